"""The columns of the report's tables, the gain over the bare classifier first; what they mean, and what a row says."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from unperturb.benchmarks.reporting.rows import AVERAGED, LEADERBOARD_SOURCE, ByAnother, Group, Interval, Row, Signs
from unperturb.benchmarks.robustness.figures import LESS

DAGGER = "†"
LEGEND = f"{DAGGER} fewer than 1,000 images: a difference of a few points may be chance."
NOTES = {
    "gain": "points of accuracy in the worst case over the bare classifier, on the same images and under the same "
    "budget, paired by image, with its 95% interval. Below 0, an attacker who knows the purifier does better against "
    "it than against no purifier.",
    "worst case": "the share of images that no attack broke, with its 95% Wilson interval.",
    "clean": "accuracy on images that nobody attacked; in brackets the points that the purifier gains there.",
    "bare": "the same of the classifier without its purifier.",
    "transfer": "the images that AutoAttack made against the bare classifier, and the same moved on to where that is "
    "wrong by most, purified: an attacker who does not know of the purifier.",
    "draws": "the hardest points of each image, sent again under fresh seeds: the mean, and an image counting as "
    "broken that any of the seeds broke.",
    "attacks": "how many the worst case is over, and their budget; more of either can only lower it.",
    "corruptions and noise": "have no worst case: the mean over all kinds and sizes stands in its place.",
}
PUBLISHED = {
    "published rows": f"of the {LEADERBOARD_SOURCE}: their worst case is AutoAttack, or a lower figure of an adaptive "
    "attack that others published. RobustBench takes no defense with an optimisation loop: no row claims a place on "
    "its leaderboard.",
}


class Cell(NamedTuple):
    """One place of a table: its text, what is said beside it in smaller type, and what it sorts by."""

    text: str
    detail: str = ""
    key: float | str = -1.0

    @property
    def whole(self) -> str:
        """Return the text with its detail."""
        return " ".join(filter(None, (self.text, self.detail)))


class Column(NamedTuple):
    """A head, and what stands under it; a number is set to the right."""

    head: str
    cell: Callable[[Row], Cell]
    number: bool = True


def percent(share: float | None, interval: Interval | None = None) -> Cell:
    """Return a share in percent, its interval beside it."""
    if share is None:
        return Cell("")
    return Cell(f"{100 * share:.1f}", f"({_ends(interval)})" if interval else "", share)


def points(gain: float | None, interval: Interval | None = None) -> Cell:
    """Return a difference of shares in points, with its sign, its interval beside it."""
    if gain is None:
        return Cell("", key=float("-inf"))
    return Cell(f"{100 * gain:+.1f}", f"({_ends(interval, '+')})" if interval else "", gain)


def gained(gain: float | None, interval: Interval | None, weaker: Sequence[str] = ()) -> Cell:
    """Return a gain in points; where attacks were less than a judge's, a bound (≤), or near one (≲) where those on the
    bare classifier were, too: its upper end beside it.
    """
    cell = points(gain, interval)
    if not weaker:
        return cell
    detail = f"(to {100 * interval[1]:+.1f})" if interval else ""
    return cell._replace(text=f"{'≲' if less(weaker) else '≤'} {cell.text}", detail=detail)


def paired(gain: dict[str, Any] | None, weaker: Sequence[str] = ()) -> Cell:
    """Return `gained` of a record's paired gain; an empty cell where there is none."""
    return points(None) if gain is None else gained(gain["mean"], tuple(gain["interval"]), weaker)


def less(weaker: Sequence[str]) -> bool:
    """Return whether the bare classifier was attacked with less than a judge needs, too: a gain is no bound then."""
    return any(reason.startswith(LESS) for reason in weaker)


def _ends(interval: Interval, sign: str = "") -> str:
    return " to ".join(f"{100 * end:{sign}.1f}" for end in interval)


def _gain(row: Row) -> Cell:
    return gained(row.gain, row.gain_interval, row.weaker)


def _count(row: Row) -> Cell:
    return Cell(f"{row.n:,}{f' {DAGGER}' * row.few}", key=row.n)


def _clean(row: Row) -> Cell:
    gain = "" if row.clean_gain is None else f"({points(row.clean_gain).text})"
    return Cell(percent(row.clean).text, gain, row.clean)


def _draws(row: Row) -> Cell:
    if row.mean_of_draws is None or row.worst_of_draws is None:
        return Cell("")
    text = f"{percent(row.mean_of_draws).text} / {percent(row.worst_of_draws).text}"
    return Cell(text, key=row.worst_of_draws)


def _source(row: Row) -> Cell:
    lower = not row.measured and row.static != row.worst
    beside = f"AutoAttack {percent(row.static).text}" if lower and row.static is not None else ""
    return Cell(", ".join(filter(None, (row.source, row.remark, beside))), key=row.source)


def _milliseconds(row: Row) -> Cell:
    value = row.ms_per_image
    beside = "" if row.times is None else f"({row.times:.1f})"
    return Cell("") if value is None else Cell(f"{value:.2f}", beside, value)


def with_minus(text: str, minus: str) -> str:
    """Return a text in which the hyphen before a number is a minus of this form."""
    return re.sub(r"(?<![\w.-])-(?=\d)", lambda _: minus, text)


def remarks(row: Row) -> list[str]:
    """Return what is to be known of a row's figures: the signs of masked gradients, and what speaks against them."""
    return [*([masking(row.signs, purified=row.gain is not None)] if row.signs else []), *cautions(row)]


def masking(signs: Signs, *, purified: bool) -> str:
    """Return what was measured to see whether gradients are masked, and what was not."""
    said = []
    if signs.once is not None:
        once, twice = (percent(share).text for share in (signs.once, signs.twice))
        said.append(f"APGD's cross-entropy leaves {once}%, with twice the iterations {twice}%")
    if signs.larger:
        at = ", ".join(f"{percent(left).text}% at {times} times ε" for times, left in signs.larger)
        said.append(f"of what all attacks left, {at}")
    if signs.transfer is not None:
        said.append(f"transferred images break {signs.transfer} of {signs.n:,} that it does not")
    if signs.queries is not None:
        said.append(f"queries break {signs.queries} of {signs.n:,} that nothing before them does")
    tested = {
        "twice the iterations": signs.once is not None,
        "larger ε": bool(signs.larger),
        "transfer": signs.transfer is not None or not purified,
        "queries": signs.queries is not None,
    }
    if lacking := [name for name, done in tested.items() if not done]:
        said.append(f"not tested: {', '.join(lacking)}")
    return "signs of masked gradients: " + "; ".join(said)


def cautions(row: Row) -> list[str]:
    """Return what speaks against a row's figures: gradients that look masked, and attacks that were not run."""
    said = [f"gradients may be masked: {sentence}" for sentence in row.warnings]
    said += notes(row)
    bound = "stronger ones may lower the gain" if less(row.weaker) else "the gain is at most this"
    said += [f"{reason}: {bound}" for reason in row.weaker]
    return said + [f"{attack} could not be run: {reason}" for attack, reason in row.could_not_run]


def notes(row: Row) -> list[str]:
    """Return what is noted of a row, and what images that were made on another classifier do."""
    return [*row.notes, *([_by_another(row.surrogate)] if row.surrogate else [])]


def _by_another(found: ByAnother) -> str:
    said = f"{percent(found.accuracy).text}% withstand"
    if found.gain is not None:
        gain, interval, _ = points(found.gain, found.gain_interval)
        said += f", bare {percent(found.bare).text}%: {gain} points {interval}"
    return f"of the images made on {', '.join(found.of)}, by who knows no more, {said}"


MODEL = Column("model", lambda row: Cell(row.model, key=row.model), number=False)
PURIFIER = Column("purifier", lambda row: Cell(row.purifier, key=row.purifier), number=False)
GAIN = Column("gain over bare, points (95%)", _gain)
COUNT = Column("n", _count)
WORST = Column("worst case, % (95%)", lambda row: percent(row.worst, row.interval))
CLEAN = Column("clean, %", _clean)
BARE = Column("bare, %", lambda row: percent(row.bare))
BARE_WORST = Column("bare worst case, %", BARE.cell)
TRANSFER = Column("transfer, %", lambda row: percent(row.transfer))
DRAWS = Column("mean / worst of draws, %", _draws)
ATTACKS = Column("attacks", lambda row: Cell(str(row.attacks or ""), key=row.attacks))
BUDGET = Column("budget", lambda row: Cell(row.budget, key=row.budget), number=False)
TIME = Column("ms per image (times bare in the same run)", _milliseconds)
SOURCE = Column("source", _source, number=False)
THREAT = Column("threat", lambda row: Cell(threat_of(row.group), key=threat_of(row.group)), number=False)
BEHIND = Column("behind the purifier, % (95%)", WORST.cell)
MEAN = Column("mean, %", WORST.cell)
ACROSS = (THREAT, GAIN, COUNT, BEHIND, BARE)  # of a table across threats


def columns_of(group: Group) -> tuple[Column, ...]:
    """Return the columns of a group's table after those that name the row."""
    if group.threat in AVERAGED:
        return GAIN, COUNT, MEAN, CLEAN, BARE, SOURCE
    return GAIN, COUNT, WORST, CLEAN, BARE_WORST, TRANSFER, DRAWS, ATTACKS, BUDGET, TIME, SOURCE


def threat_of(group: Group) -> str:
    """Return the threat in words: `L∞ 8/255`."""
    match group.threat:
        case "Linf":
            return f"L∞ {group.epsilon * 255:.4g}/255"
        case "L2":
            return f"L2 {group.epsilon:g}"
        case "corruptions":
            return "generated corruptions" if group.generated else "common corruptions"
        case "noise":
            return "Gaussian noise"
    return f"{group.threat} {group.epsilon:g}"
