"""One image on its way through the engine, and how its answer reaches the event loop that waits for it."""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from unperturb.service.engine.messages import Outcome, Work
from unperturb.service.engine.registry import Model

log = logging.getLogger("unperturb.engine")


@dataclass(eq=False)
class ImageRequest:
    """Hold one image on its way.

    work:     what a worker is sent
    answer:   what to call with its result
    client:   whose share of the devices' time it takes
    deadline: on time.monotonic's clock
    step:     how many of its steps are done, as far as is known
    """

    work: Work
    model: Model
    answer: Callable[[Outcome | Exception], None]
    client: str = ""
    deadline: float = math.inf
    step: int = 0

    @property
    def cost_s(self) -> float:
        """Estimate the seconds that it takes alone."""
        return self.model.alone_s(self.work.stage)


def resolve(future: "asyncio.Future[Outcome]", result: Outcome | Exception) -> None:
    """Resolve a future from any thread, unless its client has gone."""
    try:
        future.get_loop().call_soon_threadsafe(_resolve_in_loop, future, result)
    except RuntimeError:  # the loop has closed: nobody waits any more
        log.debug("an outcome came after its event loop had closed")


def _resolve_in_loop(future: "asyncio.Future[Outcome]", result: Outcome | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
