"""What images cost a device, against hand-made timings."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import make_checkpoint
from unperturb.models.checkpoints.store import read_card, resolve
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service import settings
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.cost import Cost, Timing
from unperturb.service.engine.messages import Work
from unperturb.service.engine.registry import Model
from unperturb.service.engine.stages import ATTACK, BACKWARD, begin_passes, passes, shape
from unperturb.service.engine.warm_up import warmed
from unperturb.service.settings import Settings

STAGES = [None, ATTACK, *PRESETS]


def test_line_through_two_timings_gives_both_back() -> None:
    small, large = Timing(3, 10, 0.40), Timing(3, 160, 1.15)
    cost = Cost.fit(small, large)
    assert cost.seconds(3, 10) == pytest.approx(0.40)
    assert cost.seconds(3, 160) == pytest.approx(1.15)


@pytest.mark.parametrize(
    "large",
    [Timing(3, 160, 0.39), Timing(3, 160, 100.0), Timing(3, 10, 0.4)],
    ids=["free in a batch", "dearer in a batch", "slots for one"],
)
def test_noisy_timings_give_no_negative_cost(large: Timing) -> None:
    cost = Cost.fit(Timing(3, 10, 0.40), large)
    assert min(cost) >= 0
    assert cost.seconds(3, 10) == pytest.approx(0.40)


@pytest.mark.parametrize("stage", STAGES)
def test_equal_images_add_all_of_their_passes(stage: str | None) -> None:
    cost = Cost(per_batch_s=0.5, per_pass_s=0.001)
    assert cost.alone(stage) == pytest.approx(0.5 * (shape(stage)[0] + 1) + 0.001 * passes(stage))
    if stage is not None:
        assert cost.added_by(stage, stage) == pytest.approx(0.001 * passes(stage))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", STAGES)
def test_other_image_adds_no_more_than_its_own_passes(stage: str | None, other: str | None) -> None:
    assert 0 < Cost(0.0, 1.0).added_by(other, stage) <= passes(other)


def test_another_models_images_cost_batches_of_their_own() -> None:
    cost = Cost(per_batch_s=10.0, per_pass_s=1.0)
    steps = PRESETS["default"].loop.steps
    assert cost.added_by("published", "default", together=False) == cost.added_by("published", "default") + 10 * steps


def test_one_step_that_hung_does_not_change_the_pace_for_long() -> None:
    model = Model(1, "a", "a", read_card(resolve("small")))
    model.observe(1e6)
    assert 1 < model.pace < 2
    for _ in range(100):
        model.observe(1e-6)
    assert 0.1 <= model.pace < 0.11


def test_long_neighbour_adds_only_the_steps_that_are_shared() -> None:
    few, many = PRESETS["default"], PRESETS["published"]
    assert Cost(0.0, 1.0).added_by("published", "default") == few.loop.steps * many.views * 3
    assert Cost(0.0, 1.0).added_by("published", None) == many.views * 3


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "restorer"])
def test_an_image_takes_as_many_passes_as_it_is_said_to(stage: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_checkpoint()
    batch = ContinuousBatch(loaded, torch.device("cpu"), execution="eager")
    rows: list[tuple[int, bool]] = []
    features = loaded.classifier.features

    def counted(images: torch.Tensor) -> torch.Tensor:
        rows.append((len(images), images.requires_grad))
        return features(images)

    monkeypatch.setattr(loaded.classifier, "features", counted)
    assert not batch.admit(
        [Work(1, 1, np.zeros((3, batch.image_size, batch.image_size), np.uint8), stage, 0, False, 0.0)]
    )
    rows.clear()
    while batch.slots:
        ended = batch.advance()
    assert not isinstance(ended[0].result, Exception)
    assert sum(count * (1 + BACKWARD * backward) for count, backward in rows) == passes(stage) - begin_passes(stage)


@pytest.mark.parametrize(("quota", "count"), [("max", 8), ("200000", 2), ("250000", 3), ("1600000", 8), (None, 8)])
def test_a_container_has_the_cores_of_its_share(
    quota: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(settings, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    assert settings.cores() == count


def test_two_workers_share_the_cores_of_a_cpu_and_have_slots_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def workers(**given: Any) -> list[tuple[str, int, int]]:
        chosen = Settings(**given)
        return [(str(device), chosen.threads_each, chosen.slots) for device in chosen.devices]

    monkeypatch.delenv("UNPERTURB_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(settings, "CPU_QUOTA", Path("none"))
    for count, each in ((1, [1]), (2, [1, 1]), (7, [3, 3])):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=count: set(range(count)), raising=False)
        assert workers() == [("cpu", threads, 4 * threads) for threads in each]
        assert workers(device="cpu") == [("cpu", count, 4 * count)]
    assert workers(threads=1) == [("cpu", 1, 4)]
    assert workers(threads=4) == [("cpu", 2, 8), ("cpu", 2, 8)]
    assert workers(threads=64) == [("cpu", 32, 64)] * 2
    assert workers(device="cpu,cpu,cpu", threads=2) == [("cpu", 1, 4)] * 3
    assert workers(max_batch=12) == [("cpu", 3, 12)] * 2


def test_a_warm_up_is_at_every_number_of_threads_and_timed_at_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_checkpoint(head=False)
    batch = ContinuousBatch(loaded, torch.device("cpu"), execution="eager")
    own, features = torch.get_num_threads(), loaded.classifier.features
    seen: list[int] = []

    def noted(images: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return features(images)

    monkeypatch.setattr(loaded.classifier, "features", noted)
    between = {torch.get_num_threads() for _ in warmed(batch, 3, threads=(own + 2, own + 1))}
    assert between == {own} == {torch.get_num_threads()}
    assert [number for number, _ in itertools.groupby(seen)] == 2 * [own + 2, own + 1]  # of one image, and of three
