"""Engines whose workers a test can reach into, and how to ask them."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import make_checkpoint
from unperturb.models.checkpoints import store
from unperturb.models.inference.captured import Execution
from unperturb.service.engine.admission import Admission
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.messages import Outcome, WorkerConfig
from unperturb.service.engine.slot import Slot
from unperturb.service.engine.worker import work
from unperturb.service.telemetry.metrics import Metrics

Pixels = NDArray[Any]
READY_S = 240.0  # of a slow machine that is busy; pytest ends a test a minute later
OUTCOME = Outcome(np.ones(2, dtype=np.float32), np.ones(2, dtype=np.float32))


class ThreadHandle(WorkerHandle):
    """The worker in a thread of this process, so that a test can reach into it."""

    def _start_worker(self, theirs: Connection) -> None:
        self.thread = threading.Thread(target=lambda: work(theirs, theirs.recv()), daemon=True)
        self.thread.start()

    def wait(self, timeout_s: float) -> None:
        self.thread.join(10 * timeout_s)  # a thread that is in torch when the interpreter ends aborts the process


@contextmanager
def starting(tiny_folder: Path) -> Iterator[Callable[..., Engine]]:
    """Makes warm engines, and stops them at the end."""
    made: list[Engine] = []

    def make(
        *,
        slots: int = 8,
        execution: Execution = "eager",
        workers: int = 1,
        max_queue: int = 64,
        patience: float = 1e9,
        default_stage: str = "default",
        upgrade: Execution | None = None,
        **changed: Any,
    ) -> Engine:
        admission = Admission(max_queue, patience, default_stage)
        settings = {"stall_s": 60.0, "metrics": Metrics(), "handle": ThreadHandle, **changed}
        config = WorkerConfig("cpu", slots, torch.get_num_threads(), execution, "float32", "warning", "text", upgrade)
        engine = Engine(str(tiny_folder), workers=[config] * workers, admission=admission, **settings)
        made.append(engine)
        engine.start()
        assert engine.lifecycle.wait_until_ready(READY_S) or engine.lifecycle.failure is not None
        return engine

    yield make
    for engine in made:
        engine.stop(30.0)


def wait_until(true: Callable[[], bool], timeout_s: float = 60) -> None:
    ends_at = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < ends_at, "it did not come to pass"
        time.sleep(0.005)


def uint8(images: torch.Tensor) -> list[Pixels]:
    return list((images * 255).round().to(torch.uint8).numpy())


async def submit(
    engine: Engine,
    images: list[Pixels],
    stage: str | None = "default",
    *,
    seed: int = 0,
    timeout_s: float = 100,
    model: str | None = None,
    **options: Any,
) -> list[Outcome]:
    with engine.models.use(model) as used:
        return await engine.dispatcher.submit(
            used, images, stage=stage, seeds=[seed] * len(images), deadline=time.monotonic() + timeout_s, **options
        )


def one(engine: Engine, image: Pixels, stage: str | None = "default", **options: Any) -> Outcome:
    (outcome,) = asyncio.run(submit(engine, [image], stage, **options))
    return outcome


def close(found: Pixels | None, expected: torch.Tensor | Pixels, tolerance: float) -> bool:
    assert found is not None
    return bool(np.allclose(found, np.asarray(expected), atol=tolerance))


def hold_steps(patch: pytest.MonkeyPatch) -> threading.Event:
    """Steps wait until the event is set."""
    go, step = threading.Event(), ContinuousBatch._step

    def held(batch: ContinuousBatch, slots: list[Slot]) -> None:
        go.wait(60)
        step(batch, slots)

    patch.setattr(ContinuousBatch, "_step", held)
    return go


def other_checkpoint(folder: Path) -> str:
    other = make_checkpoint()
    for module in other.classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.add_(0.1)
    store.save(folder, other)
    return str(folder)
