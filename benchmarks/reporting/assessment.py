"""Make a card's `assessment` of the harness's runs: what each preset is worth there, and the advice."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from unperturb.benchmarks.reporting.columns import GAIN, paired, percent, points
from unperturb.benchmarks.reporting.first_page import DEFAULT, transfer_gain
from unperturb.benchmarks.reporting.rows import Row, measured_row
from unperturb.benchmarks.reporting.sections import Summary, tone
from unperturb.models.checkpoints.card import Card
from unperturb.models.purifiers.defended import preset_of as of_card
from unperturb.models.purifiers.parameters import parameters
from unperturb.models.purifiers.reverse_attack import ReverseAttackConfig

HEADS = ("preset", "clean", "transfer", "worst case, full gradient", "ms/image")
CLEAN_LOSS = 0.02  # of clean accuracy, from which on a preset is not advised


class Judged(NamedTuple):
    """A row of the report, and the paired gain on the bare classifier's adversarial images."""

    row: Row
    transfer: dict[str, Any] | None


def judged_presets(runs: Sequence[dict[str, Any]], card: Card, presets: Collection[str]) -> list[Judged]:
    """Return the bare classifier and those presets among the runs of a checkpoint, each named as a preset is.

    Left out: runs of other weights, and of a preset whose parameters were others. ValueError for two runs of one, or
    runs of different images, balls or budgets.
    """
    chosen = []
    for run in runs:
        name = preset_of(run["results"]["purifier_spec"])
        same = run["results"]["model"]["weights_sha256"] == card.weights_sha256
        if same and (name == "none" or (name in presets and _ran_as(run, of_card(card, name)))):
            chosen.append((run, dataclasses.replace(measured_row(run), purifier=name)))
    judged = [Judged(row, transfer_gain(run)) for run, row in chosen]
    names = [one.row.purifier for one in judged]
    kinds = {(run["results"]["data"]["sha256"], row.n, row.group, row.budget) for run, row in chosen}
    if len(set(names)) < len(names) or len(kinds) > 1:
        raise ValueError(f"runs of {', '.join(names)}: one of each is needed, of the same images, ball and budget")
    return judged


def _ran_as(run: dict[str, Any], config: ReverseAttackConfig) -> bool:
    """Return whether a run's purifier had the parameters of a preset as the checkpoint has it."""
    ran, wanted = run["results"]["purifier"], parameters(config)
    own = {**ran.get("config", {}), "vote": ran["vote"]}  # the vote is the defense's, not only its steps'
    own = json.loads(json.dumps(own))  # a run that was not read from a file has tuples
    return bool(own == wanted if config.loop.steps else own["vote"] == wanted["vote"])


def preset_of(specification: str) -> str:
    """Return the preset that a purifier's specification is, or the specification."""
    kind, _, name = specification.partition(":")
    return name or "default" if kind == DEFAULT else specification


def assessment(judged: Sequence[Judged], card: Card, *, data: str, seed: int) -> dict[str, Any]:
    """Return what stands on the card; gains are shares of the images, paired, with 95% intervals.

    It holds for the card's weights, and each preset's figures for the parameters that stand with them.
    """
    rows = [one.row for one in judged]
    return {
        "n": rows[0].n,
        "seed": seed,
        "epsilon": rows[0].group.epsilon,
        "budget": rows[0].budget,
        "data": data,
        "weights_sha256": card.weights_sha256,
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
                "parameters": None if row.gain is None else parameters(of_card(card, row.purifier)),
            }
            for row, transfer in judged
        },
        "verdict": verdict([one for one in judged if one.row.gain is not None]),
    }


def summary(judged: Sequence[Judged], found: dict[str, Any], *, headless: Sequence[str] = ()) -> Summary:
    """Return a line for the bare classifier and for each preset, in points of 100 images with their 95% intervals, and
    the assessment's verdict; `headless` names the presets that were left out for want of a head.
    """
    rows = []
    for row, transfer in judged:
        texts = [f"{percent(share).text}%" if share is not None else "" for share in (row.clean, row.static, row.worst)]
        if row.gain is not None:
            clean = points(row.clean_gain, row.clean_gain_interval)
            texts = [cell.whole for cell in (clean, paired(transfer), GAIN.cell(row))]
        rows.append((row.purifier, *texts, "" if row.ms_per_image is None else f"{row.ms_per_image:.1f}"))
    below = [f"n = {found['n']}; the first line in percent, the others in points against it, 95% intervals"]
    if headless:
        below.append(f"not measured, for want of a head: {', '.join(headless)}")
    return Summary(f"Does a purifier help {judged[0].row.model}?", HEADS, rows, below, found["verdict"])


def verdict(judged: Sequence[Judged]) -> str:
    """Return the advice: the preset of the largest worst-case gain beyond doubt, or one that helps only against those
    who do not know of it, or none; and one that gains more at a loss of clean accuracy.
    """
    if not judged:
        return "nothing was measured: train a head, or take --presets vote"
    harmless = [one for one in judged if (one.row.clean_gain or 0.0) >= -CLEAN_LOSS]
    free = _without_loss(judged, harmless)
    least = max([CLEAN_LOSS, *(one.row.gain or 0.0 for one in harmless)])
    costly = [one.row for one in judged if one not in harmless and tone(one.row) in ("better", "unjudged")]
    traded = [row for row in costly if (row.gain or 0.0) > least]
    if not traded:
        return free
    best = max(traded, key=lambda row: row.gain or 0.0)
    clean = points(best.clean_gain, best.clean_gain_interval).whole
    trade = f"`{best.purifier}`: {GAIN.cell(best).whole} points in the worst case, {clean} on clean images"
    if free.startswith("don't purify"):
        return f"don't purify where no attack is to be expected; where one is, {trade}"
    return f"{free}; where attacks are to be expected, {trade}"


def _without_loss(judged: Sequence[Judged], harmless: Sequence[Judged]) -> str:
    """Return the advice to who wants no clean accuracy lost."""
    better = [one.row for one in harmless if tone(one.row) == "better"]
    if better:
        best = max(better, key=lambda row: row.gain or 0.0)
        return f"use `{best.purifier}`: {GAIN.cell(best).whole} points in the worst case"
    unaware = [
        one
        for one in harmless
        if tone(one.row) in ("even", "unjudged") and one.transfer and one.transfer["interval"][0] > 0
    ]
    if unaware:
        row, transfer = max(unaware, key=lambda one: one.transfer["mean"] if one.transfer else 0.0)
        known = "is not judged" if tone(row) == "unjudged" else "makes no difference that can be told"
        return (
            f"use `{row.purifier}` against attackers who do not know of it: {paired(transfer).whole} points; against "
            f"those who do it {known}"
        )
    if any(tone(one.row) == "unjudged" for one in harmless):
        return (
            "not judged: a longer budget, or the attacks that were not run, may tell whether a preset helps this model"
        )
    if all(tone(one.row) == "worse" or one not in harmless for one in judged):
        return "don't purify: every preset makes this model worse, on clean images or against an attacker who knows it"
    return "don't purify: no preset makes a difference that can be told on these images; more images may tell"
