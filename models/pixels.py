"""From an opened image file to the pixels that a model sees; the same for training data and for uploads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from unperturb.models.container import pixels_alone
from unperturb.models.errors import ConfigError

WHOLE = 16  # times the square, up to which a resized picture may be before its centre is cut out
PLAIN = ("nearest", "bilinear", "bicubic")  # that exist without antialiasing
FITS = ("square", "crop", "stretch")
WHITE = (255, 255, 255, 255)


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def opened(payload: bytes, formats: tuple[str, ...] | None = None) -> Iterator[tuple[Image.Image, int]]:
    """Open a picture file without its metadata; yield it, not decoded yet, and its EXIF orientation for `to_rgb`."""
    alone = pixels_alone(payload)
    with Image.open(BytesIO(alone.payload), formats=formats) as image:
        yield image, alone.orientation  # TIFF's own Pillow heeds itself


def to_rgb(image: Image.Image, orientation: int = 1) -> Image.Image:
    """Return 8-bit RGB: turned upright, 16-bit grey scaled rather than clipped, transparency on white.

    Pillow's own convert("RGB") turns every 16-bit level above 255 into white and shows the colour under alpha 0.
    """
    image = image.transpose(TURNS[orientation]) if orientation in TURNS else image
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16-bit grey; "I" where Pillow has widened it
        levels = np.asarray(image)
        grey = np.clip(levels, 0, 65535).astype(np.uint32)
        grey += 128
        grey //= 257  # rounded: 257 is odd, so that nothing is half way
        if isinstance(transparent, int):
            grey[levels == transparent] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent is not None:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, WHITE), layer)
    return image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the square that a network takes; it stands on the checkpoint's card.

    size: the square's side in pixels
    fit: "square": the picture's largest centred square, at that size; "crop": the shorter side becomes `resize` pixels
        and the centred square of `size` is cut out (torchvision's Resize and CenterCrop); "stretch": both sides do
    resize: pixels, at least `size`; 0: `size`
    interpolation: a name of Pillow's Resampling, in small letters
    antialias: whether pixels that a smaller picture leaves out count (Pillow's own way)
    """

    size: int
    fit: str = "square"
    resize: int = 0
    interpolation: str = "bicubic"
    antialias: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if self.size < 1:
            raise ConfigError(f"size={self.size} must be at least 1")
        if self.fit not in FITS:
            raise ConfigError(f"fit={self.fit!r} is not one of {', '.join(FITS)}")
        if self.resize and self.fit == "square":
            raise ConfigError(f"resize={self.resize}: fit='square' cuts out first and has none; crop and stretch do")
        if self.resize and self.resize < self.size:
            raise ConfigError(f"resize={self.resize} must be at least the size, {self.size}")
        known = [kind.name.lower() for kind in Image.Resampling]
        if self.interpolation not in known:
            raise ConfigError(f"interpolation={self.interpolation!r} is not one of {', '.join(known)}")
        if not self.antialias and self.interpolation not in PLAIN:
            raise ConfigError(f"antialias=False with interpolation={self.interpolation!r}: one of {', '.join(PLAIN)}")

    @property
    def resampling(self) -> Image.Resampling:
        """Return Pillow's own name."""
        return Image.Resampling[self.interpolation.upper()]


def to_size(image: Image.Image, how: Preprocessing) -> Image.Image:
    """Return the square of `how.size` pixels a side; a picture of that size already is left as it is."""
    size = how.size
    if image.size == (size, size):
        return image
    if how.fit == "square" and how.antialias:
        return ImageOps.fit(image, (size, size), how.resampling)
    width, height = image.size
    short = min(width, height)
    resize = size if how.fit == "square" else how.resize or size
    wide, high = (resize, resize) if how.fit == "stretch" else (resize * width // short, resize * height // short)
    left, top = round((wide - size) / 2), round((high - size) / 2)  # as torchvision's CenterCrop
    if wide * high <= WHOLE * size * size:
        whole = _resized(image, (wide, high), (0.0, 0.0, float(width), float(height)), how)
        return whole.crop((left, top, left + size, top + size))
    across, down = width / wide, height / high  # of a picture of 1 x 1,000 pixels the whole would be large
    return _resized(image, (size, size), (left * across, top * down, (left + size) * across, (top + size) * down), how)


def _resized(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float], how: Preprocessing
) -> Image.Image:
    if how.antialias:
        return image.resize(size, how.resampling, box=box)
    return image.transform(size, Image.Transform.EXTENT, box, Image.Resampling(how.resampling))
