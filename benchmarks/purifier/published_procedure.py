"""The reverse attack as its paper's code is described to run it, for the comparison of cost only.

Views by torchvision's transforms with one draw for the whole batch, the other images of the batch as negatives, one of
an image's other views as the target and the rest in the denominator, and a backward pass that computes every weight's
gradient (Mao et al., ICCV 2021). Nothing here is served.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms

from unperturb.models.checkpoints.store import Checkpoint


class PublishedProcedure:
    """Purify a batch of at least two images; `steps` of `step_size` in a ball of `epsilon`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        views: int = 4,
        steps: int = 40,
        step_size: float = 2 / 255,
        epsilon: float = 16 / 255,
        temperature: float = 0.2,
    ) -> None:
        assert checkpoint.head is not None
        self.classifier: nn.Module = checkpoint.classifier.requires_grad_(True)
        self.features, self.head = checkpoint.classifier.features, checkpoint.head.requires_grad_(True)
        self.views, self.steps, self.step_size, self.epsilon = views, steps, step_size, epsilon
        self.temperature = temperature
        size = checkpoint.classifier.image_size
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, antialias=True),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.8, 0.8, 0.8, 0.2),
                transforms.RandomGrayscale(0.2),
            ]
        )

    def __call__(self, x0: Tensor) -> Tensor:
        """Purify images [batch, 3, h, w] in [0, 1]."""
        x = (x0 + self.epsilon * (2 * torch.rand_like(x0) - 1)).clamp(0, 1)
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            self.classifier.zero_grad()
            self.head.zero_grad()
            self._loss(x).backward()
            assert x.grad is not None
            moved = x - self.step_size * x.grad.sign()
            x = torch.minimum(torch.maximum(moved, x0 - self.epsilon), x0 + self.epsilon).clamp(0, 1)
        return x.detach()

    def _loss(self, x: Tensor) -> Tensor:
        embeddings = torch.cat([self.head(self.features(self.transform(x))) for _ in range(self.views)])
        similarity = embeddings @ embeddings.T / self.temperature
        itself = torch.eye(len(similarity), dtype=torch.bool, device=x.device)
        target = torch.arange(len(similarity), device=x.device).roll(-len(x))  # the same image's next view
        return F.cross_entropy(similarity.masked_fill(itself, float("-inf")), target)
