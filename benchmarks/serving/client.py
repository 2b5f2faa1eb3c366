"""An HTTP/1.1 client for a server on the same cores: it takes little of them, a fraction of what a general one does."""

import asyncio
import contextlib
from types import TracebackType
from typing import NamedTuple, Self, cast
from urllib.parse import urlsplit

import httptools

TIMEOUT_S = 60.0


class Prepared(NamedTuple):
    """A request that can be sent: its path, body and content type, and what it is called in the figures."""

    path: str
    body: bytes
    kind: str = "image/png"
    name: str = ""


class Client:
    """Connections to one server, as many as it takes, all from one loopback address; an async context manager.

    They are kept and used again, the last one first. A request is sent once: none is repeated on another connection.
    """

    def __init__(self, url: str, address: str = "127.0.0.1") -> None:
        parts = urlsplit(url)
        self._host, self._port, self._address = parts.hostname or "", parts.port or 80, address
        self._open: set[_Connection] = set()
        self._unused: list[_Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in tuple(self._open):
            one.transport.abort()
        while self._open:
            await asyncio.sleep(0)  # each says at its end that it is closed

    async def post(self, request: Prepared) -> int:
        """Send one request and read its answer; return the answer's status, 0 where there was none in time."""
        head = (
            f"POST {request.path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\ncontent-type: {request.kind}\r\n"
            f"content-length: {len(request.body)}\r\n\r\n"
        )
        one: _Connection | None = None
        with contextlib.suppress(OSError, TimeoutError, httptools.HttpParserError):
            async with asyncio.timeout(TIMEOUT_S):
                one = await self._connection()
                status = await one.ask(head.encode() + request.body)
            if not one.transport.is_closing():
                self._unused.append(one)
            return status
        if one is not None:
            one.transport.abort()
        return 0

    async def _connection(self) -> "_Connection":
        while self._unused:
            one = self._unused.pop()
            if not one.transport.is_closing():
                return one
        _, made = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._open), self._host, self._port, local_addr=(self._address, 0)
        )
        return made


class _Connection(asyncio.Protocol):
    """One connection, in the set of those that are open, with at most one request on its way."""

    transport: asyncio.Transport

    def __init__(self, open: "set[_Connection]") -> None:
        self._open = open
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._open.add(self)

    async def ask(self, message: bytes) -> int:
        """Send a message and return the status of its answer; raise ConnectionError, or HttpParserError."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(message)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(error)
            self.transport.abort()

    def on_message_complete(self) -> None:
        """End an answer (httptools calls this)."""
        if not self._parser.should_keep_alive():
            self.transport.close()
        self._end(self._parser.get_status_code())

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        self._end(exc or ConnectionResetError("closed before its answer was whole"))

    def _end(self, result: int | Exception) -> None:
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)
