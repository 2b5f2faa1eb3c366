"""The gate: measured on clean images that training kept back, stored on the card, and read from there."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models import checkpoint
from models.errors import CheckpointError, ConfigError
from models.purifiers import build_purifier
from models.reverse_attack import PRESETS
from tests.conftest import make_checkpoint
from tests.test_training import classifier_arguments
from training import data
from training.__main__ import main as train


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier with a head, random as it is, whose card says what was held out."""
    root = tmp_path_factory.mktemp("gate")
    assert train(classifier_arguments(image_folder, root / "run", "--epochs", "1")) == 0
    made, tiny = checkpoint.load(root / "run" / "checkpoint"), make_checkpoint()
    card = dataclasses.replace(made.card, head=tiny.card.head)
    checkpoint.save(root / "head", checkpoint.Checkpoint(card, made.classifier, tiny.head, tiny.bank))
    return root / "head"


def test_gate_is_the_quantile_of_clean_images_losses(
    folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(PRESETS, "published")
    arguments = [
        "gate",
        "--checkpoint",
        str(folder),
        "--data",
        str(image_folder),
        "--quantile",
        "0.7",
        "--device",
        "cpu",
    ]
    assert train([*arguments, "--cache", str(tmp_path)]) == 0
    loaded = checkpoint.load(folder)
    assert loaded.card.gates.keys() == set(PRESETS)
    dataset = data.load(str(image_folder), image_size=32, cache=tmp_path)
    held = data.kept_back(dataset, loaded.card)
    x, seeds = held.images.float() / 255, torch.arange(9)
    for name in PRESETS:
        gate = loaded.card.gates[name]
        losses = build_purifier(f"reverse-attack:{name}", loaded).descend(x, seeds=seeds).losses[0]
        assert gate["loss"] == pytest.approx(float(losses.quantile(0.7)), abs=1e-4)
        assert gate["n"] == 9
        assert gate["clean_left"] == pytest.approx(6 / 9, abs=0.12)
        left = build_purifier(f"reverse-attack:{name},gate=auto", loaded).descend(x, seeds=seeds)
        unchanged = (left.image == x).flatten(1).all(1)
        assert torch.equal(unchanged, losses <= gate["loss"])


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("reverse-attack:gate=auto", CheckpointError, "training gate"),
        ("reverse-attack:gate=auto,views=4", ConfigError, "views"),
        ("reverse-attack:gate=soon", ConfigError, "gate"),
    ],
)
def test_gate_that_is_not_there_is_refused(spec: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build_purifier(spec, make_checkpoint())


@pytest.mark.parametrize("gate", [{"loss": float("nan")}, {"quantile": 0.9}, 5.0], ids=str)
def test_card_with_a_bad_gate_is_refused(gate: object, tmp_path: Path) -> None:
    tiny = make_checkpoint()
    checkpoint.save(tmp_path, dataclasses.replace(tiny, card=dataclasses.replace(tiny.card, gates={"default": gate})))
    with pytest.raises(CheckpointError, match="gate"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "bad", [["--quantile", "1"], ["--images", "-1"], ["--checkpoint", "no/such"]], ids=lambda b: b[0]
)
def test_bad_argument_is_refused(bad: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["gate", "--checkpoint", str(folder), "--data", "nowhere", "--device", "cpu", *bad]) == 2
    assert bad[1] in capsys.readouterr().err
