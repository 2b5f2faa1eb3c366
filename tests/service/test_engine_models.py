"""Models that are added, replaced, refused and removed while others are served."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_checkpoint
from tests.support.engines import close, one, other_checkpoint, submit, uint8
from unperturb.models.checkpoints import store
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.inference.captured import Stepper
from unperturb.models.inference.continuous import Stage
from unperturb.service.engine import loading
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.messages import FromWorker, Outcome, Upgraded
from unperturb.service.engine.registry import Model
from unperturb.service.errors import NotFoundError, NotReadyError


def test_replaced_model_finishes_what_began_on_it(
    engines: Callable[..., Engine], images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels = engines(slots=2), uint8(images)
    before = one(engine, pixels[0])
    new = other_checkpoint(tmp_path)
    said: list[Any] = []
    monkeypatch.setattr(engine.models, "_on_unused", lambda model: said.append(model.number))

    async def swap() -> tuple[Outcome, Outcome]:
        with engine.models.use(None) as old:  # a request that has begun, and still decodes
            await asyncio.to_thread(engine.add, new, None)
            assert said == []
            outcomes = await engine.dispatcher.submit(
                old, pixels[:1], stage="default", seeds=[0], deadline=time.monotonic() + 60
            )
        (after,) = await submit(engine, pixels[:1])
        return outcomes[0], after

    began_before, after = asyncio.run(swap())
    assert said == [1]
    assert close(began_before.scores, before.scores, 1e-4)
    assert not close(after.scores, before.scores, 1e-3)


def test_models_are_added_warm_refused_and_removed_by_id(engines: Callable[..., Engine], tiny_folder: Path) -> None:
    engine = engines()
    added = engine.add(str(tiny_folder), "second", default=True)
    assert added.cost.alone("default") > 0
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
    store.save(tmp_path, broken, half=False)
    engine = engines(slots=2)
    with pytest.raises(CheckpointError, match="does not run"):
        engine.add(str(tmp_path), "broken")
    assert engine.lifecycle.failure is None
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


@pytest.mark.parametrize(("piece_s", "fails"), [(0.15, False), (3.0, True)])
def test_loading_may_take_long_as_long_as_it_goes_on(
    engines: Callable[..., Engine], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, piece_s: float, fails: bool
) -> None:
    reasons: list[str] = []

    def on_failure(reason: str) -> None:
        reasons.append(reason)
        other = threading.Thread(target=engine.lifecycle.leave)  # as whoever is answered needs the lock
        other.start()
        other.join(5.0)
        assert not other.is_alive(), "the engine's lock is held"

    engine = engines(slots=1, on_failure=on_failure)
    monkeypatch.setattr(loading, "LOAD_TIMEOUT_S", 1.0)
    prepare = Stepper.prepare

    def slowly(stepper: Stepper, stage: Stage, count: int) -> None:
        time.sleep(piece_s)
        prepare(stepper, stage, count)

    monkeypatch.setattr(Stepper, "prepare", slowly)
    started = time.monotonic()
    if fails:
        with pytest.raises(NotReadyError):
            engine.add(str(tiny_folder), "second")
        assert "has not gone on" in reasons[0]
    else:
        engine.add(str(tiny_folder), "second")
        assert time.monotonic() - started > 1.0
        assert not reasons


def test_model_is_shown_as_it_is_on_its_slowest_worker(engines: Callable[..., Engine]) -> None:
    engine = engines(workers=2, slots=1)
    model = engine.models.get(None)
    fast = Cost(per_batch_s=1e-9, per_pass_s=1e-9)
    engine.workers[0].on_message(Upgraded(model.number, "captured", fast))
    assert model.execution == "eager"
    assert model.cost.alone("default") > fast.alone("default")
    engine.workers[1].on_message(Upgraded(model.number, "captured", fast))
    assert (model.execution, model.cost) == ("captured", fast)


def test_upgrade_that_ends_before_its_model_is_served_is_not_lost(
    engines: Callable[..., Engine], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(slots=1, upgrade="captured")
    upgraded, told, put = threading.Event(), engine.workers[0].on_message, engine.models.put

    def noted(message: FromWorker) -> None:
        told(message)
        if isinstance(message, Upgraded) and message.model == 2:
            upgraded.set()

    def late(model: Model, *, default: bool) -> None:
        assert upgraded.wait(60)
        put(model, default=default)

    monkeypatch.setattr(engine.workers[0], "on_message", noted)
    monkeypatch.setattr(engine.models, "put", late)
    assert engine.add(str(tiny_folder), "second").execution == "captured"
