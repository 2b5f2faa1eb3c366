"""A view with an attack's perturbation taken off: what the reverse attack draws an image towards, or what is seen.

A small network estimates what is to be taken off. Fitted to perturbations (the denoiser of Liao et al., CVPR 2018,
section 3.3, "pixel guided") its estimate is cautious, and taken off several times over, within a ball; trained through
the classifier that it stands before, it is taken off as it is. An autoencoder draws the image anew instead, from what
its narrowest layer keeps of it: no pixel goes around that, and no perturbation either.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.errors import ConfigError
from unperturb.models.networks.residual import PreActBlock
from unperturb.models.shapes import Float

REACH = 2.0  # a restored view lies within so many epsilon of the image
NARROWEST = 8  # channels of an autoencoder


@dataclass(frozen=True, kw_only=True)
class RestorerCard:
    """A restorer's shape, and its unit.

    epsilon: what an estimate of 1 stands for, in pixel units of [0, 1]; scale: its layers work on images of a side
    1/scale; times: how many times over an estimate is taken off; kind: "residual" takes something off, within a ball,
    and "autoencoder" draws the image anew, halving its side `depth` times and doubling its `width` channels each time
    """

    width: int
    depth: int
    epsilon: float
    scale: int = 1
    times: float = 8.0
    kind: Literal["residual", "autoencoder"] = "residual"

    def reach(self, factor: float = 1.0) -> float:
        """Return the most that it moves a channel of a pixel, with `factor` times what it takes off.

        Of an autoencoder 1, whatever its epsilon; ConfigError for a factor other than 1, since it takes nothing off.
        """
        if self.kind == "autoencoder":
            if factor != 1:
                raise ConfigError(f"times={factor}: an autoencoder draws the image anew, and that once")
            return 1.0
        return min(factor * self.times, REACH) * self.epsilon


class Restorer(nn.Module):
    """Convolutions: `depth` of `width` channels with BatchNorm and SiLU, and one to the image's; or an autoencoder."""

    def __init__(self, card: RestorerCard) -> None:
        super().__init__()
        if min(card.width, card.depth, card.scale) < 1 or not (0 < card.epsilon <= 1 and 0 < card.times < 1000):
            raise ConfigError(f"{card}: out of range")
        if card.kind == "autoencoder" and card.width < NARROWEST:
            raise ConfigError(
                f"width={card.width}: an autoencoder needs at least {NARROWEST}; the gradient of a narrower one's "
                "convolutions of 1x1 and stride 2 writes beyond its memory on some CPUs (oneDNN, with torch 2.15)"
            )
        self.card, self.scale, self.kind = card, card.scale, card.kind
        self.multiple = card.scale * 2**card.depth if card.kind == "autoencoder" else card.scale
        self.layers = nn.Sequential(*(_autoencoder if card.kind == "autoencoder" else _convolutions)(card))

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Return, of images in [0, 1], the perturbation as a share of epsilon, in (-1, 1), or the image as drawn."""
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        small = F.pixel_unshuffle(padded, self.scale).contiguous(memory_format=torch.channels_last)
        found: Tensor = F.pixel_shuffle(self.layers(small), self.scale)[..., :height, :width]
        return found.sigmoid() if self.kind == "autoencoder" else found.tanh()

    def restored(self, x: Float[Tensor, "batch 3 h w"], *, factor: float = 1.0) -> Float[Tensor, "batch 3 h w"]:
        """Return the images less `factor` times what is taken off, within `card.reach(factor)` of them and in [0, 1].

        Of an autoencoder, the images as it draws them, whatever the factor.
        """
        if self.kind == "autoencoder":
            drawn: Tensor = self(x).float()
            return drawn
        moved, reach = x - factor * self.card.times * self.card.epsilon * self(x), self.card.reach(factor)
        return torch.minimum(torch.maximum(moved, x - reach), x + reach).clamp(0, 1)


def _convolutions(card: RestorerCard) -> list[nn.Module]:
    layers: list[nn.Module] = []
    pixels = 3 * card.scale**2
    for channels in (pixels, *[card.width] * (card.depth - 1)):
        layers += [nn.Conv2d(channels, card.width, 3, 1, 1, bias=False), nn.BatchNorm2d(card.width), nn.SiLU()]
    return [*layers, nn.Conv2d(card.width, pixels, 3, 1, 1)]


def _autoencoder(card: RestorerCard) -> list[nn.Module]:
    """Return residual blocks down to the narrowest layer, an upsampling a level back from it, and nothing around it."""
    pixels, activation = 3 * card.scale**2, nn.SiLU()
    levels = [(card.width << level, card.width << (level + 1)) for level in range(card.depth)]
    layers: list[nn.Module] = [nn.Conv2d(pixels, card.width, 3, 1, 1, bias=False)]
    layers += [PreActBlock(card.width, card.width, 1, activation)]
    for narrow, wide in levels:
        layers += [PreActBlock(narrow, wide, 2, activation), PreActBlock(wide, wide, 1, activation)]
    for narrow, wide in reversed(levels):
        layers += [nn.BatchNorm2d(wide), activation]
        layers += [nn.Conv2d(wide, 4 * narrow, 3, 1, 1, bias=False), nn.PixelShuffle(2)]
    layers += [PreActBlock(card.width, card.width, 1, activation), nn.BatchNorm2d(card.width), activation]
    return [*layers, nn.Conv2d(card.width, pixels, 3, 1, 1)]
