"""The gate: measured on clean images that training kept back, stored on the card, and read from there."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_checkpoint
from tests.support.training import classifier_arguments
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import gate_of
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.pixels import Preprocessing
from unperturb.models.purifiers.registry import build_purifier
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.training import data, held_out
from unperturb.training.__main__ import main as train

WITH_STEPS = [name for name, config in PRESETS.items() if config.loop.steps]


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier with a head, random as it is, whose card says what was held out."""
    root = tmp_path_factory.mktemp("gate")
    assert train(classifier_arguments(image_folder, root / "run", "--epochs", "1")) == 0
    made, tiny = store.load(root / "run" / "checkpoint"), make_checkpoint()
    head_training = {"held_out": 9, "seed": 0, "data_sha256": made.card.data["sha256"]}
    card = dataclasses.replace(made.card, head=tiny.card.head, head_training=head_training)
    store.save(root / "head", store.Checkpoint(card, made.classifier, tiny.head, tiny.bank))
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
    loaded = store.load(folder)
    assert loaded.card.gates.keys() == set(WITH_STEPS) - {"published"}
    dataset = data.load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    held = held_out.kept_back(dataset, loaded.card)
    x, seeds = held.images.float() / 255, torch.zeros(9, dtype=torch.int64)  # as served
    for name in loaded.card.gates:
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
        ("reverse-attack:gate=auto", CheckpointError, "unperturb train gate"),
        ("reverse-attack:gate=auto,views=4", ConfigError, "views"),
        ("reverse-attack:gate=soon", ConfigError, "gate"),
    ],
)
def test_gate_that_is_not_there_is_refused(spec: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build_purifier(spec, make_checkpoint())


@pytest.mark.parametrize(
    "gates",
    [
        {"default": {"loss": float("nan")}},
        {"default": {}},
        {"default": 5.0},
        [],
        "x",
        {"default": {"loss": 1.0, "clean_mean": 1.0, "clean_std": 0.0}},
        {"default": {"loss": 1.0, "clean_mean": 1.0, "clean_std": -0.1}},
        {"default": {"loss": 1.0, "clean_mean": 1.0, "clean_std": float("nan")}},
        {"default": {"loss": 1.0, "clean_mean": float("inf"), "clean_std": 0.1}},
        {"default": {"loss": 1.0, "clean_mean": "1", "clean_std": 0.1}},
    ],
    ids=str,
)
def test_card_with_a_bad_gate_is_refused(gates: object, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "bad")
    card = json.loads((tmp_path / "bad" / "card.json").read_text())
    (tmp_path / "bad" / "card.json").write_text(json.dumps({**card, "gates": gates}))
    with pytest.raises(CheckpointError, match="gate"):
        store.load(tmp_path / "bad")


@pytest.mark.parametrize("checkpoint", store.shipped_names())
def test_shipped_checkpoint_has_a_gate_for_every_preset_with_steps(checkpoint: str) -> None:
    card = store.read_card(store.resolve(checkpoint))
    for name in WITH_STEPS:
        assert 0 < gate_of(card, name) < 20
        assert card.gates[name]["n"] == 1000


def test_gate_of_other_weights_is_refused(folder: Path) -> None:
    loaded = store.load(folder)
    gates = {"default": {"loss": 1.0, "weights_sha256": "0" * 64}}
    other = dataclasses.replace(loaded, card=dataclasses.replace(loaded.card, gates=gates))
    with pytest.raises(CheckpointError, match="these weights"):
        build_purifier("reverse-attack:gate=auto", other)


@pytest.mark.parametrize("part", ["head_training", "restorer_training"])
def test_images_that_a_part_was_trained_on_are_not_held_back(
    part: str, folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    card, dataset = store.load(folder).card, data.load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    training = {**card.head_training, "held_out": 30, "seed": 1}
    changed: dict[str, Any] = {part: training}
    other = dataclasses.replace(card, **changed)
    both = held_out.kept_back(dataset, other)
    for seed, count in ((0, 9), (1, 30)):
        _, held = held_out.hold_out(dataset.train, count, seed=seed)
        assert all(any(torch.equal(image, one) for one in held.images) for image in both.images)
    assert 0 < len(both.labels) < 9
    with pytest.raises(ConfigError, match="other images"):
        held_out.kept_back(dataset._replace(digest="0"), card)
    with pytest.raises(ConfigError, match="does not say"):
        held_out.kept_back(dataset, make_checkpoint().card)
    with pytest.raises(ConfigError, match="does not say"):
        held_out.kept_back(dataset, dataclasses.replace(card, data={}))  # an imported classifier, with a head
    training["data_sha256"] = "0"
    with pytest.raises(ConfigError, match="other images"):
        held_out.kept_back(dataset, other)


def test_clean_images_whose_losses_do_not_differ_are_refused_and_the_card_is_left(
    folder: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (folder / "card.json").read_bytes()
    same = data.Split(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    for held in (same, data.Split(same.images[:1], same.labels[:1])):
        monkeypatch.setattr(held_out, "kept_back", lambda *_, held=held: held)
        given = ["--checkpoint", str(folder), "--data", str(image_folder), "--device", "cpu", "--cache", str(tmp_path)]
        assert train(["gate", *given]) == 2
        assert f"the losses of {len(held.labels)} clean images do not differ" in capsys.readouterr().err
    assert (folder / "card.json").read_bytes() == before


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (["--quantile", "1"], "quantile=1"),
        (["--images", "-1"], "images=-1"),
        (["--images", "1"], "images=1"),
        (["--checkpoint", "no/such"], "no/such"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_bad_argument_is_refused(bad: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["gate", "--checkpoint", str(folder), "--data", "nowhere", "--device", "cpu", *bad]) == 2
    assert says in capsys.readouterr().err
