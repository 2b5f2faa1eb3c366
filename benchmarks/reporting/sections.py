"""The sections of the report: a table for each data set and threat, one across threats, and what they say in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unperturb.benchmarks.reporting import columns as c
from unperturb.benchmarks.reporting.rows import AVERAGED, Group, Row, published_rows

NEAREST = 10  # published rows that are shown at once


class Summary(NamedTuple):
    """What stands before all sections: a table of texts, the first column a name, what to know of it, the verdict."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    below: list[str]
    verdict: str


@dataclass(frozen=True)
class Section:
    """A table: its title, its columns after those that name a row, our rows, and the published ones.

    across: whether it repeats rows of several threats
    """

    title: str
    columns: tuple[c.Column, ...]
    ours: list[Row]
    published: list[Row]
    across: bool = False

    @property
    def named(self) -> tuple[c.Column, ...]:
        """Return all columns."""
        return (c.MODEL, c.PURIFIER, *self.columns)

    @property
    def near(self) -> list[Row]:
        """Return the published rows that lie nearest to a bare classifier's figure, in their order."""
        bare = [row.worst for row in self.ours if row.purifier == "none"] + [row.bare for row in self.ours]
        at = [value for value in bare if value is not None] or [0.0]
        near = sorted(self.published, key=lambda row: min(abs((row.worst or 0.0) - one) for one in at))[:NEAREST]
        return [row for row in self.published if row in near]

    @property
    def in_words(self) -> list[str]:
        """Return the gain of each purified row as a sentence; of rows that are repeated none."""
        return [] if self.across else [in_words(row) for row in self.ours if row.gain is not None]

    def remarks(self, row: Row) -> list[str]:
        """Return what is to be known of a row's figures; of one that is repeated or published nothing."""
        return [] if self.across or not row.measured else c.remarks(row)

    @property
    def few(self) -> bool:
        """Return whether a row is marked for its few images."""
        return any(row.few for row in self.ours)


def notes_of(sections: Sequence[Section]) -> dict[str, str]:
    """Return how the sections are to be read; of published rows only where one stands there."""
    return {**c.NOTES, **(c.PUBLISHED if any(section.published for section in sections) else {})}


def sections(rows: Sequence[Row]) -> list[Section]:
    """Return a section for each group of measured rows, and one across threats for models measured under several."""
    made = []
    for group in dict.fromkeys(row.group for row in rows):
        ours = [row for row in rows if row.group == group]
        made.append(Section(title_of(group), c.columns_of(group), ours, published_rows(group)))
    across = of_every_threat(rows)
    return [*made, Section("Every threat", c.ACROSS, across, [], across=True)] if across else made


def title_of(group: Group) -> str:
    """Return the title of a group's table: `cifar10, L∞ 8/255`."""
    return f"{group.dataset}{' (own data)' * group.own}, {c.threat_of(group)}"


def of_every_threat(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of each model and purifier that were measured under several threats, these beside each other."""
    purified: dict[tuple[str, bool, str, str], list[Row]] = {}
    for row in rows:
        if row.gain is not None:
            purified.setdefault((row.group.dataset, row.group.own, row.model, row.purifier), []).append(row)
    return [row for same in purified.values() if len({row.group for row in same}) > 1 for row in same]


def tone(row: Row) -> Literal["worse", "better", "even", "unjudged"]:
    """Return on which side of 0 the interval of a purified row's gain lies; of one that was attacked with less than a
    judge needs only whether it is a loss, and where the bare classifier was, too, not even that.
    """
    assert row.gain_interval is not None
    low, high = row.gain_interval
    if row.gain_at_most and (high >= 0 or c.less(row.weaker)):
        return "unjudged"
    return "worse" if high < 0 else "better" if low > 0 else "even"


def verdict(row: Row) -> str:
    """Return what the interval of a purified row's gain allows to say."""
    where = "on such images" if row.group.threat in AVERAGED else "against an attacker who knows it"
    said = {"worse": "makes things worse", "better": "helps", "even": "makes no difference that can be told"}
    said["unjudged"] = "was attacked with less than a judge needs, and is not judged"
    return f"{said[tone(row)]} {where}"


def in_words(row: Row) -> str:
    """Return a purified row's gain, and what it is made of, as a sentence."""
    gain, interval, _ = c.GAIN.cell(row)
    name = "mean" if row.group.threat in AVERAGED else "worst case"
    return (
        f"{row.purifier} before {row.model} {verdict(row)}: {gain} points {interval}, n = {c.COUNT.cell(row).text}; "
        f"{name} {c.percent(row.worst).text}%, bare {c.percent(row.bare).text}%."
    )
