"""Pre-activation residual networks for small images (He et al. 2016; Zagoruyko and Komodakis 2016)."""

from typing import cast

import torch
from torch import Tensor, nn

from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.shapes import Float


class PreActBlock(nn.Module):
    """BN, activation, 3x3; twice; the shortcut is a 1x1 of the activated input where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, out, h / stride, w / stride] of [batch, in, h, w]."""
        activated = self.activation(self.norm1(x))
        skipped = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv2(self.activation(self.norm2(self.conv1(activated))))
        return cast(Tensor, out + skipped)


class PreActResNet(ImageClassifier):
    """Stem, stages of pre-activation blocks (stride 2 from the second on), BN, pooling, one linear layer."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        widths: tuple[int, ...],
        blocks: int,
        stem: int,
        num_classes: int,
        image_size: int,
        activation: nn.Module,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__(feature_dim=widths[-1], num_classes=num_classes, image_size=image_size)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        layers: list[nn.Module] = []
        channels = stem
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(PreActBlock(channels, width, stride, activation))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.linear: nn.Module = nn.Linear(channels, num_classes)
        self.activation = activation
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return pooled activations before the last linear layer; `x` in [0, 1]."""
        out = self.blocks(self.stem((x - self.mean) / self.std))
        return cast(Tensor, self.activation(self.norm(out)).mean((2, 3)))

    def logits(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the last linear layer's class scores."""
        return cast(Tensor, self.linear(features))
