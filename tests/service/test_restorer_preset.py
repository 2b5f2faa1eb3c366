"""The preset `restorer`: a network that stands before the classifier is served, defended and measured as one thing."""

import base64
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from tests.conftest import make_checkpoint
from tests.support.serving import photo, serving
from unperturb.benchmarks import assess
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.restorer import Restorer, RestorerCard
from unperturb.models.purifiers.defended import defend, preset_of, presets_of
from unperturb.models.purifiers.registry import build_defense
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.models.purifiers.vote import Vote
from unperturb.service.cli import app

ALONE = RestorerCard(width=4, depth=2, epsilon=6 / 255, scale=2, times=1.0)
REACH = 6 / 255


def made(*, vote: bool = False, restorer: RestorerCard = ALONE) -> Checkpoint:
    """A checkpoint without a head, and with a restorer that has an opinion of every pixel."""
    bare = make_checkpoint(head=False)
    network = Restorer(restorer).eval().requires_grad_(False)
    for layer in network.layers:
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.mul_(3)
    card = dataclasses.replace(bare.card, purifier=restorer, purifier_training={"vote": vote})
    return dataclasses.replace(bare, card=card, purifier=network)


def with_view(bare: Checkpoint) -> Checkpoint:
    """The checkpoint with what `train restorer` makes, a view inside other presets, and no purifier."""
    view = Restorer(ALONE).eval().requires_grad_(False)
    card = dataclasses.replace(bare.card, restorer=ALONE, restorer_training={"epochs": 1})
    return dataclasses.replace(bare, card=card, restorer=view)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("restoring")
    store.save(found, made(), half=False)
    return found


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder) as opened:
        yield opened


def pixels(payload: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(payload)))).permute(2, 0, 1)[None].float() / 255


def test_restored_image_is_what_is_classified_and_sent(client: TestClient, folder: Path) -> None:
    defended = defend(store.load(folder), PRESETS["restorer"])
    found = defended.classify(pixels(photo()))
    expected = found.logits[0].softmax(0)
    assert float((expected - found.unpurified_logits[0].softmax(0)).abs().max()) > 1e-4
    body = client.post("/classify?preset=restorer&return_image=true&top_k=3", files={"image": photo()}).json()
    for one in body["predictions"]:
        assert one["score"] == pytest.approx(float(expected[one["index"]]), abs=1e-5)
    purification = body["purification"]
    assert (purification["applied"], purification["preset"], purification["steps"]) == (True, "restorer", 0)
    assert (purification["vote"], purification["views"], purification["loss_before"]) == (None, None, None)
    assert purification["epsilon"] == pytest.approx(REACH)
    assert purification["linf"] == pytest.approx(float(found.trace.linf), abs=1e-6)
    sent = client.post("/purify?preset=restorer", files={"image": photo()})
    assert sent.content == base64.b64decode(purification["image"])
    assert "x-loss-before" not in sent.headers
    distance = float((pixels(sent.content) - pixels(photo())).abs().max())
    assert 1 / 255 < distance <= REACH + 1e-6
    assert float((pixels(sent.content) - found.image).abs().max()) <= 1 / 255


def test_result_does_not_depend_on_the_images_beside_it(client: TestClient) -> None:
    alone = client.post("/classify?preset=restorer", files={"image": photo(1)}).json()
    several = {"inputs": [base64.b64encode(photo(number)).decode() for number in range(3)]}
    beside: list[Any] = client.post("/classify?preset=restorer", json=several).json()["answers"]
    for one, other in zip(alone["predictions"], beside[1]["predictions"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def test_page_and_lists_know_it(client: TestClient) -> None:
    assert client.get("/model").json()["presets"] == ["vote", "restorer"]
    seen = client.post("/inspect?preset=restorer", files={"image": photo()}).json()
    assert (seen["losses"], seen["loss_before"], seen["vote"]) == ([], None, None)
    assert seen["epsilon"] == pytest.approx(REACH)
    refused = client.post("/classify?preset=restorer&purify=auto", files={"image": photo()})
    assert refused.status_code == 422
    assert "presets with steps" in refused.json()["detail"]


def test_inference_protocol_has_its_image_and_no_losses(client: TestClient) -> None:
    data = pixels(photo()).flatten().tolist()
    tensor = {"name": "image", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": data}

    def infer(output: str) -> Any:
        asked = {"inputs": [tensor], "outputs": [{"name": output}], "parameters": {"preset": "restorer"}}
        return client.post("/v2/models/tiny/infer", json=asked)

    purified = torch.tensor(infer("purified").json()["outputs"][0]["data"])
    assert 1 / 255 < float((purified - pixels(photo()).flatten()).abs().max()) <= REACH + 1e-6
    assert infer("loss_before").status_code == 400


def test_checkpoint_without_one_says_how_to_train_it(tiny_folder: Path) -> None:
    viewing = with_view(make_checkpoint())
    assert "restorer" not in presets_of(viewing.card)
    with serving(tiny_folder) as client:
        refused = client.post("/classify?preset=restorer", files={"image": photo()})
    assert refused.status_code == 422
    assert "no purifier" in refused.json()["detail"]
    assert "unperturb train purifier --checkpoint" in refused.json()["detail"]
    with pytest.raises(CheckpointError, match="unperturb train purifier"):
        defend(viewing, PRESETS["restorer"])
    with pytest.raises(ConfigError, match="takes none"):
        build_defense("reverse-attack:restorer,steps=2", made())


def test_one_trained_for_the_vote_is_followed_by_it(images: Tensor) -> None:
    checkpoint = made(vote=True)
    assert preset_of(checkpoint.card, "restorer").vote == Vote()
    defended = defend(checkpoint, PRESETS["restorer"])
    restored = defended.purify(images).image
    assert torch.equal(defended(images), Vote().scores(checkpoint.classifier, restored))
    assert build_defense("reverse-attack:restorer", checkpoint).vote == Vote()
    assert build_defense("reverse-attack:restorer,vote=none", checkpoint).vote is None


def test_other_presets_are_what_they_are_without_it(images: Tensor, tmp_path: Path) -> None:
    bare, one = make_checkpoint(), made()
    whole = with_view(bare)
    card = dataclasses.replace(whole.card, purifier=one.card.purifier, purifier_training={"epochs": 2})
    store.save(tmp_path / "whole", whole, half=False)
    store.save(tmp_path / "both", dataclasses.replace(whole, card=card, purifier=one.purifier), half=False)
    whole, both = store.load(tmp_path / "whole"), store.load(tmp_path / "both")
    assert (both.card.restorer_training, both.card.purifier_training) == ({"epochs": 1}, {"epochs": 2})
    for preset in ("default", "transfer"):
        assert torch.equal(defend(both, PRESETS[preset])(images), defend(whole, PRESETS[preset])(images))
    assert one.purifier is not None
    assert torch.equal(defend(both, PRESETS["restorer"]).purify(images).image, one.purifier.restored(images))


def test_gradient_passes_through_the_restorer(images: Tensor) -> None:
    checkpoint = made()
    assert checkpoint.purifier is not None
    defended = defend(checkpoint, PRESETS["restorer"], gradient="full")
    x = images[:2].clone().requires_grad_()
    (found,) = torch.autograd.grad(defended(x)[:, 0].sum(), x)
    (expected,) = torch.autograd.grad(checkpoint.classifier(checkpoint.purifier.restored(x))[:, 0].sum(), x)
    assert torch.allclose(found, expected, atol=1e-6)


def test_it_is_assessed_as_the_others(
    folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(image_folder), "--images", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert assess.main([str(folder), *given, "--presets", "restorer", "--cache", str(tmp_path / "cache")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("restorer ")]
    store.save(tmp_path / "bare", make_checkpoint(head=False))
    assert assess.main([str(tmp_path / "bare"), *given, "--presets", "restorer"]) == 2
    assert "unperturb train purifier --checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("many", [False, True], ids=["file", "folder"])
def test_command_tells_no_loss_of_a_preset_that_has_none_and_refuses_one_that_changes_nothing_as_the_service_does(
    client: TestClient, folder: Path, tmp_path: Path, many: bool
) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    source, out = tmp_path / "in", tmp_path / ("out" if many else "out.png")
    source.mkdir()
    (source / "a.png").write_bytes(photo())
    given = ["purify", str(source if many else source / "a.png"), "--out", str(out), "--device", "cpu"]
    given += ["--checkpoint", str(folder)]
    refused = CliRunner().invoke(app, [*given, "--preset", "vote"])
    assert (refused.exit_code, out.exists()) == (2, False)
    answer = client.post("/purify?preset=vote", files={"image": photo()}).json()
    assert refused.stderr.splitlines()[-1] == f"unperturb: {answer['detail']}"
    done = CliRunner().invoke(app, [*given, "--preset", "restorer"])
    assert done.exit_code == 0, done.output
    assert "InfoNCE" not in done.output
    if many:
        (row,) = pq.ParquetFile(out / "traces" / "part-00000.parquet").read().to_pylist()
        assert (row["loss_before"], row["loss_after"], row["losses"]) == (None, None, [])
        assert 0 < row["linf"] <= REACH + 1e-6
    else:
        assert "largest change" in done.stdout
