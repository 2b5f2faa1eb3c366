"""The report's plots, from result records alone; PNG bytes."""

import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from unperturb.benchmarks.reporting.columns import threat_of
from unperturb.benchmarks.reporting.drawing import LIGHT, Theme, drawn_in, open_figure, png
from unperturb.benchmarks.reporting.results import where
from unperturb.benchmarks.reporting.rows import AVERAGED, group_of, measured_row

Runs = list[dict[str, Any]]
MARKERS = "osD^v"  # other in number than the colours: no pair comes twice soon
LINE = 0.25  # inches of a line of a legend
LONG, WIDE = 48, 40  # letters of a name that takes a legend's whole width, and of a line above a stair


def all_plots(runs: Runs, theme: Theme = LIGHT) -> dict[str, bytes]:
    """Return PNG files by title; a plot that the runs have too little for is left out."""
    attacked = [run for run in runs if group_of(run).threat not in AVERAGED]
    plots: dict[str, Callable[[Runs, Theme], bytes | None]] = {
        "Robust accuracy by attack": _bars,
        "Accuracy left after each attack": _stairs,
        "Accuracy against perturbation size": _by_epsilon,
        "Worst case against time per image": _by_time,
        "The purifier's objective over its steps": _curves,
    }
    with drawn_in(theme):
        made = {title: draw(attacked, theme) for title, draw in plots.items()} if attacked else {}
    return {title: image for title, image in made.items() if image is not None}


def label(run: dict[str, Any], runs: Runs) -> str:
    """Return the purifier, with the model, the data and the threat where runs differ in them."""
    found, group, groups = run["results"], group_of(run), {group_of(other) for other in runs}
    several_models = len({other["results"]["model"]["spec"] for other in runs}) > 1
    beside = [
        found["model"]["spec"] if several_models else "",
        group.dataset + " (own)" * group.own if len({(one.dataset, one.own) for one in groups}) > 1 else "",
        threat_of(group) if len({(one.threat, one.epsilon) for one in groups}) > 1 else "",
    ]
    return ", ".join(filter(None, (found["purifier_spec"], *beside)))


def _colour(theme: Theme, number: int) -> str:
    return theme.colours[number % len(theme.colours)]


def _bars(runs: Runs, theme: Theme) -> bytes:
    """Draw clean accuracy, the bare classifier's worst case, transfer, and the worst case with its interval."""
    colours = {
        "clean": theme.soft,
        "worst case of the bare classifier": theme.colours[0],
        "transfer": theme.colours[2],
        "worst case": theme.colours[1],
    }
    plt, figure, axes = open_figure(9, 1.2 + 0.85 * len(runs))
    for place, run in enumerate(runs):
        row = measured_row(run)
        values = dict(zip(colours, (row.clean, row.bare, row.transfer, row.worst), strict=True))
        shown = [(name, value) for name, value in values.items() if value is not None]
        for number, (name, value) in enumerate(shown):
            y = place + 0.19 * (number - (len(shown) - 1) / 2)
            axes.barh(y, 100 * value, height=0.17, color=colours[name])
            end = 100 * value
            if name == "worst case" and row.interval is not None:
                low, high = (100 * bound for bound in row.interval)
                axes.plot([low, high], [y, y], color=theme.ink, linewidth=1.5)
                end = high
            axes.text(end + 0.8, y, f"{100 * value:.1f}", va="center", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, colours, ncols=len(colours), loc="outside upper left", fontsize=10)
    axes.set_yticks(range(len(runs)), [label(run, runs).replace(", ", "\n") for run in runs])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, % (line: 95% interval)")
    axes.set_xlim(0, 100)
    axes.grid(axis="x")
    return png(plt, figure)


def _stairs(runs: Runs, theme: Theme) -> bytes:
    """Draw a stair for each run: what every attack leaves of it, in the order of running, down to the worst case."""
    longest = max(len(run["results"]["figures"]["attacks"]) for run in runs)
    columns = 1 if len(runs) == 1 else 2
    lines = -(-len(runs) // columns)
    plt, figure, grid = open_figure(6.2 * columns, lines * (1.3 + 0.27 * longest), rows=lines, columns=columns)
    places = [grid] if len(runs) == 1 else list(grid.flat)
    for axes, run in zip(places, runs, strict=False):
        _stair(axes, run, theme)
        axes.set_title(_wrapped(label(run, runs)), loc="left", pad=22 if run["results"]["figures"]["bare"] else 6)
    for axes in places[len(runs) :]:
        axes.set_visible(False)
    for axes in places[max(0, len(runs) - columns) : len(runs)]:
        axes.set_xlabel("accuracy that is left, %")
    return png(plt, figure)


def _wrapped(name: str) -> str:
    """Return a name on lines that a stair is wide enough for, broken after commas."""
    return textwrap.fill(re.sub(r",\s*", ", ", name), WIDE, break_long_words=False, break_on_hyphens=False)


def _legend(figure: Any, names: Sequence[str]) -> None:  # noqa: ANN401
    """Put the legend below, in as many columns as fit."""
    figure.legend(loc="outside lower left", ncols=_columns(names), fontsize=10)


def _columns(names: Sequence[str]) -> int:
    return 1 if max(map(len, names)) > LONG else 2


def _stair(axes: Any, run: dict[str, Any], theme: Theme) -> None:  # noqa: ANN401
    figures = run["results"]["figures"]
    left = {name: cell["left"] for name, cell in figures["attacks"].items()}
    stages = {"clean": figures["clean"], **left, "worst case": figures["worst_case"]}
    values = [100 * cell["accuracy"] for cell in stages.values()]
    edges = [place - 0.5 for place in range(len(values) + 1)]
    axes.stairs(values, edges, orientation="horizontal", fill=True, color=theme.colours[0], alpha=0.25)
    axes.stairs(values, edges, orientation="horizontal", baseline=None, color=theme.colours[0], linewidth=2)
    if figures["bare"]:
        bare = 100 * figures["bare"]["worst_case"]["accuracy"]
        axes.axvline(bare, color=theme.colours[1], linestyle="--", linewidth=1.5)
        text = f"dashed: worst case of the bare classifier, {bare:.1f}"
        axes.annotate(text, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9)
    behind = {"facecolor": theme.ground, "edgecolor": "none", "pad": 1}
    for place, (value, before) in enumerate(zip(values, [101.0, *values], strict=False)):
        ends = place in (0, len(values) - 1)
        if ends or value < before:
            weight = "bold" if ends else "normal"
            axes.text(value + 1.5, place, f"{value:.1f}", va="center", fontsize=9, fontweight=weight, bbox=behind)
    axes.set_yticks(range(len(values)), stages)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(axis="x")


def _by_epsilon(runs: Runs, theme: Theme) -> bytes | None:
    """Draw lines of runs that differ in epsilon alone, not in their attacks either."""
    lines: dict[tuple[Any, ...], Runs] = defaultdict(list)
    for run in runs:
        found, config, group = run["results"], run["config"], group_of(run)
        same = (found["model"]["spec"], found["purifier_spec"], group.dataset, group.threat, group.own)
        over = frozenset(found["figures"]["worst_case_over"])
        lines[(*same, config["n_examples"], config["budget"], config["seed"], over)].append(run)
    lines = {key: sorted(line, key=group_of) for key, line in lines.items() if len({*map(group_of, line)}) > 1}
    if not lines:
        return None
    plt, figure, axes = open_figure(9, 4.2 + LINE * len(lines))
    for number, (key, line) in enumerate(lines.items()):
        unit = 255 if key[3] == "Linf" else 1
        points = [(0.0, 100 * line[0]["results"]["figures"]["clean"]["accuracy"])]
        points += [
            (group_of(run).epsilon * unit, 100 * run["results"]["figures"]["worst_case"]["accuracy"]) for run in line
        ]
        name = f"{', '.join(key[:2])}: worst case over {len(key[-1])} attacks"
        axes.plot(*zip(*points, strict=True), "o-", color=_colour(theme, number), label=name)
    units = {"255ths" if key[3] == "Linf" else key[3] for key in lines}
    axes.set_xlabel(f"epsilon, {' or '.join(sorted(units))}")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid()
    figure.legend(loc="outside lower left", fontsize=10)
    return png(plt, figure)


def _by_time(runs: Runs, theme: Theme) -> bytes | None:
    rows = [(label(run, runs), measured_row(run)) for run in runs]
    shown = [(name, row) for name, row in rows if row.ms_per_image and row.worst is not None and row.interval]
    if not shown:
        return None
    names = [name for name, _ in shown]
    plt, figure, axes = open_figure(9, 4.2 + LINE * -(-len(shown) // _columns(names)))
    for number, (name, row) in enumerate(shown):
        assert row.ms_per_image is not None
        assert row.worst is not None
        assert row.interval is not None
        low, high = row.interval
        ends = [[max(0.0, 100 * (row.worst - low))], [max(0.0, 100 * (high - row.worst))]]  # but for a last bit
        look: dict[str, Any] = {
            "fmt": MARKERS[number % len(MARKERS)],
            "markersize": 7,
            "capsize": 4,
            "color": _colour(theme, number),
        }
        axes.errorbar(row.ms_per_image, 100 * row.worst, yerr=ends, label=name, **look)
    axes.set_xscale("log", subs=())
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.xaxis.set_major_formatter("{x:g}")
    machines = ", ".join(sorted({where(run["machine"]) for run in runs if measured_row(run).ms_per_image}))
    axes.set_xlabel(f"ms per image, purified and classified ({machines}; logarithmic)")
    axes.set_ylabel("worst case, % (95% interval)")
    axes.set_ylim(bottom=-1)
    axes.grid()
    _legend(figure, names)
    return png(plt, figure)


def _curves(runs: Runs, theme: Theme) -> bytes | None:
    """Draw each objective as a share of its value before the first step on clean images, since their scales differ."""
    shown = [run for run in runs if len(run["results"]["curves"]["clean"]) > 1]
    if not shown:
        return None
    names = [f"{label(run, shown)}, attacked" for run in shown]
    plt, figure, axes = open_figure(9, 4.2 + LINE * len(shown) * 2 / _columns(names))
    for number, run in enumerate(shown):
        curves = run["results"]["curves"]
        scale = curves["clean"][0] or 1.0
        for name, style in (("clean", "-"), ("attacked", "--")):
            values = [value / scale for value in curves[name]]
            text = f"{label(run, shown)}, {name}"
            axes.plot(range(len(values)), values, style, color=_colour(theme, number), label=text)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("mean objective, first on clean = 1")
    axes.grid()
    _legend(figure, names)
    return png(plt, figure)
