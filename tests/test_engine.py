"""The engine: continuous batches, a bounded queue, clients that have gone, and devices that fail."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models import checkpoint
from models.defended import defend
from models.errors import CheckpointError, ConfigError, DeadlineError, NotFoundError, NotReadyError, UnprocessableError
from models.reverse_attack import PRESETS
from service.engine import Engine
from service.handle import WorkerHandle
from service.lane import Lane, Slot
from service.messages import Outcome, Work
from service.metrics import Metrics
from service.stages import ATTACK, passes
from service.worker import WorkerConfig, work
from tests.conftest import make_checkpoint

Pixels = NDArray[Any]


class ThreadHandle(WorkerHandle):
    """The worker in a thread of this process, so that a test can reach into it."""

    def _host(self, theirs: Connection) -> None:
        threading.Thread(target=work, args=(theirs, self.config), daemon=True).start()


@pytest.fixture
def engines(tiny_folder: Path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(*, slots: int = 8, pad: bool = False, workers: int = 1, **changed: Any) -> Engine:
        settings = {
            "max_queue": 64, "max_wait_s": 1e9, "stall_s": 60.0, "metrics": Metrics(), "handle": ThreadHandle,
            **changed,
        }  # fmt: skip
        configs = [WorkerConfig("cpu", slots, pad, 2, "warning", "text")] * workers
        engine = Engine(str(tiny_folder), workers=configs, **settings)
        made.append(engine)
        engine.start()
        wait_until(lambda: engine.warm.is_set() or engine.failure is not None)
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
    engine: Engine, images: list[Pixels], stage: str | None = "default", *, seed: int = 0, timeout_s: float = 100,
    model: str | None = None, **options: Any,
) -> list[Outcome]:  # fmt: skip
    with engine.models.use(model) as used:
        return await engine.submit(
            used, images, stage=stage, seeds=[seed] * len(images), deadline=time.monotonic() + timeout_s, **options
        )  # fmt: skip


def one(engine: Engine, image: Pixels, stage: str | None = "default", **options: Any) -> Outcome:
    (outcome,) = asyncio.run(submit(engine, [image], stage, **options))
    return outcome


def close(found: Pixels | None, expected: torch.Tensor | Pixels, tolerance: float) -> bool:
    assert found is not None
    return bool(np.allclose(found, np.asarray(expected), atol=tolerance))


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("pad", [False, True], ids=["unpadded", "padded"])
def test_outcome_is_that_of_the_defended_classifier(
    engines: Callable[..., Engine], tiny_folder: Path, images: torch.Tensor, preset: str, pad: bool
) -> None:
    engine = engines(pad=pad, slots=2)
    expected = defend(checkpoint.load(tiny_folder), PRESETS[preset]).classify(images[:1], seed=7)
    outcome = one(engine, uint8(images)[0], preset, seed=7, wants_image=True)
    assert close(outcome.scores, expected.logits[0].softmax(0), 1e-4)
    assert close(outcome.unpurified_scores, expected.unpurified_logits[0].softmax(0), 1e-5)
    assert outcome.loss_before is not None
    assert outcome.loss_after is not None
    assert outcome.linf is not None
    assert close(outcome.image, expected.image[0], 1e-3)
    assert abs(outcome.loss_before - float(expected.trace.loss_before)) < 1e-3
    assert abs(outcome.loss_after - float(expected.trace.loss_after)) < 1e-2
    assert abs(outcome.linf - float(expected.trace.linf)) < 1e-4
    assert close(np.array(outcome.losses), expected.trace.losses[:, 0], 1e-2)


def test_presets_attacks_and_plain_images_share_batches_and_keep_their_own_answers(
    engines: Callable[..., Engine], images: torch.Tensor
) -> None:
    engine, pixels = engines(slots=16), uint8(images)
    kinds = ["default", "published", None, ATTACK]
    alone = [one(engine, pixels[i], kind, seed=i) for i, kind in enumerate(kinds)]
    mixed: set[frozenset[str | None]] = set()
    tick = Lane.tick

    def watched(lane: Lane) -> Any:
        mixed.add(frozenset(slot.work.stage for slot in lane.slots))
        return tick(lane)

    async def together() -> list[list[Outcome]]:
        return await asyncio.gather(
            *(submit(engine, [pixels[i]], kind, seed=i) for i, kind in enumerate(kinds)),
            *(submit(engine, pixels, kind, seed=9) for kind in kinds),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lane, "tick", watched)
        found = asyncio.run(together())
    assert any({"default", "published", ATTACK} <= kinds for kinds in mixed)
    for (outcome,), expected in zip(found, alone, strict=False):
        assert close(outcome.scores, expected.scores, 1e-4)
        assert outcome.loss_before == pytest.approx(expected.loss_before, abs=1e-4)


def test_attack_raises_the_loss_within_its_ball(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    outcome = one(engines(), uint8(images)[0], ATTACK, wants_image=True)
    assert outcome.loss_before is not None
    assert outcome.loss_after is not None
    assert outcome.loss_after > outcome.loss_before
    assert outcome.image is not None
    assert np.abs(outcome.image - images[0].numpy()).max() <= 8 / 255 + 1e-6


def test_newcomer_with_few_steps_overtakes_one_with_many(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    engine, pixels, order = engines(), uint8(images), []

    async def noted(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await submit(engine, [pixels[0]], name)
        order.append(name)

    async def both() -> None:
        await asyncio.gather(noted("published", 0), noted("default", 0.02))

    asyncio.run(both())
    assert order == ["default", "published"]


def test_two_devices_share_one_queue(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    engine = engines(workers=2, slots=2)

    async def run() -> list[Outcome]:
        task = asyncio.create_task(submit(engine, uint8(images) * 2))
        await asyncio.sleep(0)
        assert [len(worker.busy) for worker in engine.workers] == [2, 2]
        assert engine.waiting == 12
        return await task

    found = asyncio.run(run())
    for first, again in zip(found[:8], found[8:], strict=True):
        assert close(first.scores, again.scores, 1e-4)


# -- the queue ---------------------------------------------------------------------------------------------------------


def hold_steps(patch: pytest.MonkeyPatch) -> threading.Event:
    """Steps wait until the event is set."""
    go, step = threading.Event(), Lane._step

    def held(lane: Lane, slots: list[Slot]) -> None:
        go.wait(60)
        step(lane, slots)

    patch.setattr(Lane, "_step", held)
    return go


def test_queue_is_bounded_by_count_and_refuses_a_list_as_a_whole(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(slots=2, max_queue=3), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        waiting = [asyncio.create_task(submit(engine, [pixels[0]])) for _ in range(2)]
        while engine.in_slots < 2:
            await asyncio.sleep(0.005)
        waiting.append(asyncio.create_task(submit(engine, pixels[:2])))
        await asyncio.sleep(0.02)
        with pytest.raises(NotReadyError, match=r"2 images are waiting, and at most 3 may") as refused:
            await submit(engine, pixels[:2])
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1
        assert engine.waiting == 2
        go.set()
        assert [len(done) for done in await asyncio.gather(*waiting)] == [1, 1, 2]

    asyncio.run(fill())


def test_queue_is_bounded_by_work(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(max_wait_s=10.0), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        engine.models.get(None).seconds_per_pass = 30 / passes("published")  # in a slot, half of it is ahead
        waiting = asyncio.create_task(submit(engine, [pixels[0]], "published"))
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match=r"takes about 15\.0 s, at most 10 s may wait") as refused:
            await submit(engine, [pixels[0]])
        assert refused.value.retry_after_s == 5
        go.set()
        await waiting

    asyncio.run(fill())


def test_deadline_frees_the_slot_between_steps_and_is_checked_in_the_queue(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(slots=2), uint8(images)
    go = hold_steps(monkeypatch)

    async def expire() -> list[Any]:
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
    step = Lane._step

    def counted(lane: Lane, slots: list[Slot]) -> None:
        steps.append(len(slots))
        step(lane, slots)

    async def leave() -> None:
        task = asyncio.create_task(submit(engine, uint8(images), "published"))
        while not steps:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lane, "_step", counted)
        asyncio.run(leave())
        before = len(steps)
        time.sleep(0.3)
    assert len(steps) <= before + 1 < PRESETS["published"].loop.steps


# -- isolation ---------------------------------------------------------------------------------------------------------


def hostile(count: int) -> list[Pixels]:
    """NaN, infinite, far outside [0, 1], constant, and noise."""
    values = (np.nan, np.inf, 1e30, -1e30, 0.0)
    kinds = [np.full((3, 32, 32), value, dtype=np.float32) for value in values]
    kinds.append(np.random.default_rng(0).integers(0, 2, (3, 32, 32)).astype(np.float32))
    return [kinds[i % len(kinds)] for i in range(count)]


@pytest.mark.parametrize("preset", ["default", "published"])
def test_image_keeps_its_scores_alone_among_31_hostile_ones_in_a_reused_slot_and_in_another_bucket(
    engines: Callable[..., Engine], images: torch.Tensor, preset: str
) -> None:
    small, large = engines(slots=2), engines(slots=32, pad=True)
    pixels = uint8(images)[0]
    alone = one(small, pixels, preset, seed=3)

    async def among() -> Outcome:
        others = [
            asyncio.create_task(submit(large, [image], kind if i else "published", seed=i))
            for i, (image, kind) in enumerate(zip(hostile(31), ["default", ATTACK, "default", None] * 8, strict=False))
        ]
        (outcome,) = await submit(large, [pixels], preset, seed=3)
        for result in await asyncio.gather(*others, return_exceptions=True):
            assert isinstance(result, list | UnprocessableError), result
        return outcome

    for _ in range(2):  # the second time in slots that the hostile ones have used
        found = asyncio.run(among())
        assert close(found.scores, alone.scores, 1e-4)
        assert int(found.scores.argmax()) == int(alone.scores.argmax())
    again = one(large, pixels, preset, seed=3)
    assert close(again.scores, alone.scores, 1e-4)


def test_job_that_breaks_a_step_fails_alone(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(), uint8(images)
    step = Lane._step

    def broken(lane: Lane, slots: list[Slot]) -> None:
        if any(slot.work.seed == 13 for slot in slots):
            raise RuntimeError("an operation that this image breaks")
        step(lane, slots)

    monkeypatch.setattr(Lane, "_step", broken)

    async def run() -> list[Any]:
        return await asyncio.gather(
            *(submit(engine, [pixels[i]], seed=seed) for i, seed in enumerate((1, 13, 2))), return_exceptions=True
        )

    first, guilty, last = asyncio.run(run())
    assert isinstance(guilty, RuntimeError)
    assert len(first) == len(last) == 1
    assert engine.failure is None


# -- failures, the end, and other models -------------------------------------------------------------------------------


def test_failed_device_answers_everybody_and_ends_readiness(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    engine, pixels = engines(slots=2, on_failure=reasons.append), uint8(images)

    def fatal(*_: object) -> None:
        time.sleep(0.05)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Lane, "_step", fatal)

    async def run() -> list[Any]:
        return await asyncio.gather(*(submit(engine, [image]) for image in pixels), return_exceptions=True)

    for result in asyncio.run(run()):
        assert isinstance(result, NotReadyError)
    assert engine.failure == "worker cpu: AcceleratorError"
    assert engine.not_ready is not None
    wait_until(lambda: reasons == [engine.failure])
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


def test_stopping_finishes_what_is_here_and_takes_no_more(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    engine, pixels = engines(slots=2), uint8(images)

    async def run() -> list[Outcome]:
        task = asyncio.create_task(submit(engine, pixels))
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 60.0))
        while not engine.draining:
            await asyncio.sleep(0.001)
        with pytest.raises(NotReadyError, match="stopping"):
            engine.refuse_if_full()
        found = await task
        await stopping
        return found

    assert len(asyncio.run(run())) == 8


def other_checkpoint(folder: Path) -> str:
    other = make_checkpoint()
    for module in other.classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.add_(0.1)
    checkpoint.save(folder, other)
    return str(folder)


def test_replaced_model_finishes_what_began_on_it(
    engines: Callable[..., Engine], images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(slots=2), uint8(images)
    before = one(engine, pixels[0])
    new = other_checkpoint(tmp_path)
    said: list[Any] = []
    monkeypatch.setattr(engine.models, "_let_go", lambda model: said.append(model.number))

    async def swap() -> tuple[Outcome, Outcome]:
        with engine.models.use(None) as old:  # a request that has begun, and still decodes
            await asyncio.to_thread(engine.add, new, None)
            assert said == []
            outcomes = await engine.submit(
                old, pixels[:1], stage="default", seeds=[0], deadline=time.monotonic() + 60
            )  # fmt: skip
        (after,) = await submit(engine, pixels[:1])
        return outcomes[0], after

    began_before, after = asyncio.run(swap())
    assert said == [1]
    assert close(began_before.scores, before.scores, 1e-4)
    assert not close(after.scores, before.scores, 1e-3)


def test_models_are_added_warm_refused_and_removed_by_id(engines: Callable[..., Engine], tiny_folder: Path) -> None:
    engine = engines()
    added = engine.add(str(tiny_folder), "second", default=True)
    assert added.seconds_per_pass > 0
    assert engine.models.get(None) is added
    with pytest.raises(ConfigError, match="default"):
        engine.models.remove("second")
    engine.models.remove("tiny")
    with pytest.raises(NotFoundError, match="'tiny' is not loaded; second is"):
        engine.models.get("tiny")
    with pytest.raises(CheckpointError, match="not 0000"):
        engine.add(str(tiny_folder), None, digest="0" * 64)
    with pytest.raises(CheckpointError, match="no/such"):
        engine.add("no/such", None)


def test_checkpoint_that_does_not_run_is_refused_and_the_others_are_served(
    engines: Callable[..., Engine], images: torch.Tensor, tmp_path: Path
) -> None:
    broken = make_checkpoint()
    with torch.no_grad():
        for parameter in broken.classifier.parameters():
            parameter.mul_(1e30)
    checkpoint.save(tmp_path, broken, half=False)
    engine = engines(slots=2)
    with pytest.raises(CheckpointError, match="does not run"):
        engine.add(str(tmp_path), "broken")
    assert engine.failure is None
    assert list(engine.models.by_id) == ["tiny"]
    assert one(engine, uint8(images)[0]).loss_before is not None


def test_images_are_served_while_a_model_is_warmed_up(
    engines: Callable[..., Engine], images: torch.Tensor, tiny_folder: Path
) -> None:
    engine = engines(slots=16)

    async def both() -> tuple[int, bool]:
        adding = asyncio.create_task(asyncio.to_thread(engine.add, str(tiny_folder), "second"))
        served = 0
        while not adding.done():
            await submit(engine, uint8(images)[:1])
            served += not adding.done()
        return served, (await adding).id == "second"

    served, added = asyncio.run(both())
    assert served >= 2
    assert added


def test_images_without_steps_do_not_take_the_slots_of_those_with() -> None:
    handle = WorkerHandle(WorkerConfig("cpu", 2, False, 1, "warning", "text"), lambda *_: None)
    black = np.zeros((3, 8, 8), dtype=np.uint8)
    for i in range(2):
        handle.give(Work(i, 1, black, None, 0, False, 0.0))
    assert not handle.has_room(None)
    assert handle.has_room("default")
    for i in range(2, 4):
        handle.give(Work(i, 1, black, "default", 0, False, 0.0))
    assert not handle.has_room("default")
    handle.take_back([0, 2])
    assert handle.has_room(None)
    assert handle.has_room("default")
