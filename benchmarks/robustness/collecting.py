"""From the units of every chunk to the results of a record."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks import ATTACKS
from unperturb.benchmarks.robustness.figures import CLEAN, Outcomes, figures_of
from unperturb.benchmarks.robustness.units import Unit

RESUBMITTED = "resubmitted"
SURROGATE_IMAGES = "surrogate-images"  # made on another classifier, before they are judged
LARGER_PREFIX, PARTS_PREFIX = "larger:", "parts:"  # of units that are no attacks of the row
Collected = dict[str, list[Unit]]


def results_of(
    collected: Collected,
    bare: Collected | None,
    chunks: list[Tensor],
    *,
    weaker: list[str],
    surrogates: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return what came out, image by image, the figures, and what it took.

    bare: the bare classifier's units; weaker: why the attacks are less than a judge's; surrogates: the classifiers that
    the attack of that name made its images on
    """
    again = collected.get(RESUBMITTED)
    results: dict[str, Any] = {
        "indices": torch.cat(chunks).tolist(),
        "outcomes": _outcomes(_of_row(collected)),
        "bare_outcomes": None if bare is None else _outcomes(_of_row(bare)),
        "larger_epsilon": _outcomes(_among(collected, LARGER_PREFIX)),
        "bare_larger_epsilon": None if bare is None else _outcomes(_among(bare, LARGER_PREFIX)),
        "autoattack_parts": _outcomes(_among(collected, PARTS_PREFIX)),
        "weaker": weaker,
        "resubmitted": None if again is None else torch.cat([unit.right for unit in again], dim=1).int().tolist(),
    }
    if surrogates:
        results["surrogates"] = list(surrogates)
    taken = {name: units for name, units in collected.items() if not name.startswith(PARTS_PREFIX)}  # in the whole's
    n = sum(map(len, chunks))
    return {
        **results,
        "figures": figures_of(results),
        "passes_per_image": {
            name: {
                "forward": sum(unit.forward_passes for unit in units) / n,
                "backward": sum(unit.backward_passes for unit in units) / n,
            }
            for name, units in taken.items()
        },
        "timings": {"seconds": {name: sum(unit.seconds for unit in units) for name, units in taken.items()}},
    }


def _of_row(collected: Collected) -> Collected:
    """Return the attacks whose outcomes count."""
    return {name: units for name, units in collected.items() if name in ATTACKS or name == CLEAN}


def _among(collected: Collected, prefix: str) -> Collected:
    return {name.removeprefix(prefix): units for name, units in collected.items() if name.startswith(prefix)}


def _outcomes(collected: Collected) -> Outcomes:
    """Return 1, 0 or None per image."""
    return {
        name: [
            int(right) if attacked else None
            for unit in units
            for right, attacked in zip(unit.right.tolist(), unit.attacked.tolist(), strict=True)
        ]
        for name, units in collected.items()
    }
