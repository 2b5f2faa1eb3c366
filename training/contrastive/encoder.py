"""The module that contrastive training trains: a backbone and its projector, as one module; and its checkpoint."""

from typing import cast

import torch
from torch import Tensor, nn

from unperturb.models.attacks.pgd import evaluating
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card, HeadCard
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.networks.head import NegativesBank, ProjectionHead
from unperturb.models.networks.readout import NoReadout, attach
from unperturb.models.networks.registry import build
from unperturb.models.shapes import Float
from unperturb.training import data

BATCH = 250


class Encoder(nn.Module):
    """Images in [0, 1] -> features of the backbone -> unit embeddings of the projector."""

    def __init__(self, backbone: ImageClassifier, projector: ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def features(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch features"]:
        """Return the backbone's features, as a readout sees them."""
        return self.backbone.features(x)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch dim"]:
        """Return embeddings of unit length."""
        return cast(Tensor, self.projector(self.features(x)).float())


def trainable(card: Card) -> None:
    """Raise ConfigError for an exported network, whose weights stand in its program among constants."""
    if card.architecture.name.startswith("export:"):
        raise ConfigError(
            f"{card.id!r} is an exported network, which cannot be trained further: import it from where its module is "
            "made, or train what stands before or behind it (purifier, head, linear)"
        )


def fresh(architecture: Architecture, head: HeadCard) -> Encoder:
    """Return an encoder with random weights, in training mode."""
    backbone = build(architecture)
    attach(backbone, NoReadout())
    projector = ProjectionHead(feature_dim=backbone.feature_dim, hidden=head.hidden, embedding_dim=head.embedding_dim)
    return Encoder(backbone, projector).train()


def reopened(name: str) -> tuple[Encoder, Card]:
    """Return the encoder of a checkpoint with its projector, to be trained on, and its card.

    Raises ConfigError where it has no projector, or cannot be trained on.
    """
    found = store.load(name)
    if found.head is None:
        raise ConfigError(f"{name} has no projector; begin with one of `unperturb train pretrain` or `head`")
    trainable(found.card)
    attach(found.classifier, NoReadout())
    return Encoder(found.classifier, found.head).train().requires_grad_(True), found.card


def bank_of(encoder: nn.Module, train: data.Split, *, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embed `size` random training images as they are: [size, dim] float32, and their labels."""
    if not 0 < size <= len(train.labels):
        raise ConfigError(f"bank_size={size} is not in 1 to {len(train.labels)}, the number of training images")
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))[:size]
    order = order.to(train.images.device)
    parts = []
    with torch.no_grad(), evaluating(encoder):
        for indices in order.split(BATCH):
            parts.append(encoder(train.images[indices].float() / 255).float())
    return torch.cat(parts), train.labels[order]


def bank_for(base: Checkpoint, dataset: data.DataSet, train: data.Split, *, seed: int) -> NegativesBank | None:
    """Return a checkpoint's bank of negatives, made anew of `train` where its own is of other classes."""
    if base.head is None or base.bank is None or base.card.classes == dataset.classes:
        return base.bank
    size = min(len(base.bank.labels), len(train.labels))
    return NegativesBank(*bank_of(Encoder(base.classifier, base.head), train, size=size, seed=seed))
