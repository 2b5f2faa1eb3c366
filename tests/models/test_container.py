import random
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from tests.support.pictures import chunk, encode
from unperturb.models.container import orientation_of, pixels_alone
from unperturb.models.pixels import Preprocessing, opened, to_rgb
from unperturb.service.decoding.decode import decode
from unperturb.service.errors import UnprocessableError
from unperturb.training.data import _decode

FORMATS = ("JPEG", "PNG", "WEBP")
HOW = Preprocessing(size=32)


def picture() -> Image.Image:
    coarse = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((44, 28), Image.Resampling.BICUBIC)


def exif(orientation: int | None, **more: Any) -> bytes:
    tags = Image.Exif()
    if orientation is not None:
        tags[0x0112] = orientation
    tags[0x010F] = "a maker"
    tags.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})  # GPS
    for tag, value in more.items():
        tags[int(tag)] = value
    return tags.tobytes()


def file_of(kind: str, **options: Any) -> bytes:
    return encode(picture(), kind, **options)


def shown(payload: bytes) -> NDArray[np.uint8]:
    with opened(payload) as (image, orientation):
        return np.asarray(to_rgb(image, orientation))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_orientation_is_pillows_and_metadata_is_gone(kind: str, orientation: int | None) -> None:
    payload = file_of(kind, exif=exif(orientation), icc_profile=b"p" * 4000)
    with Image.open(BytesIO(payload)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(shown(payload), expected)
    alone = pixels_alone(payload)
    assert b"a maker" not in alone.payload
    assert b"pppp" not in alone.payload
    assert alone.orientation == (orientation or 1)
    assert pixels_alone(alone.payload) == (alone.payload, 1)


def test_orientation_of_big_endian_long_or_odd_values() -> None:
    entry = struct.pack(">HHII", 0x0112, 4, 1, 6)
    assert orientation_of(b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry) == 6
    for value, count in ((0, 1), (9, 1), (6, 2)):
        entry = struct.pack("<HHIHH", 0x0112, 3, count, value, 0)
        assert orientation_of(b"II*\0" + struct.pack("<IH", 8, 1) + entry) == 1
    for odd in (b"", b"II*\0", b"not a TIFF", b"II*\0" + b"\xff" * 40, b"II*\0" + struct.pack("<IH", 8, 65535)):
        assert orientation_of(odd) == 1


def png_with(*chunks: bytes) -> bytes:
    payload = file_of("PNG")
    return payload[:33] + b"".join(chunks) + payload[33:]  # after IHDR


def text_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("exif", "steps: 20, sampler: Euler a")
    return file_of("PNG", pnginfo=info)


ODD: dict[str, Callable[[], bytes]] = {
    "text named exif": text_png,
    "ImageMagick's profile": lambda: png_with(chunk(b"tEXt", b"Raw profile type exif\0no hex at all")),
    "EXIF that is no TIFF, in PNG": lambda: png_with(chunk(b"eXIf", b"nonsense")),
    "EXIF that is no TIFF, in WebP": lambda: file_of("WEBP", exif=b"nonsense"),
    "profile of 2 MB": lambda: file_of("PNG", icc_profile=random.Random(0).randbytes(2 << 20)),
    "text of 3 MB": lambda: png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (3 << 20)))),
    "bad checksum in an ancillary chunk": lambda: png_with(chunk(b"tIME", b"\0" * 7, crc=5)),
    "ancillary chunk too short": lambda: png_with(chunk(b"gAMA", b"\0")),
    "GPS of a wrong type": lambda: file_of("JPEG", exif=exif(None).replace(b"N\0", b"\0\0")),
}


@pytest.mark.parametrize("name", ODD)
def test_sound_pixels_are_served_and_trained_on_whatever_the_metadata(name: str, tmp_path: Path) -> None:
    payload = ODD[name]()
    kind = "JPEG" if payload[:2] == b"\xff\xd8" else "WEBP" if payload[:4] == b"RIFF" else "PNG"
    expected = decode(file_of(kind), HOW, max_pixels=10**6).pixels
    assert np.array_equal(decode(payload, HOW, max_pixels=10**6).pixels, expected)
    (tmp_path / "one.png").write_bytes(payload)
    assert np.array_equal(_decode(tmp_path / "one.png", HOW), expected)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("files", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_metadata_keeps_the_pixels(files: int, kind: str) -> None:
    """Every byte of a file's metadata, changed at random, some at a time, its lengths and names among them."""
    plain, draw = file_of(kind), random.Random(f"metadata of {kind}")
    expected = decode(plain, HOW, max_pixels=10**6).pixels
    for _ in range(files):
        block = bytearray(exif(draw.choice([None, 1])))
        for _ in range(draw.randint(1, 12)):
            at = draw.randrange(len(block))
            block[at] = draw.randrange(256)
        odd = bytes(block[: draw.choice([len(block), draw.randrange(len(block) + 1)])])
        if kind == "JPEG":
            marker = draw.choice([0xE1, 0xE1, 0xE1, 0xE2, 0xED, 0xFE])
            payload = plain[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(odd) + 2) + odd + plain[2:]
        elif kind == "PNG":
            name = draw.choice([b"eXIf", b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"tIME", b"xYZw"])
            payload = plain[:33] + chunk(name, odd, crc=draw.choice([None, 7])) + plain[33:]
        else:
            name = draw.choice([b"EXIF", b"EXIF", b"XMP ", b"ICCP", b"ABCD"])
            inside = plain[8:] + name + struct.pack("<I", len(odd)) + odd + b"\0" * (len(odd) % 2)
            payload = b"RIFF" + struct.pack("<I", len(inside)) + inside
        turned = pixels_alone(payload).orientation
        if turned == 1:  # a changed orientation is an orientation
            assert np.array_equal(decode(payload, HOW, max_pixels=10**6).pixels, expected), payload.hex()
        else:
            assert decode(payload, HOW, max_pixels=10**6).pixels.shape == expected.shape


def test_many_small_segments_take_no_longer_than_their_bytes() -> None:
    plain = file_of("JPEG")
    payload = plain[:2] + b"\xff\xe1\x00\x02" * 500_000 + plain[2:]
    started = time.process_time()
    assert pixels_alone(payload).payload == plain
    assert time.process_time() - started < 30  # it was minutes, and grew with the square


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_that_break_off_are_refused_still(kind: str) -> None:
    payload = file_of(kind)
    for share in (0.97, 0.9, 0.6):
        with pytest.raises(UnprocessableError):
            decode(payload[: int(share * len(payload))], HOW, max_pixels=10**6)
