"""A purifier in front of its classifier, as one module: what is served, attacked and measured."""

import dataclasses
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import NoPurifier, Purified, Purifier, Trace, lacking
from unperturb.models.purifiers.restored import restored_of
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttack, ReverseAttackConfig, preset
from unperturb.models.purifiers.vote import Vote
from unperturb.models.shapes import Float, Int

Gradient = Literal["full", "bpda", "none"]


class Defended(NamedTuple):
    """Class scores with and without purification, the purified image, and its trace."""

    logits: Float[Tensor, "batch classes"]
    unpurified_logits: Float[Tensor, "batch classes"]
    image: Float[Tensor, "batch 3 h w"]
    trace: Trace


class DefendedClassifier(nn.Module):
    """Images in [0, 1] -> purified -> class scores, of the image alone or the mean over a vote's views.

    seed: of the random views and starts, where a call names none.
    gradient: what a backward pass sees of the purifier: "full" (through every step), "bpda" (the identity: Athalye et
    al. 2018), or "none": the scores carry no gradient at all.
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        purifier: Purifier,
        *,
        seed: int = 0,
        gradient: Gradient = "bpda",
        vote: Vote | None = None,
    ) -> None:
        super().__init__()
        if gradient not in get_args(Gradient):
            raise ConfigError(f"gradient={gradient!r} is not one of {', '.join(get_args(Gradient))}")
        self.classifier, self.purifier, self.seed, self.gradient = classifier, purifier, seed, gradient
        self.vote = vote
        self.train(False)

    def train(self, mode: bool = True) -> "DefendedClassifier":
        """Stay in eval mode, as the purifier does."""
        super().train(False)
        return self

    def forward(self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Int[Tensor, " batch"] | None = None) -> Tensor:
        """Return the class scores [batch, classes] of the purified images.

        Differentiable with respect to `x` where gradients are on. Raises ConfigError for what are no images.
        """
        return self.scores(self.purified(x, seed=seed))

    def scores(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        """Return the class scores of images as they are."""
        return cast(Tensor, self.classifier(x)) if self.vote is None else self.vote.scores(self.classifier, x)

    def attacked_by(self, gradient: Gradient, *, steps: int | None = None) -> "DefendedClassifier":
        """Return the same defense, sharing its weights, with another gradient, and at most `steps` purifier steps."""
        purifier = self.purifier if steps is None else self.purifier.stopped_after(steps)
        return DefendedClassifier(self.classifier, purifier, seed=self.seed, gradient=gradient, vote=self.vote)

    def purified(
        self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch 3 h w"]:
        """Return the purified images, with the gradient that an attacker sees."""
        require_images(x, self.classifier)
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        unrolled = wants_gradient and self.gradient == "full"
        purified = self.purifier.descend(x, seeds=self._seeds(seed, x), unrolled=unrolled).image
        if self.gradient == "none":
            return purified.detach()
        if wants_gradient and not unrolled:
            purified = x + (purified - x).detach()
        return purified

    def _seeds(self, seed: int | Tensor | None, x: Tensor) -> Tensor:
        return seeds_of(self.seed if seed is None else seed, x)

    def purify(self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Tensor | None = None) -> Purified:
        """Return the purified images and their trace. Raises ConfigError for what are no images."""
        require_images(x, self.classifier)
        return cast(Purified, self.purifier(x, seeds=self._seeds(seed, x)))

    def classify(self, x: Float[Tensor, "batch 3 h w"], *, seed: int | Tensor | None = None) -> Defended:
        """Return everything that a caller may want to show, without gradients."""
        with torch.no_grad():
            purified = self.purify(x, seed=seed)
            return Defended(self.scores(purified.image), self.classifier(x), purified.image, purified.trace)


def defend(
    checkpoint: Checkpoint, config: ReverseAttackConfig, *, seed: int = 0, gradient: Gradient = "bpda"
) -> DefendedClassifier:
    """Return a checkpoint's classifier behind its reverse attack or its purifier, and the vote.

    CheckpointError where it has no head, or no purifier.
    """
    purifier, vote = purifier_of(checkpoint, config), vote_of(checkpoint.card, config)
    return DefendedClassifier(checkpoint.classifier, purifier, seed=seed, gradient=gradient, vote=vote)


def purifier_of(checkpoint: Checkpoint, config: ReverseAttackConfig) -> Purifier:
    """Return the purifier of a preset, without its vote; CheckpointError where the checkpoint lacks its parts."""
    if config.restores:
        return restored_of(dataclasses.replace(checkpoint, restorer=None))  # a view of other presets is no purifier
    return reverse_attack_of(checkpoint, config) if config.loop.steps else NoPurifier(checkpoint.classifier)


def presets_of(card: Card) -> tuple[str, ...]:
    """Return the names of the presets that a checkpoint has the parts for."""
    alone, headless = card.purifier is not None, card.head is None
    return tuple(
        name for name, config in PRESETS.items() if (alone if config.restores else not (headless and config.loop.steps))
    )


def preset_of(card: Card, name: str) -> ReverseAttackConfig:
    """Return a preset as a checkpoint has it: with its own views of the vote, and its purifier's reach."""
    config = preset(name)
    loop = config.loop
    if config.restores and card.purifier is not None:
        loop = dataclasses.replace(loop, epsilon=card.purifier.reach())
    return dataclasses.replace(config, loop=loop, vote=vote_of(card, config))


def vote_of(card: Card, config: ReverseAttackConfig) -> Vote | None:
    """Return the vote of a preset, or of the purifier that was trained for one: of the card's own views where it has
    some.
    """
    vote = config.vote or (Vote() if config.restores and card.purifier_training.get("vote") else None)
    return vote and (card.vote or vote.scaled(card.architecture.image_size))


def reverse_attack_of(checkpoint: Checkpoint, config: ReverseAttackConfig) -> ReverseAttack:
    """Return the reverse attack of a checkpoint; raise CheckpointError where it has no head."""
    if checkpoint.head is None or checkpoint.bank is None:
        raise CheckpointError(lacking("head", f"checkpoint {checkpoint.card.id!r}"))
    return ReverseAttack(checkpoint.classifier, checkpoint.head, checkpoint.bank, config, checkpoint.restorer)


def require_images(x: object, classifier: ImageClassifier) -> None:
    """Raise ConfigError for what is no batch of images that the classifier takes; values are not looked at."""
    side, dtype = classifier.image_size, next((p.dtype for p in classifier.parameters()), torch.float32)
    wanted = f"a {str(dtype).removeprefix('torch.')} tensor of pixels in [0, 1], [batch, 3, {side}, {side}], is needed"
    if not isinstance(x, Tensor):
        raise ConfigError(f"images are a {type(x).__name__}: {wanted}; torch.from_numpy makes one of an array")
    if x.shape[1:] != (3, side, side):
        raise ConfigError(f"images of shape {list(x.shape)}: {wanted}")
    if not x.is_floating_point() or torch.promote_types(x.dtype, dtype) != dtype:
        by = " / 255" if x.dtype == torch.uint8 else ""
        raise ConfigError(f"images of {x.dtype}: {wanted}; images.to({dtype}){by} makes one")


def seeds_of(seed: int | Tensor, x: Tensor) -> Tensor:
    """Return one int64 seed per image of `x`, on its device."""
    return torch.as_tensor(seed, dtype=torch.int64, device=x.device).expand(len(x))
