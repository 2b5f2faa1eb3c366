"""A balancer as clusters have them: it asks /readyz, and gives each new connection to one that answered 200."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import aiohttp

CHECK_EVERY_S = 0.1
CHUNK = 65536


class Balancer:
    """Relays connections to the instances that are ready; it never tries a request again."""

    def __init__(self) -> None:
        self.instances: list[int] = []  # their ports
        self.ready: list[int] = []
        self._turns = itertools.count()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Yield the port that it listens on."""
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        checks = asyncio.create_task(self._check())
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            checks.cancel()
            server.close()

    async def until_ready(self, port: int, timeout_s: float) -> None:
        """Wait until an instance gets connections."""
        async with asyncio.timeout(timeout_s):
            while port not in self.ready:
                await asyncio.sleep(CHECK_EVERY_S)

    async def _check(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                ready = []
                for port in self.instances:
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                        async with session.get(f"http://127.0.0.1:{port}/readyz") as answer:
                            ready += [port] * (answer.status == 200)
                self.ready = ready
                await asyncio.sleep(CHECK_EVERY_S)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = self.ready[next(self._turns) % len(self.ready)]
        try:
            theirs, to_them = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_copy(reader, to_them), _copy(theirs, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy a connection's one direction to its end."""
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        writer.close()
    except OSError:
        writer.transport.abort()
