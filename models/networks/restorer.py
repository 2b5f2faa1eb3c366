"""A view with an attack's perturbation taken off: what the reverse attack draws an image towards.

A small network is shown images with and without an attack and estimates the perturbation (the denoiser of Liao et al.,
CVPR 2018, section 3.3, "pixel guided"). Its estimate is cautious: it is taken off several times over, within a ball.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Float

TIMES = 8.0  # that an estimate is taken off, by the presets
REACH = 2.0  # a restored view lies within so many epsilon of the image


@dataclass(frozen=True, kw_only=True)
class RestorerCard:
    """A restorer's shape, and the radius of the attacks that it was trained on, in pixel units of [0, 1]."""

    width: int
    depth: int
    epsilon: float


class Restorer(nn.Module):
    """Convolutions at the image's size: `depth` of `width` channels with BatchNorm and SiLU, and one to the image's."""

    def __init__(self, card: RestorerCard) -> None:
        super().__init__()
        if min(card.width, card.depth) < 1 or not 0 < card.epsilon <= 1:
            raise ConfigError(
                f"restorer of width={card.width}, depth={card.depth}, epsilon={card.epsilon}: out of range"
            )
        self.epsilon = card.epsilon
        layers: list[nn.Module] = []
        for channels in (3, *[card.width] * (card.depth - 1)):
            layers += [nn.Conv2d(channels, card.width, 3, 1, 1, bias=False), nn.BatchNorm2d(card.width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(card.width, 3, 3, 1, 1))

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Return the perturbation of images in [0, 1], as a share of epsilon, in (-1, 1)."""
        estimate: Tensor = self.layers(x.contiguous(memory_format=torch.channels_last))
        return estimate.tanh()

    def restored(self, x: Float[Tensor, "batch 3 h w"], *, factor: float) -> Float[Tensor, "batch 3 h w"]:
        """Return the images less `factor` times their estimated perturbation, within 2 epsilon and in [0, 1]."""
        moved, reach = x - factor * self.epsilon * self(x), REACH * self.epsilon
        return torch.minimum(torch.maximum(moved, x - reach), x + reach).clamp(0, 1)
