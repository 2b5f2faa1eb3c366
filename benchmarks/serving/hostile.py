"""Make what the fault benchmark sends: damaged files, bombs, and connections that stall or close."""

import asyncio
import contextlib
import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


def mutated(kind: str, count: int, *, seed: int) -> Iterator[bytes]:
    """Yield files of one format, bytes changed, cut off, repeated or inserted after the first 12, which name it."""
    generator = np.random.default_rng(seed)
    sources = []
    for side in (16, 48):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, FORMATS[kind])
        sources.append(buffer.getvalue())
    for i in range(count):
        file = bytearray(sources[i % 2])
        match int(generator.integers(4)):
            case 0:
                del file[int(generator.integers(12, len(file))) :]
            case 1:
                place = int(generator.integers(12, len(file)))
                file[place:place] = generator.bytes(int(generator.integers(1, 64)))
            case 2:
                start = int(generator.integers(12, len(file)))
                file[start:start] = file[start : start + int(generator.integers(1, 256))]
            case _:
                for place in generator.integers(12, len(file), int(generator.integers(1, 24))):
                    file[place] = int(generator.integers(256))
        yield bytes(file)


def bombs() -> dict[str, bytes]:
    """Return small files that claim to be, or unpack to be, very large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def png(width: int, height: int, data: bytes, before: bytes = b"") -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(7000 * 7000 * 3 + 7000), 9)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000), 9))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))
    large_webp = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(large_webp, "WEBP", lossless=True, quality=0)
    large_jpeg = io.BytesIO()
    Image.new("RGB", (12_000, 12_000)).save(large_jpeg, "JPEG", quality=1)
    return {
        "a PNG that claims 60,000 pixels a side": png(60_000, 60_000, zlib.compress(b"")),
        "a PNG of 49 million black pixels": png(7000, 7000, zeros),
        "a PNG with 300 MB of compressed text": png(8, 8, zlib.compress(b""), text),
        "a PNG with a 100 MB colour profile": png(8, 8, zlib.compress(b""), profile),
        "a WebP of 64 million pixels": large_webp.getvalue(),
        "a JPEG of 144 million pixels": large_jpeg.getvalue(),
    }


async def leave_early(port: int, body: bytes, *, count: int, after_s: float) -> None:
    """Send whole requests and close each connection before its answer."""

    async def one() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_head("/classify?preset=published", len(body)) + body)
        await writer.drain()
        await asyncio.sleep(after_s)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    await asyncio.gather(*(one() for _ in range(count)))


async def stall(port: int, *, count: int, seconds: float) -> Counter[str]:
    """Half of the connections never end their head, half never their body; how each ended within `seconds`."""

    async def one(number: int) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = _head("/classify", 5000)
        pending = head[: len(head) // 2] if number % 2 else head + b"\x89PNG"
        ends_at = asyncio.get_running_loop().time() + seconds
        answer = b""
        try:
            writer.write(pending)
            while not answer and asyncio.get_running_loop().time() < ends_at:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        answer = await reader.read(64) or b"closed"
                if not answer:
                    writer.write(b"x")  # one byte a second
        except ConnectionError:  # a byte crossed the closing: the answer to it is a reset
            answer = b"closed"
        writer.close()
        return answer.split(b"\r\n")[0].decode(errors="replace") or "still open"

    return Counter(await asyncio.gather(*(one(i) for i in range(count))))


def _head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
    ).encode()
