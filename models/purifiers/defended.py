"""A purifier in front of its classifier, as one module: what is served, attacked and measured."""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import Purified, Purifier, Trace
from unperturb.models.purifiers.reverse_attack import ReverseAttack, ReverseAttackConfig
from unperturb.models.shapes import Float, Int


class Defended(NamedTuple):
    """Class scores with and without purification, the purified image, and its trace."""

    logits: Float[Tensor, "batch classes"]
    unpurified_logits: Float[Tensor, "batch classes"]
    image: Float[Tensor, "batch 3 h w"]
    trace: Trace


class DefendedClassifier(nn.Module):
    """Images in [0, 1] -> purified -> class scores.

    gradient: what an attacker's backward pass sees of the purifier: "bpda" (Athalye et al. 2018: the identity) or
    "unrolled" (through every step).
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        purifier: Purifier,
        *,
        gradient: Literal["bpda", "unrolled"] = "bpda",
    ) -> None:
        super().__init__()
        if gradient not in ("bpda", "unrolled"):
            raise ConfigError(f"gradient={gradient!r} is neither bpda nor unrolled")
        self.classifier, self.purifier, self.gradient = classifier, purifier, gradient
        self.train(False)

    def train(self, mode: bool = True) -> "DefendedClassifier":
        """Stay in eval mode, as the purifier does."""
        super().train(False)
        return self

    def forward(self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Int[Tensor, " batch"] = 0) -> Tensor:
        """Return class scores of the purified images; differentiable with respect to `x` where gradients are on."""
        return cast(Tensor, self.classifier(self.purified(x, seed=seed)))

    def purified(
        self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Int[Tensor, " batch"] = 0
    ) -> Float[Tensor, "batch 3 h w"]:
        """Return the purified images, with the gradient that an attacker sees."""
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        unrolled = wants_gradient and self.gradient == "unrolled"
        purified = self.purifier.descend(x, seeds=seeds_of(seed, x), unrolled=unrolled).image
        if wants_gradient and not unrolled:
            purified = x + (purified - x).detach()
        return purified

    def purify(self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Tensor = 0) -> Purified:
        """Return the purified images and their trace."""
        return cast(Purified, self.purifier(x, seeds=seeds_of(seed, x)))

    def classify(self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Tensor = 0) -> Defended:
        """Return everything that a caller may want to show, without gradients."""
        with torch.no_grad():
            purified = self.purify(x, seed=seed)
            return Defended(self.classifier(purified.image), self.classifier(x), purified.image, purified.trace)


def defend(checkpoint: Checkpoint, config: ReverseAttackConfig) -> DefendedClassifier:
    """Return the classifier of a checkpoint behind its reverse attack; raise CheckpointError where it has no head."""
    return DefendedClassifier(checkpoint.classifier, reverse_attack_of(checkpoint, config))


def reverse_attack_of(checkpoint: Checkpoint, config: ReverseAttackConfig) -> ReverseAttack:
    """Return the reverse attack of a checkpoint; raise CheckpointError where it has no head."""
    if checkpoint.head is None or checkpoint.bank is None:
        raise CheckpointError(
            f"checkpoint {checkpoint.card.id!r} has no head to purify with; train one: "
            "unperturb train head --classifier FOLDER --data … --out …"
        )
    return ReverseAttack(checkpoint.classifier, checkpoint.head, checkpoint.bank, config, checkpoint.restorer)


def seeds_of(seed: int | Tensor, x: Tensor) -> Tensor:
    """Return one int64 seed per image of `x`, on its device."""
    return torch.as_tensor(seed, dtype=torch.int64, device=x.device).expand(len(x))
