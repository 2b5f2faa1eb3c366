"""A 16-bit RGB PNG, which Pillow cannot write."""

import struct
import zlib

import torch
from torch import Tensor

from unperturb.models.shapes import Float


def png16(image: Float[Tensor, "3 h w"]) -> bytes:
    """The image in [0, 1] as a PNG with 16 bits a channel (W3C PNG, third edition, sections 5 and 11; no filter)."""
    levels = (image.clamp(0, 1) * 65535).round().to(torch.int32)
    rows = levels.permute(1, 2, 0).contiguous().numpy().astype(">u2")
    height, width, _ = rows.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)  # bits, RGB, and no choice in the rest
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
