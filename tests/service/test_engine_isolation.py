"""No image changes another's answer."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.engines import Pixels, close, one, submit, uint8
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.messages import Outcome
from unperturb.service.engine.slot import Slot
from unperturb.service.engine.stages import ATTACK
from unperturb.service.errors import UnprocessableError


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
    small, large = engines(slots=2), engines(slots=32, execution="captured")
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
    step = ContinuousBatch._step

    def broken(batch: ContinuousBatch, slots: list[Slot]) -> None:
        if any(slot.work.seed == 13 for slot in slots):
            raise RuntimeError("an operation that this image breaks")
        step(batch, slots)

    monkeypatch.setattr(ContinuousBatch, "_step", broken)

    async def run() -> list[Any]:
        return await asyncio.gather(
            *(submit(engine, [pixels[i]], seed=seed) for i, seed in enumerate((1, 13, 2))), return_exceptions=True
        )

    first, guilty, last = asyncio.run(run())
    assert isinstance(guilty, RuntimeError)
    assert len(first) == len(last) == 1
    assert engine.lifecycle.failure is None
