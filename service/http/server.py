"""Uvicorn, with what it leaves to a proxy: slow heads are cut off, SIGTERM drains and ends with status 0."""

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from unperturb.service.settings import Settings

ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@contextmanager
def taken(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Hold the address, each one that a name stands for, from before anything is loaded; an OSError names it.

    Nothing listens there yet. Addresses of a name that this machine has not, as of IPv6, are left out beside others.
    """
    with ExitStack() as held:
        sockets: list[socket.socket] = []
        try:
            places = dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            for last, (family, _, _, _, address) in enumerate(places, start=1 - len(places)):
                try:
                    sockets.append(held.enter_context(_bound(family, address)))
                except OSError as error:
                    if error.errno not in ABSENT or (last == 0 and not sockets):
                        raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
        yield sockets


def _bound(family: socket.AddressFamily, address: tuple[str | int | bytes, ...]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed a minute ago is free
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT: nothing more is admitted, what is in progress is finished within the grace period.

    It also ends once `failed` holds the reason why the app can never serve again; the process's status is then not to
    be 0.
    """

    def __init__(self, app: FastAPI, settings: Settings, failed: list[str]) -> None:
        class Protocol(_Protocol):
            header_timeout_s, write_timeout_s = settings.header_timeout_s, settings.upload_timeout_s
            max_connections = settings.max_connections

        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=Protocol,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(settings.grace_s) + 2,
            )
        )
        self.engine, self.grace_s = app.state.engine, settings.grace_s
        self.failed = failed

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; uvicorn asks ten times a second."""
        return bool(self.failed) or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does; refuse, with a reason, what is in progress at the end of the grace period."""
        timer = asyncio.get_running_loop().call_later(self.grace_s, self.engine.refuse_rest)
        await super().shutdown(sockets)
        timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; a second signal ends at once."""
        self.engine.drain()  # the queue is closed at the end: what was admitted before is still taken
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, but do not raise them again at the end: the status would be a kill's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


class _Protocol(H11Protocol):
    """HTTP/1.1 with limits that uvicorn leaves to a proxy.

    It closes a connection whose request's head (the first one's or a later one's) does not arrive in time, or whose
    client does not read its answer, and accepts no more than `max_connections`.
    """

    header_timeout_s: float
    write_timeout_s: float
    max_connections: int
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_request():
            self._forget()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_is_late)

    def _forget(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self._in_request() and not self.transport.is_closing():
            self.transport.close()
