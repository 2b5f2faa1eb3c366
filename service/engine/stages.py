"""Name what an image may go through: a preset of the purifier, the page's attack, or nothing; and count its passes."""

import functools

from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import CheckpointError
from unperturb.models.inference.continuous import (
    CrossEntropyAttack,
    RestoredStage,
    ReverseAttackStage,
    Stage,
    VoteStage,
    draws,
)
from unperturb.models.networks.readout import MAKE_ONE
from unperturb.models.purifiers.defended import presets_of, purifier_of, vote_of
from unperturb.models.purifiers.restored import Restored
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttack, ReverseAttackConfig

ATTACK = "attack"
ATTACK_LOOP = ProjectedGradient(direction="ascend", epsilon=8 / 255, step_size=2 / 255, steps=10, start="uniform")
BACKWARD = 2  # a pass backward costs about two forward


def stages_of(loaded: Checkpoint) -> dict[str, Stage]:
    """Return every stage that a checkpoint has the parts for. CheckpointError without a readout."""
    if loaded.card.readout.kind == "none":
        raise CheckpointError(f"checkpoint {loaded.card.id!r} {MAKE_ONE}")
    presets = {name: _stage(loaded, PRESETS[name]) for name in presets_of(loaded.card)}
    return {**presets, ATTACK: CrossEntropyAttack(loaded.classifier, ATTACK_LOOP)}


def _stage(loaded: Checkpoint, config: ReverseAttackConfig) -> Stage:
    vote, purifier = vote_of(loaded.card, config), purifier_of(loaded, config)
    if isinstance(purifier, ReverseAttack):
        return ReverseAttackStage(purifier, vote)
    return RestoredStage(purifier, vote) if isinstance(purifier, Restored) else VoteStage(vote)


@functools.cache
def passes(stage: str | None) -> int:
    """Return the work of one image, in images forward through the classifier."""
    steps, rows = shape(stage)
    return begin_passes(stage) + steps * step_passes(rows) + finish_passes(stage)


@functools.cache
def shape(stage: str | None) -> tuple[int, int]:
    """Return a stage's steps, and the images of one step of one image."""
    if stage is None:
        return 0, 0
    if stage == ATTACK:
        return ATTACK_LOOP.steps, 1
    return PRESETS[stage].loop.steps, PRESETS[stage].views if PRESETS[stage].loop.steps else 0


def begin_passes(stage: str | None) -> int:
    """Return the work before the first step: the restored view or image, where the checkpoint has a restorer."""
    return 1 if stage in PRESETS and (PRESETS[stage].restored or PRESETS[stage].restores) else 0


def step_passes(rows: int) -> int:
    """Return the work of one step: every row forward and backward."""
    return rows * (1 + BACKWARD)


def finish_passes(stage: str | None) -> int:
    """Return the work after the last step: the losses before (the first step's, if it draws nothing) and after, and
    both classifications.
    """
    if stage is None:
        return 1
    drawn, vote = (True, None) if stage == ATTACK else (draws(PRESETS[stage]), PRESETS[stage].vote)
    return (2 if drawn else 1) * shape(stage)[1] + 1 + (1 if vote is None else len(vote))
