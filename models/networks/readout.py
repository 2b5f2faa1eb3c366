"""Readouts, from features to class scores: a linear layer, dense layers, nearest neighbours, or nothing yet.

A classifier's readout is its module `linear`; a checkpoint's card says which kind it is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.shapes import Float, Int

KINDS = ("linear", "dense", "knn", "none")
COLDEST, SMALLEST = 0.03, 1e-35  # a vote of exp(-2 / temperature) is still a float32
WHOLE_BANK = 1e-3  # the share of the vote that images beyond the nearest have


@dataclass(frozen=True, kw_only=True)
class ReadoutCard:
    """The shape of a readout.

    hidden:      width of the layer between (dense)
    neighbours:  images that vote; 0 for all of the bank; bank_size: images in the bank; temperature: of the votes (knn)
    """

    kind: str = "linear"
    hidden: int = 0
    neighbours: int = 0
    bank_size: int = 0
    temperature: float = 0.07

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if self.kind not in KINDS:
            raise ConfigError(f"readout kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if self.kind == "dense" and self.hidden < 1:
            raise ConfigError(f"hidden={self.hidden} must be at least 1")
        if self.kind == "knn" and not (0 <= self.neighbours <= self.bank_size and self.bank_size > 0):
            raise ConfigError(f"neighbours={self.neighbours} must be 0 to bank_size={self.bank_size}, and that above 0")
        if not COLDEST <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be at least {COLDEST}")


MAKE_ONE = (
    "is an encoder without a classifier; make one with unperturb train linear --encoder FOLDER …, "
    "or unperturb train knn --encoder FOLDER …"
)


class NoReadout(nn.Module):
    """Stands where nothing has been trained to classify."""

    def forward(self, features: Tensor) -> Tensor:
        """Raise CheckpointError with what to run."""
        raise CheckpointError(f"this checkpoint {MAKE_ONE}")


class SoftNeighbours(nn.Module):
    """Soft k-nearest-neighbour votes (Wu et al., CVPR 2018, section 3.4; attacked as in Chen et al., arXiv 1911.06470).

    The score of class c is the logarithm of Σ exp(z·z_n / τ) over the nearest images n of class c, plus a thousandth of
    the same sum over the whole bank: so every class has a finite score, and a gradient where the nearest images agree.
    """

    bank: Tensor
    labels: Tensor

    def __init__(
        self,
        bank: Float[Tensor, "bank features"],
        labels: Int[Tensor, " bank"],
        *,
        num_classes: int,
        neighbours: int,
        temperature: float,
    ) -> None:
        super().__init__()
        ReadoutCard(kind="knn", neighbours=neighbours, bank_size=len(labels), temperature=temperature)
        self.register_buffer("bank", F.normalize(bank.float(), dim=1))
        self.register_buffer("labels", labels)
        self.num_classes, self.neighbours, self.temperature = num_classes, neighbours, temperature

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return class scores, finite even for a class of which the bank has no image."""
        with torch.autocast(features.device.type, enabled=False):
            similarity = F.normalize(features.float(), dim=1) @ self.bank.T / self.temperature  # batch bank
            weight = torch.full_like(similarity, WHOLE_BANK)
            if self.neighbours:
                nearest = similarity.detach().topk(self.neighbours, dim=1).indices
                weight = weight.scatter(1, nearest, 1 + WHOLE_BANK)
            votes = similarity + weight.log()
            most = votes.detach().amax(1, keepdim=True)
            classes = torch.arange(self.num_classes, device=votes.device)
            of_class = (self.labels[:, None] == classes).to(votes.dtype)  # bank classes
            return ((votes - most).exp() @ of_class).clamp(min=SMALLEST).log() + most


def attach(classifier: ImageClassifier, readout: nn.Module) -> None:
    """Make `readout` the classifier's; raise ConfigError for a classifier of another library, which has its own."""
    if not isinstance(getattr(classifier, "linear", None), nn.Module):
        raise ConfigError(f"{type(classifier).__name__} cannot be given another readout")
    classifier.linear = readout


def blank_readout(card: ReadoutCard, *, feature_dim: int, num_classes: int) -> nn.Module | None:
    """Return a readout of the card's shape, with any weights; None for the architecture's own linear layer."""
    if card.kind == "none":
        return NoReadout()
    if card.kind == "dense":
        return nn.Sequential(nn.Linear(feature_dim, card.hidden), nn.ReLU(), nn.Linear(card.hidden, num_classes))
    if card.kind == "knn":
        return SoftNeighbours(
            torch.ones(card.bank_size, feature_dim),
            torch.zeros(card.bank_size, dtype=torch.int64),
            num_classes=num_classes,
            neighbours=card.neighbours,
            temperature=card.temperature,
        )
    return None
