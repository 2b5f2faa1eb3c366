"""InfoNCE over the views of one image against explicit negatives, and which negatives count."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb.models import philox
from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Bool, Float, Int

NEGATIVES = ("all", "subset", "drop-similar", "quantile")
SUBSET_STREAM = 0xBA6C  # the Philox stream that draws a seeded subset of the bank


@dataclass(frozen=True, kw_only=True)
class NegativePolicy:
    """The choice of the negatives that count for an image.

    "all":           every one
    "subset":        `count` of them, drawn from the image's seed
    "drop-similar":  all but the share `fraction` that is most similar to the image's views, taken to be false
                     negatives (Huynh et al., arXiv 2011.11765, section 3.2)
    "quantile":      all but those that are nearer to the image than to the share 1 - `fraction` of the bank: a
                     threshold per negative instead of a count per image (GloFND, Balmaseda et al., ICML 2025)
    """

    kind: Literal["all", "subset", "drop-similar", "quantile"] = "all"
    count: int = 0
    fraction: float = 0.0

    def __post_init__(self) -> None:
        """Raise ConfigError for values that would leave no negative."""
        if self.kind not in NEGATIVES:
            raise ConfigError(f"negatives={self.kind!r} is not one of {', '.join(NEGATIVES)}")
        if self.kind == "subset" and self.count < 1:
            raise ConfigError(f"negatives=subset with count={self.count!r}; it must be at least 1")
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"negatives={self.kind} with fraction={self.fraction!r}; it must be in [0, 1)")

    def thresholds(self, bank: Float[Tensor, "bank dim"]) -> Float[Tensor, " bank"] | None:
        """Return, per negative, the similarity beyond which an image is of its kind; None where no policy asks."""
        if self.kind != "quantile" or not self.fraction or len(bank) < 2:
            return None
        similarity = (bank @ bank.T).fill_diagonal_(-2)
        others = len(bank) - 1
        return similarity.sort(1, descending=True).values[:, min(round(self.fraction * others), others - 1)]

    def keep(
        self,
        embeddings: Float[Tensor, "batch views dim"],
        negatives: Float[Tensor, "bank dim"],
        seeds: Int[Tensor, " batch"],
        thresholds: Float[Tensor, " bank"] | None = None,
    ) -> Bool[Tensor, "batch bank"] | None:
        """Return the mask of negatives that count, at least one for each image, or None for all of them."""
        size = len(negatives)
        if self.kind == "subset" and self.count < size:
            keys = philox.uniform(seeds, 0, SUBSET_STREAM, size)
            chosen = keys.topk(self.count, dim=1).indices
            return torch.zeros_like(keys, dtype=torch.bool).scatter(1, chosen, True)
        dropped = min(round(self.fraction * size), size - 1) if self.kind == "drop-similar" else 0
        if dropped:
            similarity = embeddings.detach().mean(1) @ negatives.T  # batch bank
            nearest = similarity.topk(dropped, dim=1).indices
            return torch.ones_like(similarity, dtype=torch.bool).scatter(1, nearest, False)
        if self.kind == "quantile" and thresholds is not None:
            similarity = F.normalize(embeddings.detach().mean(1), dim=1) @ negatives.T
            return (similarity <= thresholds).scatter(1, similarity.argmin(1, keepdim=True), True)
        return None


def info_nce(
    embeddings: Float[Tensor, "batch views dim"],
    negatives: Float[Tensor, "bank dim"],
    *,
    temperature: float,
    keep: Bool[Tensor, "batch bank"] | None = None,
    together: bool = False,
) -> Float[Tensor, " batch"]:
    """Return InfoNCE per image, the mean over every ordered pair (i, j) of its views (van den Oord et al. 2018, eq. 4):

        -log( exp(z_i·z_j / τ) / (exp(z_i·z_j / τ) + Σ_n exp(z_i·k_n / τ)) )

    with the other views of the same image in no denominator. Embeddings and negatives have unit length; at least two
    views. `keep` masks the negatives of each image; each needs at least one.

    With `together`, the mean over every view i of the form with all its positives in one (Kim et al., NeurIPS 2020,
    eq. 2):  -log( Σ_j exp(z_i·z_j / τ) / (Σ_j exp(z_i·z_j / τ) + Σ_n exp(z_i·k_n / τ)) )
    """
    views = embeddings.shape[1]
    if views < 2:
        raise ConfigError(f"InfoNCE over {views} view(s); it needs at least 2")
    with torch.autocast(embeddings.device.type, enabled=False):  # 8 bits of mantissa are too few for a loss
        embeddings = embeddings.float() if embeddings.dtype == torch.bfloat16 else embeddings
        positive = embeddings @ embeddings.transpose(1, 2) / temperature  # batch views views
        negative = embeddings @ negatives.to(embeddings.dtype).T / temperature  # batch views bank
    if keep is not None:
        negative = negative.masked_fill(~keep[:, None, :], float("-inf"))
    against = negative.logsumexp(2)[:, :, None]  # batch views 1
    if together:
        itself = torch.eye(views, dtype=torch.bool, device=positive.device)
        return F.softplus(against[:, :, 0] - positive.masked_fill(itself, float("-inf")).logsumexp(2)).mean(1)
    pairs = F.softplus(against - positive)  # -log(p / (p + n)) = log(1 + exp(log n - log p))
    others = 1 - torch.eye(views, device=pairs.device, dtype=pairs.dtype)
    return (pairs * others).sum((1, 2)) / (views * (views - 1))


def in_batch_negatives(
    embeddings: Float[Tensor, "batch views dim"],
) -> tuple[Float[Tensor, "batch*views dim"], Bool[Tensor, "batch batch*views"]]:
    """Return training's negatives: every view in the batch, and the mask that takes an image's own views out."""
    batch, views, _ = embeddings.shape
    own = torch.eye(batch, dtype=torch.bool, device=embeddings.device).repeat_interleave(views, dim=1)
    return embeddings.flatten(0, 1), ~own
