"""Bytes of a stranger's image file to the pixels that the model takes, or an error with its HTTP status.

Imports no torch: it runs in small processes of its own.
"""

import ctypes
import resource
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unperturb.models.pixels import Preprocessing, opened, to_rgb, to_size
from unperturb.service.errors import MalformedRequestError, TooLargeError, UnprocessableError, UnsupportedTypeError

MEMORY_BYTES = 3 * 2**30  # what a decoding process may add to its own; 50 million pixels take about 1 GiB
KEPT_BYTES = 200 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP")


class Decoded(NamedTuple):
    """The model's pixels [3, size, size], and the file's own width, height and Pillow mode."""

    pixels: NDArray[np.uint8]
    width: int
    height: int
    mode: str
    resized: bool


def decode(payload: bytes, how: Preprocessing, *, max_pixels: int) -> Decoded:
    """Decode a JPEG, PNG or WebP, known by its content, to the pixels that the model takes.

    Raises MalformedRequestError for no bytes, UnsupportedTypeError for another type, TooLargeError for more than
    `max_pixels` (before decoding any), UnprocessableError for a file that breaks off or is damaged.
    """
    if not payload:
        raise MalformedRequestError("the image is empty (0 bytes)")
    if not _is_accepted(payload):
        raise UnsupportedTypeError(f"the bytes are not an image of an accepted type ({', '.join(FORMATS)})")
    try:
        with opened(payload, FORMATS) as (image, orientation):
            width, height, mode = image.width, image.height, image.mode
            if width * height > max_pixels:
                raise TooLargeError(f"the image has {width} x {height} pixels; at most {max_pixels:,} are accepted")
            small = to_size(to_rgb(image, orientation), how)
    except TooLargeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"the image has too many pixels; at most {max_pixels:,} are accepted") from error
    except MemoryError as error:
        raise TooLargeError("the image takes more memory to decode than it may") from error
    except Exception as error:  # Pillow's decoders raise nearly every kind of exception on damaged files
        raise UnprocessableError("the image is damaged or breaks off, and cannot be decoded") from error
    pixels = np.array(small).transpose(2, 0, 1).copy()
    return Decoded(pixels, width, height, mode, resized=(width, height) != (how.size, how.size))


def _is_accepted(payload: bytes) -> bool:
    """Return whether the first bytes are those of JPEG (ITU T.81), PNG (W3C) or WebP (RIFF container)."""
    return (
        payload.startswith(b"\xff\xd8\xff")
        or payload.startswith(b"\x89PNG\r\n\x1a\n")
        or (payload[:4] == b"RIFF" and payload[8:12] == b"WEBP")
    )


def decode_within_memory(payload: bytes, how: Preprocessing, *, max_pixels: int) -> Decoded:
    """Decode in a process that does nothing else: it may take only so much memory, and keeps little of it."""
    _limit_memory()
    try:
        return decode(payload, how, max_pixels=max_pixels)
    finally:
        _give_back()


@cache
def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _give_back() -> None:
    """Release a large image's memory, which glibc may keep (and is set to keep, for the sake of the model's steps)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * resource.getpagesize() > KEPT_BYTES and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
