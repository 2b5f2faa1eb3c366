"""Decoding in a bounded number of small processes: a file that hangs or crashes a decoder harms nothing else."""

import asyncio
import base64
import os
from collections import deque
from functools import partial

import anyio
import anyio.to_process

from unperturb.models.pixels import Preprocessing
from unperturb.service.decoding.decode import Decoded, decode_within_memory
from unperturb.service.errors import UnprocessableError

START_TIMEOUT_S = 120.0
ENDED = (anyio.BrokenWorkerProcess, ProcessLookupError)  # the latter: anyio's, of one that ended while it started
DOT = base64.b64decode(  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


class Turns:
    """At most `count` at a time; of those that wait each client's are let in by turns, in their own order."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next client's turn is the first one's

    async def acquire(self, client: str) -> None:
        """Wait for a place."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was let in, and goes
                self.release()
            raise

    def release(self) -> None:
        """Give a place to the next one that still waits."""
        while self._waiting:
            client = next(iter(self._waiting))
            waiting = deque(one for one in self._waiting.pop(client) if not one.done())  # the others have gone
            if waiting:
                waiting.popleft().set_result(None)
                if waiting:
                    self._waiting[client] = waiting
                return
        self._free += 1


class Decoders:
    """At most `count` processes, each killed where one file takes it longer than `timeout_s`; for one event loop."""

    def __init__(self, *, count: int, timeout_s: float) -> None:
        self.count, self.timeout_s = count, timeout_s
        self._turns = Turns(self.count)
        self._limiter: anyio.CapacityLimiter | None = None
        self._tasks: set[asyncio.Task[Decoded]] = set()

    async def start(self) -> None:
        """Start every process, so that the first requests wait for none; raise RuntimeError where they do not start.

        One that has been idle for five minutes ends, and is started anew when it is wanted.
        """
        self._limiter = anyio.CapacityLimiter(self.count)
        os.environ.setdefault(
            "OPENBLAS_NUM_THREADS", "1"
        )  # numpy's: a thread per core in every process, and never used
        how = Preprocessing(size=8)
        first = (self._decode(DOT, how, max_pixels=1, timeout_s=START_TIMEOUT_S) for _ in range(self.count))
        try:
            await asyncio.gather(*first)
        except UnprocessableError as error:
            raise RuntimeError("the decoding processes do not start") from error

    async def decode(self, payload: bytes, how: Preprocessing, *, max_pixels: int, client: str) -> Decoded:
        """Return or raise what `decode.decode` does; raise UnprocessableError where it takes too long or crashes.

        The clients' files take turns: who has sent many slow ones waits behind them, and nobody else.
        A file whose client goes while it waits for a process is never decoded; one that is being decoded is decoded to
        its end, since killing the process would cost more than it saves.
        """
        await self._turns.acquire(client)  # waiting for a process is not the file's fault: it is not timed
        task = asyncio.create_task(self._decode(payload, how, max_pixels=max_pixels, timeout_s=self.timeout_s))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: "asyncio.Task[Decoded]") -> None:
        self._turns.release()
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # has been seen, even where nobody waits

    async def _decode(self, payload: bytes, how: Preprocessing, *, max_pixels: int, timeout_s: float) -> Decoded:
        work = partial(decode_within_memory, payload, how, max_pixels=max_pixels)
        try:
            with anyio.fail_after(timeout_s):
                try:
                    return await anyio.to_process.run_sync(work, cancellable=True, limiter=self._limiter)
                except ENDED:  # perhaps while it was idle, which is not the file's doing
                    return await anyio.to_process.run_sync(work, cancellable=True, limiter=self._limiter)
        except TimeoutError as error:
            raise UnprocessableError(f"the image could not be decoded within {timeout_s:g} s") from error
        except ENDED as error:
            raise UnprocessableError("the image is damaged: it crashed the decoder") from error
