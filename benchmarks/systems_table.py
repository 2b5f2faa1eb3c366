"""The README's table of systems, from the result files of benchmarks/systems.py: a row a system, and what it shows."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """What was measured, over which arms (the first are the system's own), and what it shows."""

    system: str
    measured: str
    arms: tuple[str, ...]
    shows: str


class Found:
    """The result files of a folder, by arm."""

    def __init__(self, folder: Path) -> None:
        self.arms: dict[str, dict[str, Any]] = {
            file.stem: json.loads(file.read_text())["results"] for file in sorted(folder.glob("*.json"))
        }

    def values(self, arm: str, measure: str, *path: str) -> list[float]:
        """One figure, a value per seed, in seed order."""
        found = []
        for seed in sorted(self.arms[arm]["seeds"], key=int):
            value = self.arms[arm]["seeds"][seed]["figures"][measure]
            for key in path:
                value = value[key]
            found.append(float(value["accuracy"] if isinstance(value, dict) else value))
        return found

    def sizes(self) -> list[int]:
        """The number of test images of every measurement."""
        measures = [
            measure for arm in self.arms.values() for seed in arm["seeds"].values()
            for measure in seed["figures"].values()
        ]  # fmt: skip
        cells = [cell for measure in measures for cell in (measure, *measure.values()) if isinstance(cell, dict)]
        return [cell["n"] for cell in cells if "n" in cell]

    def budget(self, arms: tuple[str, ...]) -> str:
        """Seeds, images, epochs and minutes of the arm, and of those that it goes on from."""
        arm = self.arms[arms[0]]
        parts = []
        for name, options in arm["options"].items():
            seeds = self.arms.get(name, arm)["seeds"]
            spent = [seed["training"].get("seconds", 0) / 60 for seed in seeds.values() if name in self.arms]
            if options["command"] in ("pretrain", "classifier", "head", "generator"):
                images = int(options.get("images", 0))
                took = f", {statistics.mean(spent):.0f} min" if spent else ""
                parts.append(f"{f'{images:,}' if images else 'all'} images, {options['epochs']} epochs{took}")
        return f"{len(arm['seeds'])} seed{'s' * (len(arm['seeds']) > 1)}; {'; then '.join(parts)}"


def spread(values: list[float], *, scale: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    text = f"{statistics.mean(values) * scale:.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values) * scale:.{digits}f}"


def gap(first: list[float], second: list[float]) -> tuple[float, str]:
    """The mean difference over common seeds in points, and its text."""
    pairs = list(zip(first, second, strict=False))
    differences = [one - other for one, other in pairs]
    mean = statistics.mean(differences) * 100
    sd = f" ± {statistics.stdev(differences) * 100:.1f}" if len(differences) > 1 else ""
    return mean, f"{mean:+.1f}{sd}"


def said(holds: bool, *, direction: bool = False) -> str:
    """The verdict: what was to be shown, its direction alone, or neither."""
    return "shown" if holds else "the direction, not the size" if direction else "**not shown**"


def _simclr(found: Found) -> Row:
    linear, knn = found.values("simclr-linear", "radii", "clean"), found.values("simclr-knn", "radii", "clean")
    return Row(
        "SimCLR", f"linear {spread(linear)}, kNN {spread(knn)}", ("simclr",), "the base of the rows below"
    )  # fmt: skip


def _moco(found: Found) -> Row:
    linear, base = (found.values(f"{name}-linear", "radii", "clean") for name in ("moco", "simclr"))
    mean, text = gap(linear, base)
    return Row("MoCo", f"linear {spread(linear)}", ("moco",), f"near SimCLR's ({text}): {said(mean > -5)}")


def _rocl(found: Found) -> Row:
    robust, base = (found.values(f"{name}-linear", "radii", "pgd-8/255") for name in ("rocl", "simclr"))
    clean = found.values("rocl-linear", "radii", "clean")
    mean, text = gap(robust, base)
    measured = f"linear {spread(clean)}, robust {spread(robust)}; SimCLR robust {spread(base)}"
    if "rocl-robust-linear" in found.arms:
        also = [found.values("rocl-robust-linear", "test", name) for name in ("clean_accuracy", "pgd_accuracy")]
        measured += f"; layer trained on attacked images {spread(also[0])}, robust {spread(also[1])}"
    if "rocl-transfer" in found.arms and "simclr-transfer" in found.arms:
        to = [
            found.values(f"{name}-transfer", "test", part)
            for name in ("rocl", "simclr")
            for part in ("clean_accuracy", "pgd_accuracy")
        ]
        measured += (
            f"; on CIFAR-100 {spread(to[0])}, robust {spread(to[1])} (SimCLR {spread(to[2])}, {spread(to[3])})"
        )  # fmt: skip
    return Row(
        "RoCL",
        measured,
        ("rocl",),
        f"≥ 15 points more robust than SimCLR ({text}): {said(mean >= 15, direction=mean > 0)}",
    )


def _instance(found: Found) -> Row:
    cells = {
        name: found.values("simclr-instance", "instance", name)
        for name in ("clean", "noise", "sim", "mse", "l1", "cos")
    }
    best = min(("sim", "mse", "l1", "cos"), key=lambda name: statistics.mean(cells[name]))
    mean, text = gap(cells["noise"], cells[best])
    measured = "SimCLR's linear: " + ", ".join(f"{name} {spread(values)}" for name, values in cells.items())
    verdict = f"≥ 30 points more than noise ({best} {text}): {said(mean >= 30, direction=mean > 0)}"
    return Row("label-free instance attack", measured, ("simclr-instance",), verdict)


def _generator(found: Found) -> Row:
    clean, noise, attacked = (found.values("generator", "generator", name) for name in ("clean", "noise", "generator"))
    drop, text = gap(clean, attacked)
    more, _ = gap(noise, attacked)
    same = all(
        seed["figures"]["generator"]["classifier_unchanged"] for seed in found.arms["generator"]["seeds"].values()
    )
    measured = f"EfficientNet-B0, dense layers: {spread(clean)}, noise {spread(noise)}, generator {spread(attacked)}"
    verdict = f"takes ≥ 5 points ({text}) and more than noise, weights {'un' * same}changed: "
    return Row(
        "contrastive attack generator",
        measured,
        ("generator",),
        verdict + said(drop >= 5 and more > 0 and same, direction=drop > 0 and more > 0),
    )


def _neighbours(found: Found) -> Row:
    names = {"natural-knn": "supervised", "simclr-knn": "self-supervised", "mutual-information-knn": "adversarial"}
    cells, held = [], []
    for radius in ("clean", "pgd-2/255", "pgd-8/255"):
        values = {title: found.values(arm, "radii", radius) for arm, title in names.items()}
        if radius != "clean":  # the stronger of the two gradients, seed by seed
            values = {
                title: [min(pair) for pair in zip(values[title], found.values(arm, "soft", radius), strict=True)]
                for arm, title in names.items()
            }
        cells.append(f"{radius}: " + " / ".join(spread(one) for one in values.values()))
        means = [statistics.mean(one) for one in values.values()]
        if radius != "clean" and means[0] < means[1] < means[2]:
            held.append(radius.removeprefix("pgd-"))
    where = f"at ε {', '.join(held)}: shown" if held else "**not shown** at any ε"
    return Row(
        "kNN and self-supervised adversarial training", f"{' / '.join(names.values())}; {'; '.join(cells)}",
        ("mutual-information",), f"supervised < self-supervised < adversarial, {where}",
    )  # fmt: skip


def _false_negatives(found: Found) -> Row:
    parts, ratios = [], []
    for kind in ("top", "quantile"):
        precision, chance, recall = (
            found.values(f"simclr-{kind}", "detector", "training", name) for name in ("precision", "chance", "recall")
        )
        ratios.append(statistics.mean(precision) / statistics.mean(chance))
        parts.append(f"{kind}: precision {spread(precision)}, recall {spread(recall)} (chance {spread(chance)})")
    bank = [
        f"bank, {policy}: {spread(found.values('simclr-top', 'detector', f'bank, {policy}', 'precision'))}"
        for policy in ("drop-similar", "quantile")
    ]
    arms = ("simclr", "simclr-top", "simclr-quantile", "simclr-labels")
    robust = {arm: found.values(f"{arm}-linear", "radii", "pgd-2/255") for arm in arms}
    means = [statistics.mean(values) for values in robust.values()]
    order = means[0] <= max(means[1:3]) <= means[3]
    measured = f"{'; '.join(parts + bank)}; robust linear accuracy at 2/255, plain / top / quantile / oracle: "
    precise = said(max(ratios) >= 3, direction=max(ratios) > 1)
    verdict = f"precision ≥ 3 times chance ({max(ratios):.1f}): {precise}; plain ≤ detector ≤ oracle: "
    return Row(
        "false-negative removal", measured + " / ".join(spread(values) for values in robust.values()),
        ("simclr-top",), verdict + said(order),
    )  # fmt: skip


def _deacl(found: Found) -> Row:
    clean, robust = (found.values("deacl-linear", "radii", name) for name in ("clean", "pgd-8/255"))
    other = found.values("rocl-linear", "radii", "pgd-8/255")
    _, text = gap(robust, other)
    cost = [
        sum(seed["training"]["seconds"] for seed in found.arms[name]["seeds"].values()) for name in ("deacl", "rocl")
    ]
    share = cost[0] / cost[1] * len(found.arms["rocl"]["seeds"]) / len(found.arms["deacl"]["seeds"])
    return Row(
        "DeACL", f"linear {spread(clean)}, robust {spread(robust)}", ("deacl",),
        f"robust beside RoCL {text} points at {share:.0%} of its time",
    )  # fmt: skip


def _silu(found: Found) -> Row:
    smooth, sharp = (found.values(name, "overfitting", "best") for name in ("silu", "relu"))
    mean, text = gap(smooth, sharp)
    measured = f"robust accuracy of the best epoch: SiLU {spread(smooth)}, ReLU {spread(sharp)}"
    return Row("smooth activations", measured, ("silu", "relu"), f"SiLU ≥ ReLU ({text}): {said(mean >= 0)}")


def _closer(name: str, title: str) -> Callable[[Found], Row]:
    def row(found: Found) -> Row:
        own, plain = (found.values(arm, "overfitting", "gap") for arm in (name, "silu"))
        last = [found.values(arm, "overfitting", "last") for arm in (name, "silu")]
        ratio = statistics.mean(own) / max(statistics.mean(plain), 1e-9)
        measured = (
            f"best less last epoch: {spread(own)}, without it {spread(plain)}; "
            f"last epoch {spread(last[0])}, without it {spread(last[1])}"
        )
        return Row(
            title,
            measured,
            (name,),
            f"gap at least halved ({ratio:.2f} of it): {said(ratio <= 0.5, direction=ratio < 1)}",
        )

    return row


def _s4l(found: Found) -> Row:
    both, alone = (found.values(name, "test", "clean_accuracy") for name in ("s4l", "labels-only"))
    mean, text = gap(both, alone)
    measured = f"10% labels: {spread(both)}, labels only {spread(alone)}"
    return Row("S4L", measured, ("s4l",), f"beats labels only ({text}): {said(mean > 0)}")


def _head(found: Found) -> Row:
    cells, differences = [], []
    for figure in ("clean", "transfer", "bpda-contrastive", "worst_case"):
        values = [found.values(name, "harness", figure) for name in ("head-robust", "head-plain")]
        cells.append(f"{figure.replace('_', ' ')} {spread(values[0])} / {spread(values[1])}")
        differences.append(f"{figure.replace('_', ' ')} {gap(*values)[1]}")
    measured = f"reverse attack with the robust / the plain head: {', '.join(cells)}"
    return Row("robust head", measured, ("head-robust", "head-plain"), f"points gained: {', '.join(differences)}")


ROWS: dict[str, Callable[[Found], Row]] = {
    "simclr": _simclr,
    "moco": _moco,
    "rocl": _rocl,
    "instance": _instance,
    "generator": _generator,
    "knn": _neighbours,
    "false negatives": _false_negatives,
    "deacl": _deacl,
    "silu": _silu,
    "self-adaptive": _closer("self-adaptive", "self-adaptive training"),
    "weight perturbation": _closer("weight-perturbation", "adversarial weight perturbation"),
    "s4l": _s4l,
    "head": _head,
}


def systems_table(folder: Path) -> str:
    """One row a system; a system whose results are not all there is named as missing."""
    found = Found(folder)
    n = max(found.sizes(), default=0)
    rows = [
        f"| accuracies in %, mean ± standard deviation over seeds, n = {n:,} | measured | budget of a seed | shows |",
        "| --- | --- | --- | --- |",
    ]
    for name, make in ROWS.items():
        try:
            row = make(found)
        except KeyError as missing:
            rows.append(f"| {name} | not run ({missing.args[0]}) | | |")
            continue
        rows.append(f"| {row.system} | {row.measured} | {found.budget(row.arms)} | {row.shows} |")
    return "\n".join(rows)
