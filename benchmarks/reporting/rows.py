"""Result files -> rows of a table: our runs, and RobustBench's published figures for the same data and threat."""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from unperturb.benchmarks.reporting.results import SCHEMA_VERSION
from unperturb.benchmarks.robustness.figures import (
    CLEAN,
    NO_AUTOATTACK,
    beyond_gradient,
    joined,
    merge,
    withstands_unknowing,
)
from unperturb.models.errors import DataError

SCRIPT = "benchmarks/robustbench_eval.py"
# RobustBench's model cards (github.com/RobustBench/robustbench, model_info/), as a table made on 2026-11-21. Accuracies
# in percent; `external`: a lower figure by an adaptive attack that others published.
LEADERBOARD = Path(__file__).resolve().parent / "leaderboard.csv"
LEADERBOARD_SOURCE = "RobustBench model_info cards, table of 2026-11-21"
THREATS, FIRST = ("Linf", "L2", "corruptions", "noise"), ("none", "reverse-attack", "vote")  # in the order of tables
AVERAGED = ("corruptions", "noise")  # no worst case: the mean over kinds and sizes
# Equal in the runs of a row.
ROW = ("model", "purifier_spec", "purifier", "digests", "data", "threat", "budget", "corruptions")
FEW = 1000  # images; a row of fewer is marked

Interval = tuple[float, float]


class Group(NamedTuple):
    """What makes runs comparable: data set, threat, epsilon, whether the data are somebody's own, and whether its
    corruptions were generated, which are not the published ones.
    """

    dataset: str
    threat: str
    epsilon: float
    own: bool = False
    generated: bool = False


class Signs(NamedTuple):
    """What would show that gradients are masked, in shares of 1 and images; None where it was not measured.

    once, twice: left by APGD's cross-entropy, and by the same with twice the iterations
    larger: left at so many times epsilon
    transfer, queries: images that these attacks break alone, of n
    """

    once: float | None
    twice: float | None
    larger: tuple[tuple[int, float], ...]
    transfer: int | None
    queries: int | None
    n: int


class ByAnother(NamedTuple):
    """What came of the images that were made on other classifiers, in shares of 1.

    of: these classifiers; bare: the accuracy without the purifier, over which the gain is; None of a row without one
    """

    of: tuple[str, ...]
    accuracy: float
    bare: float | None
    gain: float | None
    gain_interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line; accuracies and gains are shares of 1, None where there is none.

    worst:     accuracy in the worst case; for corruptions and noise the mean over them; `interval` is its own
    bare:      the same of the classifier without its purifier, on the same images
    gain:      worst less bare, paired by image; `clean_gain` that of clean images
    static:    AutoAttack on the classifier alone; a published row's `worst` may be a lower figure of others
    weaker:    why the attacks were less than a judge's, so that stronger ones could lower the gain
    attacks:   how many the worst case is over, without the control
    surrogate: what images that were made on other classifiers do, where there are some
    times:     the time of an image, in those of the bare classifier
    """

    group: Group
    model: str
    purifier: str
    measured: bool
    n: int
    clean: float
    worst: float | None = None
    interval: Interval | None = None
    bare: float | None = None
    gain: float | None = None
    gain_interval: Interval | None = None
    weaker: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    clean_gain: float | None = None
    clean_gain_interval: Interval | None = None
    transfer: float | None = None
    static: float | None = None
    mean_of_draws: float | None = None
    worst_of_draws: float | None = None
    attacks: int = 0
    budget: str = ""
    ms_per_image: float | None = None
    times: float | None = None
    signs: Signs | None = None
    surrogate: ByAnother | None = None
    warnings: tuple[str, ...] = ()
    could_not_run: tuple[tuple[str, str], ...] = ()
    remark: str = ""

    @property
    def source(self) -> str:
        """Return where the figures are from."""
        return "measured" if self.measured else "published"

    @property
    def gain_at_most(self) -> bool:
        """Return whether stronger attacks could lower the gain."""
        return bool(self.weaker)

    @property
    def few(self) -> bool:
        """Return whether the row is marked for its few images."""
        return self.n < FEW


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """Return every row in the folder, its shards merged and its runs joined, in the order of `ordered`.

    Raises DataError naming a file that is no result, of another schema, one of shards that do not make a whole, or
    whose clean images another run of its row classifies otherwise.
    """
    parts: dict[tuple[str, str, str], list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    for file in sorted(folder.rglob("*.json")) if folder.is_dir() else []:
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not a result file ({error})") from error
        if not isinstance(record, dict) or record.get("script") != SCRIPT:
            continue
        check_schema(record, str(file))
        name, _, shard = file.name.removesuffix(".json").partition(".shard-")
        parts[str(file.parent), name, shard.rpartition("-")[2]].append((file, record))
    if not parts:
        raise DataError(f"{folder} holds no result of {SCRIPT}")
    return ordered(_rows([(shards[0][0], _whole(shards)) for shards in parts.values()]))


def _rows(runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of runs: those of one row by different attacks are taken together."""
    same: dict[str, list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    for file, run in runs:
        found = run["results"]
        row = [run["config"]["seed"], found["indices"], *(found.get(name) for name in ROW)]
        same[json.dumps(row, sort_keys=True)].append((file, run))
    for (file, first), *others in same.values():
        for other, run in others:
            if _clean(run) != _clean(first):
                raise DataError(f"{other} and {file} are of one row and differ in which clean images are right")
    rows = ([run for _, run in several] for several in same.values())
    return [_joined(several) if len(several) > 1 else several[0] for several in rows]


def _clean(run: dict[str, Any]) -> list[Any]:
    """Return which clean images are right, with and without a defense."""
    return [run["results"][key] and run["results"][key][CLEAN] for key in ("outcomes", "bare_outcomes")]


def _joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first, *_ = runs = sorted(runs, key=lambda run: -len(run["results"]["outcomes"]))
    if group_of(first).threat in AVERAGED:
        return first
    found = joined([run["results"] for run in runs])
    return {**first, "results": {**found, "notes": [*found["notes"], *_differences(runs, "attacks")]}}


def _differences(runs: list[dict[str, Any]], what: str) -> list[str]:
    """Return notes on commits and code that differ between the runs of a whole, or are not known."""
    commits = list(dict.fromkeys(str(run["commit"])[:7] for run in runs))
    notes = [f"its {what} were run at different commits, {', '.join(commits)}"] if len(commits) > 1 else []
    if not all(run["results"].get(name) for run in runs for name in ("digests", "code")):
        unknown = "its code is not recorded"
        return [f"{notes[0]}; {unknown}" if notes else unknown]
    for part in ("classifier", "defense"):
        if len({run["results"]["code"][part] for run in runs}) > 1:
            notes.append(f"its {what} were run with different code of the {part}")
    return notes


def check_schema(record: dict[str, Any], name: str) -> None:
    """Raise DataError for a record of another schema."""
    if record.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{name} has schema {record.get('schema_version')}, not {SCHEMA_VERSION}; run it again")


def _whole(shards: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    file, first = shards[0]
    if len(shards) == 1 and first["results"]["shard"] == "1/1":
        return first
    try:
        whole = merge([record["results"] for _, record in shards])
    except ValueError as error:
        raise DataError(f"{file} and its {len(shards) - 1} other shard(s) do not make a whole: {error}") from None
    wanted = first["config"]["n_examples"]
    if len(whole["indices"]) != wanted:
        raise DataError(f"{file}: shards of {wanted} images hold {len(whole['indices'])}")
    notes = _differences([record for _, record in shards], "images")
    return {**first, "results": {**whole, "notes": [*whole.get("notes", ()), *notes]}}


def ordered(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs by data set, threat, epsilon, model and purifier."""

    def place(run: dict[str, Any]) -> tuple[Any, ...]:
        group, purifier = group_of(run), run["results"]["purifier_spec"]
        threat = THREATS.index(group.threat) if group.threat in THREATS else len(THREATS)
        first = FIRST.index(name) if (name := purifier.partition(":")[0]) in FIRST else len(FIRST)
        return group.own, group.dataset, threat, group.epsilon, run["results"]["model"]["spec"], first, purifier

    return sorted(runs, key=place)


def group_of(run: dict[str, Any]) -> Group:
    """Return what a run is comparable with; epsilon is 0 for corruptions and noise."""
    found = run["results"]
    threat = found["threat"]["model"]
    epsilon = 0.0 if threat in AVERAGED else found["threat"]["epsilon"]
    generated = threat == "corruptions" and found["corruptions"] == "generated"
    return Group(found["data"]["dataset"], threat, epsilon, found["data"]["own"], generated)


def measured_row(run: dict[str, Any]) -> Row:
    """Return a run as a row."""
    found, group = run["results"], group_of(run)
    figures, averaged = found["figures"], group.threat in AVERAGED
    measure, over = ("corruptions_mean", ()) if averaged else ("worst_case", figures["worst_case_over"])
    bare, again = figures["bare"], figures.get("resubmitted")
    static, transferred = figures["attacks"].get("autoattack", {}).get("alone"), withstands_unknowing(found["outcomes"])
    gain, clean_gain = (figures[name] or {} for name in ("gain", "clean_gain"))
    return Row(
        group=group,
        model=found["model"]["spec"],
        purifier=found["purifier_spec"],
        measured=True,
        n=figures["clean"]["n"],
        clean=figures["clean"]["accuracy"],
        worst=_accuracy(figures[measure]),
        interval=_interval(None if averaged else figures[measure]),
        bare=_accuracy(bare[measure]) if bare else None,
        gain=gain.get("mean"),
        gain_interval=_interval(gain),
        weaker=_weaker(figures),
        notes=tuple(found.get("notes", ())),
        clean_gain=clean_gain.get("mean"),
        clean_gain_interval=_interval(clean_gain),
        transfer=sum(transferred) / len(transferred) if transferred else None,
        static=_accuracy(static) if static else None,
        mean_of_draws=again["mean"] if again else None,
        worst_of_draws=again["worst_of_draws"]["accuracy"] if again else None,
        attacks=len([name for name in over if name not in ("clean", "noise")]),
        budget="" if averaged else found["budget"]["name"],
        ms_per_image=found["timings"].get("ms_per_image", {}).get("defended"),
        times=found["timings"].get("ms_per_image", {}).get("times_the_classifier"),
        signs=_signs(figures.get("signs"), figures["clean"]["n"]),
        surrogate=_by_another(figures.get("surrogate")),
        warnings=_warnings(figures.get("signs")),
        could_not_run=tuple(found.get("could_not_run", {}).items()),
    )


def _weaker(figures: dict[str, Any]) -> tuple[str, ...]:
    return tuple(figures.get("weaker", [NO_AUTOATTACK] * figures.get("gain_at_most", False)))  # as it once was


def _by_another(found: dict[str, Any] | None) -> ByAnother | None:
    if found is None:
        return None
    gain = found["gain"] or {}
    return ByAnother(
        of=tuple(one["spec"] for one in found["of"]),
        accuracy=_accuracy(found["accuracy"]),
        bare=_accuracy(found["bare"]) if found["bare"] else None,
        gain=gain.get("mean"),
        gain_interval=_interval(gain),
    )


def _signs(found: dict[str, Any] | None, n: int) -> Signs | None:
    if found is None:
        return None
    twice = found["twice_the_iterations"] or {}
    transfer, queries = (found[f"{name}_beyond_gradient"] or {} for name in ("transfer", "queries"))
    return Signs(
        once=_accuracy(twice["once"]) if twice else None,
        twice=_accuracy(twice["twice"]) if twice else None,
        larger=tuple((one["times"], _accuracy(one["accuracy"])) for one in found["epsilon"]),
        transfer=transfer.get("broken"),
        queries=queries.get("broken"),
        n=n,
    )


def _warnings(found: dict[str, Any] | None) -> tuple[str, ...]:
    """Return what a record warns of, and what it would today."""
    return () if found is None else tuple(dict.fromkeys([*found["warnings"], *beyond_gradient(found)]))


def _accuracy(cell: dict[str, Any] | float) -> float:
    return float(cell["accuracy"] if isinstance(cell, dict) else cell)


def _interval(cell: dict[str, Any] | None) -> Interval | None:
    return (cell["interval"][0], cell["interval"][1]) if cell else None


def published_rows(group: tuple[str, str, float] | Group) -> list[Row]:
    """Return RobustBench's figures for the same data set, threat and epsilon, best first; none for data of one's own or
    generated ones.
    """
    group = Group(*group)
    rows: list[Row] = []
    if group.own or group.generated:
        return rows
    with LEADERBOARD.open(newline="") as opened:
        for card in csv.DictReader(opened):
            same = card["dataset"] == group.dataset and card["threat_model"] == group.threat
            if same and group.threat != "corruptions":
                same = abs(float(Fraction(card["epsilon"])) - group.epsilon) < 5e-4
            if not same:
                continue
            attacked, external, corrupted = (
                float(card[f"{name}_accuracy"]) / 100 if card[f"{name}_accuracy"] else None
                for name in ("autoattack", "external", "corruptions")
            )
            rows.append(
                Row(
                    group=group,
                    model=card["model"],
                    purifier="none",
                    measured=False,
                    n=10000 if group.dataset != "imagenet" else 5000,
                    clean=float(card["clean_accuracy"]) / 100,
                    worst=corrupted if group.threat == "corruptions" else attacked if external is None else external,
                    static=attacked,
                    remark="unreliable" if card["unreliable"] == "True" else "",
                )
            )
    return sorted(rows, key=lambda row: -(row.worst or 0))
