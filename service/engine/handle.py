"""The server's end of a worker: its process, and the threads that carry messages to it and from it."""

import contextlib
import logging
import multiprocessing
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from unperturb.service.engine.messages import Failed, FromWorker, ToWorker, WorkerConfig

log = logging.getLogger("unperturb.engine")


class WorkerHandle:
    """Start a worker and carry messages.

    on_message: called, from a thread, with everything that the worker says, and with Failed when it dies
    """

    def __init__(self, config: WorkerConfig, on_message: Callable[[FromWorker], None]) -> None:
        self.config, self.on_message = config, on_message
        self.process: subprocess.Popen[bytes] | None = None
        self._outbox: queue.SimpleQueue[WorkerConfig | ToWorker | None] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the process and the threads."""
        self._connection, theirs = multiprocessing.Pipe()
        self._outbox.put(self.config)
        self._start_worker(theirs)
        for target in (self._send_all, self._receive_all):
            threading.Thread(target=target, name=f"worker-{self.config.device}", daemon=True).start()

    def send(self, message: ToWorker) -> None:
        """Send a message, in turn, without waiting for it to be read."""
        self._outbox.put(message)

    def close(self) -> None:
        """Tell the worker to end."""
        self._closed.set()
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

    def _start_worker(self, theirs: Connection) -> None:
        """Run the worker at the other end; tests run it in a thread."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unperturb.service.engine.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def _send_all(self) -> None:
        assert self._connection is not None
        while True:
            message = self._outbox.get()
            with contextlib.suppress(OSError):  # it has died; `_receive_all` says so
                self._connection.send(message)
            if message is None:
                return

    def _receive_all(self) -> None:
        assert self._connection is not None
        reason = "its process has ended"
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, Failed):
                    reason = message.reason
                    break
                self.on_message(message)
        except (EOFError, OSError):
            if self.process is not None and (status := self.process.poll()) is not None:
                reason = f"its process has ended with status {status}"
        except Exception as error:
            log.exception("a worker's message cannot be handled")
            reason = f"its message cannot be handled: {type(error).__name__}"
        if not self._closed.is_set():
            self.on_message(Failed(reason))
