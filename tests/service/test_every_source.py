"""Every source of `unperturb import`, tiny, the whole way: taken in, served, given a purifier, assessed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim, export
from torchvision import models as zoo
from typer.testing import CliRunner

from tests.conftest import CLASSES
from tests.support.serving import photo, serving
from unperturb.benchmarks import assess
from unperturb.models.checkpoints import store
from unperturb.models.networks.imported import ALLOW
from unperturb.service.cli import app
from unperturb.training.__main__ import main as train

FACTORY = """
import torch

def make():
    torch.manual_seed(0)
    body = [torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()]
    return torch.nn.Sequential(*body, torch.nn.Linear(128, 3)).eval()
"""


def of_torchvision(folder: Path) -> list[str]:
    torch.save(zoo.resnet18(num_classes=3).state_dict(), folder / "weights.pth")
    return ["torchvision:resnet18", "--weights", "weights.pth"]


def of_timm(folder: Path) -> list[str]:
    timm = pytest.importorskip("timm")
    save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), folder / "w.safetensors")
    return ["timm:test_efficientnet", "--weights", "w.safetensors"]


def in_timms_layout(folder: Path) -> list[str]:
    timm = pytest.importorskip("timm")
    save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "test_efficientnet", "num_classes": 3}))
    return ["."]


def in_transformers_layout(folder: Path) -> list[str]:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    config = transformers.ResNetConfig(**sizes)
    transformers.ResNetForImageClassification(config).save_pretrained(folder / "hers")
    return ["hers"]


def of_a_factory(folder: Path) -> list[str]:
    (folder / "her_tiny_network.py").write_text(FACTORY)
    return ["python:her_tiny_network:make"]


def of_a_program(folder: Path) -> list[str]:
    names: dict[str, Callable[[], nn.Module]] = {}
    exec(FACTORY, names)
    program = export(names["make"](), (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, folder / "program.pt2")
    return ["export:program.pt2"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")  # torch 2.11, of itself
@pytest.mark.parametrize(
    "source",
    [of_torchvision, of_timm, in_timms_layout, in_transformers_layout, of_a_program, of_a_factory],
    ids=lambda make: str(make.__name__),
)
def test_source_is_taken_in_served_given_a_purifier_and_assessed(
    source: Callable[[Path], list[str]],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ALLOW, "her_tiny_network")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    given = [*source(tmp_path), "--classes", "names.txt", "--image-size", "32", "--fit", "square", "--out", "model"]
    done = CliRunner().invoke(app, ["import", *given])
    assert done.exit_code == 0, done.output
    assert "the shipped drawing: " in done.output
    with serving(tmp_path / "model") as client:
        assert client.get("/model").json()["presets"] == ["vote"]
        for query in ("purify=never", "preset=vote"):
            answer = client.post(f"/classify?{query}", files={"image": photo()})
            assert (answer.status_code, answer.json()["predictions"][0]["label"] in CLASSES) == (200, True)
        assert client.post("/classify", files={"image": photo()}).status_code == 422
    here = ["--data", str(image_folder), "--device", "cpu", "--cache", "cache"]
    small = ["--epochs", "1", "--batch-size", "20", "--held-out", "20", "--width", "8", "--depth", "2"]
    assert train(["purifier", "--checkpoint", "model", "--out", "run", *here, *small]) == 0
    before, after = (store.load(folder).classifier.state_dict() for folder in ("model", "run/checkpoint"))
    assert all(torch.equal(before[name].half(), after[name].half()) for name in before)
    assert assess.main(["run/checkpoint", "--images", "4", "--out", "assessment", "--write-card", *here]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    found = store.read_card(Path("run/checkpoint")).figures["assessment"]
    assert (found["verdict"], set(found["presets"])) == (verdict, {"none", "vote", "restorer"})
    with serving(tmp_path / "run" / "checkpoint") as client:
        assert client.get("/model").json()["presets"] == ["vote", "restorer"]
        answer = client.post("/classify?preset=restorer", files={"image": photo()})
        assert answer.status_code == 200
        assert answer.json()["purification"]["applied"] is True
    sys.modules.pop("her_tiny_network", None)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command that imports the network as `made`, from the folder that it is run in."""
    monkeypatch.chdir(tmp_path)
    return ["import", *of_torchvision(tmp_path), "--image-size", "32", "--out", "made"]


def test_checkpoint_is_not_written_over(asked: list[str]) -> None:
    assert CliRunner().invoke(app, asked).exit_code == 0
    before = Path("made/card.json").read_bytes()
    again = CliRunner().invoke(app, [*asked, "--mean", "0,0,0"])
    assert again.exit_code == 2
    assert "is not empty; give a new folder" in again.output
    assert Path("made/card.json").read_bytes() == before


@pytest.mark.parametrize(
    ("picture", "says"),
    [("nowhere.png", "nowhere.png: No such file"), ("weights.pth", "the bytes are not an image of an accepted type")],
)
def test_picture_that_cannot_be_read_leaves_no_checkpoint(asked: list[str], picture: str, says: str) -> None:
    done = CliRunner().invoke(app, [*asked, "--picture", picture])
    assert done.exit_code == 2
    assert says in done.output
    assert not Path("made").exists()
