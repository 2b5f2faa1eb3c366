"""A checkpoint in memory: one replica per worker, each with a stage for every preset and one for attacking."""

from pathlib import Path

import torch

from models import checkpoint
from models.checkpoint import Card
from models.classifier import ImageClassifier
from models.continuous import CrossEntropyAttack, Purification, Stage
from models.defended import reverse_attack_of
from models.projected_gradient import ProjectedGradient
from models.reverse_attack import PRESETS

ATTACK = "attack"
ATTACK_LOOP = ProjectedGradient(direction="ascend", epsilon=8 / 255, step_size=2 / 255, steps=10, start="uniform")
FOLLOW = 0.1  # of each new observation's distance from the estimate
BACKWARD = 2  # a pass backward costs about two forward


class Replica:
    """The model on one device."""

    def __init__(self, name: str | Path, device: torch.device) -> None:
        loaded = checkpoint.load(name, device=device)
        self.card: Card = loaded.card
        self.device = device
        self.classifier: ImageClassifier = loaded.classifier
        self.stages: dict[str, Stage] = {
            preset: Purification(reverse_attack_of(loaded, config)) for preset, config in PRESETS.items()
        }
        self.stages[ATTACK] = CrossEntropyAttack(loaded.classifier, ATTACK_LOOP)


class LoadedModel:
    """A model that can be served under `id`; `seconds_per_pass` is measured when it is warmed up.

    A pass is one image forward through the classifier.
    """

    def __init__(self, name: str | Path, *, id: str | None, devices: list[torch.device]) -> None:
        self.replicas = [Replica(name, device) for device in devices]
        self.card = self.replicas[0].card
        self.id = id or self.card.id
        self.seconds_per_pass = 0.0

    def observe(self, seconds_per_pass: float) -> None:
        """Follow what a pass takes in a full batch."""
        before = self.seconds_per_pass or seconds_per_pass
        self.seconds_per_pass = before + FOLLOW * (seconds_per_pass - before)

    @property
    def image_size(self) -> int:
        """Side of the images that it takes."""
        return self.card.architecture.image_size

    def passes(self, stage: str | None) -> int:
        """The work of one image."""
        if stage is None:
            return 1
        found = self.replicas[0].stages[stage]
        return found.loop.steps * step_passes(found) + finish_passes(found)


def step_passes(stage: Stage) -> int:
    """The work of one step: every row forward and backward."""
    return stage.rows * (1 + BACKWARD)


def finish_passes(stage: Stage) -> int:
    """The work after the last step: the losses before and after, and both classifications."""
    return 2 * stage.rows + 2


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(0, rows - 1).bit_length()
