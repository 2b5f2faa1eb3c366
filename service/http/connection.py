"""One connection's limits of time, which uvicorn leaves to a proxy, and how many connections there may be."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HELD_BYTES = 64 * 1024


class _Transport:
    """A transport that says when it is asked to close, by whomever: it then waits for its client to read, for ever.

    What is written in one go, as the head of an answer and its body are, is sent in one piece: each piece is a call of
    the kernel, and wakes the client.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop, on_close: Callable[[], None]) -> None:  # noqa: ANN401
        self._transport, self._loop, self._on_close = transport, loop, on_close
        self._held = bytearray()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if len(self._held) + len(data) > HELD_BYTES:
            self._send()
            self._transport.write(data)
            return
        if not self._held:
            self._loop.call_soon(self._send)
        self._held += data

    def close(self) -> None:
        self._send()
        self._transport.close()
        self._on_close()

    def _send(self) -> None:
        held, self._held = self._held, bytearray()
        if held and not self._transport.is_closing():
            self._transport.write(held)


class TimedConnection(HttpToolsProtocol):
    """Close a connection that is slow, or one too many.

    header_timeout_s: in which a request's head, the first one's or a later one's, has to arrive
    write_timeout_s: in which a client has to read its answer, or what is left of it when the connection is closed
    max_connections: past which a new one takes the place of the one that has been unused for longest, else of one whose
                     head is not whole after prompt_s, or is closed
    """

    header_timeout_s: float
    write_timeout_s: float
    max_connections: int
    prompt_s = 1.0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _close_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - uvloop's is no asyncio.Transport
        """Begin a connection, and wait for its first head."""
        closing: Any = _Transport(transport, self.loop, self._expect_end)
        super().connection_made(closing)
        if len(self.connections) > self.max_connections and not (self._close_unused() or self._close_slow()):
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection, and what waits for it."""
        super().connection_lost(exc)
        self._forget_head()
        for timer in (self._write_timer, self._close_timer):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Wait for the client to read its answer."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Wait no more: the client has read."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _close_unused(self) -> bool:
        """Close the connection that has waited for longest for a next request; return whether there was one."""
        waiting = {
            one.timeout_keep_alive_task.when(): one
            for one in self.connections
            if isinstance(one, TimedConnection) and one.timeout_keep_alive_task and not one.transport.is_closing()
        }
        if waiting:
            waiting[min(waiting)].transport.close()
        return bool(waiting)

    def _close_slow(self) -> bool:
        """Close a connection whose head has been coming for some time; return whether there was one.

        Otherwise whoever opens as many as there may be, and sends their heads slowly, keeps everybody out.
        """
        before = self.loop.time() + self.header_timeout_s - self.prompt_s
        for one in self.connections:  # the first one found: under a flood most are such
            if isinstance(one, TimedConnection) and one._head_timer is not None and one._head_timer.when() <= before:
                one._forget_head()
                one.transport.close()
                return True
        return False

    def _expect_end(self) -> None:
        if self._close_timer is None:
            self._close_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _time_head(self) -> None:
        """Wait for a head where no request is in progress."""
        if self._in_request():
            self._forget_head()
        else:
            self._expect_head()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_is_late)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self._in_request() and not self.transport.is_closing():
            self.transport.close()
