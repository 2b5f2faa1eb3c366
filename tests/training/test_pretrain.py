"""Pre-training and readouts from the command line."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_checkpoint
from tests.support.training import FRESH, pretrain_arguments, read_log
from unperturb.models.checkpoints import store
from unperturb.models.contrastive.views import make_views
from unperturb.models.networks.readout import NoReadout, SoftNeighbours
from unperturb.models.pixels import Preprocessing
from unperturb.models.purifiers.vote import Vote
from unperturb.training import state
from unperturb.training.__main__ import main
from unperturb.training.contrastive.encoder import reopened
from unperturb.training.contrastive.pretrain import GOES_ON, PRETRAINING_METHODS
from unperturb.training.data import load


@pytest.fixture(scope="module")
def simclr(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simclr") / "run"
    assert main(pretrain_arguments(image_folder, out, *FRESH, "--epochs", "3", "--lr", "5e-3")) == 0
    return out / "checkpoint"


@pytest.mark.parametrize("method", PRETRAINING_METHODS)
def test_method_learns_and_makes_an_encoder(method: str, image_folder: Path, tmp_path: Path, simclr: Path) -> None:
    begin = ["--encoder", str(simclr)] if method in GOES_ON else FRESH
    out = tmp_path / "run"
    arguments = pretrain_arguments(
        image_folder,
        out,
        *begin,
        "--method",
        method,
        "--epochs",
        "5",
        "--lr",
        "5e-3",
        "--queue",
        "30",
        "--schedule",
        "constant",
        "--distance",
        "sim",
    )
    assert main(arguments) == 0
    log = read_log(out)
    last = log[-1]["loss"] if method != "moco" else log[-1]["loss"] - 1.5  # its queue grows
    assert last < log[0]["loss"]
    loaded = store.load(out / "checkpoint")
    assert isinstance(loaded.classifier.get_submodule("linear"), NoReadout)
    assert loaded.head is not None
    assert loaded.bank is not None
    assert loaded.bank.embeddings.shape == (30, 8)
    assert loaded.card.training["method"] == method
    assert loaded.card.training["chosen_epoch"] == 5
    assert ("encoder_sha256" in loaded.card.training) == (method in GOES_ON)


@pytest.mark.parametrize(("method", "moved"), [("deacl", False), ("moco", True)])
def test_run_from_averaged_weights_moves_mocos_keys_and_not_deacls_teacher(
    method: str, moved: bool, image_folder: Path, tmp_path: Path, simclr: Path
) -> None:
    encoder, _ = reopened(str(simclr))
    expected = {name: parameter.detach() + 0.1 * moved for name, parameter in encoder.named_parameters()}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    state.export(tmp_path / "ema.safetensors", encoder, epoch=1)
    more = ["--encoder", str(simclr), "--method", method, "--epochs", "2", "--lr", "1e-9", "--epoch", "1"]
    more += ["--resume-from", str(tmp_path / "ema.safetensors")]
    assert main(pretrain_arguments(image_folder, tmp_path / "run", *more)) == 0
    memory = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["parts"]["memory"]
    for name, value in expected.items():
        assert torch.allclose(memory[f"encoder.{name}" if moved else name], value, atol=5e-3), name


def test_encoder_goes_on_with_its_own_pictures_and_views(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, how, vote = make_checkpoint(), Preprocessing(size=24, fit="crop", resize=28), Vote(shifts=((0, 0), (1, 1)))
    architecture = dataclasses.replace(base.card.architecture, image_size=24)
    card = dataclasses.replace(base.card, architecture=architecture, preprocessing=how, vote=vote)
    store.save(tmp_path / "base", dataclasses.replace(base, card=card))
    more = ["pretrain", "--encoder", str(tmp_path / "base"), "--epochs", "1", "--batch-size", "21", "--held-out", "9"]
    places = ["--data", str(image_folder), "--out", str(tmp_path / "run"), "--cache", str(tmp_path), "--device", "cpu"]
    assert main([*more, *places, "--image-size", "64"]) == 2
    assert "image_size=64: of a fresh network" in capsys.readouterr().err
    assert main([*more, *places]) == 0
    assert "whether 'tiny' was trained on the images that are held back is not known" in capsys.readouterr().err
    made = store.read_card(tmp_path / "run" / "checkpoint")
    assert (made.preprocessing, made.vote, made.training["image_size"]) == (how, vote, 24)
    assert made.data["sha256"] == load(str(image_folder), how, cache=tmp_path).digest


@pytest.mark.long
def test_readouts_of_an_encoder_classify(image_folder: Path, tmp_path: Path, simclr: Path) -> None:
    common = ["--encoder", str(simclr), "--data", str(image_folder), "--cache", str(tmp_path), "--device", "cpu"]
    training = ["--epochs", "30", "--batch-size", "21", "--held-out", "9", "--lr", "1e-2"]
    for name, arguments in {
        "linear": ["linear", *training],
        "dense": ["linear", "--hidden", "16", *training],
        "robust": ["linear", "--method", "pgd", "--attack-steps", "1", *training],
        "knn": ["knn", "--neighbours", "9"],
    }.items():
        out = tmp_path / name
        assert main([*arguments, *common, "--out", str(out), "--id", name]) == 0
        made, base = store.load(out / "checkpoint"), store.load(simclr)
        assert made.card.figures["test"]["clean_accuracy"] > 0.6, name
        assert made.card.id == name
        for key, value in base.classifier.state_dict().items():  # what was frozen is as it was
            assert torch.equal(made.classifier.state_dict()[key], value), (name, key)
        assert made.head is not None  # the projector purifies for it
        assert made.card.data["held_out_of_train"] == (0 if name == "knn" else 9)
        assert made.card.training["encoder_data"] == base.card.data
    assert base.card.data["held_out_of_train"] == 9
    assert isinstance(store.load(tmp_path / "knn/checkpoint").classifier.get_submodule("linear"), SoftNeighbours)


@pytest.mark.parametrize("command", ["linear", "knn"])
def test_encoder_is_transferred_to_other_classes(
    command: str, image_folder: Path, tmp_path: Path, simclr: Path
) -> None:
    """Its purifier's negatives are then images of those."""
    for split in ("train", "test"):
        for old, new in (("red", "warm"), ("blue", "cold")):
            shutil.copytree(image_folder / split / old, tmp_path / "data" / split / new)
    more = ["--epochs", "5", "--batch-size", "10", "--held-out", "9"] if command == "linear" else ["--neighbours", "9"]
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--cache", str(tmp_path)]
    assert main([command, "--encoder", str(simclr), *places, *more, "--device", "cpu"]) == 0
    made = store.load(tmp_path / "run" / "checkpoint")
    assert made.card.classes == ("cold", "warm")
    assert made.card.architecture.num_classes == made.classifier.num_classes == 2
    assert made.bank is not None
    assert set(made.bank.labels.tolist()) == {0, 1}


def test_resumed_contrast_goes_on_with_its_queue_and_thresholds(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [
        *FRESH,
        "--method",
        "moco",
        "--queue",
        "100",
        "--false-negatives",
        "quantile",
        "--false-negatives-from",
        "1",
        "--epochs",
        "4",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(pretrain_arguments(image_folder, whole, *more)) == 0
    saving, count = state.save, iter(range(100))

    def stop(file: Path, *arguments: Any) -> None:
        saving(file, *arguments)
        if next(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("unperturb.training.state.save", stop)
    assert main(pretrain_arguments(image_folder, stopped, *more)) == 130
    monkeypatch.setattr("unperturb.training.state.save", saving)
    assert main(pretrain_arguments(image_folder, stopped, *more)) == 0
    logs = [read_log(out) for out in (whole, stopped)]
    assert [entry["epoch"] for entry in logs[1]] == [1, 2, 3, 4]
    for one, other in zip(*logs, strict=True):  # the third's: without the queue 0.6 lower, without thresholds 0.07 more
        assert abs(one["loss"] - other["loss"]) < 0.02
    weights = [store.load(out / "checkpoint").classifier.state_dict() for out in (whole, stopped)]
    for name, value in weights[0].items():
        assert torch.allclose(value.float(), weights[1][name].float(), atol=5e-3), name


def test_no_held_out_image_is_left_without_another_as_its_negative(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def noted(x: torch.Tensor, **settings: Any) -> torch.Tensor:
        sizes.append(len(x))
        return make_views(x, **settings)

    monkeypatch.setattr("unperturb.training.contrastive.pretrain.make_views", noted)
    monkeypatch.setattr("unperturb.training.contrastive.pretrain.BATCH", 8)
    assert main(pretrain_arguments(image_folder, tmp_path / "run", *FRESH, "--epochs", "1")) == 0
    assert sizes == [5, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--method", "deacl"], "--encoder"),
        (["pretrain", "--temperature", "0"], "temperature=0"),
        (["pretrain", "--false-negative-share", "1"], "false_negative_share=1"),
        (["pretrain", "--encoder", "nowhere"], "nowhere"),
        (["pretrain", "--encoder", "default", "--arch", "resnet50"], "arch='resnet50': of a fresh network"),
        (["pretrain", "--images", "1000"], "images=1000"),
        (["pretrain", "--queue", "0"], "queue=0"),
        (["linear", "--encoder", "nowhere"], "nowhere"),
        (["knn", "--encoder", "default", "--bank", "1000"], "bank_size=1000"),
        (["knn", "--encoder", "default", "--bank", "20"], "neighbours=75"),
        (["classifier", "--labelled", "0"], "labelled=0"),
        (["classifier", "--weight-perturbation", "-1"], "weight_perturbation=-1"),
        (["classifier", "--self-adaptive-momentum", "2"], "self_adaptive_momentum=2"),
        (["classifier", "--method", "n-fgsm", "--qub", "--self-adaptive-from", "2"], "qub=True"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_argument_is_refused_with_its_name(
    arguments: list[str], message: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = [] if arguments[0] == "knn" else ["--held-out", "9"]
    more = ["--data", str(image_folder), "--out", str(tmp_path / "run"), "--device", "cpu", "--cache", str(tmp_path)]
    assert main([*arguments, *more, *held]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("command", ["moco", "generator"])
def test_two_processes_share_what_they_remember(
    command: str, image_folder: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    """torchrun with two CPU processes: queues and thresholds are of both; a generator has no float buffer."""
    out = tmp_path / "run"
    places = ["--data", str(image_folder), "--out", str(out), "--cache", str(tmp_path), "--device", "cpu"]
    small = ["--batch-size", "20", "--held-out", "9", "--epochs", "1"]
    arguments = {
        "moco": [
            "pretrain",
            "--method",
            "moco",
            *FRESH,
            "--queue",
            "200",
            "--false-negatives",
            "quantile",
            "--hidden",
            "16",
            "--embedding-dim",
            "8",
            "--bank-size",
            "30",
        ],
        "generator": ["generator", "--classifier", str(tiny_folder), "--width", "8"],
    }[command]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "unperturb.training",
    ]
    done = subprocess.run(
        [*launch, *arguments, *places, *small],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # all of it: the process that fell first says why
    memory = torch.load(out / "state.pt", weights_only=True)["parts"]["memory"]
    if command == "moco":
        assert memory["filled"] == 120  # 3 steps of 20 images with 2 views, of both processes
        assert memory["false_negatives.seen"].sum() == 60
