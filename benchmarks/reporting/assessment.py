"""Make a card's `assessment` of the harness's runs: what each preset is worth there, and the advice."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from unperturb.benchmarks.reporting.columns import GAIN, points
from unperturb.benchmarks.reporting.first_page import DEFAULT, transfer_gain
from unperturb.benchmarks.reporting.rows import Row, measured_row
from unperturb.benchmarks.reporting.sections import tone
from unperturb.models.purifiers.parameters import parameters
from unperturb.models.purifiers.reverse_attack import PRESETS

CLEAN_LOSS = 0.02  # of clean accuracy, from which on a preset is not advised


class Judged(NamedTuple):
    """A row of the report, and the paired gain on the bare classifier's adversarial images."""

    row: Row
    transfer: dict[str, Any] | None


def judged_presets(runs: Sequence[dict[str, Any]], presets: Collection[str]) -> list[Judged]:
    """Return the bare classifier and those presets among one classifier's runs, each named as a preset is.

    ValueError for two runs of one, or runs of different images or budgets.
    """
    rows = [(run, measured_row(run)) for run in runs]
    named = [(run, dataclasses.replace(row, purifier=preset_of(row.purifier))) for run, row in rows]
    judged = [Judged(row, transfer_gain(run)) for run, row in named if row.purifier in ("none", *presets)]
    names = [one.row.purifier for one in judged]
    if len(set(names)) < len(names) or len({(one.row.n, one.row.budget) for one in judged}) > 1:
        raise ValueError(f"runs of {', '.join(names)}: one of each is needed, of the same images and budget")
    return judged


def preset_of(specification: str) -> str:
    """Return the preset that a purifier's specification is, or the specification."""
    kind, _, name = specification.partition(":")
    return name or "default" if kind == DEFAULT else specification


def assessment(judged: Sequence[Judged], *, data: str, seed: int, weights_sha256: str) -> dict[str, Any]:
    """Return what stands on the card; gains are shares of the images, paired, with 95% intervals.

    It holds for those weights, and each preset's figures for the parameters that stand with them.
    """
    rows = [one.row for one in judged]
    return {
        "n": rows[0].n,
        "seed": seed,
        "epsilon": rows[0].group.epsilon,
        "budget": rows[0].budget,
        "data": data,
        "weights_sha256": weights_sha256,
        "presets": {
            row.purifier: {
                "worst_case": row.worst,
                "gain": row.gain,
                "gain_interval": row.gain_interval,
                "gain_at_most": row.gain_at_most,
                "attacks": row.attacks,
                "clean": row.clean,
                "clean_gain": row.clean_gain,
                "clean_gain_interval": row.clean_gain_interval,
                "transfer_gain": transfer,
                "ms_per_image": row.ms_per_image,
                "parameters": parameters(PRESETS[row.purifier]) if row.purifier in PRESETS else None,
            }
            for row, transfer in judged
        },
        "verdict": verdict([one for one in judged if one.row.gain is not None]),
    }


def verdict(judged: Sequence[Judged]) -> str:
    """Return the advice: the preset of the largest worst-case gain beyond doubt, or one that helps only against those
    who do not know of it, or none.
    """
    if not judged:
        return "nothing was measured: train a head, or take --presets vote"
    harmless = [one for one in judged if (one.row.clean_gain or 0.0) >= -CLEAN_LOSS]
    better = [one.row for one in harmless if tone(one.row) == "better"]
    if better:
        best = max(better, key=lambda row: row.gain or 0.0)
        return f"use `{best.purifier}`: {GAIN.cell(best).whole} points in the worst case"
    unaware = [one for one in harmless if tone(one.row) == "even" and one.transfer and one.transfer["interval"][0] > 0]
    if unaware:
        row, transfer = max(unaware, key=lambda one: one.transfer["mean"] if one.transfer else 0.0)
        return (
            f"use `{row.purifier}` against attackers who do not know of it: {points_of(transfer)} points; against "
            "those who do it makes no difference that can be told"
        )
    if all(tone(one.row) == "worse" or one not in harmless for one in judged):
        return "don't purify: every preset makes this model worse, on clean images or against an attacker who knows it"
    return "don't purify: no preset makes a difference that can be told on these images; more images may tell"


def points_of(gain: dict[str, Any] | None) -> str:
    """Return a paired gain in points, with its interval."""
    return "" if gain is None else points(gain["mean"], tuple(gain["interval"])).whole
