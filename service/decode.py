"""Bytes of a stranger's image file to the pixels that the model takes, or an error with its HTTP status."""

from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import MalformedRequestError, TooLargeError, UnprocessableError, UnsupportedTypeError
from models.pixels import to_rgb, to_size
from models.shapes import UInt8

FORMATS = ("JPEG", "PNG", "WEBP")


class Decoded(NamedTuple):
    """The model's pixels, and the file's own width, height and Pillow mode."""

    pixels: UInt8[Tensor, "3 size size"]
    width: int
    height: int
    mode: str
    resized: bool


def decode(payload: bytes, *, size: int, max_pixels: int) -> Decoded:
    """Decode a JPEG, PNG or WebP, known by its content, to `size` pixels a side.

    Raises MalformedRequestError for no bytes, UnsupportedTypeError for another type, TooLargeError for more than
    `max_pixels` (before decoding any), UnprocessableError for a file that breaks off or is damaged.
    """
    if not payload:
        raise MalformedRequestError("the image is empty (0 bytes)")
    if not _is_accepted(payload):
        raise UnsupportedTypeError(f"the bytes are not an image of an accepted type ({', '.join(FORMATS)})")
    try:
        with Image.open(BytesIO(payload), formats=FORMATS) as image:
            width, height, mode = image.width, image.height, image.mode
            if width * height > max_pixels:
                raise TooLargeError(f"the image has {width} x {height} pixels; at most {max_pixels:,} are accepted")
            small = to_size(to_rgb(image), size)
    except TooLargeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"the image has too many pixels; at most {max_pixels:,} are accepted") from error
    except Exception as error:  # Pillow's decoders raise nearly every kind of exception on damaged files
        raise UnprocessableError("the image is damaged or breaks off, and cannot be decoded") from error
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
    return Decoded(pixels, width, height, mode, resized=(width, height) != (size, size))


def _is_accepted(payload: bytes) -> bool:
    """By the first bytes: JPEG (ITU T.81), PNG (W3C), WebP (RIFF container)."""
    return (
        payload.startswith(b"\xff\xd8\xff")
        or payload.startswith(b"\x89PNG\r\n\x1a\n")
        or (payload[:4] == b"RIFF" and payload[8:12] == b"WEBP")
    )
