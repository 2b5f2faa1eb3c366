"""From an opened image file to the pixels that a model sees; the same for training data and for uploads."""

import numpy as np
from PIL import Image, ImageOps

WHITE = (255, 255, 255, 255)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB: EXIF orientation applied, 16-bit grey scaled rather than clipped, transparency on white.

    Pillow's own convert("RGB") turns every 16-bit level above 255 into white and shows the colour under alpha 0.
    """
    image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16-bit grey; "I" where Pillow has widened it
        levels = np.asarray(image)
        grey = np.rint(np.clip(levels, 0, 65535) / 257)
        if isinstance(transparent, int):
            grey[levels == transparent] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent is not None:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, WHITE), layer)
    return image.convert("RGB")


def to_size(image: Image.Image, size: int) -> Image.Image:
    """Return a square of `size` pixels a side: the largest centred square, resized bicubic with antialiasing."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
