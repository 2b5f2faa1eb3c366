"""Make the table "which preset when": what each gains over the bare classifier, by what an attacker knows."""

from collections.abc import Callable, Sequence
from typing import Any

from unperturb.benchmarks.reporting import columns as c
from unperturb.benchmarks.reporting.assessment import preset_of
from unperturb.benchmarks.reporting.first_page import DEFAULT, transfer_gain
from unperturb.benchmarks.reporting.purifier_tables import with_remarks
from unperturb.benchmarks.reporting.rows import AVERAGED, Row, measured_row
from unperturb.models.purifiers.reverse_attack import PRESETS

NOT_RUN = c.Cell("not run")
QUERIES = "queries"


def when_table(main: list[dict[str, Any]], runs: list[dict[str, Any]], queried: Sequence[dict[str, Any]] = ()) -> str:
    """Return the table, a line for each purifier of `main`, in points with 95% intervals.

    main: runs of one classifier or several in one ball; runs: theirs under every threat; queried: anybody's, of attacks
    that see scores or labels alone
    """
    rows = [(run, measured_row(run)) for run in main]
    attacked = {
        (row.model, row.purifier): (run, row)
        for run, row in rows
        if row.gain is not None and (not row.purifier.startswith(f"{DEFAULT}:") or preset_of(row.purifier) in PRESETS)
    }  # no changed preset
    averaged = (row for row in map(measured_row, runs) if row.group.threat in AVERAGED)
    others = {(row.group.threat, row.model, row.purifier): row for row in averaged}
    others |= {(QUERIES, row.model, row.purifier): row for row in map(measured_row, queried)}

    def name(row: Row) -> c.Cell:
        purifier, _, preset = row.purifier.partition(":")
        return c.Cell(f"preset `{preset or 'default'}`" if purifier == DEFAULT else f"`{row.purifier}`")

    def unknowing(row: Row) -> c.Cell:
        gained = transfer_gain(attacked[row.model, row.purifier][0])
        return c.points(gained["mean"], tuple(gained["interval"])) if gained else NOT_RUN

    def times(row: Row) -> c.Cell:
        taken = attacked[row.model, row.purifier][0]["results"]["timings"]["ms_per_image"]
        return c.Cell(f"{taken['times_the_classifier']:.1f}")

    def under(threat: str) -> Callable[[Row], c.Cell]:
        def cell(row: Row) -> c.Cell:
            found = others.get((threat, row.model, row.purifier))
            return NOT_RUN if found is None else c.GAIN.cell(found)

        return cell

    several = len({model for model, _ in attacked}) > 1
    columns = (
        *([c.Column("before", lambda row: c.Cell(f"`{row.model}`"), number=False)] if several else []),
        c.Column("purifier", name, number=False),
        c.Column("attacker does not know of it", unknowing),
        c.Column("sends queries alone", under(QUERIES)),
        c.Column("knows everything", c.GAIN.cell),
        c.Column("15 corruptions", under("corruptions")),
        c.Column("Gaussian noise", under("noise")),
        c.Column("clean images", lambda row: c.points(row.clean_gain, row.clean_gain_interval)),
        c.Column("times the classifier's time", times),
        c.COUNT,
    )
    return with_remarks(columns, [row for _, row in attacked.values()])
