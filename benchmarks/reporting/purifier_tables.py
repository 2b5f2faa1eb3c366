"""The tables of what the purifier is worth and costs, from the result files and the shipped card."""

from collections.abc import Mapping
from typing import Any

from unperturb.benchmarks.reporting import columns as c
from unperturb.benchmarks.reporting.formats import with_remarks
from unperturb.benchmarks.reporting.results import where
from unperturb.benchmarks.reporting.rows import measured_row
from unperturb.benchmarks.robustness.figures import LESS
from unperturb.models.checkpoints import store

PURIFIER = c.Column("purifier", lambda row: c.Cell(f"`{row.purifier}`"), number=False)


def share(cell: dict[str, Any]) -> str:
    """An accuracy with its interval, in percent."""
    low, high = cell["interval"]
    return f"{cell['accuracy']:.1%} ({low * 100:.1f} to {high * 100:.1f})"


def classifier_table(autoattacked: Mapping[str, dict[str, Any]]) -> str:
    """The shipped classifiers on the whole test set, from their cards, and under AutoAttack, from runs by card's id."""
    rows = [
        "| checkpoint | id | network | parameters | n | clean (95%) | PGD-20, L∞ 8/255 | AutoAttack, first 1,000 |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in store.shipped_names():
        loaded = store.load(name)
        card, test = loaded.card, loaded.card.figures["test"]
        attack = test["pgd"]
        if (attack["steps"], round(attack["epsilon"] * 255, 3)) != (20, 8):
            raise ValueError(f"{name}: the card's PGD has {attack['steps']} steps of radius {attack['epsilon']}")
        millions = sum(p.numel() for p in loaded.classifier.parameters()) / 1e6
        width = "" if card.architecture.width == 1 else f", width {card.architecture.width:g}"
        cells = [
            f"`{name}`",
            f"`{card.id}`",
            f"`{card.architecture.name}`{width}",
            f"{millions:.1f} million",
            f"{test['n']:,}",
            share({"accuracy": test["clean_accuracy"], "interval": test["clean_interval"]}),
            share({"accuracy": test["pgd_accuracy"], "interval": test["pgd_interval"]}),
            share(autoattacked[card.id]) if card.id in autoattacked else "not run yet",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def gates_table() -> str:
    """Return the table of what the shipped checkpoints' gates leave as it is, from their cards."""
    cards = {name: store.read_card(store.resolve(name)) for name in store.shipped_names()}
    (n,) = {gate["n"] for card in cards.values() for gate in card.gates.values()}
    rows = [
        f"| n = {n:,} held-out training images | preset | clean left | attacked left (PGD-20) |",
        "| --- | --- | ---: | ---: |",
    ]
    for name, card in cards.items():
        for preset, gate in card.gates.items():
            rows.append(f"| `{name}` | `{preset}` | {gate['clean_left']:.1%} | {gate['attacked_left']:.1%} |")
    return "\n".join(rows)


def purification_table(record: dict[str, Any]) -> str:
    """Every purifier on every set of points, and the adaptive attack."""
    accuracy = record["results"]["accuracy"]
    n = accuracy["classifier"]["clean"]["n"]
    rows = [
        f"| `{record['results']['checkpoint']['id']}`, n = {n:,} | clean | PGD-{record['config']['steps']} on the "
        "classifier | noise of that size |",
        "| --- | --- | --- | --- |",
    ]
    for name, cells in accuracy.items():
        title = "no purifier" if name == "classifier" else f"preset `{name}`"
        shown = [share(cells[key]) for key in ("clean", "attacked", "noise")]
        rows.append(f"| {title} | {' | '.join(shown)} |")
    for name, cells in accuracy.items():
        if name != "classifier":
            gains = [c.paired(cells[key]["gain"]).whole for key in ("clean", "attacked", "noise")]
            rows.append(f"| `{name}`: points gained | {' | '.join(gains)} |")
    text = "\n".join(rows)
    if "adaptive_bpda" in accuracy["default"]:
        cell = accuracy["default"]["adaptive_bpda"]
        gain = c.paired(cell["gain"]).whole
        text += (
            "\n\nUnder the same PGD through the `default` preset (BPDA: backward = identity; seed known, "
            f"n = {cell['n']}) it keeps {share(cell)}: {gain} points against the undefended classifier "
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
        "transfer": "preset `transfer`",
        "vote": "preset `vote`",
        "restorer": "preset `restorer`",
    }
    rows = [
        f"| `{record['results']['checkpoint']['id']}`, batch of {timed['batch']}, {where(record['machine'])} | "
        "ms per image | times faster |",
        "| --- | --- | --- |",
    ]
    for name, title in ((name, title) for name, title in titles.items() if name in timed["ms_per_image"]):
        ratio = f"{faster[name]:.1f}" if name in faster else ""
        rows.append(f"| {title} | {timed['ms_per_image'][name]:.1f} | {ratio} |")
    return "\n".join(rows)


def robustness_table(runs: list[dict[str, Any]]) -> str:
    """Return the table of every purifier under every attack of one data set and threat, and what speaks against rows;
    RobustBench's figures stand in the report.
    """
    rows = [measured_row(run) for run in runs]
    groups = {(row.group, row.model) for row in rows}
    if len(groups) != 1:
        raise ValueError(f"a table of {len(groups)} threats, data sets or models: {sorted(groups)}")
    columns = (column for column in c.columns_of(rows[0].group) if column != c.SOURCE)
    return with_remarks((PURIFIER, *columns), rows, c.remarks)


def threats_table(runs: list[dict[str, Any]]) -> str:
    """Return a table of every purified run under every threat: bare, behind the purifier, and the paired gain."""
    rows = [measured_row(run) for run in runs if run["results"]["purifies"]]
    names = list(dict.fromkeys((row.model, row.purifier) for row in rows))
    models = [c.MODEL] if len({row.model for row in rows}) > 1 else []
    rows.sort(key=lambda row: names.index((row.model, row.purifier)))
    return with_remarks((*models, PURIFIER, *c.ACROSS), rows)


def sweep_table(record: dict[str, Any]) -> str:
    """Candidates for the default preset on held-out training images."""
    found = record["results"]["rows"]
    n = found["no purifier"]["clean"]["n"]
    rows = [f"| n = {n:,}, held-out training images | clean | attacked | ms per image |", "| --- | --- | --- | --- |"]
    for name, cells in found.items():
        if name == "no purifier":
            rows.append(f"| {name} | {cells['clean']['accuracy']:.1%} | {cells['attacked']['accuracy']:.1%} | |")
        else:
            gains = [c.paired(cells[key]["gain"]).whole for key in ("clean", "attacked")]
            spent = f"{cells['ms_per_image']:.0f} " if "ms_per_image" in cells else ""
            rows.append(f"| {name} | {gains[0]} | {gains[1]} | {spent}|")
    return "\n".join(rows)


def worst_case_sweep_table(record: dict[str, Any]) -> str:
    """Candidates judged on held-out training images, in points over the bare classifier: where an attacker knows them,
    by their worst case.
    """
    swept = record["results"]["rows"]
    bare = swept["none"]
    n = bare["clean"]["n"]
    known = record["config"]["sweep"] != "transfer"
    weaker: dict[str, tuple[str, ...]] = {"clean": (), "transfer": (), **({"worst": (LESS,)} if known else {})}
    left = [f"{bare[key]['accuracy']:.1%}" for key in ("clean", "worst")]
    rows = [
        f"| `{record['results']['checkpoint']['id']}`, n = {n:,} held-out training images | clean | transfer |"
        f"{' worst case |' * known} ms per image |",
        f"| --- |{' ---: |' * len(weaker)} ---: |",
        f"| no purifier | {' | '.join([left[0], *[''] * known, left[1]])} | {bare['ms_per_image']:.2f} |",
    ]
    for title, cells in swept.items():
        if title != "none":
            gains = " | ".join(c.paired(cells[key]["gain"], why).whole for key, why in weaker.items())
            rows.append(f"| {title} | {gains} | {cells['ms_per_image']:.2f} |")
    return "\n".join(rows)
