"""Make the table "which preset when": what each gains over the bare classifier, by what an attacker knows."""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

from unperturb.benchmarks.reporting import columns as c
from unperturb.benchmarks.reporting.assessment import preset_of
from unperturb.benchmarks.reporting.first_page import DEFAULT, VOTE, transfer_gain
from unperturb.benchmarks.reporting.formats import with_remarks
from unperturb.benchmarks.reporting.rows import AVERAGED, Row, measured_row
from unperturb.models.purifiers.reverse_attack import PRESETS

NOT_RUN = c.Cell("not run")
SURROGATE, ELSEWHERE = "surrogate", "knows not even the classifier"
NEXT, BULLET = "\n- ", "\n\n- "  # of a list that there is, and the first of one


class Unjudged(NamedTuple):
    """A preset that was purified with, but not judged by every attack: what it gains there, and its time."""

    cells: dict[str, Any]
    times: float


def when_table(
    main: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    elsewhere: Sequence[dict[str, Any]] = (),
    purified: Sequence[dict[str, Any]] = (),
    served: str = "",
) -> str:
    """Return the table, a line for each purifier of `main`, in points with 95% intervals.

    main: runs of one classifier or several in one ball; runs: theirs under every threat; elsewhere: anybody's, of
    images made on another classifier, with a column where there are some; purified: results of purification.py, whose
    presets that are not in `main` get a line of their own beside a classifier whose default is, and beside `served`,
    the one of which who runs the service without a setting asks; those before others stand in a sentence below
    """
    rows = [(run, measured_row(run)) for run in main]
    attacked = {
        (row.model, row.purifier): (run, row)
        for run, row in rows
        if row.gain is not None and (not row.purifier.startswith(f"{DEFAULT}:") or preset_of(row.purifier) in PRESETS)
    }  # no changed preset
    averaged = (row for row in map(measured_row, runs) if row.group.threat in AVERAGED)
    others = {(row.group.threat, row.model, row.purifier): row for row in averaged}
    others |= {(SURROGATE, row.model, row.purifier): row for row in map(measured_row, elsewhere)}

    with_lines = [record for record in purified if _id(record) == served or (_id(record), DEFAULT) in attacked]
    unjudged = {key: one for record in with_lines for key, one in _unjudged(record, attacked).items()}
    unknown_pgd = {
        (_id(record), _purifier(preset)): figures["attacked"]
        for record in purified
        for preset, figures in record["results"]["accuracy"].items()
        if preset in PRESETS
    }
    lines = {key: row for key, (_, row) in attacked.items()}
    for model, purifier in unjudged:
        if bare := next((row for _, row in rows if row.model == model), None):
            lines[model, purifier] = Row(
                group=bare.group, model=model, purifier=purifier, measured=True, n=bare.n, clean=bare.clean
            )

    def name(row: Row) -> c.Cell:
        purifier, _, preset = row.purifier.partition(":")
        return c.Cell(f"preset `{preset or 'default'}`" if purifier == DEFAULT else f"`{row.purifier}`")

    def unknowing(row: Row) -> c.Cell:
        if (row.model, row.purifier) in unjudged:
            return NOT_RUN
        gained = transfer_gain(attacked[row.model, row.purifier][0])
        return c.paired(gained) if gained else NOT_RUN

    def by_pgd(row: Row) -> c.Cell:
        found = unknown_pgd.get((row.model, row.purifier))
        return c.paired(found["gain"]) if found else NOT_RUN

    def knowing(row: Row) -> c.Cell:
        return NOT_RUN if (row.model, row.purifier) in unjudged else c.GAIN.cell(row)

    def clean(row: Row) -> c.Cell:
        if one := unjudged.get((row.model, row.purifier)):
            return c.paired(one.cells["clean"]["gain"])
        return c.points(row.clean_gain, row.clean_gain_interval)

    def times(row: Row) -> c.Cell:
        if one := unjudged.get((row.model, row.purifier)):
            return c.Cell(f"{one.times:.1f}")
        taken = attacked[row.model, row.purifier][0]["results"]["timings"]["ms_per_image"]
        return c.Cell(f"{taken['times_the_classifier']:.1f}")

    def under(threat: str) -> Callable[[Row], c.Cell]:
        def cell(row: Row) -> c.Cell:
            found = others.get((threat, row.model, row.purifier))
            return NOT_RUN if found is None else c.points(found.gain, found.gain_interval)

        return cell

    models = list(dict.fromkeys(row.model for _, row in rows))
    several = len({model for model, _ in lines}) > 1
    generated = any(row.group.generated for row in others.values())
    columns = (
        *([c.Column("before", lambda row: c.Cell(f"`{row.model}`"), number=False)] if several else []),
        c.Column("purifier", name, number=False),
        *([c.Column(ELSEWHERE, under(SURROGATE))] if elsewhere else []),
        c.Column("does not know of it, PGD-20", by_pgd),
        c.Column("does not know of it, AutoAttack", unknowing),
        c.Column("knows everything", knowing),
        c.Column("15 corruptions" + ", generated" * generated, under("corruptions")),
        c.Column("Gaussian noise", under("noise")),
        c.Column("clean images", clean),
        c.Column("times the classifier's time", times),
        c.COUNT,
    )
    ordered = sorted(lines.values(), key=lambda row: (models.index(row.model), row.purifier != DEFAULT))
    text = with_remarks(columns, ordered, name=lambda row: f"{name(row).text}{f' before `{row.model}`' * several}")
    without = [_in_words(record) for record in purified if record not in with_lines]
    if not without:
        return text
    said = "not in the table, points on clean images and under PGD-20 that does not know of it"
    return f"{text}{NEXT if BULLET in text else BULLET}{said}: {'; '.join(without)}"


def _in_words(record: dict[str, Any]) -> str:
    """Return what each preset gains before a classifier that has no lines of its own."""
    accuracy = record["results"]["accuracy"]
    gains = []
    for preset in (name for name in PRESETS if name in accuracy):
        clean, attacked = (c.paired(accuracy[preset][on]["gain"]).text for on in ("clean", "attacked"))
        gains.append(f"`{preset}` {clean} and {attacked}")
    return f"before `{_id(record)}` {', '.join(gains)}"


def _id(record: dict[str, Any]) -> str:
    """Return the id of the checkpoint that was purified with."""
    return str(record["results"]["checkpoint"]["id"])


def _unjudged(record: dict[str, Any], attacked: Container[tuple[str, str]]) -> dict[tuple[str, str], Unjudged]:
    """Return the presets that a classifier was purified with and not judged."""
    found, model = record["results"], _id(record)
    ms = found["time"]["ms_per_image"]
    names = {preset: _purifier(preset) for preset in PRESETS}
    return {
        (model, name): Unjudged(found["accuracy"][preset], ms[preset] / ms["classifier"])
        for preset, name in names.items()
        if preset in found["accuracy"] and (model, name) not in attacked
    }


def _purifier(preset: str) -> str:
    """Return the harness's name of a preset."""
    return preset if preset == VOTE else DEFAULT if preset == "default" else f"{DEFAULT}:{preset}"
