"""One step of many loops at once: images that are at different steps, of different presets, share one backbone pass.

An objective is cut in two around the classifier's features: what images one image becomes (`inputs`), and its loss from
their features (`loss_of`). Everything between is one batch. No tensor operation mixes the rows of two images, so that
each image's result is its own, and not even a NaN passes from one to another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.restored import Restored
from unperturb.models.purifiers.reverse_attack import PAIR, ReverseAttack, ReverseAttackConfig
from unperturb.models.purifiers.vote import Vote
from unperturb.models.shapes import Float, Int


class Slots(NamedTuple):
    """Images in the same stage: as received, as they are, velocity (None without momentum), seed, step, label, and
    the stage's anchor of what was received (None where it has none).
    """

    x0: Float[Tensor, "batch 3 h w"]
    x: Float[Tensor, "batch 3 h w"]
    velocity: Float[Tensor, "batch 3 h w"] | None
    seeds: Int[Tensor, " batch"]
    steps: Int[Tensor, " batch"]
    labels: Int[Tensor, " batch"]
    anchors: Float[Tensor, "batch dim"] | None = None


class Stage:
    """A loop and its objective; `rows` images pass through the classifier for one image and step.

    draws: whether chance has a part in where it begins, or in the views of a step
    vote: of the classifier on what comes out; None: it sees the image alone
    """

    loop: ProjectedGradient
    rows: int
    draws: bool = True
    vote: Vote | None = None

    def first(self, x0: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Float[Tensor, "batch 3 h w"]:
        """Return where the received images begin."""
        return self.loop.begin(x0, seeds)

    def anchor(self, x0: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch dim"] | None:
        """Return what the loss needs of the received images at every step, computed once; most need nothing."""
        return None

    def inputs(self, slots: Slots, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "rows 3 h w"]:
        """Return what the classifier sees of `x` at each slot's step; every subclass gives its own."""
        raise TypeError(f"{type(self).__name__} does not define inputs()")

    def loss_of(self, slots: Slots, features: Float[Tensor, "rows features"]) -> Float[Tensor, " batch"]:
        """Return each image's loss, from the features of its `inputs`; every subclass gives its own."""
        raise TypeError(f"{type(self).__name__} does not define loss_of()")

    def seen(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "rows 3 h w"]:
        """Return what the classifier sees of the results: themselves, or every view of the vote."""
        return x if self.vote is None else self.vote.views(x).flatten(0, 1)

    def scores(self, logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "batch classes"]:
        """Return the scores of the results, from those of what the classifier has seen of them."""
        return logits if self.vote is None else self.vote.mean(logits)


class VoteStage(Stage):
    """No step at all, and a vote."""

    loop = ProjectedGradient(direction="descend", epsilon=0.0, step_size=0.0, steps=0)
    rows = 0

    def __init__(self, vote: Vote | None) -> None:
        self.vote = vote


class RestoredStage(VoteStage):
    """No step either: what the restorer makes of an image, and a vote or none."""

    def __init__(self, purifier: Restored, vote: Vote | None) -> None:
        super().__init__(vote)
        self.purifier, self.loop = purifier, purifier.loop

    def first(self, x0: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Float[Tensor, "batch 3 h w"]:
        """Return the restored images."""
        return self.purifier.descend(x0, seeds=seeds).image


class StepResult(NamedTuple):
    """After one step: the next iterate, the next velocity, and each image's loss before the step."""

    x: Float[Tensor, "batch 3 h w"]
    velocity: Float[Tensor, "batch 3 h w"] | None
    losses: Float[Tensor, " batch"]


def step_together(classifier: ImageClassifier, parts: Sequence[tuple[Stage, Slots]]) -> list[StepResult]:
    """Take one step of every slot of every part, in one pass of the classifier; works under a caller's no_grad."""
    with torch.inference_mode(False), torch.enable_grad():
        iterates = [slots.x.detach().requires_grad_() for _, slots in parts]
        rows = [stage.inputs(slots, x) for (stage, slots), x in zip(parts, iterates, strict=True)]
        features = features_of(classifier, rows)
        losses = [stage.loss_of(slots, f) for (stage, slots), f in zip(parts, features, strict=True)]
        total = torch.stack([loss.sum() for loss in losses]).sum()
        gradients = torch.autograd.grad(total, iterates)
    after = []
    for (stage, slots), gradient, loss in zip(parts, gradients, losses, strict=True):
        x, velocity = stage.loop.advance(slots.x, slots.x0, gradient, slots.velocity)
        after.append(StepResult(x, velocity, loss.detach()))
    return after


def features_of(classifier: ImageClassifier, parts: Sequence[Float[Tensor, "_ 3 h w"]]) -> tuple[Tensor, ...]:
    """Return the features of several sets of images from one pass."""
    features: tuple[Tensor, ...] = classifier.features(torch.cat(list(parts))).split([len(part) for part in parts])
    return features


def draws(config: ReverseAttackConfig) -> bool:
    """Return whether chance has a part in a reverse attack: in where it begins, or in the views of a step."""
    return config.loop.start == "uniform" or config.policy != PAIR


class ReverseAttackStage(Stage):
    """A reverse attack as a stage."""

    def __init__(self, purifier: ReverseAttack, vote: Vote | None = None) -> None:
        self.purifier, self.loop, self.vote = purifier, purifier.loop, vote
        self.rows, self.draws = purifier.config.views, draws(purifier.config)

    def anchor(self, x0: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch dim"] | None:
        """Return the embedding of the restored view."""
        with torch.inference_mode(False), torch.no_grad():
            return self.purifier.anchor(x0)

    def inputs(self, slots: Slots, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "rows 3 h w"]:
        """Return the views of each slot's own step."""
        return self.purifier.inputs(x, slots.steps, slots.seeds)

    def loss_of(self, slots: Slots, features: Float[Tensor, "rows features"]) -> Float[Tensor, " batch"]:
        """Return InfoNCE against the bank."""
        return self.purifier.loss_of(features, slots.seeds, slots.anchors)


class CrossEntropyAttack(Stage):
    """PGD on the bare classifier as a stage: raise each image's cross-entropy with its slot's label."""

    rows = 1

    def __init__(self, classifier: ImageClassifier, loop: ProjectedGradient) -> None:
        self.classifier, self.loop = classifier, loop

    def inputs(self, slots: Slots, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "rows 3 h w"]:
        """Return the images themselves."""
        return x

    def loss_of(self, slots: Slots, features: Float[Tensor, "rows features"]) -> Float[Tensor, " batch"]:
        """Return cross-entropy with the label."""
        return F.cross_entropy(self.classifier.logits(features).float(), slots.labels, reduction="none")
