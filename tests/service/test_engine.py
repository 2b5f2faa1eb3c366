"""The engine: continuous batches of different presets, and what each image gets."""

import asyncio
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.engines import close, hold_steps, one, submit, uint8, wait_until
from unperturb.models.checkpoints import store
from unperturb.models.inference.captured import Execution, Stepper
from unperturb.models.inference.continuous import step_together
from unperturb.models.inference.folding import prepared
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.engine import batching, precompile, worker
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.messages import Outcome, WorkerConfig
from unperturb.service.engine.stages import ATTACK, stages_of


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("execution", ["eager", "captured"])
def test_outcome_is_that_of_the_defended_classifier(
    engines: Callable[..., Engine], tiny_folder: Path, images: torch.Tensor, preset: str, execution: str
) -> None:
    engine = engines(execution=execution, slots=2)
    expected = defend(prepared(store.load(tiny_folder)), PRESETS[preset]).classify(images[:1], seed=7)
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


def test_preset_without_steps_gives_the_vote_and_no_losses(
    engines: Callable[..., Engine], tiny_folder: Path, images: torch.Tensor
) -> None:
    engine = engines(execution="captured", slots=2)
    expected = defend(prepared(store.load(tiny_folder)), PRESETS["vote"]).classify(images[:1])
    outcome = one(engine, uint8(images)[0], "vote", seed=7, wants_image=True)
    assert close(outcome.scores, expected.logits[0].softmax(0), 1e-4)
    assert close(outcome.unpurified_scores, expected.unpurified_logits[0].softmax(0), 1e-5)
    assert not close(outcome.scores, outcome.unpurified_scores, 1e-4)
    assert close(outcome.image, images[0], 1e-6)
    assert (outcome.steps, outcome.losses, outcome.linf) == (0, (), 0.0)
    assert outcome.loss_before is outcome.loss_after is None


@pytest.mark.skipif(not shutil.which("g++"), reason="torch's compiler needs g++")
def test_compiled_steps_give_the_same_outcome(
    engines: Callable[..., Engine], tiny_folder: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        batching, "stages_of", lambda loaded: {"default": stages_of(loaded)["default"]}
    )  # for time's sake
    compiler, compiled = torch.compile, []

    def watched(*given: Any, **options: Any) -> Any:
        compiled.append(given)
        return compiler(*given, **options)

    monkeypatch.setattr(torch, "compile", watched)
    engine = engines(execution="compiled", slots=1)
    expected = defend(prepared(store.load(tiny_folder)), PRESETS["default"]).classify(images[:1], seed=7)
    outcome = one(engine, uint8(images)[0], "default", seed=7, wants_image=True)
    assert len(compiled) == 1
    assert close(outcome.scores, expected.logits[0].softmax(0), 1e-4)
    assert close(outcome.image, expected.image[0], 1e-3)


@pytest.mark.parametrize("faster", ["captured", "compiled"])
def test_images_go_on_while_faster_steps_are_made_and_new_ones_take_them(
    faster: Execution, engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompiled: list[Any] = []

    def command(name: str, config: WorkerConfig) -> list[str]:
        precompiled.append(config)
        return [sys.executable, "-c", "import time; time.sleep(0.5)"]

    monkeypatch.setattr(precompile, "command", command)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # for time's sake
    monkeypatch.setattr(worker, "UPGRADE_EVERY_S", 0.0)
    engine, image = engines(upgrade=faster, slots=2), uint8(images)[0]
    model = engine.models.get(None)
    answers = []
    while model.execution == "eager":  # the last one of them begins on the old steps
        answers += asyncio.run(submit(engine, [image], "published", seed=3, wants_image=True))
    before = len(answers)
    assert model.execution == faster
    assert len(precompiled) == (faster == "compiled")
    answers += asyncio.run(submit(engine, [image], "published", seed=3, wants_image=True))
    for outcome in answers[1:]:
        assert close(outcome.scores, answers[0].scores, 1e-4)
        assert close(outcome.image, torch.from_numpy(answers[0].image), 1e-3)
    assert before > 0
    assert engine.lifecycle.failure is None
    assert not engine.in_slots


def test_faster_steps_that_cannot_be_made_leave_all_as_it_was(
    engines: Callable[..., Engine],
    images: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Stepper, "captured", broken)
    engine = engines(upgrade="captured", slots=2)
    wait_until(lambda: "captured steps of" in caplog.text)
    assert len(asyncio.run(submit(engine, uint8(images)[:3]))) == 3
    assert engine.models.get(None).execution == "eager"
    assert engine.lifecycle.failure is None


def test_process_that_compiles_makes_every_step_of_a_checkpoint(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: set[tuple[Any, int]] = set()
    monkeypatch.setattr(Stepper, "prepare", lambda _, stage, count: made.add((stage, count)))
    monkeypatch.setattr(Stepper, "step", lambda stepper, parts: step_together(stepper.classifier, parts))
    config = WorkerConfig("cpu", 3, torch.get_num_threads(), "eager", "float32", "info", "text")
    given = json.loads(precompile.command(str(tiny_folder), config)[-1])
    precompile.precompile(str(tiny_folder), WorkerConfig(**given))
    assert given["execution"] == "compiled"
    assert {count for _, count in made} == {1, 2, 3}
    with_steps = [stage for stage in stages_of(store.load(tiny_folder)).values() if stage.loop.steps]
    assert len(made) == 3 * len(with_steps)


def test_presets_attacks_and_plain_images_share_batches_and_keep_their_own_answers(
    engines: Callable[..., Engine], images: torch.Tensor
) -> None:
    engine, pixels = engines(slots=16), uint8(images)
    kinds = ["default", "published", None, ATTACK, "vote"]
    alone = [one(engine, pixels[i], kind, seed=i) for i, kind in enumerate(kinds)]
    mixed: set[frozenset[str | None]] = set()
    advance = ContinuousBatch.advance

    def watched(batch: ContinuousBatch) -> Any:
        mixed.add(frozenset(slot.work.stage for slot in batch.slots))
        return advance(batch)

    async def together() -> list[list[Outcome]]:
        return await asyncio.gather(
            *(submit(engine, [pixels[i]], kind, seed=i) for i, kind in enumerate(kinds)),
            *(submit(engine, pixels, kind, seed=9) for kind in kinds),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousBatch, "advance", watched)
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


def test_newcomer_with_few_steps_overtakes_one_with_many(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pixels, order = engines(), uint8(images), []
    go = hold_steps(monkeypatch)

    async def noted(name: str) -> None:
        await submit(engine, [pixels[0]], name)
        order.append(name)

    async def both() -> None:
        first, newcomer = asyncio.create_task(noted("published")), asyncio.create_task(noted("default"))
        await asyncio.sleep(0)
        assert engine.in_slots == 2
        go.set()
        await asyncio.gather(first, newcomer)

    asyncio.run(both())
    assert order == ["default", "published"]


def test_two_devices_share_one_queue(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(workers=2, slots=2)
    engine.models.get(None).cost = Cost()  # every step is about to end
    go = hold_steps(monkeypatch)

    async def run() -> list[Outcome]:
        task = asyncio.create_task(submit(engine, uint8(images) * 2))
        await asyncio.sleep(0)
        assert [worker.running for worker in engine.scheduler.workers] == [4, 4]  # half of them for the next step
        assert engine.waiting == 8
        go.set()
        return await task

    found = asyncio.run(run())
    for first, again in zip(found[:8], found[8:], strict=True):
        assert close(first.scores, again.scores, 1e-4)
