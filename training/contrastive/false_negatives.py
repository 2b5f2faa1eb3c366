"""Negatives that are of the anchor's own kind, and so are left out (Gupta et al., AAAI 2023, arXiv 2207.10862).

A tenth of a batch of CIFAR-10 is of the anchor's class; pushing it away makes contrastive features fragile.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.contrastive.loss import in_batch_negatives
from unperturb.models.errors import ConfigError
from unperturb.models.options import option
from unperturb.models.shapes import Bool, Float, Int
from unperturb.training import world as worlds
from unperturb.training.options import RunConfig
from unperturb.training.world import World

Kind = Literal["keep", "top", "quantile", "labels"]


@dataclass(frozen=True, kw_only=True)
class FalseNegativeConfig(RunConfig):
    """The options of every run with a contrastive loss."""

    false_negatives: Kind = option("negatives left out: keep (none), top, quantile, or labels (an oracle)", "keep")
    false_negative_share: float = option("share of the negatives that top and quantile leave out", 0.1)
    false_negatives_from: int = option("epochs before any are left out", 5)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        if not 0 < self.false_negative_share < 1:
            raise ConfigError(f"false_negative_share={self.false_negative_share} must be in (0, 1)")


class NegativeMask(NamedTuple):
    """The negatives that count for each anchor, and how many of the others are of its class, with counts to divide by:
    precision = hits / dropped, recall = hits / of_class.
    """

    keep: Bool[Tensor, "batch negatives"]
    hits: Tensor
    dropped: Tensor
    of_class: Tensor
    possible: Tensor


class FalseNegatives(nn.Module):
    """A detector; what it has learned is in its buffers.

    "keep":     none is left out
    "top":      the share `fraction` of each anchor's negatives that is most similar to it (arXiv 2011.11765, sec. 3.2)
    "quantile": those above the anchor's own threshold, which follows the 1 - `fraction` quantile of its similarities
                over the whole training set by stochastic steps on the pinball loss (GloFND, ICML 2025)
    "labels":   those of the anchor's class: an oracle for comparisons, which makes the training no longer label-free
    """

    threshold: Tensor
    seen: Tensor

    def __init__(
        self, kind: Kind, *, images: int, fraction: float, rate: float = 0.05, world: World | None = None
    ) -> None:
        super().__init__()
        self.world = world
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction={fraction} of the negatives must be in (0, 1)")
        self.kind, self.fraction, self.rate = kind, fraction, rate
        self.register_buffer("threshold", torch.zeros(images))
        self.register_buffer("seen", torch.zeros(images, dtype=torch.bool))

    def find(
        self,
        similarity: Float[Tensor, "batch negatives"],
        others: Bool[Tensor, "batch negatives"],
        same: Bool[Tensor, "batch negatives"],
        indices: Int[Tensor, " batch"],
        *,
        active: bool = True,
    ) -> NegativeMask:
        """Return the mask of negatives that count, at least one for each anchor.

        similarity: cosine of anchor and negative; others: the negatives that are not the anchor itself; same: those of
        its class (used by the oracle, and to report precision); indices: the anchors' numbers in the training set.
        With `active` off, thresholds are learned but nothing is left out.
        """
        similarity = similarity.detach()
        drop = torch.zeros_like(others)
        if self.kind == "labels":
            drop = same & others
        elif self.kind == "top":
            count = round(self.fraction * int(others.sum(1).min()))
            ranked = similarity.masked_fill(~others, -2)
            drop = torch.zeros_like(others).scatter(1, ranked.topk(count, dim=1).indices, True)
        elif self.kind == "quantile":
            drop = (similarity > self._learned(similarity, others, indices)[:, None]) & others
        least = similarity.masked_fill(~others, 2).argmin(1, keepdim=True)
        some = (others & ~drop).any(1, keepdim=True)
        drop = drop.scatter(1, least, drop.gather(1, least) & some)  # where none is left, the least similar is
        keep = others & ~drop if active else others
        return NegativeMask(keep, (drop & same & others).sum(), drop.sum(), (same & others).sum(), others.sum())

    def _learned(self, similarity: Tensor, others: Tensor, indices: Tensor) -> Tensor:
        """Return each anchor's threshold, after one step; its first is the quantile of its first batch."""
        count = torch.round(self.fraction * others.sum(1)).long().clamp(min=1)
        ranked = similarity.masked_fill(~others, -2).sort(1, descending=True).values
        first = ranked.gather(1, (count[:, None] - 1))[:, 0]
        known = torch.where(self.seen[indices], self.threshold[indices], first)
        above = ((similarity > known[:, None]) & others).sum(1) / others.sum(1)
        known = known - self.rate * (self.fraction - above)
        where, learned = indices, known.to(self.threshold.dtype)
        if self.world is not None:  # every process learns of every image
            where, learned = worlds.gather(self.world, where), worlds.gather(self.world, learned)
        self.threshold[where], self.seen[where] = learned, True
        return known


class Negatives:
    """One run's negatives: every view of the batch's other images, without those that its detector takes to be false.

    Labels serve the oracle and the report of a detector's precision, nothing else.
    """

    def __init__(self, config: FalseNegativeConfig, images: int, world: World) -> None:
        self.config = config
        if config.batch_size // world.size < 2:
            raise ConfigError(
                f"batch_size={config.batch_size} leaves each of {world.size} processes without a negative"
            )
        self.detector = FalseNegatives(
            config.false_negatives, images=images, fraction=config.false_negative_share, world=world
        ).to(world.device)

    def found(
        self,
        embeddings: Float[Tensor, "batch views dim"],
        labels: Int[Tensor, " batch"],
        indices: Int[Tensor, " batch"],
        epoch: int,
        *,
        queue: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[NegativeMask, Tensor]:
        """Find which negatives count for each image, among all [n, dim]: the batch's, and the queue's if there is one
        (embeddings and labels). `indices` are the images' numbers in the training set, `epoch` counts from 0.
        """
        negatives, others = in_batch_negatives(embeddings)
        kinds = labels.repeat_interleave(embeddings.shape[1])
        if queue is not None:
            negatives, kinds = torch.cat((negatives, queue[0])), torch.cat((kinds, queue[1]))
            queued = torch.ones(len(others), len(queue[0]), dtype=torch.bool, device=others.device)
            others = torch.cat((others, queued), dim=1)
        with torch.autocast(embeddings.device.type, enabled=False):
            similarity = F.normalize(embeddings.detach().mean(1), dim=1) @ negatives.detach().T
        active = epoch >= self.config.false_negatives_from
        return self.detector.find(similarity, others, labels[:, None] == kinds, indices, active=active), negatives

    def figures(self, found: NegativeMask) -> dict[str, Tensor]:
        """Return the detector's precision and recall against the labels, and the precision of chance."""
        if self.config.false_negatives == "keep":
            return {}
        return {
            "precision": found.hits / found.dropped.clamp(min=1),
            "recall": found.hits / found.of_class.clamp(min=1),
            "chance": found.of_class / found.possible,
        }
