"""The table of systems, from the results of benchmarks/papers/run.py: a row a system, and what it shows."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student

from unperturb.benchmarks.reporting.columns import paired
from unperturb.benchmarks.reporting.results import where

Seeds = dict[int, float]  # a figure by seed, as a share of 1
FEWEST = 3  # seeds, for a difference to be judged


class SystemRow(NamedTuple):
    """One system's row: what was measured, and what it shows; its budget is that of `arm`."""

    system: str
    measured: str
    arm: str
    shows: str


class Found:
    """The result files of one scale, by arm."""

    def __init__(self, folder: Path) -> None:
        records = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
        self.arms: dict[str, dict[str, Any]] = {name: record["results"] for name, record in records.items()}
        self.machine = {name: record["machine"] for name, record in records.items()}

    def values(self, arm: str, measure: str, *path: str) -> Seeds:
        """Return one figure by seed."""
        found = {}
        for seed, record in self.arms[arm]["seeds"].items():
            value = record["figures"][measure]
            for key in path:
                value = value[key]
            found[int(seed)] = float(value["accuracy"] if isinstance(value, dict) else value)
        return found

    def seconds(self, arm: str) -> float:
        """Return mean seconds of an arm's training, with that of the arms that it goes on from."""
        total = 0.0
        for name in self.arms[arm]["options"]:
            spent = [record["training"].get("seconds", 0.0) for record in self.arms[name]["seeds"].values()]
            total += statistics.mean(spent)
        return total

    def budget(self, arm: str) -> str:
        """Return seeds, images, epochs and minutes of the arm and of those that it goes on from, and the device."""
        parts = []
        for name, options in self.arms[arm]["options"].items():
            if options["command"] in ("pretrain", "classifier", "head", "generator") and name in self.arms:
                images = int(options.get("images", 0))
                spent = [record["training"]["seconds"] / 60 for record in self.arms[name]["seeds"].values()]
                parts.append(
                    f"{f'{images:,}' if images else 'all'} images, {options['epochs']} epochs, "
                    f"{statistics.mean(spent):.0f} min"
                )
        count = len(self.arms[arm]["seeds"])
        return f"{count} seed{'s' * (count > 1)}; {', then '.join(parts)}; {where(self.machine[arm])}"


def spread(values: Seeds) -> str:
    """Return mean ± standard deviation over seeds, in percent."""
    text = f"{statistics.mean(values.values()) * 100:.1f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values.values()) * 100:.1f}"


class Difference(NamedTuple):
    """Of two figures over their common seeds: mean, 95% half width (Student), in points, and the number of seeds."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + (f" ± {self.half:.1f}" if self.seeds > 1 else "")


def gain(first: Seeds, second: Seeds) -> Difference:
    """Return the first less the second, paired by seed."""
    pairs = [(first[seed] - second[seed]) * 100 for seed in sorted(first.keys() & second.keys())]
    mean, n = statistics.mean(pairs), len(pairs)
    half = math.inf if n < 2 else float(student.ppf(0.975, n - 1)) * statistics.stdev(pairs) / math.sqrt(n)
    return Difference(mean, half, n)


def verdict(difference: Difference, *, least: float = 0.0) -> str:
    """Return whether a difference is shown: its 95% interval above 0, its mean at least `least` points."""
    if difference.seeds < FEWEST:
        return f"not judged on {difference.seeds} seed{'s' * (difference.seeds > 1)}"
    if difference.mean - difference.half <= 0:
        return "**not shown**: " + ("within the noise" if difference.mean + difference.half > 0 else "the reverse")
    return "shown" if difference.mean >= least else "the direction, not the size"


def _simclr(found: Found) -> SystemRow:
    linear, knn = found.values("simclr-linear", "radii", "clean"), found.values("simclr-knn", "neighbours", "clean")
    return SystemRow("SimCLR", f"linear {spread(linear)}, kNN {spread(knn)}", "simclr", "the base of the rows below")


def _moco(found: Found) -> SystemRow:
    linear, base = (found.values(f"{name}-linear", "radii", "clean") for name in ("moco", "simclr"))
    return SystemRow("MoCo", f"linear {spread(linear)}", "moco", f"beside SimCLR's: {gain(linear, base)} points")


def _rocl(found: Found) -> SystemRow:
    robust, base = (found.values(f"{name}-linear", "radii", "pgd-8/255") for name in ("rocl", "simclr"))
    clean = found.values("rocl-linear", "radii", "clean")
    measured = f"linear {spread(clean)}, robust {spread(robust)} (SimCLR's {spread(base)})"
    also = [found.values("rocl-robust-linear", "test", name) for name in ("clean_accuracy", "pgd_accuracy")]
    measured += f"; layer trained on attacked images {spread(also[0])}, robust {spread(also[1])}"
    to = [
        found.values(f"{name}-transfer", "test", part)
        for name in ("rocl", "simclr")
        for part in ("clean_accuracy", "pgd_accuracy")
    ]
    measured += f"; on CIFAR-100 {spread(to[0])}, robust {spread(to[1])} (SimCLR's {spread(to[2])}, {spread(to[3])})"
    more = gain(robust, base)
    shows = f"≥ 15 points more robust than SimCLR ({more}): {verdict(more, least=15)}"
    return SystemRow("RoCL", measured, "rocl", shows)


def _instance(found: Found) -> SystemRow:
    names = ("clean", "noise", "sim", "mse", "l1", "cos")
    cells = {name: found.values("simclr-instance", "instance", name) for name in names}
    more = gain(cells["noise"], cells["sim"])
    measured = "SimCLR's linear: " + ", ".join(f"`{name}` {spread(values)}" for name, values in cells.items())
    shows = f"`sim` takes ≥ 30 points more than noise ({more}): {verdict(more, least=30)}"
    return SystemRow("label-free instance attack", measured, "simclr-instance", shows)


def _taken(found: Found, arm: str) -> tuple[str, str]:
    """Return a generator's accuracies, and what they show."""
    clean, noise, attacked = (found.values(arm, "generator", name) for name in ("clean", "noise", "generator"))
    same = all(found.values(arm, "generator", "classifier_unchanged").values())
    drop, more = gain(clean, attacked), gain(noise, attacked)
    measured = f"{spread(clean)}, noise {spread(noise)}, generator {spread(attacked)}"
    shows = (
        f"takes ≥ 5 points ({drop}): {verdict(drop, least=5)}; more than noise ({more}): {verdict(more)}; "
        f"the classifier's digest is {'the same' if same else '**another**'} afterwards"
    )
    return measured, shows


def _generator(found: Found) -> SystemRow:
    measured, shows = _taken(found, "generator")
    return SystemRow("contrastive attack generator", f"EfficientNet-B0, dense layers: {measured}", "generator", shows)


def _imported_generator(found: Found) -> SystemRow:
    arm = "imported-generator"
    measured, shows = _taken(found, arm)
    uniform, attacked = (found.values(arm, "generator", name) for name in ("uniform", "generator"))
    network = found.arms[arm]["options"]["imported"].get("imported", "")
    measured = f"{network}, fine-tuned: {measured}; uniform noise {spread(uniform)}"
    more = gain(uniform, attacked)
    seeds = found.arms[arm]["seeds"].values()
    least = max((seed["figures"]["generator"]["less_than"]["uniform"] for seed in seeds), key=lambda one: one["mean"])
    shows += (
        f"; more than uniform noise ({more}): {verdict(more)}; the weakest generator less uniform noise, by image "
        f"(n = {least['n']:,}): {paired(least).whole}"
    )
    return SystemRow("the same on a network that has seen images", measured, arm, shows)


def _neighbours(found: Found) -> SystemRow:
    arms = ("natural-knn", "simclr-longer-knn", "mutual-information-knn")
    cells, shows = [], []
    for name in ("clean", "pgd-2/255", "pgd-8/255"):
        values = [found.values(arm, "neighbours", name) for arm in arms]
        cells.append(f"{name} {' / '.join(spread(one) for one in values)}")
        if name != "clean":
            steps = [gain(values[1], values[0]), gain(values[2], values[1])]
            shows.append(
                f"at {name.removeprefix('pgd-')} supervised < self-supervised ({steps[0]}): {verdict(steps[0])}, "
                f"self-supervised < adversarial ({steps[1]}): {verdict(steps[1])}"
            )
    measured = f"supervised / self-supervised / adversarial: {'; '.join(cells)}"
    return SystemRow("kNN and self-supervised adversarial training", measured, "mutual-information", "; ".join(shows))


def _false_negatives(found: Found) -> SystemRow:
    parts = []
    for kind in ("top", "quantile"):
        precision, recall, chance = (
            found.values(f"simclr-{kind}", "detector", "training", name) for name in ("precision", "recall", "chance")
        )
        parts.append(f"`{kind}` precision {spread(precision)}, recall {spread(recall)}, chance {spread(chance)}")
    for policy in ("drop-similar", "quantile"):
        precision = found.values("simclr-top", "detector", f"bank, {policy}", "precision")
        parts.append(f"bank by `{policy}` {spread(precision)}")
    arms = ("simclr", "simclr-top", "simclr-quantile", "simclr-labels")
    robust = [found.values(f"{arm}-linear", "radii", "pgd-2/255") for arm in arms]
    parts.append(f"robust linear at 2/255, plain / `top` / `quantile` / oracle {' / '.join(map(spread, robust))}")
    precision, chance = (found.values("simclr-top", "detector", "training", name) for name in ("precision", "chance"))
    times = statistics.mean(precision.values()) / statistics.mean(chance.values())
    more = gain(precision, chance)
    enough = verdict(more, least=200 * statistics.mean(chance.values()))
    steps = [gain(robust[1], robust[0]), gain(robust[3], robust[1])]
    shows = (
        f"`top`'s precision ≥ 3 times chance ({times:.1f}): {enough}; plain ≤ `top` ({steps[0]}): {verdict(steps[0])}; "
        f"`top` ≤ oracle ({steps[1]}): {verdict(steps[1])}"
    )
    return SystemRow("false-negative removal", "; ".join(parts), "simclr-top", shows)


def _deacl(found: Found) -> SystemRow:
    clean, robust = (found.values("deacl-linear", "radii", name) for name in ("clean", "pgd-8/255"))
    more = gain(robust, found.values("rocl-linear", "radii", "pgd-8/255"))
    share = found.seconds("deacl") / found.seconds("rocl")
    shows = f"robust beside RoCL's {more} points, at {share:.0%} of its time, its teacher's included"
    return SystemRow("DeACL", f"linear {spread(clean)}, robust {spread(robust)}", "deacl", shows)


def _silu(found: Found) -> SystemRow:
    smooth, sharp = (found.values(name, "test", "pgd_accuracy") for name in ("silu", "relu"))
    more = gain(smooth, sharp)
    measured = f"robust (PGD-20, 4/255) at the chosen epoch: SiLU {spread(smooth)}, ReLU {spread(sharp)}"
    return SystemRow("smooth activations", measured, "silu", f"SiLU ≥ ReLU ({more}): {verdict(more)}")


def _overfitting(found: Found, name: str) -> tuple[str, Seeds, Seeds, Difference]:
    """Return what an arm and the plain one measured, their gaps, and what the arm gains at the last epoch."""
    own, plain = (found.values(arm, "overfitting", "gap") for arm in (name, "silu"))
    last = [found.values(arm, "overfitting", "last") for arm in (name, "silu")]
    measured = (
        f"PGD-10 at 4/255 on 500 held-out images, best less last epoch: {spread(own)}, without it {spread(plain)}; "
        f"last epoch {spread(last[0])}, without it {spread(last[1])}"
    )
    return measured, own, plain, gain(*last)


def _self_adaptive(found: Found) -> SystemRow:
    measured, own, plain, _ = _overfitting(found, "self-adaptive")
    ratio = statistics.mean(own.values()) / max(statistics.mean(plain.values()), 1e-9)
    closed = gain(plain, own)
    enough = verdict(closed, least=50 * statistics.mean(plain.values()))
    shows = f"gap at least halved ({ratio:.2f} of it, {closed} points closed): {enough}"
    return SystemRow("self-adaptive training", measured, "self-adaptive", shows)


def _weight_perturbation(found: Found) -> SystemRow:
    measured, _, _, more = _overfitting(found, "weight-perturbation")
    shows = f"more robust at the last epoch ({more}): {verdict(more)}"
    return SystemRow("adversarial weight perturbation", measured, "weight-perturbation", shows)


def _s4l(found: Found) -> SystemRow:
    both, alone = (found.values(name, "test", "clean_accuracy") for name in ("s4l", "labels-only"))
    more = gain(both, alone)
    measured = f"10% labels: {spread(both)}, labels only {spread(alone)}"
    return SystemRow("S4L", measured, "s4l", f"beats labels only ({more}): {verdict(more)}")


def _head(found: Found) -> SystemRow:
    cells, differences = [], []
    seed = next(iter(found.arms["head-robust"]["seeds"].values()))
    for figure in ("clean", "transfer", "bpda-contrastive", "worst_case"):
        if figure not in seed["figures"]["harness"]:
            continue  # the attack was not run on every image that is right
        values = [found.values(name, "harness", figure) for name in ("head-robust", "head-plain")]
        cells.append(f"{figure.replace('_', ' ')} {spread(values[0])} / {spread(values[1])}")
        differences.append(f"{figure.replace('_', ' ')} {gain(*values)}")
    n = seed["figures"]["harness"]["clean"]["n"]
    measured = f"reverse attack with the robust / the plain head, n = {n}: {', '.join(cells)}"
    shows = f"points gained by the robust head: {', '.join(differences)}"
    if "autoattack" in seed["figures"]["harness"]:
        bare = [found.values(name, "harness", "autoattack") for name in ("head-robust", "head-plain")]
        measured += f"; the bare classifier under AutoAttack on the same images {spread(bare[0])}"
        worst = (found.values(name, "harness", "worst_case") for name in ("head-robust", "head-plain"))
        over = " / ".join(str(gain(own, without)) for own, without in zip(worst, bare, strict=True))
        shows += (
            f"; by the reverse attack over the bare classifier, worst case, with the robust / the plain head {over}"
        )
    return SystemRow("robust head", measured, "head-robust", shows)


ROWS: dict[str, Callable[[Found], SystemRow]] = {
    "SimCLR": _simclr,
    "MoCo": _moco,
    "RoCL": _rocl,
    "label-free instance attack": _instance,
    "contrastive attack generator": _generator,
    "the same on a network that has seen images": _imported_generator,
    "kNN and self-supervised adversarial training": _neighbours,
    "false-negative removal": _false_negatives,
    "DeACL": _deacl,
    "smooth activations": _silu,
    "self-adaptive training": _self_adaptive,
    "adversarial weight perturbation": _weight_perturbation,
    "S4L": _s4l,
    "robust head": _head,
}


def systems_table(folder: Path) -> str:
    """Return one row a system, and below which arms' seeds were run at several commits; a system whose results are not
    all there is named as such.
    """
    found = Found(folder)
    rows = ["| system | measured | budget of a seed | shows |", "| --- | --- | --- | --- |"]
    for name, make in ROWS.items():
        try:
            row = make(found)
        except KeyError as missing:
            rows.append(f"| {name} | not run yet: {missing.args[0]} | | |")
            continue
        rows.append(f"| {row.system} | {row.measured} | {found.budget(row.arm)} | {row.shows} |")
    return "\n".join([*rows, *_mixed(found)])


def _mixed(found: Found) -> list[str]:
    """Return a sentence on the arms whose seeds were run at several commits, `+changes` being another."""
    several = [
        f"`{name}`"
        for name, arm in found.arms.items()
        if len({seed.get("commit") for seed in arm["seeds"].values()}) > 1
    ]
    said = "Of these arms the seeds were run at several commits, or with changes since one, which ± is over as well: "
    return ["", f"{said}{', '.join(several)}."] if several else []
