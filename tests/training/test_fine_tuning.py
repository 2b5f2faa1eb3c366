"""`unperturb train classifier --classifier`: somebody's network goes on, on other classes, from the command line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import CLASSES, make_checkpoint
from tests.support.checkpoints import convolutions, imported, saved
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.importing.imported import ImportConfig, import_classifier
from unperturb.models.networks.imported import ALLOW
from unperturb.models.pixels import Preprocessing
from unperturb.training.__main__ import main

FACTORY = """
import torch

def make():
    torch.manual_seed(0)
    body = [torch.nn.Conv2d(3, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)]
    return torch.nn.Sequential(*body, torch.nn.Flatten(), torch.nn.Linear(8, 5))
"""


def arguments(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    run = ["--data", str(data), "--out", str(out), "--cache", str(out.parent), "--device", "cpu"]
    small = ["--batch-size", "12", "--held-out", "9", "--ema", "0.5", "--method", "natural"]
    return ["classifier", "--classifier", str(base), *run, *small, *more]


@pytest.mark.parametrize("source", ["python:her_small_network:make", "timm:test_efficientnet"])
def test_imported_network_learns_other_classes_from_its_own_pictures(
    source: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source.startswith("timm:"):
        timm = pytest.importorskip("timm")
        torch.save(timm.create_model("test_efficientnet", num_classes=5).state_dict(), tmp_path / "w.pth")
    (tmp_path / "her_small_network.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(ALLOW, "her_small_network")
    weights = tmp_path / "w.pth" if source.startswith("timm:") else None
    base = import_classifier(ImportConfig(source=source, weights=weights, image_size=24, fit="crop", resize=28))
    sys.modules.pop("her_small_network", None)
    store.save(tmp_path / "base", base, half=False)
    out = tmp_path / "run"
    assert main(arguments(tmp_path / "base", image_folder, out, "--epochs", "6", "--lr", "0.05")) == 0
    made = store.load(out / "checkpoint")
    assert made.card.classes == CLASSES
    assert made.classifier.num_classes == 3
    assert made.card.pictures == replace(base.card.pictures, size=24, fit="crop", resize=28)
    assert made.card.figures["test"]["clean_accuracy"] > 0.6
    assert made.card.training["classifier_sha256"] == store.read_card(tmp_path / "base").weights_sha256
    assert made.card.training["classifier_training"]["source"] == source
    assert str(tmp_path) not in json.dumps(made.card.training)
    before, after = base.classifier.state_dict(), made.classifier.state_dict()
    kernels = [name for name, value in base.classifier.named_parameters() if value.ndim == 4]
    assert kernels
    assert not [name for name in kernels if torch.equal(before[name].half().float(), after[name])]


def test_exported_network_is_not_trained_in_part(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights stand among its program's constants: training would reach the last layer alone."""
    store.save(tmp_path / "base", imported(saved(tmp_path / "her.pt2", convolutions())))
    assert main(arguments(tmp_path / "base", image_folder, tmp_path / "run", "--epochs", "1")) == 2
    assert "is an exported network, which cannot be trained further" in capsys.readouterr().err


def test_last_layer_is_new_for_other_classes_alone(image_folder: Path, tmp_path: Path) -> None:
    base = make_checkpoint()
    store.save(tmp_path / "same", base)
    store.save(tmp_path / "other", replace(base, card=replace(base.card, classes=("a", "b", "c"))))
    for name in ("same", "other"):
        out = tmp_path / f"run-{name}"
        assert main(arguments(tmp_path / name, image_folder, out, "--epochs", "1", "--lr", "1e-6")) == 0
        made = store.load(out / "checkpoint")
        assert made.card.architecture == base.card.architecture
        assert made.card.pictures == Preprocessing(size=32)
        assert (made.head, made.restorer) == (None, None)
        now, then = (one.classifier.state_dict()["linear.weight"] for one in (made, base))
        assert torch.allclose(now, then, atol=1e-3) == (name == "same")


def test_options_of_a_fresh_network_are_refused_beside_a_checkpoint(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ("--arch", "resnet18", "--image-size", "64")
    assert main(arguments(tmp_path / "base", image_folder, tmp_path / "run", *wrong)) == 2
    assert "arch='resnet18', image_size=64: of a fresh network" in capsys.readouterr().err
