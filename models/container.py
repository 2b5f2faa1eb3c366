"""A picture file without what is not pixels: metadata that is odd, large or damaged spoils no sound picture.

Of it the EXIF orientation is read, as browsers do, and nothing else: JPEG's application segments (ITU T.81, annex B),
PNG's ancillary chunks (W3C PNG, section 5) and WebP's metadata chunks (RFC 9649, section 2.7) are left out before a
decoder sees them. Pillow reads more of them than it needs, and refuses a picture for them.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

PNG, RIFF, WEBP, JPEG = b"\x89PNG\r\n\x1a\n", b"RIFF", b"WEBP", b"\xff\xd8"
JPEG_START_OF_SCAN, JPEG_COMMENT, JPEG_EXIF = 0xDA, 0xFE, 0xE1
JPEG_METADATA = {
    *range(0xE1, 0xEE),
    0xEF,
    JPEG_COMMENT,
}  # not JFIF's APP0, nor Adobe's APP14 (its colours)
JPEG_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # ICC, EXIF, XMP, in VP8X's first byte
EXIF = b"Exif\x00\x00"
ORIENTATION, SHORT, LONG = 0x0112, 3, 4


class Container(NamedTuple):
    """A file's bytes without metadata, and its EXIF orientation, 1 (upright) to 8."""

    payload: bytes
    orientation: int


def pixels_alone(payload: bytes) -> Container:
    """Return a JPEG, PNG or WebP without its metadata; any other file, or what does not parse, as it is, upright."""
    try:
        if payload.startswith(JPEG):
            return _jpeg(payload)
        if payload.startswith(PNG):
            return _png(payload)
        if payload[:4] == RIFF and payload[8:12] == WEBP:
            return _webp(payload)
    except (struct.error, IndexError):  # it breaks off: whether that is the pixels' loss, the decoder tells
        pass
    return Container(payload, 1)


def orientation_of(exif: bytes) -> int:
    """Return the orientation that an EXIF block's first directory has (TIFF 6.0, section 2), 1 where it has none."""
    tiff = exif.removeprefix(EXIF)
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, at)
            if tag == ORIENTATION and count == 1 and kind in (SHORT, LONG):
                (value,) = struct.unpack_from(f"{order}{'H' if kind == SHORT else 'I'}", tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _jpeg(payload: bytes) -> Container:
    kept, orientation, at = [payload[:2]], 0, 2
    while payload[at] == 0xFF:
        begun, marker = at, payload[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in JPEG_ALONE:
            at += 2
        elif marker == JPEG_START_OF_SCAN:
            break
        else:
            at += 2 + struct.unpack_from(">H", payload, at + 2)[0]
            if marker == JPEG_EXIF and not orientation and payload.startswith(EXIF, begun + 4):
                orientation = orientation_of(payload[begun + 4 : at])
        if marker not in JPEG_METADATA:
            kept.append(payload[begun:at])
    return Container(b"".join([*kept, payload[at:]]), orientation or 1)


def _png(payload: bytes) -> Container:
    kept, orientation, at = [PNG], 1, len(PNG)
    while at < len(payload):
        length, kind = struct.unpack_from(">I4s", payload, at)
        end = at + 12 + length
        if kind == b"eXIf":
            orientation = orientation_of(payload[at + 8 : end - 4])
        if kind in PNG_PIXELS:
            kept.append(payload[at:end])
        if kind == b"IEND":
            break
        at = end
    return Container(b"".join(kept), orientation)


def _webp(payload: bytes) -> Container:
    kept, orientation = [], 1
    for kind, length, body in _riff_chunks(payload):
        if kind == b"EXIF":
            orientation = orientation_of(body)
        if kind == b"VP8X" and body:
            body = bytes([body[0] & ~WEBP_METADATA_FLAGS]) + body[1:]
        if kind in WEBP_PIXELS:
            if len(body) < length:
                raise IndexError("the pixels break off")
            kept.append(kind + struct.pack("<I", len(body)) + body + b"\x00" * (len(body) % 2))
    inside = WEBP + b"".join(kept)
    return Container(RIFF + struct.pack("<I", len(inside)) + inside, orientation)


def _riff_chunks(payload: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    at = 12
    while at + 8 <= len(payload):
        kind, length = struct.unpack_from("<4sI", payload, at)
        yield kind, length, payload[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
