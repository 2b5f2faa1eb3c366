"""Records that are one row: shards of a run, and runs by different attacks, are taken together or refused."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.records import BARE, NO_SIGNS, WORSE, N, Outcomes, record, write
from unperturb.benchmarks.reporting.rows import load_runs, measured_row
from unperturb.benchmarks.robustness.figures import NO_AUTOATTACK
from unperturb.models.errors import DataError

EVERY_OTHER = (slice(0, N, 2), slice(1, N, 2))
HALVES = (slice(0, N // 2), slice(N // 2, N))


def sharded(folder: Path, images: Sequence[slice] = EVERY_OTHER) -> dict[str, Any]:
    """Write a run in two shards of these images; return the whole."""
    for number, taken in enumerate(images):
        outcomes, bare = ({name: values[taken] for name, values in of.items()} for of in (WORSE, BARE))
        part = record(outcomes, bare, shard=f"{number + 1}/2", indices=range(N)[taken])
        part["config"]["n_examples"] = N
        write(folder, f"run.shard-{number + 1}-of-2", part)
    return record(WORSE, BARE)


@pytest.mark.parametrize("images", [EVERY_OTHER, HALVES], ids=["every other", "halves"])
def test_shards_are_merged_to_one_row(images: Sequence[slice], tmp_path: Path) -> None:
    sharded(tmp_path, images)
    (run,) = load_runs(tmp_path)
    broken = "transferred images break 1 of 20 that APGD's cross-entropy through the full gradient does not"  # of WORSE
    signs = {**NO_SIGNS, "transfer_beyond_gradient": {"broken": 1, "n": N}, "warnings": [broken]}
    whole = measured_row(record(WORSE, BARE, signs=signs))
    assert measured_row(run) == replace(whole, weaker=(NO_AUTOATTACK,), notes=("its code is not recorded",))


@pytest.mark.parametrize(
    ("images", "says"),
    [(HALVES, "shards of 20 images hold 10"), (EVERY_OTHER, "images are missing")],
    ids=["halves", "every other"],
)
def test_row_of_which_a_shard_is_missing_is_refused(images: Sequence[slice], says: str, tmp_path: Path) -> None:
    sharded(tmp_path, images)
    (tmp_path / "run.shard-2-of-2.json").unlink()
    with pytest.raises(DataError, match=says):
        load_runs(tmp_path)


def test_runs_of_one_row_by_different_attacks_are_taken_together(tmp_path: Path) -> None:
    known: Outcomes = {"clean": [1, 1, 1, 0], "apgd-ce": [1, 1, 0, None]}
    asked: Outcomes = {"clean": [1, 1, 1, 0], "square": [0, 1, 1, None], "defended-autoattack": [None, 1, 1, None]}
    write(
        tmp_path, "known", record(known, {"clean": [1] * 4, "apgd-ce": [1, 1, 1, 0]}, could_not_run={"square": "why"})
    )
    later = {**record(asked, {"clean": [1] * 4, "autoattack": [0, 1, 1, 1]}), "commit": "b" * 40}
    write(tmp_path, "asked", later)
    write(tmp_path, "other", record(known, {"clean": [1] * 4}, purifier="vote"))
    rows_found = [measured_row(run) for run in load_runs(tmp_path)]
    joint, vote = rows_found
    assert (joint.purifier, joint.worst, joint.bare, joint.attacks) == ("reverse-attack", 0.25, 0.5, 3)
    assert joint.gain == pytest.approx(-0.25)
    assert (joint.could_not_run, joint.weaker) == ((), ())
    assert joint.notes == (
        f"its attacks were run at different commits, bbbbbbb, {str(record(known)['commit'])[:7]}; its code is not "
        "recorded",
    )
    assert not vote.notes
    assert (vote.purifier, vote.worst) == ("vote", 0.5)


KNOWN: Outcomes = {"clean": [1, 1, 1, 0], "apgd-ce": [1, 1, 0, None]}
ASKED: Outcomes = {"clean": [1, 1, 1, 0], "square": [0, 1, 1, None]}
MADE: dict[str, Any] = {
    "digests": {"classifier": "c", "defense": "d", "generator": None},
    "code": {"classifier": "c", "defense": "d"},
}


def two_runs(folder: Path, *changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of two runs by different attacks, in each of whose results so much is changed."""
    for name, outcomes, change in zip(("known", "asked"), (KNOWN, ASKED), changes, strict=True):
        run = record(outcomes, {"clean": [1] * 4})
        write(folder, name, {**run, "results": {**run["results"], **change}})
    return load_runs(folder)


def test_runs_are_joined_and_shards_merged_where_some_are_older_than_a_figure(tmp_path: Path) -> None:
    (run,) = two_runs(tmp_path / "runs", {}, {"bare_larger_epsilon": {"2": [1, 0, None, None]}})
    assert run["results"]["bare_larger_epsilon"] == {"2": [1, 0, None, None]}
    (run,) = two_runs(tmp_path / "older", {}, {})
    assert run["results"]["bare_larger_epsilon"] is None
    sharded(tmp_path / "shards")
    file = tmp_path / "shards" / "run.shard-1-of-2.json"
    part = json.loads(file.read_text())
    write(file.parent, file.stem, {**part, "results": {**part["results"], "bare_larger_epsilon": {"2": [1] * 10}}})
    (run,) = load_runs(tmp_path / "shards")
    assert run["results"]["bare_larger_epsilon"] is None


@pytest.mark.parametrize("name", ["classifier", "defense", "generator"])
def test_runs_of_two_defenses_of_one_specification_are_two_rows(name: str, tmp_path: Path) -> None:
    assert len(two_runs(tmp_path, MADE, MADE)) == 1
    assert len(two_runs(tmp_path, MADE, {**MADE, "digests": {**MADE["digests"], name: "other"}})) == 2
    assert len(two_runs(tmp_path, MADE, {})) == 2


@pytest.mark.parametrize("lacks", ["digests", "code"])
def test_row_of_runs_whose_code_is_not_recorded_says_so(lacks: str, tmp_path: Path) -> None:
    (run,) = two_runs(tmp_path, *(2 * ({name: one for name, one in MADE.items() if name != lacks},)))
    assert measured_row(run).notes == ("its code is not recorded",)
    (run,) = two_runs(tmp_path, MADE, MADE)
    assert not measured_row(run).notes


@pytest.mark.parametrize("name", ["classifier", "defense"])
def test_row_of_which_the_code_changed_says_so(name: str, tmp_path: Path) -> None:
    (run,) = two_runs(tmp_path, MADE, {**MADE, "code": {**MADE["code"], name: "other"}})
    assert measured_row(run).notes == (f"its attacks were run with different code of the {name}",)


@pytest.mark.parametrize(
    "change",
    [{"outcomes": {**ASKED, "clean": [1, 1, 1, 1]}}, {"bare_outcomes": {"clean": [1, 1, 1, 0]}}],
    ids=["defended", "bare"],
)
def test_runs_of_one_row_that_classify_clean_images_otherwise_are_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    names = f"{tmp_path / 'known.json'} and {tmp_path / 'asked.json'} are of one row and differ in which clean"
    with pytest.raises(DataError, match=re.escape(names)):
        two_runs(tmp_path, {}, change)


def test_shards_of_two_defenses_are_refused_and_those_of_other_code_or_commits_say_so(tmp_path: Path) -> None:
    sharded(tmp_path)
    whole, other = {**MADE, "code": {"classifier": "other", "defense": "other"}}, tmp_path / "run.shard-1-of-2.json"
    first = json.loads(other.read_text())
    file = tmp_path / "run.shard-2-of-2.json"
    part = json.loads(file.read_text())
    write(tmp_path, other.stem, {**first, "results": {**first["results"], **whole}})
    write(tmp_path, file.stem, {**part, "commit": "b" * 40, "results": {**part["results"], **MADE}})
    (run,) = load_runs(tmp_path)
    assert measured_row(run).notes == (
        "its images were run at different commits, aaaaaaa, bbbbbbb",
        "its images were run with different code of the classifier",
        "its images were run with different code of the defense",
    )
    write(tmp_path, file.stem, part)
    with pytest.raises(DataError, match=r"run\.shard-1-of-2\.json.*differ in digests"):
        load_runs(tmp_path)


def test_outcomes_of_shards_are_put_in_the_order_of_the_images(tmp_path: Path) -> None:
    whole = sharded(tmp_path)["results"]
    (run,) = load_runs(tmp_path)
    assert run["results"]["indices"] == list(range(N))
    assert run["results"]["outcomes"] == whole["outcomes"]
