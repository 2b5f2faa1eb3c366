"""The benchmarks' HTTP client, against servers that answer byte by byte what the test says."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from unperturb.benchmarks.serving import client
from unperturb.benchmarks.serving.client import Client, Prepared

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = Prepared("/classify?top_k=3", b"\0\1\2", "image/png")


def plain(body: bytes, *, status: str = "200 OK", head: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{head}\r\n".encode() + body


async def head_and_body(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    return head, await reader.readexactly(length)


def posts(answering: Answering, count: int, *, at_once: bool = False) -> tuple[list[int], int]:
    """Return the statuses of so many requests, and on how many connections they came."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            await answering(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> list[int]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Client(f"http://127.0.0.1:{port}") as one:
            if at_once:
                return list(await asyncio.gather(*(one.post(REQUEST) for _ in range(count))))
            return [await one.post(REQUEST) for _ in range(count)]

    return asyncio.run(run()), connections


def test_a_connection_is_used_again_and_the_request_arrives_whole() -> None:
    seen = []

    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await head_and_body(reader))
            writer.write(plain(b"{}", status="503 Service Unavailable" if len(seen) == 2 else "200 OK"))

    assert posts(answering, 3) == ([200, 503, 200], 1)
    head, body = seen[0]
    assert head.startswith(b"POST /classify?top_k=3 HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"\r\ncontent-type: image/png\r\n" in head
    assert body == REQUEST.body


def test_those_at_once_have_connections_of_their_own() -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_and_body(reader)
        await asyncio.sleep(0.2)
        writer.write(plain(b""))

    assert posts(answering, 5, at_once=True) == ([200] * 5, 5)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n"],
        [b"HTTP/1.1 20", b"0 OK\r\ncontent-le", b"ngth: 4\r\n\r\nab", b"cd"],
    ],
)
def test_answers_in_pieces_are_read_to_their_end(pieces: list[bytes]) -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head_and_body(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)

    assert posts(answering, 2) == ([200, 200], 1)


def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_and_body(reader)
        writer.write(plain(b"x", head="connection: close\r\n"))

    assert posts(answering, 2) == ([200, 200], 2)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", b"no HTTP at all\r\n\r\n"])
def test_no_answer_half_an_answer_and_nonsense_are_status_0(sent: bytes) -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_and_body(reader)
        writer.write(sent)

    assert posts(answering, 2) == ([0, 0], 2)


def test_nobody_there_and_nobody_who_answers_are_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    async def closed() -> int:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with Client(f"http://127.0.0.1:{port}") as one:
            return await one.post(REQUEST)

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    assert asyncio.run(closed()) == 0
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)
    assert posts(silent, 1) == ([0], 1)
