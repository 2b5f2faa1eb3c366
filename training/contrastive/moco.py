"""MoCo (He, Fan, Wu, Xie, Girshick, CVPR 2020): keys from a momentum encoder, and a queue of them as negatives.

As in MoCo v3 both views are queries once, and an MLP projects; the other keys of the batch are negatives beside the
queue, which on small data is what fills it at the start.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.training.contrastive.contrast import Contrast, ContrastiveBatch, Loss, Queue, embed_together
from unperturb.training.contrastive.encoder import Encoder
from unperturb.training.world import World


class Keys(Queue):
    """The key encoder and its queue."""

    def __init__(self, encoder: Encoder, false_negatives: nn.Module, size: int, dim: int, world: World) -> None:
        super().__init__(size, dim, false_negatives, world)
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)

    def follow(self, encoder: Encoder, momentum: float) -> None:
        """Move the keys' weights, key ← m · key + (1 - m) · encoder (eq. 2); BatchNorm statistics are their own."""
        with torch.no_grad():
            for key, query in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
                key.lerp_(query, 1 - momentum)


class MoCo:
    """The method; see SimCLR."""

    def __init__(self, contrast: Contrast, encoder: Encoder, world: World, *, queue: int, key_momentum: float) -> None:
        self.contrast, self.encoder, self.key_momentum = contrast, encoder, key_momentum
        self.model: nn.Module = encoder
        last = encoder.projector.layers[-1]
        assert isinstance(last, nn.Linear)
        self.memory = Keys(encoder, contrast.negatives.detector, queue, last.out_features, world)

    def loss(self, batch: ContrastiveBatch) -> Loss:
        """Return the loss of each view against the other's key, the batch's other keys and the queue (eq. 1)."""
        memory, temperature = self.memory, self.contrast.config.temperature
        views = self.contrast.views(batch)
        memory.follow(self.encoder, self.key_momentum)
        queries = embed_together(self.encoder, views)
        with torch.no_grad():
            keys = embed_together(memory.encoder.train(), views)
        found, negatives = self.contrast.found(keys, batch, queue=memory.filled_part())
        pairs = torch.stack((queries, keys.flip(1)), dim=2)  # batch 2 (query, key) dim
        first, second = (_one_way(pairs[:, view], negatives, found.keep, temperature) for view in range(2))
        memory.push(keys.flatten(0, 1), batch.labels.repeat_interleave(2))
        return Loss((first + second) / 2, self.contrast.negatives.figures(found))


def _one_way(pair: Tensor, negatives: Tensor, keep: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE of queries against their keys; a key has no gradient, so its own direction is left out."""
    query, key = pair[:, 0], pair[:, 1]
    with torch.autocast(query.device.type, enabled=False):
        positive = (query * key).sum(1) / temperature
        negative = (query @ negatives.T / temperature).masked_fill(~keep, float("-inf"))
    return F.softplus(negative.logsumexp(1) - positive).mean()
