"""One image on its way through the engine."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.messages import Outcome
from unperturb.service.engine.registry import Model

log = logging.getLogger("unperturb.engine")


@dataclass(eq=False)
class ImageRequest:
    """One image on its way; `future` belongs to `loop`, and `worker` is who has it."""

    id: int
    model: Model
    image: NDArray[Any]
    stage: str | None
    seed: int
    wants_image: bool
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Outcome]"
    gate: float | None = None
    queued_at: float = field(default_factory=time.monotonic)
    worker: WorkerHandle | None = None

    def answer(self, result: Outcome | Exception) -> None:
        """Resolve the future, unless its client has gone; from any thread."""
        try:
            self.loop.call_soon_threadsafe(_resolve, self.future, result)
        except RuntimeError:  # the loop has closed: nobody waits any more
            log.debug("an outcome came after its event loop had closed")


def _resolve(future: "asyncio.Future[Outcome]", result: Outcome | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
