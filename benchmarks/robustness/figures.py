"""From per-image outcomes to figures: accuracies with intervals, the worst case, resubmissions; shards to a whole."""

from typing import Any

from unperturb.benchmarks.reporting.results import accuracy

CLEAN, STATIC, TRANSFER, CONTROL = "clean", "autoattack", "transfer", "noise"


def summarise(outcomes: dict[str, list[int]], resubmitted: list[list[int]] | None, *, purifies: bool) -> dict[str, Any]:
    """Per attack the robust accuracy; the worst case counts an image as broken that any attack broke.

    outcomes: attack -> 1 per image that is still classified right; AutoAttack's are the static classifier's, and
    count towards the worst case only where there is no purifier.
    resubmitted: one row per fresh seed, of the hardest point of each image
    """
    counted = {name: values for name, values in outcomes.items() if name != STATIC or not purifies}
    survivors = [all(row) for row in zip(*counted.values(), strict=True)]
    found: dict[str, Any] = {
        "attacks": {name: accuracy([bool(value) for value in values]) for name, values in outcomes.items()},
        "worst_case": accuracy(survivors),
        "worst_case_over": sorted(counted),
        "resubmitted": None,
    }
    if resubmitted is not None:
        flat = [bool(value) for row in resubmitted for value in row]
        never = [all(column) for column in zip(*resubmitted, strict=True)]
        found["resubmitted"] = {
            "draws": len(resubmitted),
            "mean": sum(flat) / len(flat),
            "worst_of_draws": accuracy(never),
        }
    return found


def summarise_corruptions(outcomes: dict[str, list[int]]) -> dict[str, Any]:
    """Return the accuracy on clean images and on each corruption and severity, and the mean over all of the latter."""
    cells = {name: accuracy([bool(value) for value in values]) for name, values in outcomes.items()}
    means = [cell["accuracy"] for name, cell in cells.items() if name != CLEAN]
    return {"attacks": cells, "corruptions_mean": sum(means) / len(means)}


SAME = ("model", "purifier_spec", "purifier", "data", "threat", "budget", "purifies")


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the results of one run's shards to those of the whole; what is shown of a few images is the first shard's.

    Raises ValueError saying why the parts make no whole.
    """
    for name in SAME:
        if any(part.get(name) != parts[0].get(name) for part in parts):
            raise ValueError(f"they differ in {name}")
    if any(list(part["outcomes"]) != list(parts[0]["outcomes"]) for part in parts):
        raise ValueError("they differ in the attacks")
    order = sorted(
        (index, part, place) for part, found in enumerate(parts) for place, index in enumerate(found["indices"])
    )
    indices = [index for index, *_ in order]
    if indices != list(range(len(indices))):
        raise ValueError("images are missing or twice there")
    outcomes = {
        name: [parts[part]["outcomes"][name][place] for _, part, place in order] for name in parts[0]["outcomes"]
    }
    names = parts[0]["timings"]["seconds"]
    seconds = {name: sum(part["timings"]["seconds"][name] for part in parts) for name in names}
    whole = {
        **parts[0],
        "indices": indices,
        "outcomes": outcomes,
        "timings": {**parts[0]["timings"], "seconds": seconds},
    }
    if "corruptions" in whole:
        return {**whole, "figures": summarise_corruptions(outcomes)}
    draws = None
    if whole["resubmitted"] is not None:
        count = len(whole["resubmitted"])
        draws = [[parts[part]["resubmitted"][draw][place] for _, part, place in order] for draw in range(count)]
    weights = [len(part["indices"]) / len(indices) for part in parts]
    passes = {
        name: {
            kind: sum(
                weight * part["passes_per_image"][name][kind] for weight, part in zip(weights, parts, strict=True)
            )
            for kind in ("forward", "backward")
        }
        for name in whole["passes_per_image"]
    }
    return {
        **whole,
        "resubmitted": draws,
        "figures": summarise(outcomes, draws, purifies=whole["purifies"]),
        "passes_per_image": passes,
        "notes": sorted({note for part in parts for note in part["notes"]}),
    }
