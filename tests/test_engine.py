"""The engine: continuous batches, a bounded queue, clients that have gone, and devices that fail."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from service.jobs import Outcome
from service.loaded import ATTACK, LoadedModel

from models import checkpoint
from models.defended import defend
from models.errors import ConfigError, DeadlineError, NotFoundError, NotReadyError, UnprocessableError
from models.reverse_attack import PRESETS
from service import worker as worker_module
from service.engine import Engine
from service.lane import Lane, Slot
from service.metrics import Metrics
from tests.conftest import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    return LoadedModel(tiny_folder, id=None, devices=[CPU, CPU])


@pytest.fixture
def engines(model: LoadedModel) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**changed: Any) -> Engine:
        settings = {
            "devices": [CPU], "max_batch": 8, "max_queue": 64, "max_wait_s": 1e9, "stall_s": 60.0, "pad": False,
            "threads": 2, "metrics": Metrics(), **changed,
        }  # fmt: skip
        engine = Engine(model, **settings)
        made.append(engine)
        engine.start()
        if changed.get("max_batch") != 1:
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


def uint8(images: torch.Tensor) -> list[torch.Tensor]:
    return list((images * 255).round().to(torch.uint8))


async def submit(
    engine: Engine, images: list[torch.Tensor], stage: str | None = "default", *, seed: int = 0, timeout_s: float = 100,
    **options: Any,
) -> list[Outcome]:  # fmt: skip
    return await engine.submit(
        engine.model(None), images, stage=stage, seeds=[seed] * len(images), deadline=time.monotonic() + timeout_s,
        **options,
    )  # fmt: skip


def one(engine: Engine, image: torch.Tensor, stage: str | None = "default", **options: Any) -> Outcome:
    (outcome,) = asyncio.run(submit(engine, [image], stage, **options))
    return outcome


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("pad", [False, True], ids=["unpadded", "padded"])
def test_outcome_is_that_of_the_defended_classifier(
    engines: Callable[..., Engine], tiny_folder: Path, images: torch.Tensor, preset: str, pad: bool
) -> None:
    engine = engines(pad=pad, max_batch=2)
    expected = defend(checkpoint.load(tiny_folder), PRESETS[preset]).classify(images[:1], seed=7)
    outcome = one(engine, uint8(images)[0], preset, seed=7, wants_image=True)
    assert torch.allclose(outcome.scores, expected.logits[0].softmax(0), atol=1e-4)
    assert torch.allclose(outcome.unpurified_scores, expected.unpurified_logits[0].softmax(0), atol=1e-5)
    assert outcome.image is not None
    assert outcome.loss_before is not None
    assert outcome.loss_after is not None
    assert outcome.linf is not None
    assert torch.allclose(outcome.image, expected.image[0], atol=1e-3)
    assert abs(outcome.loss_before - float(expected.trace.loss_before)) < 1e-3
    assert abs(outcome.loss_after - float(expected.trace.loss_after)) < 1e-2
    assert abs(outcome.linf - float(expected.trace.linf)) < 1e-4
    assert torch.allclose(torch.tensor(outcome.losses), expected.trace.losses[:, 0], atol=1e-2)


def test_presets_attacks_and_plain_images_share_batches_and_keep_their_own_answers(
    engines: Callable[..., Engine], images: torch.Tensor
) -> None:
    engine, pixels = engines(max_batch=16), uint8(images)
    kinds = ["default", "published", None, ATTACK]
    alone = [one(engine, pixels[i], kind, seed=i) for i, kind in enumerate(kinds)]
    mixed: set[frozenset[str | None]] = set()
    tick = Lane.tick

    def watched(lane: Lane) -> Any:
        mixed.add(frozenset(slot.job.stage for slot in lane.slots))
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
        assert torch.allclose(outcome.scores, expected.scores, atol=1e-4)
        assert outcome.loss_before == pytest.approx(expected.loss_before, abs=1e-4)


def test_attack_raises_the_loss_within_its_ball(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    outcome = one(engines(), uint8(images)[0], ATTACK, wants_image=True)
    assert outcome.loss_before is not None
    assert outcome.loss_after is not None
    assert outcome.loss_after > outcome.loss_before
    assert outcome.image is not None
    assert (outcome.image - images[0]).abs().max() <= 8 / 255 + 1e-6


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
    engine, seen = engines(devices=[CPU, CPU], max_batch=2), set()
    admit = worker_module.Worker._admit

    def watched(worker: Any, jobs: Any) -> None:
        if jobs:
            seen.add(worker.number)
        admit(worker, jobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module.Worker, "_admit", watched)
        found = asyncio.run(submit(engine, uint8(images) * 2))
    assert seen == {0, 1}
    for first, again in zip(found[:8], found[8:], strict=True):
        assert torch.allclose(first.scores, again.scores, atol=1e-4)


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
    engine, pixels = engines(max_batch=2, max_queue=3), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        waiting = [asyncio.create_task(submit(engine, [pixels[0]])) for _ in range(2)]
        while engine.queue.in_slots < 2:
            await asyncio.sleep(0.005)
        waiting.append(asyncio.create_task(submit(engine, pixels[:2])))
        await asyncio.sleep(0.02)
        with pytest.raises(NotReadyError, match=r"2 images are waiting, and at most 3 may") as refused:
            await submit(engine, pixels[:2])
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1
        assert len(engine.queue) == 2
        go.set()
        assert [len(done) for done in await asyncio.gather(*waiting)] == [1, 1, 2]

    asyncio.run(fill())


def test_queue_is_bounded_by_work(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(max_wait_s=10.0), uint8(images)
    go = hold_steps(monkeypatch)

    async def fill() -> None:
        model = engine.model(None)
        monkeypatch.setattr(model, "seconds_per_pass", 15 / model.passes("published"))
        waiting = asyncio.create_task(submit(engine, [pixels[0]], "published"))
        await asyncio.sleep(0.05)
        with pytest.raises(NotReadyError, match=r"takes about 15\.\d s, at most 10 s may wait") as refused:
            await submit(engine, [pixels[0]])
        assert refused.value.retry_after_s in (5, 6)
        go.set()
        await waiting

    asyncio.run(fill())


def test_deadline_frees_the_slot_between_steps_and_is_checked_in_the_queue(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(max_batch=2), uint8(images)
    go = hold_steps(monkeypatch)

    async def expire() -> list[Any]:
        in_slots = [asyncio.create_task(submit(engine, [pixels[0]], "published", timeout_s=0.2)) for _ in range(2)]
        while engine.queue.in_slots < 2:
            await asyncio.sleep(0.005)
        queued = asyncio.create_task(submit(engine, [pixels[1]], timeout_s=0.2))
        alive = asyncio.create_task(submit(engine, [pixels[2]]))
        await asyncio.sleep(0.3)
        go.set()
        return await asyncio.gather(*in_slots, queued, alive, return_exceptions=True)

    *late, alive = asyncio.run(expire())
    assert [type(error) for error in late] == [DeadlineError] * 3
    assert len(alive) == 1
    assert engine.queue.in_slots == 0


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
        wait_until(lambda: engine.queue.in_slots == 0)
    assert len(steps) < PRESETS["published"].loop.steps


# -- isolation ---------------------------------------------------------------------------------------------------------


def hostile(count: int) -> list[torch.Tensor]:
    """NaN, infinite, far outside [0, 1], constant, and noise."""
    kinds = [
        torch.full((3, 32, 32), float("nan")), torch.full((3, 32, 32), float("inf")),
        torch.full((3, 32, 32), 1e30), torch.full((3, 32, 32), -1e30), torch.zeros(3, 32, 32),
        torch.rand(3, 32, 32).round(),
    ]  # fmt: skip
    return [kinds[i % len(kinds)] for i in range(count)]


@pytest.mark.parametrize("preset", ["default", "published"])
def test_image_keeps_its_scores_alone_among_31_hostile_ones_in_a_reused_slot_and_in_another_bucket(
    engines: Callable[..., Engine], images: torch.Tensor, preset: str
) -> None:
    small, large = engines(max_batch=2), engines(max_batch=32, pad=True)
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
        assert torch.allclose(found.scores, alone.scores, atol=1e-4)
        assert int(found.scores.argmax()) == int(alone.scores.argmax())
    again = one(large, pixels, preset, seed=3)
    assert torch.allclose(again.scores, alone.scores, atol=1e-4)


def test_job_that_breaks_a_step_fails_alone(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(), uint8(images)
    step = Lane._step

    def broken(lane: Lane, slots: list[Slot]) -> None:
        if any(slot.job.seed == 13 for slot in slots):
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
    engine, pixels = engines(max_batch=2, on_failure=reasons.append), uint8(images)

    def fatal(*_: object) -> None:
        time.sleep(0.05)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Lane, "_step", fatal)

    async def run() -> list[Any]:
        return await asyncio.gather(*(submit(engine, [image]) for image in pixels), return_exceptions=True)

    for result in asyncio.run(run()):
        assert isinstance(result, NotReadyError)
    assert engine.failure == "worker 0: AcceleratorError"
    assert engine.not_ready is not None
    wait_until(lambda: reasons == [engine.failure])
    with pytest.raises(NotReadyError, match="must be restarted"):
        one(engine, pixels[0])


def test_worker_that_stops_stepping_fails_the_engine(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    engine = engines(stall_s=0.3, on_failure=reasons.append)
    go = hold_steps(monkeypatch)
    with pytest.raises(NotReadyError, match="failed"):
        one(engine, uint8(images)[0])
    wait_until(lambda: bool(reasons))
    assert reasons == ["worker 0 has not finished a step for 0.3 s"]
    go.set()


def test_stopping_finishes_what_is_here_and_takes_no_more(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    engine, pixels = engines(max_batch=2), uint8(images)

    async def run() -> list[Outcome]:
        task = asyncio.create_task(submit(engine, pixels))
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 60.0))
        while not engine.draining:
            await asyncio.sleep(0.001)
        with pytest.raises(NotReadyError, match="stopping"):
            await submit(engine, [pixels[0]])
        found = await task
        await stopping
        return found

    assert len(asyncio.run(run())) == 8
    assert not engine.workers[0].thread.is_alive()


def test_replaced_model_finishes_what_it_began(
    engines: Callable[..., Engine], images: torch.Tensor, tmp_path: Path, model: LoadedModel
) -> None:
    other = make_checkpoint()
    with torch.no_grad():
        for module in other.classifier.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.add_(0.1)
    checkpoint.save(tmp_path, other)
    engine, pixels = engines(max_batch=2), uint8(images)
    before = one(engine, pixels[0], "published")
    new = LoadedModel(tmp_path, id=None, devices=[CPU, CPU])

    async def swap() -> tuple[Outcome, Outcome]:
        old = asyncio.create_task(submit(engine, [pixels[0]], "published"))
        while engine.queue.in_slots == 0:
            await asyncio.sleep(0.001)
        engine.models = {**engine.models, new.id: new}
        (after,) = await submit(engine, [pixels[0]], "published")
        ((began_before),) = await old
        return began_before, after

    began_before, after = asyncio.run(swap())
    assert torch.allclose(began_before.scores, before.scores, atol=1e-4)
    assert not torch.allclose(after.scores, before.scores, atol=1e-3)


def test_models_are_added_warm_and_removed_by_id(engines: Callable[..., Engine], tiny_folder: Path) -> None:
    engine = engines()
    engine.add(LoadedModel(tiny_folder, id="second", devices=[CPU]))
    assert engine.model("second").seconds_per_pass > 0
    engine.remove("second")
    with pytest.raises(NotFoundError, match="'second' is not loaded; tiny is"):
        engine.model("second")
    with pytest.raises(ConfigError, match="default"):
        engine.remove("tiny")
