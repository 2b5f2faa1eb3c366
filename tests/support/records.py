"""Result records of the harness in the form of schema 2, their figures counted from outcomes."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unperturb.benchmarks.reporting.results import SCHEMA_VERSION, accuracy, gain
from unperturb.benchmarks.reporting.rows import SCRIPT

Outcomes = Mapping[str, Sequence[int | None]]

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ALONE = ("clean", "noise", "apgd-ce", "transfer", "transfer-further", "autoattack")  # run on every image that is right
NO_SIGNS: dict[str, Any] = {
    "twice_the_iterations": None,
    "epsilon": [],
    "transfer_beyond_gradient": None,
    "queries_beyond_gradient": None,
    "warnings": [],
}


def survivors(outcomes: Outcomes) -> list[bool]:
    """Which images no attack broke."""
    return [all(image) for image in zip(*outcomes.values(), strict=True)]


def in_order(broken_by: Mapping[str, int], n: int) -> dict[str, list[int | None]]:
    """Outcomes of `n` images, of which every attack in turn breaks so many of the first that are left.

    Those that are run on every image that is right break again what is broken already.
    """
    outcomes: dict[str, list[int | None]] = {}
    start, wrong = 0, broken_by["clean"]
    for name, count in broken_by.items():
        before = [None if name not in ALONE or image < wrong else 0 for image in range(start)]
        outcomes[name] = [*before, *([0] * count), *([1] * (n - start - count))]
        start += count
    return outcomes


def _attacks(outcomes: Outcomes) -> dict[str, Any]:
    found, seen = {}, {}
    for name, values in outcomes.items():
        seen[name] = values
        found[name] = {
            "attacked": sum(value is not None for value in values),
            "broken": sum(value == 0 for value in values),
            "left": accuracy(survivors(seen)),
            "alone": accuracy([bool(value) for value in values]) if name in ALONE else None,
        }
    return found


def _gains(outcomes: Outcomes, bare: Outcomes | None) -> dict[str, Any]:
    if bare is None:
        return {"bare": None, "gain": None, "clean_gain": None}
    clean = [[bool(value) for value in values["clean"]] for values in (outcomes, bare)]
    return {
        "bare": {
            "clean": accuracy(clean[1]),
            "worst_case": accuracy(survivors(bare)),
            "over": [name for name in bare if name != "clean"],
        },
        "gain": gain(survivors(outcomes), survivors(bare)),
        "clean_gain": gain(*clean),
    }


def record(
    outcomes: Outcomes,
    bare: Outcomes | None = None,
    *,
    purifier: str | None = None,
    threat: str = "Linf",
    epsilon: float = 8 / 255,
    own: bool = False,
    shard: str = "1/1",
    indices: Sequence[int] | None = None,
    resubmitted: list[list[int]] | None = None,
    signs: Mapping[str, Any] = NO_SIGNS,
    could_not_run: Mapping[str, str] | None = None,
    model: str = "tiny",
    dataset: str = "cifar10",
    ms: float = 2.0,
    panel: int = 0,
) -> dict[str, Any]:
    """A record of a ball; `bare` are the outcomes of the classifier alone, None where there is no purifier."""
    n = len(outcomes["clean"])
    again = None
    if resubmitted is not None:
        flat = [bool(value) for row in resubmitted for value in row]
        never = [all(column) for column in zip(*resubmitted, strict=True)]
        again = {"draws": len(resubmitted), "mean": sum(flat) / len(flat), "worst_of_draws": accuracy(never)}
    names = list(outcomes)
    figures = {
        "clean": accuracy([bool(value) for value in outcomes["clean"]]),
        "worst_case": accuracy(survivors(outcomes)),
        "worst_case_over": [name for name in names if name != "clean"],
        "attacks": _attacks(outcomes),
        **_gains(outcomes, bare),
        "resubmitted": again,
        "signs": dict(signs),
    }
    found = {
        "outcomes": outcomes,
        "bare_outcomes": bare,
        "resubmitted": resubmitted,
        "larger_epsilon": {},
        "autoattack_parts": {},
        "figures": figures,
        "could_not_run": dict(could_not_run or {}),
        "notes": [],
        "passes_per_image": {name: {"forward": 1.0, "backward": 0.0} for name in names},
        "timings": {
            "seconds": dict.fromkeys(names, 1.0),
            "ms_per_image": {"classifier": 0.5, "defended": ms, "times_the_classifier": 2 * ms},
        },
        "flags": {"randomised": bare is not None, "optimisation_loop": False, "zero_gradients": 0, "of_images": n},
        "curves": {"images": n, "clean": [4.0, 3.5, 3.2], "attacked": [4.2, 3.6, 3.3]}
        if bare
        else {"images": n, "clean": [], "attacked": []},
        "panel": _panel(panel),
    }
    spec = purifier or ("none" if bare is None else "reverse-attack")
    described = _described(spec, threat, epsilon, own=own, model=model, dataset=dataset, shard=shard)
    place = {"indices": list(range(n) if indices is None else indices), "purifies": bare is not None}
    return _wrapped({**described, **place, **found}, n)


def averaged_record(
    outcomes: Outcomes, bare: Outcomes | None = None, *, threat: str = "corruptions", **described: Any
) -> dict[str, Any]:
    """A record of corruptions or noise."""
    n, kinds = len(outcomes["clean"]), [name for name in outcomes if name != "clean"]

    def mean(of: Outcomes) -> list[float]:
        return [sum(int(bool(of[kind][image])) for kind in kinds) / len(kinds) for image in range(n)]

    figures: dict[str, Any] = {
        "clean": accuracy([bool(value) for value in outcomes["clean"]]),
        "attacks": {kind: {"alone": accuracy([bool(value) for value in outcomes[kind]])} for kind in kinds},
        "corruptions_mean": sum(mean(outcomes)) / n,
        "bare": None,
        "gain": None,
        "clean_gain": None,
    }
    if bare is not None:
        clean = accuracy([bool(value) for value in bare["clean"]])
        figures |= {**_gains(outcomes, bare), "bare": {"clean": clean, "corruptions_mean": sum(mean(bare)) / n}}
        figures["gain"] = gain(mean(outcomes), mean(bare))
    spec = "none" if bare is None else "reverse-attack"
    options = {"own": False, "model": "tiny", "dataset": "cifar10", "shard": "1/1", "purifier": spec, **described}
    spec = options.pop("purifier")
    found = {
        **_described(spec, threat, 8 / 255, **options),
        "purifies": bare is not None,
        "indices": list(range(n)),
        "outcomes": outcomes,
        "bare_outcomes": bare,
        "corruptions": "generated",
        "figures": figures,
        "timings": {"seconds": {"all": 1.0}},
    }
    return _wrapped(found, n)


def _described(
    spec: str, threat: str, epsilon: float, *, own: bool, model: str, dataset: str, shard: str
) -> dict[str, Any]:
    return {
        "model": {"spec": model, "architecture": "preact_resnet18", "weights_sha256": "0" * 64},
        "classes": CLASSES,
        "purifier_spec": spec,
        "purifier": {"kind": spec.partition(":")[0]},
        "data": {"dataset": dataset, "source": "folder", "sha256": "1" * 64, "own": own},
        "threat": {"model": threat, "epsilon": epsilon},
        "budget": {"name": "fast", "steps": 10},
        "shard": shard,
    }


def _wrapped(found: dict[str, Any], n: int) -> dict[str, Any]:
    config = {"model": "default", "purifier": found["purifier_spec"], "n_examples": n, "budget": "fast", "seed": 0}
    return {
        "schema_version": SCHEMA_VERSION,
        "script": SCRIPT,
        "config": config,
        "commit": "a" * 40 + "+changes",
        "versions": {"torch": "2.15.0"},
        "machine": {"device": "cpu", "name": "x86_64", "cpu_threads": 2},
        "finished_at": "2026-11-28T00:00:00Z",
        "results": found,
    }


def _panel(count: int) -> list[dict[str, Any]]:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (90, 120, 160)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    return [
        {
            "label": 8,
            "predicted": {"clean": 8, "attacked": 0, "purified": 8},
            "images": dict.fromkeys(("clean", "attacked", "purified", "attack", "purification"), image),
        }
        for _ in range(count)
    ]


def write(folder: Path, name: str, run: dict[str, Any]) -> Path:
    """Write a record as the harness does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(run))
    return file


N = 20
BARE = in_order({"clean": 4, "apgd-ce": 5, "autoattack": 1}, N)  # 10 of 20 are left
WORSE = in_order({"clean": 4, "apgd-ce": 3, "transfer": 1, "transfer-further": 0, "intermediate": 8}, N)  # 4 are left
