"""The tables of what the purifier is worth and costs, from the result files and the shipped card."""

from typing import Any

from unperturb.benchmarks.reporting.report import cells as texts_of
from unperturb.benchmarks.reporting.results import where
from unperturb.benchmarks.reporting.rows import measured_row
from unperturb.models.checkpoints import store


def share(cell: dict[str, Any]) -> str:
    """An accuracy with its interval, in percent."""
    low, high = cell["interval"]
    return f"{cell['accuracy']:.1%} ({low * 100:.1f} to {high * 100:.1f})"


def points(gain: dict[str, Any]) -> str:
    """A paired difference with its interval, in points."""
    low, high = gain["interval"]
    return f"{gain['mean'] * 100:+.1f} ({low * 100:+.1f} to {high * 100:+.1f})"


def classifier_table() -> str:
    """The shipped classifier on the whole test set, from its card."""
    card = store.read_card(store.resolve("default"))
    test = card.figures["test"]
    attack = f"PGD-{test['pgd']['steps']}, L∞ {test['pgd']['epsilon'] * 255:.0f}/255"
    rows = [
        f"| `{card.id}`, n = {test['n']:,} | accuracy (95% interval) |",
        "| --- | --- |",
        f"| clean | {share({'accuracy': test['clean_accuracy'], 'interval': test['clean_interval']})} |",
        f"| {attack} | {share({'accuracy': test['pgd_accuracy'], 'interval': test['pgd_interval']})} |",
    ]
    return "\n".join(rows)


def gates_table() -> str:
    """Return the table of what the shipped checkpoint's gates leave as it is, from its card."""
    gates = store.read_card(store.resolve("default")).gates
    n = next(iter(gates.values()))["n"]
    rows = [f"| n = {n:,} held-out training images | clean left | attacked left (PGD-20) |", "| --- | --- | --- |"]
    for name, gate in gates.items():
        rows.append(f"| `purify=auto`, preset `{name}` | {gate['clean_left']:.1%} | {gate['attacked_left']:.1%} |")
    return "\n".join(rows)


def purification_table(record: dict[str, Any]) -> str:
    """Every purifier on every set of points, and the adaptive attack."""
    accuracy = record["results"]["accuracy"]
    n = accuracy["classifier"]["clean"]["n"]
    rows = [
        f"| n = {n:,} | clean | PGD-{record['config']['steps']} on the classifier | noise of that size |",
        "| --- | --- | --- | --- |",
    ]
    for name, cells in accuracy.items():
        title = "no purifier" if name == "classifier" else f"preset `{name}`"
        shown = [share(cells[key]) for key in ("clean", "attacked", "noise")]
        rows.append(f"| {title} | {' | '.join(shown)} |")
    for name, cells in accuracy.items():
        if name != "classifier":
            gains = [points(cells[key]["gain"]) for key in ("clean", "attacked", "noise")]
            rows.append(f"| `{name}`: points gained | {' | '.join(gains)} |")
    text = "\n".join(rows)
    if "adaptive_bpda" in accuracy["default"]:
        cell = accuracy["default"]["adaptive_bpda"]
        text += (
            "\n\nUnder the same PGD through the `default` preset (BPDA: backward = identity; seed known, "
            f"n = {cell['n']}) it keeps {share(cell)}: {points(cell['gain'])} points against the undefended classifier "
            "under its own attack, on the same images."
        )
    return text


def time_table(record: dict[str, Any]) -> str:
    """Cost per image beside the plain published procedure."""
    timed = record["results"]["time"]
    faster = timed["times_faster_than_published_procedure"]
    titles = {
        "classifier": "classifier alone",
        "published_procedure": "published procedure, plain",
        "published": "preset `published`",
        "default": "preset `default`",
        "fast": "preset `fast`",
    }
    rows = [
        f"| batch of {timed['batch']}, {where(record['machine'])} | ms per image | times faster |",
        "| --- | --- | --- |",
    ]
    for name, title in titles.items():
        ratio = f"{faster[name]:.1f}" if name in faster else ""
        rows.append(f"| {title} | {timed['ms_per_image'][name]:.1f} | {ratio} |")
    return "\n".join(rows)


def robustness_table(runs: list[dict[str, Any]], stronger: list[dict[str, Any]]) -> str:
    """Every purifier before the shipped classifier, under every attack, and under a stronger full gradient alone;
    RobustBench's figures stand in the report.
    """
    first = runs[0]["results"]
    n, budget = first["figures"]["attacks"]["clean"]["n"], first["budget"]["name"]
    epsilon = first["threat"]["epsilon"]
    rows = [
        f"| in %; n = {n}, L∞ {epsilon * 255:.0f}/255, budget `{budget}` | clean "
        "| AutoAttack on the bare classifier | transfer | worst case (95% interval) "
        "| **full gradient, budget `standard`** | mean / worst of 10 fresh seeds | ms per image |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    unrolled = {run["config"]["purifier"]: run["results"]["figures"]["attacks"]["unrolled"] for run in stronger}
    for run in runs:
        _, purifier, _, _, clean, static, transfer, worst, again, ms, _ = texts_of(measured_row(run))
        through = f"**{share(unrolled[purifier])}**" if purifier in unrolled else ""
        rows.append(
            f"| `{purifier}` | {clean} | {static} | {transfer} | {worst} | {through} | {again or 'not random'} | {ms} |"
        )
    return "\n".join(rows)


def sweep_table(record: dict[str, Any]) -> str:
    """Candidates for the default preset on held-out training images."""
    found = record["results"]["rows"]
    n = found["no purifier"]["clean"]["n"]
    rows = [f"| n = {n:,}, held-out training images | clean | attacked | ms per image |", "| --- | --- | --- | --- |"]
    for name, cells in found.items():
        if name == "no purifier":
            rows.append(f"| {name} | {cells['clean']['accuracy']:.1%} | {cells['attacked']['accuracy']:.1%} | |")
        else:
            gains = [f"{cells[key]['gain']['mean'] * 100:+.1f}" for key in ("clean", "attacked")]
            spent = f"{cells['ms_per_image']:.0f} " if "ms_per_image" in cells else ""
            rows.append(f"| {name} | {gains[0]} | {gains[1]} | {spent}|")
    return "\n".join(rows)
