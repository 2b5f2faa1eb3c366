"""Result files -> rows of a table: our runs, and RobustBench's published figures for the same data and threat."""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from unperturb.benchmarks.reporting.results import SCHEMA_VERSION
from unperturb.benchmarks.robustness.figures import merge
from unperturb.models.errors import DataError

SCRIPT = "benchmarks/robustbench_eval.py"
# RobustBench's model cards (github.com/RobustBench/robustbench, model_info/), as a table made on 2026-11-21. Accuracies
# in percent; `external`: a lower figure by an adaptive attack that others published.
LEADERBOARD = Path(__file__).resolve().parent / "leaderboard.csv"
LEADERBOARD_SOURCE = "RobustBench model_info cards, table of 2026-11-21"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line; accuracies are shares of 1, None where there is none. `interval` is that of the worst case."""

    model: str
    purifier: str
    measured: bool
    n: int
    clean: float
    static: float | None = None
    transfer: float | None = None
    worst: float | None = None
    interval: tuple[float, float] | None = None
    mean_of_draws: float | None = None
    worst_of_draws: float | None = None
    budget: str = ""
    ms_per_image: float | None = None
    attacks: int = 0
    remark: str = ""


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """Every run in the folder, its shards merged, by data, threat, epsilon, model and purifier (none and the reverse
    attack first).

    Raises DataError naming a file that is no result, of another schema, or one of shards that do not make a whole.
    """
    parts: dict[tuple[str, str, str], list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    for file in sorted(folder.rglob("*.json")) if folder.is_dir() else []:
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not a result file ({error})") from error
        if not isinstance(record, dict) or record.get("script") != SCRIPT:
            continue
        if record["schema_version"] != SCHEMA_VERSION:
            raise DataError(f"{file} has schema {record['schema_version']}, not {SCHEMA_VERSION}; run it again")
        name, _, shard = file.name.removesuffix(".json").partition(".shard-")
        parts[str(file.parent), name, shard.rpartition("-")[2]].append((file, record))
    if not parts:
        raise DataError(f"{folder} holds no result of {SCRIPT}")
    runs = []
    for shards in parts.values():
        file, first = shards[0]
        if len(shards) > 1 or first["results"]["shard"] != "1/1":
            try:
                whole = merge([record["results"] for _, record in shards])
            except ValueError as error:
                raise DataError(
                    f"{file} and its {len(shards) - 1} other shard(s) do not make a whole: {error}"
                ) from None
            if len(whole["indices"]) != first["config"]["n_examples"]:
                raise DataError(
                    f"{file}: shards of {first['config']['n_examples']} images hold {len(whole['indices'])}"
                )
            first = {**first, "results": whole}
        runs.append(first)
    return sorted(runs, key=_place)


def _place(run: dict[str, Any]) -> tuple[Any, ...]:
    purifier = run["results"]["purifier_spec"]
    own = {"none": 0, "reverse-attack": 1}.get(purifier.partition(":")[0], 2)
    return group_of(run), run["results"]["model"]["spec"], own, purifier


def group_of(run: dict[str, Any]) -> tuple[str, str, float]:
    """Return data set, threat and epsilon: what makes runs comparable."""
    found = run["results"]
    epsilon = 0.0 if found["threat"]["model"] == "corruptions" else found["threat"]["epsilon"]
    return found["data"]["dataset"], found["threat"]["model"], epsilon


def measured_row(run: dict[str, Any]) -> Row:
    """Return a run as a row."""
    found = run["results"]
    figures = found["figures"]
    accuracy = {name: cell["accuracy"] for name, cell in figures["attacks"].items()}
    common = {
        "model": found["model"]["spec"],
        "purifier": found["purifier_spec"],
        "measured": True,
        "n": figures["attacks"]["clean"]["n"],
        "clean": accuracy["clean"],
    }
    if "corruptions_mean" in figures:
        remark = "generated corruptions" if found["corruptions"] == "generated" else ""
        return Row(**common, worst=figures["corruptions_mean"], remark=remark)
    again = figures["resubmitted"]
    return Row(
        **common,
        static=accuracy.get("autoattack"),
        transfer=accuracy.get("transfer"),
        worst=figures["worst_case"]["accuracy"],
        interval=tuple(figures["worst_case"]["interval"]),
        budget=found["budget"]["name"],
        mean_of_draws=again["mean"] if again else None,
        worst_of_draws=again["worst_of_draws"]["accuracy"] if again else None,
        ms_per_image=found["timings"]["ms_per_image"]["defended"],
        attacks=len(figures["worst_case_over"]) - 1,
    )


def published_rows(group: tuple[str, str, float]) -> list[Row]:
    """Return RobustBench's figures for the same data set, threat and epsilon, best first."""
    dataset, threat, epsilon = group
    rows = []
    with LEADERBOARD.open(newline="") as opened:
        for card in csv.DictReader(opened):
            same = card["dataset"] == dataset and card["threat_model"] == threat
            if same and threat != "corruptions":
                same = abs(float(Fraction(card["epsilon"])) - epsilon) < 5e-4
            if not same:
                continue
            published = _share(card["autoattack_accuracy"])
            external = _share(card["external_accuracy"])
            worst = _share(card["corruptions_accuracy"]) if threat == "corruptions" else external or published
            rows.append(
                Row(
                    model=card["model"],
                    purifier="none",
                    measured=False,
                    n=10000 if dataset != "imagenet" else 5000,
                    clean=float(card["clean_accuracy"]) / 100,
                    static=published,
                    worst=worst,
                    remark="unreliable" if card["unreliable"] == "True" else "",
                )
            )
    return sorted(rows, key=lambda row: -(row.worst or 0))


def _share(percent: str) -> float | None:
    return float(percent) / 100 if percent else None
