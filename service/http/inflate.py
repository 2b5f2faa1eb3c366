"""Bodies that a client has compressed: gzip and deflate (RFC 9110, 8.4.1), unpacked as they come, within a limit."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterable

from unperturb.service.errors import MalformedRequestError, UnsupportedTypeError

PIECE = 1 << 16  # bytes that come out at a time: a small chunk may hold a large body
LOOKED_AT = 1 << 12  # bytes that go in at a time: a chunk may hold a thousand empty members
GZIP, ZLIB, RAW = 31, 15, -15  # zlib's window bits


def is_compressed(encoding: str) -> bool:
    """Return whether a Content-Encoding is one of ours; raise UnsupportedTypeError for another."""
    encoding = encoding.strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise UnsupportedTypeError(f"content encoding {encoding[:40]!r} is not gzip, deflate or identity")
    return encoding not in ("", "identity")


async def inflated(chunks: AsyncIterable[bytes], encoding: str) -> AsyncGenerator[bytes, None]:
    """Yield the unpacked bytes in pieces; raise MalformedRequestError for what is not packed so, or breaks off.

    gzip may have several members; deflate is zlib's format, or bare as some clients send it.
    """
    gzip = encoding.strip().lower() != "deflate"
    unpacker, begun = zlib.decompressobj(GZIP if gzip else ZLIB), False
    async for chunk in _pieces(chunks):
        while chunk:
            if unpacker.eof:
                if not gzip:
                    raise MalformedRequestError("the body goes on after its deflate stream")
                unpacker = zlib.decompressobj(GZIP)
            try:
                piece = unpacker.decompress(chunk, PIECE)
            except zlib.error as error:
                if begun or gzip:
                    raise MalformedRequestError(f"the body is not {'gzip' if gzip else 'deflate'}") from error
                unpacker, begun = zlib.decompressobj(RAW), True
                continue
            begun, chunk = True, unpacker.unconsumed_tail or unpacker.unused_data
            if piece:
                yield piece
                await asyncio.sleep(0)  # what is made of it may take long
    while not unpacker.eof and (piece := unpacker.decompress(b"", PIECE)):  # all has come in, and not all has gone out
        yield piece
        await asyncio.sleep(0)
    if not unpacker.eof:
        raise MalformedRequestError(f"the body's {'gzip' if gzip else 'deflate'} stream breaks off")


async def _pieces(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the chunks in small pieces, and let others go on between them."""
    async for chunk in chunks:
        for begin in range(0, len(chunk), LOOKED_AT):
            yield chunk[begin : begin + LOOKED_AT]
            await asyncio.sleep(0)
