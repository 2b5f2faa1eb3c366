"""From per-image outcomes to figures: the paired gain, the worst case, signs of masked gradients; shards to a whole."""

from collections.abc import Sequence
from typing import Any

from unperturb.benchmarks.reporting.results import accuracy, gain
from unperturb.benchmarks.robustness.attacks import (
    ATTACKS,
    AUTOATTACK,
    DEFENDED_AUTOATTACK,
    GRADIENT,
    QUERYING,
    SURROGATE,
    TWICE,
    UNKNOWING,
)

CLEAN = "clean"
LARGER = (2, 4)  # times epsilon: a defense that withstands these hides its gradient
LESS = "the attacks have less than the budget `standard`"  # before the bare classifier as well: no bound then
NO_AUTOATTACK = "AutoAttack was not run through the defense, only on the bare classifier"
NO_JUDGE = "AutoAttack was run neither on the bare classifier nor through the defense"
Outcomes = dict[str, list[int | None]]  # 1: withstands, 0: broken, None: was broken already, and not attacked

# How far a figure may be off before the report says so.
NOT_CONVERGED, NOT_NEAR_ZERO = 0.02, 0.05
BEYOND_GRADIENT = {  # told from the first image on, since a gain is of a few
    "transfer_beyond_gradient": "transferred images break {broken:,} of {n:,} that APGD's cross-entropy through the "
    "full gradient does not",
    "queries_beyond_gradient": "queries alone break {broken:,} of {n:,} that no gradient does",
}


def survivors(outcomes: Outcomes) -> list[bool]:
    """Return per image whether it is classified right and no attack has broken it."""
    return [0 not in row for row in zip(*outcomes.values(), strict=True)]


def withstands_unknowing(outcomes: Outcomes) -> list[bool] | None:
    """Return per image whether it withstands an attacker who knows the classifier and not the defense; None where not
    attacked.
    """
    rows = [outcomes[name] for name in UNKNOWING if name in outcomes]
    return [all(row) for row in zip(*rows, strict=True)] if len(rows) == len(UNKNOWING) else None


def summarise(
    outcomes: Outcomes,
    *,
    bare: Outcomes | None,
    resubmitted: list[list[int]] | None,
    larger: dict[str, list[int | None]],
    by_part: dict[str, list[int | None]],
    weaker: Sequence[str] = (),
    surrogates: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return the figures of a row.

    bare: the bare classifier's outcomes on the same images, where the row has a defense
    resubmitted: one row per fresh seed, of the hardest point of each image
    larger: outcomes at larger epsilons, by their factor
    by_part: outcomes of AutoAttack's parts on the defense, or on the bare classifier of a row without one
    weaker: why the attacks are less than a judge's; the gain is then at most what they leave, or (LESS) near it
    surrogates: the classifiers that the images of that attack were made on
    """
    left = survivors(outcomes)
    found: dict[str, Any] = {
        "clean": _cell(outcomes[CLEAN]),
        "worst_case": accuracy(left),
        "worst_case_over": [name for name in outcomes if name != CLEAN],
        "attacks": _attacks(outcomes),
        "bare": None,
        "gain": None,
        "weaker": list(weaker),
        "clean_gain": None,
        "resubmitted": _resubmitted(resubmitted),
        "signs": _signs(outcomes, left, larger, by_part),
    }
    if bare is not None:
        bare_left = survivors(bare)
        found["bare"] = {
            "clean": _cell(bare[CLEAN]),
            "worst_case": accuracy(bare_left),
            "over": [name for name in bare if name != CLEAN],
        }
        found["gain"] = gain(left, bare_left)
        if DEFENDED_AUTOATTACK not in outcomes:
            found["weaker"].append(NO_AUTOATTACK if AUTOATTACK in bare else NO_JUDGE)
        found["clean_gain"] = _paired(CLEAN, outcomes, bare)
    if surrogates:
        found[SURROGATE] = {
            "of": list(surrogates),
            "accuracy": _cell(outcomes[SURROGATE]),
            "bare": None if bare is None else _cell(bare[SURROGATE]),
            "gain": None if bare is None else _paired(SURROGATE, outcomes, bare),
        }
    return found


def _paired(name: str, outcomes: Outcomes, bare: Outcomes) -> dict[str, Any]:
    """Return the gain on the images of one attack, which every image that is right was under."""
    return gain(*([bool(value) for value in row[name]] for row in (outcomes, bare)))


def _cell(values: list[int | None]) -> dict[str, Any]:
    return accuracy([bool(value) for value in values])


def _attacks(outcomes: Outcomes) -> dict[str, Any]:
    """Return per attack how many images it was run on and broke, and what is left after it and all before it."""
    found, so_far = {}, dict[str, list[int | None]]()
    for name, values in outcomes.items():
        so_far[name] = values
        alone = name == CLEAN or ATTACKS[name].on == "right"
        found[name] = {
            "attacked": sum(value is not None for value in values),
            "broken": values.count(0),
            "left": accuracy(survivors(so_far)),
            "alone": _cell(values) if alone else None,
        }
    return found


def _resubmitted(draws: list[list[int]] | None) -> dict[str, Any] | None:
    if draws is None:
        return None
    flat = [bool(value) for row in draws for value in row]
    never = [all(column) for column in zip(*draws, strict=True)]
    return {"draws": len(draws), "mean": sum(flat) / len(flat), "worst_of_draws": accuracy(never)}


def _signs(outcomes: Outcomes, left: list[bool], larger: Outcomes, by_part: Outcomes) -> dict[str, Any]:
    """Return what would show that the gradients are masked (Athalye et al. 2018, section 3.1), and sentences on it."""
    signs: dict[str, Any] = {
        "twice_the_iterations": None,
        "epsilon": [],
        "transfer_beyond_gradient": None,
        "queries_beyond_gradient": None,
        "warnings": [],
    }
    warnings, n = signs["warnings"], len(left)
    once = outcomes.get(GRADIENT)
    if once is not None and TWICE in outcomes:
        both = [bool(a) and b != 0 for a, b in zip(once, outcomes[TWICE], strict=True)]
        signs["twice_the_iterations"] = {"once": _cell(once), "twice": accuracy(both)}
        fall = (sum(map(bool, once)) - sum(both)) / n
        if fall > NOT_CONVERGED:
            warnings.append(f"twice the iterations lower {GRADIENT} by another {fall * 100:.1f} points")
    for times, values in larger.items():
        left = [was and value != 0 for was, value in zip(left, values, strict=True)]
        signs["epsilon"].append({"times": int(times), "accuracy": accuracy(left)})
    if signs["epsilon"] and (share := signs["epsilon"][-1]["accuracy"]["accuracy"]) > NOT_NEAR_ZERO:
        times = signs["epsilon"][-1]["times"]
        warnings.append(f"{share:.1%} withstand {times} times the epsilon: a figure that should be near 0")
    transferred = [outcomes[name] for name in (*UNKNOWING, SURROGATE) if name in outcomes]
    if once is not None and transferred:
        stronger = [bool(value) and outcomes.get(TWICE, once)[i] != 0 for i, value in enumerate(once)]
        broken = sum(a and not all(b) for a, *b in zip(stronger, *transferred, strict=True))
        signs["transfer_beyond_gradient"] = {"broken": broken, "n": n}
    querying = [outcomes[name] for name in QUERYING if name in outcomes]
    querying += [by_part[part] for part in QUERYING if part in by_part]
    if querying and once is not None:
        whole = (DEFENDED_AUTOATTACK, *([AUTOATTACK] if by_part else []))  # its parts stand for it
        gradients = [values for name, values in outcomes.items() if name not in (*QUERYING, *whole)]
        gradients += [values for part, values in by_part.items() if part not in QUERYING]
        broken = sum(
            0 in row and 0 not in others
            for row, others in zip(zip(*querying, strict=True), zip(*gradients, strict=True), strict=True)
        )
        signs["queries_beyond_gradient"] = {"broken": broken, "n": n}
    warnings += beyond_gradient(signs)
    return signs


def beyond_gradient(signs: dict[str, Any]) -> list[str]:
    """Return sentences on the images that were broken without the defense's gradient and not by it."""
    counted = [(says, signs[name]) for name, says in BEYOND_GRADIENT.items()]
    return [says.format(**count) for says, count in counted if count and count["broken"]]


def summarise_corruptions(outcomes: Outcomes, *, bare: Outcomes | None) -> dict[str, Any]:
    """Return the accuracy on clean images and on each kind and severity, the mean over all of the latter, and the gain.

    The gain is paired by image, each with its mean over the kinds.
    """
    means = _means(outcomes)
    found: dict[str, Any] = {
        "clean": _cell(outcomes[CLEAN]),
        "attacks": {name: {"alone": _cell(values)} for name, values in outcomes.items() if name != CLEAN},
        "corruptions_mean": sum(means) / len(means),
        "bare": None,
        "gain": None,
        "clean_gain": None,
    }
    if bare is not None:
        bare_means = _means(bare)
        found["bare"] = {"clean": _cell(bare[CLEAN]), "corruptions_mean": sum(bare_means) / len(bare_means)}
        found["gain"] = gain(means, bare_means)
        found["clean_gain"] = _paired(CLEAN, outcomes, bare)
    return found


def _means(outcomes: Outcomes) -> list[float]:
    """Return per image the share of corruptions under which it is classified right."""
    kinds = [values for name, values in outcomes.items() if name != CLEAN]
    return [sum(map(bool, row)) / len(row) for row in zip(*kinds, strict=True)]


SAME = (
    "model",
    "purifier_spec",
    "purifier",
    "digests",
    "data",
    "threat",
    "budget",
    "purifies",
    "could_not_run",
    "surrogates",
)
PER_IMAGE = ("outcomes", "bare_outcomes", "larger_epsilon", "bare_larger_epsilon", "autoattack_parts")


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

    def joined(key: str) -> Any:  # noqa: ANN401
        if any(part.get(key) is None for part in parts):
            return None
        return {name: [parts[part][key][name][place] for _, part, place in order] for name in parts[0][key]}

    names = parts[0]["timings"]["seconds"]
    seconds = {name: sum(part["timings"]["seconds"][name] for part in parts) for name in names}
    whole = {
        **parts[0],
        "indices": indices,
        **{key: joined(key) for key in PER_IMAGE if key in parts[0]},
        "timings": {**parts[0]["timings"], "seconds": seconds},
    }
    if "corruptions" in whole:
        return {**whole, "figures": summarise_corruptions(whole["outcomes"], bare=whole["bare_outcomes"])}
    draws = None
    if whole["resubmitted"] is not None:
        count = len(whole["resubmitted"])
        draws = [[parts[part]["resubmitted"][draw][place] for _, part, place in order] for draw in range(count)]
    return {
        **whole,
        "resubmitted": draws,
        "figures": figures_of({**whole, "resubmitted": draws}),
        "passes_per_image": _passes(parts, len(indices)),
        "notes": sorted({note for part in parts for note in part["notes"]}),
    }


def joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of one row over the attacks of all its runs, which were of the same images.

    An image is broken where any of them says so. What is shown and timed is the first run's.
    """

    def worst(key: str) -> Outcomes | None:
        held = [run[key] for run in runs if run.get(key) is not None]  # a record may be older than the key
        found: Outcomes = {}
        for outcomes in held:
            for name, values in outcomes.items():
                before = found.get(name, [None] * len(values))
                pairs = zip(before, values, strict=True)
                found[name] = [min((one for one in pair if one is not None), default=None) for pair in pairs]
        return found if held else None

    seconds = {name: spent for run in runs[::-1] for name, spent in run["timings"]["seconds"].items()}
    whole: dict[str, Any] = {**runs[0], **{key: worst(key) for key in PER_IMAGE}}
    lacking = {name: reason for run in runs for name, reason in run["could_not_run"].items()}
    whole |= {
        "could_not_run": {name: reason for name, reason in lacking.items() if name not in whole["outcomes"]},
        "notes": sorted({note for run in runs for note in run["notes"]}),
        "weaker": sorted({reason for run in runs for reason in run.get("weaker", ())}),
        "passes_per_image": {name: one for run in runs[::-1] for name, one in run["passes_per_image"].items()},
        "resubmitted": next((run["resubmitted"] for run in runs if run["resubmitted"] is not None), None),
        "timings": {**runs[0]["timings"], "seconds": seconds},
    }
    surrogates = [one for run in runs for one in run.get("surrogates", ())]
    if surrogates:
        whole["surrogates"] = [one for place, one in enumerate(surrogates) if one not in surrogates[:place]]
    return {**whole, "figures": figures_of(whole)}


def figures_of(results: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a record's per-image results."""
    return summarise(
        results["outcomes"],
        bare=results["bare_outcomes"],
        resubmitted=results["resubmitted"],
        larger=results["larger_epsilon"],
        by_part=results["autoattack_parts"],
        weaker=results.get("weaker", ()),
        surrogates=results.get("surrogates", ()),
    )


def _passes(parts: list[dict[str, Any]], n: int) -> dict[str, dict[str, float]]:
    weights = [len(part["indices"]) / n for part in parts]
    return {
        name: {
            kind: sum(
                weight * part["passes_per_image"][name][kind] for weight, part in zip(weights, parts, strict=True)
            )
            for kind in ("forward", "backward")
        }
        for name in parts[0]["passes_per_image"]
    }
