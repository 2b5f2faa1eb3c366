"""Images that the service leaves as they are, or ends early."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from tests.conftest import make_checkpoint, make_defended
from tests.support.engines import submit, uint8
from tests.support.purifiers import differing, some_end
from tests.support.serving import photo, serving
from unperturb.models.checkpoints import store
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.engine.engine import Engine

ALL, NONE = 1e9, -1e9  # gates that leave every image, or none


def test_service_ends_images_as_the_purifier_does(
    engines: Callable[..., Engine], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = some_end(images)
    monkeypatch.setitem(PRESETS, "halting", config)
    purifier = make_defended(config).purifier
    expected, trace = purifier(images, seeds=torch.zeros(8, dtype=torch.int64))
    outcomes = asyncio.run(submit(engines(slots=4), uint8(images), "halting", seed=0, wants_image=True))
    before = trace.loss_before
    for outcome, image, losses, loss_before in zip(outcomes, expected, trace.losses.T, before, strict=True):
        known = losses[~losses.isnan()]
        assert len(outcome.losses) == len(known)
        assert np.allclose(outcome.losses, known, atol=1e-2)
        assert outcome.loss_before == pytest.approx(float(loss_before), abs=1e-3)
        assert outcome.image is not None
        assert differing(torch.from_numpy(outcome.image), image) < 0.01


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service whose checkpoint has a gate for one preset that leaves every image as it is."""
    tiny, folder = make_checkpoint(), tmp_path_factory.mktemp("gated")
    card = store.save(folder, tiny)
    gates = {"default": {"loss": ALL, "weights_sha256": card.weights_sha256}}
    store.write_card(folder, dataclasses.replace(card, gates=gates))
    with serving(folder) as client:
        yield client


def classify(client: TestClient, query: str) -> dict[str, Any]:
    answer = client.post(f"/classify?{query}", files={"image": photo()})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_image_within_the_gate_is_left_as_it_is_and_voted_on(gated: TestClient) -> None:
    body = classify(gated, "purify=auto")
    assert body["purification"]["applied"] is False
    assert body["purification"]["steps"] == 0
    assert body["purification"]["linf"] == 0
    voted = classify(gated, "preset=vote")
    assert [one["label"] for one in body["predictions"]] == [one["label"] for one in voted["predictions"]]
    assert body["predictions"][0]["score"] == pytest.approx(voted["predictions"][0]["score"], abs=1e-4)
    assert classify(gated, "purify=always")["purification"]["applied"] is True


def test_preset_without_steps_has_no_gate(gated: TestClient) -> None:
    answer = gated.post("/classify?purify=auto&preset=vote", files={"image": photo()})
    assert answer.status_code == 422
    assert "auto is for presets with steps" in answer.json()["detail"]


def test_image_beyond_the_gate_is_purified_as_ever(engines: Callable[..., Engine], images: torch.Tensor) -> None:
    engine, pixels = engines(slots=4), uint8(images)[:2]
    ever = asyncio.run(submit(engine, pixels, "default", seed=3))
    beyond = asyncio.run(submit(engine, pixels, "default", seed=3, gate=NONE))
    within = asyncio.run(submit(engine, pixels, "default", seed=3, gate=ALL))
    for one, other, left in zip(ever, beyond, within, strict=True):
        assert one.steps == other.steps == PRESETS["default"].loop.steps
        assert np.allclose(one.scores, other.scores, atol=1e-4)
        assert left.steps == 0
        assert np.allclose(left.losses, one.losses[:1], atol=1e-4)


def test_tensor_within_the_gate_is_left_as_it_is(gated: TestClient) -> None:
    request = {
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": [7] * 3072}],
        "parameters": {"purify": "auto"},
        "outputs": [{"name": "linf"}],
    }
    answer = gated.post("/v2/models/tiny/infer", json=request)
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["data"] == [0.0]


def test_preset_without_a_gate_is_refused_with_the_remedy(gated: TestClient) -> None:
    answer = gated.post("/classify?purify=auto&preset=published", files={"image": photo()})
    assert answer.status_code == 422
    assert "unperturb train gate" in answer.json()["detail"]


def test_seed_that_the_gate_was_not_measured_with_is_refused(gated: TestClient) -> None:
    answer = gated.post("/classify?purify=auto&seed=1", files={"image": photo()})
    assert answer.status_code == 422
    assert "seed" in answer.json()["detail"]
