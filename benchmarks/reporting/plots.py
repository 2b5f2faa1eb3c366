"""The report's plots, from result records alone; PNG bytes."""

import io
from collections import defaultdict
from typing import Any

from unperturb.benchmarks.reporting.rows import Row, group_of, measured_row

INK, FAINT = "#1b1f24", "#8b949e"
COLOURS = ("#3b6fb6", "#d1762b", "#3a9461", "#a04a8c", "#7d6b3a", "#4aa3b8")


def all_plots(runs: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return PNG files by title; a plot that the runs have too little for is left out."""
    attacked = [run for run in runs if group_of(run)[1] != "corruptions"]
    made = {
        "Robust accuracy by attack": _headline(attacked),
        "Every attack": _every_attack(attacked),
        "Accuracy against perturbation size": _by_epsilon(attacked),
        "Worst case against time per image": _by_time(attacked),
        "The purifier's objective over its steps": _curves(attacked),
    }
    return {title: png for title, png in made.items() if png is not None}


def _figure(width: float, height: float) -> tuple[Any, Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return plt, figure, axes


def _png(plt: Any, figure: Any) -> bytes:  # noqa: ANN401
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def label(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return the purifier, with the model and epsilon where runs differ in them."""
    found = run["results"]
    parts = [found["purifier_spec"]]
    if len({other["results"]["model"]["spec"] for other in runs}) > 1:
        parts.insert(0, found["model"]["spec"])
    if len({group_of(other) for other in runs}) > 1:
        dataset, threat, epsilon = group_of(run)
        parts.append(
            f"{dataset} {threat} {epsilon * 255:.3g}/255" if threat == "Linf" else f"{dataset} {threat} {epsilon:g}"
        )
    return ", ".join(parts)


def _headline(runs: list[dict[str, Any]]) -> bytes | None:
    """Draw bars: static AutoAttack, its points replayed, the worst case with its interval."""
    if not runs:
        return None
    plt, figure, axes = _figure(8, 0.9 + 0.75 * len(runs))
    for place, run in enumerate(reversed(runs)):
        row: Row = measured_row(run)
        bars = (
            ("clean", row.clean, FAINT),
            ("static AutoAttack", row.static, COLOURS[0]),
            ("transfer", row.transfer, COLOURS[2]),
            ("worst case", row.worst, COLOURS[1]),
        )
        for offset, (name, value, colour) in enumerate(bars):
            y = place + 0.3 - 0.2 * offset
            if value is None:
                continue
            axes.barh(y, value * 100, height=0.18, color=colour, label=name if place == len(runs) - 1 else None)
            if name == "worst case" and row.interval:
                low, high = (100 * bound for bound in row.interval)
                axes.plot([low, high], [y, y], color=INK, linewidth=1)
            axes.text(
                max(value, (row.interval or (0, 0))[1] if name == "worst case" else 0) * 100 + 0.7,
                y,
                f"{value * 100:.1f}",
                va="center",
                fontsize=8,
                color=INK,
            )
    handles = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [name for name in ("clean", "static AutoAttack", "transfer", "worst case")]
    for name, colour in zip(order, (FAINT, COLOURS[0], COLOURS[2], COLOURS[1]), strict=True):
        handles.setdefault(name, plt.Rectangle((0, 0), 1, 1, color=colour))
    axes.legend(
        [handles[name] for name in order], order, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False
    )
    axes.set_yticks(range(len(runs)), [label(run, runs) for run in reversed(runs)])
    axes.set_xlabel("accuracy, % (line: 95% interval)")
    axes.set_xlim(0, 100)
    return _png(plt, figure)


def _every_attack(runs: list[dict[str, Any]]) -> bytes | None:
    """Draw a dot per attack and run."""
    names = list(dict.fromkeys(name for run in runs for name in run["results"]["figures"]["attacks"]))
    if not names:
        return None
    plt, figure, axes = _figure(8, 1.6 + 0.34 * len(names))
    for number, run in enumerate(runs):
        cells = run["results"]["figures"]["attacks"]
        shown = [(place, cells[name]["accuracy"] * 100) for place, name in enumerate(names) if name in cells]
        shift = (number - (len(runs) - 1) / 2) * 0.14
        axes.plot(
            [value for _, value in shown],
            [place + shift for place, _ in shown],
            "o",
            markersize=5,
            color=COLOURS[number % len(COLOURS)],
            label=label(run, runs),
        )
    shown_names = ["autoattack (no purifier)" if name == "autoattack" else name for name in names]
    axes.set_yticks(range(len(names)), shown_names)
    axes.invert_yaxis()
    axes.grid(axis="y", color="#eaeef2")
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy that is left, %")
    axes.set_xlim(left=0)
    longest = max(len(label(run, runs)) for run in runs)
    columns = max(1, min(len(runs), 70 // longest))
    axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9)
    return _png(plt, figure)


def _by_epsilon(runs: list[dict[str, Any]]) -> bytes | None:
    """Draw lines of runs that differ in epsilon alone, over the attacks that all of them have."""
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        dataset, threat, _ = group_of(run)
        found, config = run["results"], run["config"]
        same = (found["model"]["spec"], found["purifier_spec"], dataset, threat)
        lines[(*same, config["n_examples"], config["budget"], config["seed"])].append(run)
    lines = {key: sorted(line, key=group_of) for key, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    plt, figure, axes = _figure(8, 4)
    for number, (key, line) in enumerate(lines.items()):
        common = set.intersection(*(set(run["results"]["figures"]["worst_case_over"]) for run in line))
        points = [(0.0, _survivors(line[0], {"clean"}))]
        points += [(group_of(run)[2] * 255, _survivors(run, common)) for run in line]
        name = f"{', '.join(key[:2])}: worst case over {len(common) - 1} attacks"
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[number % len(COLOURS)], label=name)
    axes.set_xlabel("epsilon, 255ths")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(plt, figure)


def _survivors(run: dict[str, Any], names: set[str]) -> float:
    outcomes = run["results"]["outcomes"]
    rows = list(zip(*(outcomes[name] for name in names), strict=True))
    return 100 * sum(all(row) for row in rows) / len(rows)


def _by_time(runs: list[dict[str, Any]]) -> bytes | None:
    if not runs:
        return None
    plt, figure, axes = _figure(8, 3.6)
    for number, run in enumerate(runs):
        row = measured_row(run)
        if row.ms_per_image is None or row.worst is None or row.interval is None:
            continue
        low, high = (100 * (row.worst - row.interval[0]), 100 * (row.interval[1] - row.worst))
        axes.errorbar(
            row.ms_per_image,
            row.worst * 100,
            yerr=[[low], [high]],
            fmt="o",
            capsize=3,
            color=COLOURS[number % len(COLOURS)],
            label=label(run, runs),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"ms per image, purified and classified ({runs[0]['machine']['device']}; logarithmic)")
    axes.set_ylabel("worst case, %")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(plt, figure)


def _curves(runs: list[dict[str, Any]]) -> bytes | None:
    """Draw each objective as a share of its value before the first step on clean images, since their scales differ."""
    shown = [run for run in runs if len(run["results"]["curves"]["clean"]) > 1]
    if not shown:
        return None
    plt, figure, axes = _figure(8, 3.6)
    for number, run in enumerate(shown):
        curves = run["results"]["curves"]
        scale = curves["clean"][0] or 1.0
        for name, style in (("clean", "-"), ("attacked", "--")):
            axes.plot(
                range(len(curves[name])),
                [value / scale for value in curves[name]],
                style,
                color=COLOURS[number % len(COLOURS)],
                label=f"{label(run, shown)}, {name}",
            )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("mean objective, first on clean = 1")
    axes.legend(frameon=False, fontsize=8)
    return _png(plt, figure)
