"""Three defenses that are known to be worthless, and natural classifiers for them to stand before."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.models import philox
from unperturb.models.attacks.projected_gradient import Descent, Objective, ProjectedGradient
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import Purifier

SIZE, CLASSES = 32, 4


class SmallNet(ImageClassifier):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__(feature_dim=32, num_classes=CLASSES, image_size=SIZE)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.last = nn.Linear(32, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.layers((x - 0.5) * 4)  # type: ignore[no-any-return]

    def logits(self, features: Tensor) -> Tensor:
        return self.last(features)  # type: ignore[no-any-return]


def gratings(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Faint gratings of four orientations with random phase and pitch before a coloured backdrop; half of the images
    also carry a faint pixel code of their class, which is easier to learn and easier to forge.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    angle = labels * torch.pi / CLASSES
    phase, pitch = torch.rand(2, n, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    wave = torch.sin(along * (0.8 + 0.6 * pitch)[:, None, None] + 2 * torch.pi * phase[:, None, None])
    backdrop = F.interpolate(torch.rand(n, 3, 4, 4, generator=generator) - 0.5, size=SIZE, mode="bicubic")
    code = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9)).sign()[labels]
    coded = (torch.rand(n, 1, 1, 1, generator=generator) < 0.5).float()
    noise = 0.03 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    return (0.5 + 0.4 * backdrop + 0.07 * wave[:, None] + 0.02 * coded * code + noise).clamp(0, 1), labels


class FineAndCoarse(ImageClassifier):
    """Two classes from two cues of the pixels: a large one finer than 3 bits, flat and zero where x is a multiple of
    1/7, and a small coarse one. Rounding removes the first; an attack that does not know of it spends itself there.
    """

    fine: Tensor
    coarse: Tensor

    def __init__(self) -> None:
        super().__init__(feature_dim=1, num_classes=2, image_size=SIZE)
        generator = torch.Generator().manual_seed(11)
        fine, coarse = torch.randn(2, 3 * SIZE * SIZE, generator=generator)
        self.register_buffer("fine", fine - fine.mean())
        self.register_buffer("coarse", coarse - coarse.mean())

    def features(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        cues = 5 * torch.sin(7 * torch.pi * flat).square() @ self.fine + flat @ self.coarse
        return cues[:, None]

    def logits(self, features: Tensor) -> Tensor:
        return torch.cat((features, -features), 1)

    def images(self, n: int) -> EvaluationSet:
        """Random images whose two cues agree, and the class that they speak for."""
        x = 0.15 + 0.7 * torch.rand(8 * n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(12))
        coarse = x.flatten(1) @ self.coarse
        x = x[(self.features(x)[:, 0] * coarse > 0) & (coarse.abs() > 5)][:n]
        return EvaluationSet(x, self(x).argmax(1), "generated", f"fine and coarse {n}")


def natural_classifier(*, steps: int = 200) -> SmallNet:
    """Trained without any attack in mind: right on nearly all clean images."""
    torch.manual_seed(0)
    net = SmallNet()
    images, labels = gratings(4000, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(steps):
        rows = torch.arange(64) + 64 * step
        loss = F.cross_entropy(net(images[rows % 4000]), labels[rows % 4000])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def evaluation_set(n: int) -> EvaluationSet:
    images, labels = gratings(n, seed=2)
    return EvaluationSet(images, labels, "generated", f"gratings-{n}")


class _Fixed(Purifier):
    """A purifier without steps."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__(classifier, ProjectedGradient(direction="descend", epsilon=1.0, step_size=0.0, steps=0))

    def objective(self, x: Tensor, seeds: Tensor) -> Objective:
        return lambda iterate, _: iterate.flatten(1).sum(1) * 0

    def descend(self, x: Tensor, *, seeds: Tensor, unrolled: bool = False) -> Descent:
        return Descent(self.move(x, seeds), x.new_zeros((0, len(x))))

    def move(self, x: Tensor, seeds: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define move()")


class Rounding(_Fixed):
    """Rounds to 3 bits: a gradient of zero everywhere."""

    def move(self, x: Tensor, seeds: Tensor) -> Tensor:
        return (x * 7).round() / 7


class RandomResizing(_Fixed):
    """Resizes by a random factor and pads at random (Xie et al. 2018, in small)."""

    def move(self, x: Tensor, seeds: Tensor) -> Tensor:
        u = philox.uniform(seeds, 0, 0, 3)
        scale = 1.1 + 0.5 * u[:, 0]
        zero = torch.zeros_like(scale)
        theta = torch.stack(
            (
                torch.stack((scale, zero, (scale - 1) * (2 * u[:, 1] - 1)), 1),
                torch.stack((zero, scale, (scale - 1) * (2 * u[:, 2] - 1)), 1),
            ),
            1,
        )
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5


class Replay(_Fixed):
    """Knows a table of adversarial images, and answers with the clean one where it meets one of them."""

    adversarial: Tensor
    clean: Tensor

    def __init__(self, classifier: ImageClassifier, adversarial: Tensor, clean: Tensor) -> None:
        super().__init__(classifier)
        self.register_buffer("adversarial", adversarial)
        self.register_buffer("clean", clean)

    def move(self, x: Tensor, seeds: Tensor) -> Tensor:
        distance = (x[:, None] - self.adversarial[None]).flatten(2).abs().amax(2)  # batch table
        nearest = distance.min(1)
        return torch.where((nearest.values < 1e-4).view(-1, 1, 1, 1), self.clean[nearest.indices], x)
