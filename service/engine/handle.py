"""The server's end of a worker: its process, what it has in progress, and the threads that talk with it."""

import contextlib
import logging
import multiprocessing
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

from unperturb.service.engine.messages import Failed, Load, Loaded, LoadProgress, StepReport, Unload, Work
from unperturb.service.engine.worker import WorkerConfig

log = logging.getLogger("unperturb.engine")
Listener = Callable[["WorkerHandle", StepReport | LoadProgress | Loaded | Failed], None]


class WorkerHandle:
    """Starts the worker; `heard` is called, from a thread, with everything that it says, and with Failed when it dies.

    busy, staged: ids of the images that it has been given and has not reported on, and of those that have steps
    loading:      models that it has been told to load; the engine's lock guards all three
    """

    def __init__(self, config: WorkerConfig, heard: Listener) -> None:
        self.config, self.heard = config, heard
        self.busy: set[int] = set()
        self.staged: set[int] = set()
        self.loading: set[int] = set()
        self.memory = 0
        self.last_heard = time.monotonic()
        self.loaded: dict[int, Loaded] = {}  # answers to Load that nobody has read
        self.process: subprocess.Popen[bytes] | None = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._hung_up = threading.Event()

    def start(self) -> None:
        """Start the process and the threads."""
        self._connection, theirs = multiprocessing.Pipe()
        self._host(theirs)
        for target in (self._send, self._listen):
            threading.Thread(target=target, name=f"worker-{self.config.device}", daemon=True).start()

    def load(self, message: Load) -> None:
        """One more model."""
        self._expect()
        self.loading.add(message.model)
        self.say(message)

    def say(self, message: Work | Load | Unload | tuple[Any, ...]) -> None:
        """Send a message, in turn, without waiting for it to be read."""
        self._outbox.put(message)

    def give(self, work: Work) -> None:
        """One more image."""
        self._expect()
        self.busy.add(work.id)
        if work.stage is not None:
            self.staged.add(work.id)
        self.say(work)

    def _expect(self) -> None:
        """From now on its silence counts; until now it was no stall, where it had nothing to do."""
        if not self.busy:
            self.last_heard = time.monotonic()

    def room(self, stage: str | None) -> int:
        """Free slots for images in a stage; those without steps have as many of their own."""
        return self.config.slots - (len(self.staged) if stage is not None else len(self.busy) - len(self.staged))

    def take_back(self, ids: Iterable[int]) -> None:
        """These are no longer its."""
        ids = set(ids)
        self.busy -= ids
        self.staged -= ids

    def hang_up(self) -> None:
        """Tell the worker to end."""
        self._hung_up.set()
        self._outbox.put(None)

    def wait(self, timeout_s: float) -> None:
        """Wait for its process to end; it is killed where it does not, and left where not even that helps."""
        if self.process is None:
            return
        for end in (self.process.kill, lambda: log.error("a worker on %s cannot be killed", self.config.device)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
                return
            end()

    def _host(self, theirs: Connection) -> None:
        """Run the worker at the other end; tests run it in a thread."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unperturb.service.engine.worker", str(theirs.fileno()), *map(str, self.config)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def _send(self) -> None:
        assert self._connection is not None
        while True:
            message = self._outbox.get()
            with contextlib.suppress(OSError):  # it has died; `_listen` says so
                self._connection.send(message)
            if message is None:
                return

    def _listen(self) -> None:
        assert self._connection is not None
        reason = "its process has ended"
        try:
            while True:
                message = self._connection.recv()
                self.last_heard = time.monotonic()
                if isinstance(message, Failed):
                    reason = message.reason
                    break
                self.heard(self, message)
        except (EOFError, OSError):
            if self.process is not None and (status := self.process.poll()) is not None:
                reason = f"its process has ended with status {status}"
        if not self._hung_up.is_set():
            self.heard(self, Failed(reason))
