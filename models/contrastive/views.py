"""Random views of an image, differentiable with respect to it, with parameters of its own for every image.

Random resized crop, flip, brightness, contrast, saturation, hue, grayscale: the views of SimCLR (Chen et al. 2020,
appendix A) without blur. A view's parameters are a function of (the image's seed, step, view), so an image has the
same views in every batch. Differences from torchvision: the crop's box is continuous and drawn once (its sides end at
the image's), and the colour operations come in a fixed order.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unperturb.models import philox
from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Bool, Float, Int

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
_DRAWS = 10
_FLIP = 4  # its place among them


@dataclass(frozen=True, kw_only=True)
class ViewPolicy:
    """Ranges and probabilities of the views.

    crop_area, crop_ratio: ranges of the crop's share of the image and of its width / height
    alternate: every second view is a mirror image and the others are not, instead of `flip` at random
    brightness, contrast, saturation: factors in [1 - value, 1 + value]; hue: shift in [-value, value] turns
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    alternate: bool = False
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grayscale: float = 0.2

    def __post_init__(self) -> None:
        """Raise ConfigError for what is no range or probability."""
        for name, top in (("crop_area", 1.0), ("crop_ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ConfigError(f"{name}=({low}, {high}) is not a range within (0, {top}]")
        for name, top in (
            ("flip", 1.0),
            ("brightness", 1.0),
            ("contrast", 1.0),
            ("saturation", 1.0),
            ("hue", 0.5),
            ("grayscale", 1.0),
        ):
            if not 0 <= getattr(self, name) <= top:
                raise ConfigError(f"{name}={getattr(self, name)} is not in [0, {top}]")

    @property
    def crops(self) -> bool:
        """Return whether a view may show less than the whole image."""
        return self.crop_area != (1.0, 1.0) or self.crop_ratio != (1.0, 1.0)

    @property
    def colors(self) -> bool:
        """Return whether a view may have other colours."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.grayscale))


class ViewParameters(NamedTuple):
    """One view's parameters per image; the box in shares of the image's sides, hue in turns."""

    top: Float[Tensor, " batch"]
    left: Float[Tensor, " batch"]
    height: Float[Tensor, " batch"]
    width: Float[Tensor, " batch"]
    flip: Bool[Tensor, " batch"]
    brightness: Float[Tensor, " batch"]
    contrast: Float[Tensor, " batch"]
    saturation: Float[Tensor, " batch"]
    hue: Float[Tensor, " batch"]
    grayscale: Bool[Tensor, " batch"]


def draw(
    policy: ViewPolicy,
    seeds: Int[Tensor, " batch"],
    step: int | Int[Tensor, " batch"],
    view: int | Int[Tensor, " batch"],
) -> ViewParameters:
    """Return the parameters of one view of each image, from Philox stream `view`; float32."""
    u = philox.uniform(seeds, step, view, _DRAWS).unbind(1)
    flip = _mirrored(seeds, view) if policy.alternate else u[_FLIP] < policy.flip
    area = policy.crop_area[0] + u[0] * (policy.crop_area[1] - policy.crop_area[0])
    low, high = (math.log(value) for value in policy.crop_ratio)
    half_ratio = (0.5 * (low + u[1] * (high - low))).exp()
    width = (area.sqrt() * half_ratio).clamp(max=1)
    height = (area.sqrt() / half_ratio).clamp(max=1)

    def factor(number: Tensor, strength: float) -> Tensor:
        return 1 + strength * (2 * number - 1)

    return ViewParameters(
        top=u[2] * (1 - height),
        left=u[3] * (1 - width),
        height=height,
        width=width,
        flip=flip,
        brightness=factor(u[5], policy.brightness),
        contrast=factor(u[6], policy.contrast),
        saturation=factor(u[7], policy.saturation),
        hue=policy.hue * (2 * u[8] - 1),
        grayscale=u[9] < policy.grayscale,
    )


def make_views(
    x: Float[Tensor, "batch 3 h w"],
    *,
    seeds: Int[Tensor, " batch"],
    step: int | Int[Tensor, " batch"],
    views: int,
    policy: ViewPolicy,
) -> Float[Tensor, "batch views 3 h w"]:
    """Return `views` views of each image, in [0, 1]."""
    numbers = torch.arange(views, device=x.device).repeat(len(x))  # batch*views, an image's views together
    if isinstance(step, Tensor):
        step = step.repeat_interleave(views)
    x, count = x.repeat_interleave(views, dim=0), len(x)
    seeds = seeds.repeat_interleave(views)
    if policy.crops or policy.colors:
        x = apply(x, draw(policy, seeds, step, numbers), policy)
    elif policy.alternate:  # nothing is drawn
        x = torch.where(_mirrored(seeds, numbers)[:, None, None, None], x.flip(3), x)
    elif policy.flip:
        flip = philox.uniform(seeds, step, numbers, _FLIP + 1)[:, _FLIP] < policy.flip
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    made: Tensor = x.unflatten(0, (count, views))
    return made


def _mirrored(seeds: Int[Tensor, " batch"], view: int | Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
    """Return whether each image's view is a mirror image where every second one is."""
    return (torch.as_tensor(view, device=seeds.device) % 2 == 1).expand(len(seeds))


def apply(x: Float[Tensor, "batch 3 h w"], view: ViewParameters, policy: ViewPolicy) -> Float[Tensor, "batch 3 h w"]:
    """Return one view of each image, without the work that its policy never asks for; full precision under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        view = ViewParameters(*(p if p.dtype == torch.bool else p.to(x.dtype) for p in view))
        if policy.crops:
            x = resized_crop(x, view)
        elif policy.flip or policy.alternate:
            x = torch.where(view.flip[:, None, None, None], x.flip(3), x)
        return color(x, view) if policy.colors else x


def resized_crop(x: Float[Tensor, "batch 3 h w"], view: ViewParameters) -> Float[Tensor, "batch 3 h w"]:
    """Crop the box, resize it to the image's size (bilinear, pixel centres at .5), flip.

    A box of the axes is one interpolation matrix per side: no scatter, so the backward is deterministic on a GPU.
    """
    rows = _interpolation(view.top, view.height, x.shape[2])  # batch h h
    columns = _interpolation(view.left, view.width, x.shape[3])  # batch w w
    columns = torch.where(view.flip[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ x @ columns.transpose(1, 2)[:, None]


def color(x: Float[Tensor, "batch 3 h w"], view: ViewParameters) -> Float[Tensor, "batch 3 h w"]:
    """Change brightness, contrast, saturation, hue, grayscale, as torchvision's tensor functions define each."""
    brightness, contrast, saturation = (
        v[:, None, None, None] for v in (view.brightness, view.contrast, view.saturation)
    )
    x = (x * brightness).clamp(0, 1)
    mean = luma(x).mean((2, 3), keepdim=True)
    x = (contrast * x + (1 - contrast) * mean).clamp(0, 1)
    x = (saturation * x + (1 - saturation) * luma(x)).clamp(0, 1)
    x = shift_hue(x, view.hue)
    return torch.where(view.grayscale[:, None, None, None], luma(x).expand_as(x), x)


def luma(x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 1 h w"]:
    """Return the grey of each pixel."""
    return GRAY[0] * x[:, 0:1] + GRAY[1] * x[:, 1:2] + GRAY[2] * x[:, 2:3]


def shift_hue(x: Float[Tensor, "batch 3 h w"], turns: Float[Tensor, " batch"]) -> Float[Tensor, "batch 3 h w"]:
    """Turn the hue in HSV space, value and chroma as they are (Smith 1978)."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = chroma.clamp(min=1e-6)  # a grey pixel's hue does not matter: its chroma is what multiplies below
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector = sector + 6 * turns[:, None, None]
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        distance = torch.remainder(sector + offset, 6)
        channels.append(value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1))
    return torch.stack(channels, dim=1)


def _interpolation(
    start: Float[Tensor, " batch"], share: Float[Tensor, " batch"], size: int
) -> Float[Tensor, "batch size size"]:
    """Return bilinear weights from `size` source pixels to `size` across the span from `start`, edges repeated."""
    place = torch.arange(size, device=start.device, dtype=start.dtype)
    source = size * (start[:, None] + share[:, None] * (place + 0.5) / size) - 0.5
    source = source.clamp(0, size - 1)
    return (1 - (source[:, :, None] - place).abs()).clamp(min=0)
