"""RoCL (Kim, Tack, Hwang, NeurIPS 2020, arXiv 2006.07589): robust contrastive learning without labels.

    x_adv = the instance-wise attack on t(x), away from t'(x)                                        (eq. 4)
    loss  = NT-Xent over {t(x), t'(x), x_adv} + λ · NT-Xent(x_adv, t'(x))                        (eqs. 5, 6)

The first term is the mean over every ordered pair of the three.
"""

import torch
from torch import nn

from unperturb.models.contrastive.loss import info_nce
from unperturb.training.contrastive.contrast import Contrast, ContrastiveBatch, Loss, embed_together
from unperturb.training.contrastive.encoder import Encoder


class RoCL:
    """The method; see SimCLR."""

    def __init__(self, contrast: Contrast, encoder: Encoder, *, adversarial_weight: float) -> None:
        self.contrast, self.encoder, self.adversarial_weight = contrast, encoder, adversarial_weight
        self.model: nn.Module = encoder
        self.memory: nn.Module = contrast.negatives.detector

    def loss(self, batch: ContrastiveBatch) -> Loss:
        """Return the mean loss of a batch."""
        views = self.contrast.views(batch)
        first, second = views.unbind(1)
        attacked = self.contrast.attacked(self.encoder, first, second, batch.seeds)
        embeddings = embed_together(self.encoder, torch.stack((first, second, attacked), dim=1))
        found, negatives = self.contrast.found(embeddings, batch)
        temperature = self.contrast.config.temperature
        parts = [
            info_nce(some, negatives, temperature=temperature, keep=found.keep).mean()
            for some in (embeddings, embeddings[:, 1:])
        ]
        return Loss(parts[0] + self.adversarial_weight * parts[1], self.contrast.negatives.figures(found))
