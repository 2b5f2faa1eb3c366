"""One image on its way through the engine, and how its answer reaches the event loop that waits for it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from unperturb.service.engine.messages import Outcome, Work
from unperturb.service.engine.registry import Model

log = logging.getLogger("unperturb.engine")


@dataclass(eq=False)
class ImageRequest:
    """Hold one image on its way: what a worker is sent, the model that it is for, and what to call with its result."""

    work: Work
    model: Model
    answer: Callable[[Outcome | Exception], None]


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
