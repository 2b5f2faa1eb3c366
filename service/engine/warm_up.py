"""Warm a batch up for every number of images that it will hold, and measure what they cost."""

import contextlib
import time
from collections.abc import Generator, Iterator

import numpy as np
import torch

from unperturb.models.inference.captured import bucket
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.cost import Cost, Timing
from unperturb.service.engine.messages import Work


def warmed(batch: ContinuousBatch, slots: int, *, threads: tuple[int, ...]) -> Generator[int, None, Cost]:
    """Warm up for every size up to `slots` images, and measure what they cost; yields how many pieces there are.

    threads: every number of them that the worker may have, since kernels are chosen for each; costs are of the last
    """
    sizes = {1, slots}
    if batch.stepper.execution != "eager":  # made once for each size
        sizes |= {bucket(n) for n in range(1, slots)}
    timed = (slots, 1, 1)  # measured when all is warm
    runs = [(size, number) for size in sorted(sizes) for number in threads] + [(size, threads[-1]) for size in timed]
    pieces = len(runs) * (1 + len(batch.stages))
    timings = []
    for size, number in runs:
        timings.append((yield from _through_stages(batch, size, number, pieces)))
    large, *small = timings[-len(timed) :]
    fastest = min(small, key=lambda timing: timing.seconds)
    return Cost.fit(fastest, large, together=batch.stepper.together)


def _through_stages(batch: ContinuousBatch, size: int, threads: int, pieces: int) -> Generator[int, None, Timing]:
    """Put `size` black images through a step and the end of every stage; yield `pieces` after each stage.

    Returns what that took; raises what went wrong.
    """
    black = np.zeros((3, batch.image_size, batch.image_size), dtype=np.uint8)
    seconds, batches, passes = 0.0, batch.batch_count, batch.pass_count
    for stage in (None, *batch.stages):
        with _with_threads(threads):
            if stage is not None and batch.stages[stage].loop.steps:
                batch.stepper.prepare(batch.stages[stage], size)
            started = time.monotonic()
            ended = batch.admit(Work(-i, 0, black, stage, 0, False, started) for i in range(size))
            ended += batch.advance()
            for slot in batch.slots:  # not all of its steps: they are alike
                slot.step = slot.stage.loop.steps if slot.stage else 0
            for _, result in (*ended, *batch.advance()):
                if isinstance(result, Exception):
                    raise result
            seconds += time.monotonic() - started
        yield pieces
    return Timing(batch.batch_count - batches, batch.pass_count - passes, seconds)


@contextlib.contextmanager
def _with_threads(number: int) -> Iterator[None]:
    """Have so many threads for a piece: between pieces the worker serves with its own."""
    own = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(own)
