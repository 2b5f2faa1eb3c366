"""The engine: shared batches, a bounded queue, clients that have gone."""

import asyncio
from pathlib import Path

import pytest
import torch

from models import checkpoint
from models.errors import NotReadyError
from service.engine import Engine, Outcome


def test_requests_that_arrive_together_share_a_batch_and_keep_their_own_answers(
    tiny_folder: Path, images: torch.Tensor
) -> None:
    engine = Engine(
        checkpoint.load(tiny_folder), device=torch.device("cpu"), max_batch=8, batch_wait_s=0.5, max_queue=64
    )
    sizes = []
    compute = engine._compute

    def counted(pixels: torch.Tensor, seeds: torch.Tensor, preset: str | None) -> list[Outcome]:
        sizes.append((len(pixels), preset))
        return compute(pixels, seeds, preset)

    pixels = (images * 255).round().to(torch.uint8)

    async def together() -> list[Outcome]:
        jobs = [engine.submit(p, preset="default", seed=i) for i, p in enumerate(pixels)]
        plain = [engine.submit(p, preset=None, seed=0) for p in pixels[:3]]
        return await asyncio.gather(*jobs, *plain)

    async def alone(i: int) -> Outcome:
        return await engine.submit(pixels[i], preset="default", seed=i)

    engine.start()
    assert engine.ready.wait(60)
    engine._compute = counted  # type: ignore[method-assign]
    try:
        outcomes = asyncio.run(together())
        assert (8, "default") in sizes
        assert (3, None) in sizes
        engine.batch_wait_s = 0.0
        for i in (0, 5):
            single = asyncio.run(alone(i))
            assert torch.allclose(single.scores, outcomes[i].scores, atol=1e-4)
    finally:
        engine.stop()


def test_full_queue_and_cancelled_jobs(tiny_folder: Path) -> None:
    engine = Engine(
        checkpoint.load(tiny_folder), device=torch.device("cpu"), max_batch=2, batch_wait_s=0.0, max_queue=2
    )
    engine.ready.set()  # not started: nothing takes from the queue
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)

    async def fill() -> None:
        waiting = [asyncio.create_task(engine.submit(pixels, preset=None, seed=0)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match="2 images are waiting"):
            await engine.submit(pixels, preset=None, seed=0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        gone = engine._next_batch()
        assert gone is not None
        assert len(gone) == 2
        engine._compute = None  # type: ignore[assignment, method-assign]  # would fail if it were called
        engine._run(gone)

    asyncio.run(fill())
