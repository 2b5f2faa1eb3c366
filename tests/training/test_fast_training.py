"""N-FGSM and QUB against their formulas in NumPy; runs that are killed, that collapse, that go on elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.training import classifier_arguments, read_log
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.registry import build
from unperturb.training import options
from unperturb.training.__main__ import main
from unperturb.training.data import Split
from unperturb.training.state import AVERAGED, BEST
from unperturb.training.supervised import base as supervised
from unperturb.training.supervised.adversarial import smoothed
from unperturb.training.supervised.classifier import ClassifierConfig
from unperturb.training.supervised.n_fgsm import noisy_step
from unperturb.training.supervised.qub import quadratic_upper_bound


def test_noisy_step_is_the_papers_formula() -> None:
    """arXiv 2202.01181, algorithm 1, with a linear model whose gradient is known."""
    epsilon = 8 / 255
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 0.0, 1.0  # where clamping shows
    labels, seeds = torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).eval()
    found = noisy_step(linear, x, labels, seeds, epsilon=epsilon).numpy()
    start = ProjectedGradient(direction="ascend", epsilon=2 * epsilon, step_size=0.0, steps=0, start="uniform")
    noisy = start.begin(x, seeds).numpy()
    assert np.abs(noisy - x.numpy()).max() > 1.8 * epsilon
    weight, bias = (parameter.detach().numpy() for parameter in linear[1].parameters())
    logits = noisy.reshape(6, -1) @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = ((p - np.eye(3)[labels]) @ weight).reshape(x.shape)
    expected = np.clip(noisy + epsilon * np.sign(gradient), 0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - x.numpy()).max() > 2 * epsilon  # nothing was projected


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bound_is_the_papers_formula_and_bounds(smoothing: float) -> None:
    """arXiv 2601.13645: value against NumPy, gradient against differences, and never below the loss itself."""
    draw = torch.Generator().manual_seed(1)
    logits, attacked = (2 * torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0])
    y = np.eye(4)[labels] * (1 - smoothing) + smoothing / 4

    def bound(clean: np.ndarray, other: np.ndarray) -> float:
        p = np.exp(clean) / np.exp(clean).sum(1, keepdims=True)
        gap = other - clean
        each = -(y * np.log(p)).sum(1) + (gap * (p - y)).sum(1) + 0.25 * (gap**2).sum(1)
        return float(each.mean())

    x, z = logits.float().requires_grad_(), attacked.float().requires_grad_()
    found = quadratic_upper_bound(x, z, smoothed(labels, smoothing))
    assert abs(found.item() - bound(logits.numpy(), attacked.numpy())) < 1e-5
    assert found.item() >= float(F.cross_entropy(attacked, labels, label_smoothing=smoothing)) - 1e-6
    found.backward()
    moved, step = logits.numpy().copy(), 1e-5
    moved[2, 1] += step
    slope = (bound(moved, attacked.numpy()) - bound(logits.numpy(), attacked.numpy())) / step
    assert x.grad is not None
    assert abs(float(x.grad[2, 1]) - slope) < 1e-3  # through the softmax of the linear term too


def test_training_by_the_bound_learns(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(classifier_arguments(image_folder, out, "--method", "n-fgsm", "--qub", "--epochs", "6")) == 0
    card = store.load(out / "checkpoint").card
    assert card.figures["test"]["clean_accuracy"] > 0.6
    assert card.training["qub"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--qub", "--method", "trades"], "qub=True bounds the loss of attacked images"),
        (["--collapse", "1.5"], "collapse=1.5"),
        (["--width", "0.5"], "width=0.5"),
        (["--epoch", "1"], "epoch=1: the weights and the epochs behind them go together"),
        (["--resume-from", "nowhere", "--epoch", "1"], "resume_from=nowhere cannot be read"),
    ],
)
def test_bad_switch_is_refused_with_its_name(
    arguments: list[str], message: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(classifier_arguments(image_folder, tmp_path / "run", "--epochs", "3", *arguments)) == 2
    assert message in capsys.readouterr().err


def test_width_is_a_factor_on_the_channels() -> None:
    half = build(Architecture(name="preact_resnet18", num_classes=10, width=0.5))
    whole = build(Architecture(name="preact_resnet18", num_classes=10))
    assert (half.feature_dim, whole.feature_dim) == (256, 512)
    assert 3.9 < sum(p.numel() for p in whole.parameters()) / sum(p.numel() for p in half.parameters()) < 4.1
    with pytest.raises(ConfigError, match=r"width=0\.01"):
        build(Architecture(name="preact_resnet18", num_classes=10, width=0.01))


@pytest.mark.long
def test_run_killed_in_mid_epoch_three_times_ends_with_an_undisturbed_ones_weights(
    image_folder: Path, tmp_path: Path
) -> None:
    """kill -9 after a state of a step in the middle of an epoch; the same command again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--epochs", "6", "--batch-size", "6", "--method", "n-fgsm", "--save-every-s", "0"]
    assert main(classifier_arguments(image_folder, whole, *more)) == 0
    command = [sys.executable, "-m", "unperturb.training", *classifier_arguments(image_folder, killed, *more)]
    places = []
    for _ in range(3):
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        before, deadline, begun = _place(killed), time.monotonic() + 120, False
        while time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            now = _place(killed)
            begun = begun or now > before
            if begun and now[1]:  # in the middle of an epoch, and further than before
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        places.append(_place(killed))
    assert places == sorted(places)
    assert all(step for _, step in places)
    assert main(classifier_arguments(image_folder, killed, *more)) == 0
    assert [entry["epoch"] for entry in read_log(killed)] == list(range(1, 7))
    ends = [store.load(out / "checkpoint").classifier.state_dict() for out in (whole, killed)]
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


def _place(out: Path) -> tuple[int, int]:
    """The epoch and step of a run's state."""
    if not (out / "state.pt").exists():
        return 0, 0
    progress = torch.load(out / "state.pt", weights_only=True)["progress"]
    return progress["epoch"], progress["step"]


def test_collapsed_epoch_goes_back_to_the_best_one(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PGD accuracy by epoch as it is for a run that overfits catastrophically in epoch 3, and again once more."""
    scores = iter([0.5, 0.55, 0.1, 0.5, 0.05, 0.56, 0.57])

    def validate(*_: object) -> dict[str, float]:
        return {"score": next(scores)}

    monkeypatch.setattr(supervised.SupervisedTask, "validate", validate)
    monkeypatch.setattr(supervised.SupervisedTask, "collapsed", lambda _, best, score: best - score >= 0.2)
    out = tmp_path / "run"
    assert main(classifier_arguments(image_folder, out, "--epochs", "4", "--method", "n-fgsm")) == 0
    log = read_log(out)
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 3, 4, 3, 4]
    assert [entry.get("went_back_to") for entry in log] == [None, None, 2, None, 2, None, None]
    assert log[2]["loss"] != log[3]["loss"]  # another order of the images
    assert store.load(out / "checkpoint").card.training["chosen_epoch"] == 4


def test_run_that_collapses_each_time_ends_with_its_best_epoch(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(supervised.SupervisedTask, "validate", lambda *_: {"score": next(scores)})
    monkeypatch.setattr(supervised.SupervisedTask, "collapsed", lambda _, best, score: best - score >= 0.2)
    out = tmp_path / "run"
    assert main(classifier_arguments(image_folder, out, "--epochs", "4", "--method", "n-fgsm")) == 0
    assert [entry["epoch"] for entry in read_log(out)] == [1, 2, 2, 2, 2]
    assert store.load(out / "checkpoint").card.training["chosen_epoch"] == 1
    assert (out / BEST).exists()


@pytest.mark.parametrize(
    ("method", "best", "score", "held", "expected"),
    [
        ("n-fgsm", 0.42, 0.21, 1000, True),
        ("n-fgsm", 0.42, 0.23, 1000, False),
        ("n-fgsm", 0.42, 0.21, 9, False),  # of nine images that says nothing
        ("natural", 0.9, 0.1, 1000, False),
    ],
)
def test_collapse_is_a_fall_beyond_chance(method: str, best: float, score: float, held: int, expected: bool) -> None:
    config = ClassifierConfig(data="x", out=Path("x"), method=method)  # type: ignore[arg-type]
    images = torch.zeros(held, 3, 8, 8, dtype=torch.uint8)
    split = Split(images, torch.zeros(held, dtype=torch.int64))
    model = build(Architecture(name="wide_resnet_10_1", num_classes=3))
    assert supervised.SupervisedTask(config, model, split, split).collapsed(best, score) is expected


def test_unfinished_run_goes_on_elsewhere_from_its_averaged_weights(image_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(classifier_arguments(image_folder, first, "--epochs", "6", "--method", "natural")) == 0
    more = ["--epochs", "8", "--method", "natural", "--resume-from", str(first / AVERAGED), "--epoch", "6"]
    assert main(classifier_arguments(image_folder, second, *more)) == 0
    log = read_log(second)
    assert [entry["epoch"] for entry in log] == [7, 8]
    assert log[0]["loss"] < read_log(first)[0]["loss"]
    config = ClassifierConfig(
        data="x", out=Path("x"), epochs=8, resume_from=first / AVERAGED, epoch=6, batch_size=16, held_out=9
    )
    kept = options.comparable(config)
    assert "resume_from" not in kept
    assert len(kept["resume_from_sha256"]) == 64
    training = json.loads((second / "checkpoint" / "card.json").read_text())["training"]
    assert training["epoch"] == 6
    assert str(tmp_path) not in json.dumps(training)


def test_weights_of_another_network_are_refused(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    assert main(classifier_arguments(image_folder, first, "--epochs", "1")) == 0
    more = ["--epochs", "3", "--resume-from", str(first / AVERAGED), "--epoch", "1", "--arch", "wide_resnet_10_2"]
    assert main(classifier_arguments(image_folder, tmp_path / "second", *more)) == 2
    assert "does not fit what is trained" in capsys.readouterr().err


def test_one_step_on_a_network_is_within_three_epsilon_and_leaves_its_mode() -> None:
    model = build(Architecture(name="wide_resnet_10_1", num_classes=3)).train()
    x = torch.rand(4, 3, 32, 32)
    step: Callable[..., Tensor] = noisy_step
    found = step(model, x, torch.tensor([0, 1, 2, 0]), torch.arange(4), epsilon=8 / 255)
    assert float((found - x).abs().max()) <= 24 / 255 + 1e-6
    assert model.training
