"""Self-adaptive training (Huang, Zhang, Zhang, NeurIPS 2020, algorithm 1): targets that follow the model's predictions.

    t ← m · t + (1 - m) · p  after a warm-up, w = max t,  loss = Σ w · H(t, p) / Σ w

Labels that the model cannot fit stop being pressed on it, which is what adversarial training overfits to.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.shapes import Float, Int
from unperturb.training import world as worlds
from unperturb.training.supervised.adversarial import Fit
from unperturb.training.world import World


class AdaptiveTargets(nn.Module):
    """One target distribution per training image, beginning as its label, smoothed."""

    targets: Tensor

    def __init__(
        self,
        labels: Int[Tensor, " images"],
        *,
        num_classes: int,
        label_smoothing: float,
        momentum: float,
        warmup_epochs: int,
        world: World,
    ) -> None:
        super().__init__()
        one_hot = F.one_hot(labels, num_classes).float()
        self.register_buffer("targets", one_hot * (1 - label_smoothing) + label_smoothing / num_classes)
        self.momentum, self.warmup_epochs, self.world = momentum, warmup_epochs, world

    def fit(self, indices: Int[Tensor, " batch"], epoch: int) -> Fit:
        """Return the loss of a batch; its targets are moved first (after the warm-up)."""

        def loss(logits: Float[Tensor, "batch classes"]) -> Tensor:
            logits = logits.float()
            if epoch >= self.warmup_epochs:
                self._move(indices, logits.detach().softmax(1))
            targets = self.targets[indices].clone()
            weights = targets.amax(1)
            return (weights * -(targets * logits.log_softmax(1)).sum(1)).sum() / weights.sum()

        return loss

    def _move(self, indices: Tensor, predictions: Tensor) -> None:
        """Move the targets on every process, whichever of them had the image."""
        where, predicted = worlds.gather(self.world, indices), worlds.gather(self.world, predictions)
        rows, place, count = where.unique(return_inverse=True, return_counts=True)  # an image may come twice
        mean = predicted.new_zeros(len(rows), predicted.shape[1]).index_add_(0, place, predicted) / count[:, None]
        self.targets[rows] = self.momentum * self.targets[rows] + (1 - self.momentum) * mean
