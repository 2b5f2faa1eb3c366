"""SimCLR (Chen, Kornblith, Norouzi, Hinton, ICML 2020, eq. 1): NT-Xent between two views of each image."""

from torch import nn

from unperturb.training.contrastive.contrast import Contrast, ContrastiveBatch, Loss, embed_together
from unperturb.training.contrastive.encoder import Encoder


class SimCLR:
    """The method; `model` is what is trained, `memory` what else a resumed run needs."""

    def __init__(self, contrast: Contrast, encoder: Encoder) -> None:
        self.contrast, self.encoder = contrast, encoder
        self.model: nn.Module = encoder
        self.memory: nn.Module = contrast.negatives.detector

    def loss(self, batch: ContrastiveBatch) -> Loss:
        """Return the mean loss of a batch."""
        return self.contrast.nt_xent(embed_together(self.encoder, self.contrast.views(batch)), batch)
