"""Self-supervised adversarial training (Chen et al., arXiv 1911.06470): keep an image's representation and that of its
adversarial version informative of one another.

    x_adv lowers, and the encoder raises, the InfoNCE bound I(z(x); z(x_adv)) ≥ log N - InfoNCE

(van den Oord et al. 2018, eq. 5), so that the training loss is the InfoNCE that the instance-wise attack raises. The
images are views, as in the pre-training that this fine-tunes.
"""

import torch
from torch import nn

from unperturb.training.contrastive.contrast import Contrast, ContrastiveBatch, Loss, embed_together
from unperturb.training.contrastive.encoder import Encoder


class MutualInformation:
    """The method; see SimCLR."""

    def __init__(self, contrast: Contrast, encoder: Encoder) -> None:
        self.contrast, self.encoder = contrast, encoder
        self.model: nn.Module = encoder
        self.memory: nn.Module = contrast.negatives.detector

    def loss(self, batch: ContrastiveBatch) -> Loss:
        """Return the mean loss of a batch, and the bound in nats."""
        (x,) = self.contrast.views(batch, 1).unbind(1)
        attacked = self.contrast.attacked(self.encoder, x, x, batch.seeds)
        found = self.contrast.nt_xent(embed_together(self.encoder, torch.stack((x, attacked), dim=1)), batch)
        bound = torch.log(torch.tensor(2.0 * len(x) - 1)) - found.loss.detach()
        return Loss(found.loss, {**found.figures, "nats": bound})
