"""Devices that fail or stall, and the end."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.engines import hold_steps, one, submit, uint8, wait_until
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.lifecycle import EngineState
from unperturb.service.engine.messages import Failed, FromWorker, Outcome
from unperturb.service.errors import NotReadyError


def test_failed_device_answers_everybody_and_ends_readiness(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    engine, pixels = engines(slots=2, on_failure=reasons.append), uint8(images)

    def fatal(*_: object) -> None:
        time.sleep(0.05)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ContinuousBatch, "_step", fatal)

    async def run() -> list[Any]:
        return await asyncio.gather(*(submit(engine, [image]) for image in pixels), return_exceptions=True)

    for result in asyncio.run(run()):
        assert isinstance(result, NotReadyError)
    assert engine.lifecycle.failure == "worker cpu: AcceleratorError"
    assert engine.lifecycle.not_ready is not None
    wait_until(lambda: reasons == [engine.lifecycle.failure])
    with pytest.raises(NotReadyError, match="must be restarted"):
        one(engine, pixels[0])


def test_worker_killed_in_mid_batch_answers_everybody(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    reasons: list[str] = []
    engine = engines(slots=4, on_failure=reasons.append, handle=WorkerHandle)

    async def run() -> list[Any]:
        tasks = [asyncio.create_task(submit(engine, [image], "published")) for image in uint8(images)]
        await asyncio.sleep(0.1)
        process = engine.workers[0].process
        assert process is not None
        process.kill()
        return await asyncio.gather(*tasks, return_exceptions=True)

    for result in asyncio.run(run()):
        assert isinstance(result, NotReadyError), result
    wait_until(lambda: bool(reasons))
    assert "its process has ended" in reasons[0]


def test_worker_that_stops_stepping_fails_the_engine(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    engine = engines(stall_s=0.3, on_failure=reasons.append)
    go = hold_steps(monkeypatch)
    with pytest.raises(NotReadyError, match="failed"):
        one(engine, uint8(images)[0])
    wait_until(lambda: bool(reasons))
    assert reasons == ["worker cpu has not finished a step for 0.3 s"]
    go.set()


def test_stopping_finishes_what_is_here_and_takes_no_more(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(slots=2), uint8(images)
    engine.models.get(None).cost = Cost()  # every step is about to end
    go = hold_steps(monkeypatch)

    async def run() -> list[Outcome]:
        task = asyncio.create_task(submit(engine, pixels))
        await asyncio.sleep(0)  # it is let in
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 60.0))
        await asyncio.to_thread(wait_until, lambda: engine.lifecycle.state is EngineState.DRAINING)
        with pytest.raises(NotReadyError, match="stopping"):
            engine.dispatcher.refuse_if_full(None, "default")
        assert (engine.in_slots, engine.waiting) == (2, 4)  # two have slots in the next step
        go.set()
        found = await task
        await stopping
        return found

    assert len(asyncio.run(run())) == 8


def test_what_comes_when_the_time_is_over_is_refused(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    """As an image that was let in, and is decoded only then."""
    engine = engines()
    engine.lifecycle.drain()
    one(engine, uint8(images)[0])
    engine.refuse_rest()
    with pytest.raises(NotReadyError, match="stopping"):
        one(engine, uint8(images)[0])


def test_worker_whose_message_cannot_be_handled_fails_the_engine(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    engine = engines(on_failure=reasons.append)
    (worker,) = engine.workers
    on_message = worker.on_message

    def heard(message: FromWorker) -> None:
        if not isinstance(message, Failed):
            raise TypeError("an exception that cannot be made from its arguments")
        on_message(message)

    monkeypatch.setattr(worker, "on_message", heard)
    with pytest.raises(NotReadyError, match="failed"):
        one(engine, uint8(images)[0])
    wait_until(lambda: bool(reasons))
    assert "cannot be handled: TypeError" in reasons[0]
