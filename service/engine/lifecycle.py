"""Say what an engine does with requests: from its warm-up to its end, or its failure."""

import threading
from enum import Enum

from unperturb.service.errors import NotReadyError


class EngineState(Enum):
    """The states of the engine: what it does with requests."""

    WARMING_UP = "warming up"
    SERVING = "serving"
    LEAVING = "leaving"  # as SERVING, but it says that it will not serve for long
    DRAINING = "draining"  # what was let in before is still taken
    STOPPED = "stopped"
    FAILED = "failed"


NOT_READY = {
    EngineState.WARMING_UP: "the model is still warming up",
    EngineState.LEAVING: "the service is stopping",
    EngineState.DRAINING: "the service is stopping",
    EngineState.STOPPED: "the service is stopping",
    EngineState.FAILED: "the service has failed and must be restarted",
}
OPEN = (EngineState.SERVING, EngineState.LEAVING)  # new requests are taken


class Lifecycle:
    """Hold the engine's state, and what those wait on who wait for a change of it or of the scheduler.

    changed:  guards both
    failure:  why it can never serve again, or None
    progress: of the warm-up, in words
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.state = EngineState.WARMING_UP
        self.failure: str | None = None
        self.progress = ""

    @property
    def not_ready(self) -> str | None:
        """Return why requests should not be sent here now, or None."""
        reason = NOT_READY.get(self.state)
        return f"{reason}: {self.progress}" if self.state is EngineState.WARMING_UP and self.progress else reason

    def require_ready(self) -> None:
        """Raise NotReadyError, with the reason, where requests should not be sent here now."""
        if (reason := self.not_ready) is not None:
            raise NotReadyError(reason)

    @property
    def ending(self) -> bool:
        """Return whether it has been told to end."""
        return self.state in (EngineState.LEAVING, EngineState.DRAINING, EngineState.STOPPED)

    def require_alive(self) -> None:
        """Raise NotReadyError where it can never serve again."""
        if self.state is EngineState.FAILED:
            raise NotReadyError(NOT_READY[self.state])

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait for the end of the warm-up, and return whether it serves."""
        with self.changed:
            self.changed.wait_for(lambda: self.state is not EngineState.WARMING_UP, timeout_s)
        return self.state is EngineState.SERVING

    def serve(self) -> None:
        """End the warm-up, unless it has been told to end meanwhile."""
        with self.changed:
            if self.state is EngineState.WARMING_UP:
                self.state = EngineState.SERVING
                self.changed.notify_all()

    def leave(self) -> None:
        """Be ready no more, so that balancers send no more, but take what they still send; for signal handlers."""
        with self.changed:
            if self.state is EngineState.WARMING_UP:
                self.state = EngineState.STOPPED
            elif self.state is EngineState.SERVING:
                self.state = EngineState.LEAVING

    def drain(self) -> None:
        """Take no new requests; what was let in before is still finished."""
        with self.changed:
            self.leave()
            if self.state is EngineState.LEAVING:
                self.state = EngineState.DRAINING

    def stop(self) -> None:
        """Take nothing more, whenever it was let in."""
        with self.changed:
            if self.state is EngineState.DRAINING:
                self.state = EngineState.STOPPED

    def fail(self, reason: str) -> bool:
        """Serve never again; return whether this is the first failure."""
        with self.changed:
            if self.state is EngineState.FAILED:
                return False
            self.state, self.failure = EngineState.FAILED, reason
            self.changed.notify_all()
        return True
