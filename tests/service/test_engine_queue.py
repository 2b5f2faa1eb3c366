"""The engine's bounded queue, deadlines, and clients that have gone."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.engines import OUTCOME, hold_steps, submit, uint8, wait_until
from unperturb.models.checkpoints.store import read_card, resolve
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.engine.admission import Admission
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.dispatch import QUIET_S, Dispatcher
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.lifecycle import Lifecycle
from unperturb.service.engine.messages import (
    Admit,
    Cancel,
    FromWorker,
    Loaded,
    Outcome,
    StepReport,
    Threads,
    ToWorker,
    Work,
    WorkerConfig,
)
from unperturb.service.engine.registry import Model
from unperturb.service.engine.scheduler import Scheduler
from unperturb.service.engine.slot import Slot
from unperturb.service.engine.stages import passes
from unperturb.service.errors import DeadlineError, NotReadyError


def test_queue_is_bounded_by_count_and_refuses_a_list_as_a_whole(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(slots=2, max_queue=3), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        waiting = [asyncio.create_task(submit(engine, pixels[:2], "published"))]
        while engine.scheduler.running < 2:
            await asyncio.sleep(0.005)
        waiting.append(asyncio.create_task(submit(engine, pixels[:2])))
        await asyncio.sleep(0.02)
        with pytest.raises(NotReadyError, match=r"2 images are waiting, and at most 3 may") as refused:
            await submit(engine, pixels[:2])
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1
        assert engine.waiting == 2
        go.set()
        assert [len(done) for done in await asyncio.gather(*waiting)] == [2, 2]

    asyncio.run(fill())


def test_slots_that_are_kept_for_short_images_count_as_used_while_a_long_one_waits(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(slots=4), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        waiting = asyncio.create_task(submit(engine, pixels[:6], "published"))
        while engine.waiting < 3:
            await asyncio.sleep(0.005)
        assert (engine.scheduler.running, engine.in_slots) == (3, 4)
        go.set()
        await waiting

    asyncio.run(fill())
    assert engine.in_slots == 0


def test_queue_is_bounded_by_work(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(patience=1 / 3, default_stage="published"), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        engine.models.get(None).cost = Cost(per_pass_s=30 / passes("published"))
        waiting = asyncio.create_task(submit(engine, [pixels[0]], "published"))
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match=r"would take about 30\.00 s, at most 10\.00 s may") as refused:
            await submit(engine, [pixels[0]], "published")
        assert refused.value.retry_after_s == 20
        few = asyncio.create_task(submit(engine, [pixels[0]]))  # does not wait for all of the other's steps
        begun = asyncio.create_task(submit(engine, [pixels[0]], "published", begun=True))
        await asyncio.sleep(0.02)
        go.set()
        await asyncio.gather(waiting, few, begun)

    asyncio.run(fill())


def test_patience_is_in_multiples_of_a_newcomers_own_time(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(patience=1.5), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        engine.models.get(None).cost = Cost(per_pass_s=0.01)  # a batch saves nothing
        waiting = [asyncio.create_task(submit(engine, pixels[:3]))]  # a lone request is taken whatever its size
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match="at most"):
            await submit(engine, [pixels[0]])
        with pytest.raises(NotReadyError, match="at most"):
            engine.dispatcher.refuse_if_full(engine.models.get(None), "default")
        engine.dispatcher.refuse_if_full(None, "default")  # who does not say yet what it is
        waiting.append(asyncio.create_task(submit(engine, [pixels[0]], "published")))  # its own time is longer
        waiting.append(asyncio.create_task(submit(engine, [pixels[0]], patient=True)))
        await asyncio.sleep(0.02)
        go.set()
        await asyncio.gather(*waiting)

    asyncio.run(fill())


def test_newcomer_that_others_would_make_late_is_refused(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        engine.models.get(None).cost = Cost(per_pass_s=10 / passes("default"))
        waiting = [asyncio.create_task(submit(engine, [pixels[0]], timeout_s=1))]  # alone it is taken
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match=r"about 10\.00 s, at most [45]\.\d\d s may"):
            await submit(engine, [pixels[0]], timeout_s=15, patient=True)
        with pytest.raises(NotReadyError, match=r"about 10\.00 s, at most [45]\.\d\d s may"):
            engine.dispatcher.refuse_if_full(engine.models.get(None), "default", left_s=15.0, patient=True)
        waiting.append(asyncio.create_task(submit(engine, [pixels[0]], timeout_s=30)))
        await asyncio.sleep(0.02)
        go.set()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(fill())


def test_deadline_frees_the_slot_between_steps_and_is_checked_in_the_queue(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(slots=2), uint8(images)
    go = hold_steps(monkeypatch)

    async def expire() -> list[Any]:
        engine.models.get(None).cost = Cost()  # so that none is refused for what it would take
        in_slots = [asyncio.create_task(submit(engine, [pixels[0]], "published", timeout_s=0.2)) for _ in range(2)]
        await asyncio.sleep(0)
        assert engine.in_slots == 2
        queued = asyncio.create_task(submit(engine, [pixels[1]], timeout_s=0.2))
        alive = asyncio.create_task(submit(engine, [pixels[2]]))
        await asyncio.sleep(0.3)
        go.set()
        return await asyncio.gather(*in_slots, queued, alive, return_exceptions=True)

    *late, alive = asyncio.run(expire())
    assert [type(error) for error in late] == [DeadlineError] * 3
    assert len(alive) == 1
    assert engine.in_slots == 0


def test_cancelled_request_frees_its_slot_at_the_next_step(
    engines: Callable[..., Engine], images: torch.Tensor
) -> None:
    engine, steps = engines(), []
    step = ContinuousBatch._step

    def counted(batch: ContinuousBatch, slots: list[Slot]) -> None:
        steps.append(len(slots))
        step(batch, slots)

    async def leave() -> None:
        task = asyncio.create_task(submit(engine, uint8(images), "published"))
        while not steps:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousBatch, "_step", counted)
        asyncio.run(leave())
        before = len(steps)
        time.sleep(0.3)
    assert len(steps) <= before + 1 < PRESETS["published"].loop.steps


def test_steps_are_full_as_long_as_enough_images_wait(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    engine, sizes = engines(slots=2), []
    step = ContinuousBatch._step

    def counted(batch: ContinuousBatch, slots: list[Slot]) -> None:
        sizes.append(len(slots))
        step(batch, slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousBatch, "_step", counted)
        asyncio.run(submit(engine, uint8(images) * 2))
    assert sizes == [2] * len(images)


def test_worker_takes_no_more_images_at_a_time_than_it_has_slots_whatever_it_is_sent(
    engines: Callable[..., Engine], images: torch.Tensor
) -> None:
    engine, sizes = engines(slots=2), []
    (worker,) = engine.workers
    number, pixels = engine.models.get(None).number, uint8(images)
    step, ended = ContinuousBatch._step, list[int]()

    def counted(batch: ContinuousBatch, slots: list[Slot]) -> None:
        sizes.append(len(slots))
        step(batch, slots)

    def heard(message: FromWorker) -> None:
        if isinstance(message, StepReport):
            ended.extend(id for id, _ in message.ended)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousBatch, "_step", counted)
        patch.setattr(worker, "on_message", heard)
        stages = ["published", None, "default", None, None, "default", "default"]
        works = [Work(i, number, pixels[i], stage, 0, False, time.monotonic()) for i, stage in enumerate(stages)]
        worker.send(Admit(tuple(works)))
        worker.send(Cancel((6,)))
        wait_until(lambda: len(ended) == 6)
    assert max(sizes) == 2
    assert sorted(ended) == list(range(6))
    assert ended.index(2) < ended.index(5) < ended.index(0)  # in turn, and not behind the long one


class Recorder(WorkerHandle):
    """Keeps what a worker would be sent."""

    def __init__(self) -> None:
        super().__init__(WorkerConfig("cpu", 1, 1, "eager", "float32", "info", "text", alone=2), lambda _: None)
        self.sent: list[ToWorker] = []

    def send(self, message: ToWorker) -> None:
        self.sent.append(message)

    def taken(self) -> list[int | str]:
        """The numbers of threads since the last look, and the kinds of other messages."""
        sent, self.sent = self.sent, []
        return [message.number if isinstance(message, Threads) else type(message).__name__ for message in sent]


def test_a_worker_has_the_others_threads_once_they_have_had_nothing_to_do_for_a_while(images: torch.Tensor) -> None:
    one, two = handles = [Recorder(), Recorder()]
    now = 0.0
    scheduler, lifecycle = Scheduler([1, 1], clock=lambda: now), Lifecycle()
    model = Model(1, "a", "a", read_card(resolve("small")))
    scheduler.load(model)
    dispatcher = Dispatcher(scheduler, handles, lifecycle, Admission(64, 1e9, "default"))
    for index in (0, 1):
        dispatcher.update(index, Loaded(1, Cost()))
    assert one.taken() == two.taken() == []  # a warm-up's costs are those beside others
    lifecycle.serve()

    async def ask() -> None:
        nonlocal now
        now += QUIET_S
        first = asyncio.create_task(dispatch(images[:1]))
        await asyncio.sleep(0)
        assert (one.taken(), two.taken()) == ([2, "Admit"], [])
        second = asyncio.create_task(dispatch(images[1:2]))
        await asyncio.sleep(0)
        assert (one.taken(), two.taken()) == ([1], ["Admit"])
        dispatcher.update(0, StepReport(1, (1,), 0.1, None, [(1, OUTCOME)], 0))
        await first
        assert (one.taken(), two.taken()) == ([], [])  # the other may have an image again at once
        now += QUIET_S
        dispatcher.update(1, StepReport(1, (2,), 0.1, None, [], 0))
        assert (one.taken(), two.taken()) == ([], [2])
        third = asyncio.create_task(dispatch(images[2:3]))
        await asyncio.sleep(0)
        assert (one.taken(), two.taken()) == (["Admit"], [1])
        for task in (second, third):
            task.cancel()
        await asyncio.gather(second, third, return_exceptions=True)

    async def dispatch(images: torch.Tensor) -> list[Outcome]:
        return await dispatcher.submit(model, uint8(images), stage="default", seeds=[0], deadline=time.monotonic() + 60)

    asyncio.run(ask())
