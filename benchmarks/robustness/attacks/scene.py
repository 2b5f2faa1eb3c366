"""Hold what an attack is given: images, labels, the defended classifier as it is served, the ball, and the budget."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb.benchmarks.robustness.budgets import Budget
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.generator import NoiseGenerator
from unperturb.models.purifiers.defended import DefendedClassifier, seeds_of
from unperturb.models.shapes import Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Images [n, 3, h, w] in [0, 1] that the defended classifier gets right, and what attacks them.

    seeds:       per image, of the attack's own draws; a function of the image's place in the data set
    served_seed: the seed that the service purifies with; the attacker knows it
    attack_seed: of the attacks that draw for the whole batch
    known:       adversarial images of the static classifier (the clean image where there is none), to start from
    generator:   a trained generator of noise, where the run has one
    """

    defended: DefendedClassifier
    x: Tensor
    labels: Tensor
    seeds: Tensor
    threat: Threat
    budget: Budget
    served_seed: int = 0
    attack_seed: int = 0
    known: Tensor | None = None
    generator: NoiseGenerator | None = None

    @property
    def classifier(self) -> ImageClassifier:
        """The static classifier."""
        return self.defended.classifier

    def logits(self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Tensor | None = None) -> Tensor:
        """Class scores as served, or under another seed; differentiable as `defended.gradient` says."""
        seed = self.served_seed if seed is None else seed
        return self.defended(x, seed=seeds_of(seed, x))  # type: ignore[no-any-return]

    def right(self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Tensor | None = None) -> Bool[Tensor, " batch"]:
        """Return which of `x` are given their label."""
        with torch.no_grad():
            return self.logits(x, seed=seed).argmax(1).eq(self.labels)

    def project(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Back into the ball around the clean images, and into [0, 1]."""
        return self.threat.ball().project(x, self.x)

    def select(self, rows: Int[Tensor, " some"] | Bool[Tensor, " batch"]) -> "Scene":
        """Return the scene of some of its images."""
        known = None if self.known is None else self.known[rows]
        return replace(self, x=self.x[rows], labels=self.labels[rows], seeds=self.seeds[rows], known=known)

    def against(self, defended: DefendedClassifier) -> "Scene":
        """Return the same images before another classifier."""
        return replace(self, defended=defended)

    def opened(self) -> "Scene":
        """Return the same images before the same defense with its full gradient, through all the steps that the budget
        allows.
        """
        return self.against(self.defended.attacked_by("full", steps=self.budget.unrolled_steps))

    @property
    def is_cut(self) -> bool:
        """Return whether the budget allows fewer steps than the purifier takes."""
        purifier = self.defended.purifier
        return purifier.stopped_after(self.budget.unrolled_steps).loop.steps < purifier.loop.steps


class Judged(NamedTuple):
    """An objective's values [batch], and which images are misclassified as served (None where that is not known)."""

    losses: Tensor
    broken: Tensor | None


# Maps images and the rows of the scene that they belong to, to what the attack raises.
AttackObjective = Callable[[Float[Tensor, "some 3 h w"], Int[Tensor, " some"]], Judged]


def cross_entropy_loss(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Tensor:
    """Cross-entropy per image."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def margin(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return each label's score less the best of the others."""
    logits = logits.float()
    own = logits.gather(1, labels[:, None])
    return own[:, 0] - logits.scatter(1, labels[:, None], float("-inf")).amax(1)


def dlr_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    targets: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Difference of logits ratio (Croce & Hein 2020, eqs. 6 and 7), above 0 where the label (the target) has lost.

    Untargeted needs 3 classes, targeted 4; with fewer the plain margin, whose scale does not matter to APGD's sign.
    """
    logits = logits.float()
    ordered = logits.sort(dim=1, descending=True).values
    classes = logits.shape[1]
    if targets is not None and classes >= 4:
        own = logits.gather(1, labels[:, None])[:, 0]
        wanted = logits.gather(1, targets[:, None])[:, 0]
        return (wanted - own) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)
    lost = -margin(logits, labels)
    return lost if classes < 3 else lost / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def clearly_wrong(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
    """Return which are misclassified by more than rounding turns around when they are judged in another batch."""
    return margin(logits.detach(), labels) < -1e-3
