"""Net2WiderNet: a wider network of a checkpoint computes the same, and its copies part as soon as they are trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_checkpoint
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.readout import NoReadout, ReadoutCard, attach
from unperturb.models.networks.registry import build
from unperturb.training.__main__ import main
from unperturb.training.supervised.widening import widen

NARROW = Architecture(name="preact_resnet18", num_classes=3, width=0.125, activation="silu")


@pytest.mark.parametrize("factor", [2, 3])
def test_wider_network_has_the_same_logits_in_both_modes(factor: int) -> None:
    torch.manual_seed(0)
    narrow, x = build(NARROW), torch.rand(6, 3, 32, 32)
    narrow.train()(torch.rand(16, 3, 32, 32))  # statistics of its own
    wide, architecture = widen(narrow, NARROW, factor, seed=1)
    assert architecture.width == NARROW.width * factor
    assert wide.feature_dim == narrow.feature_dim * factor
    for training in (False, True):
        with torch.no_grad():
            assert torch.allclose(wide.train(training)(x), narrow.train(training)(x), atol=1e-4)


def test_weights_have_the_scale_of_the_wider_network_and_copies_different_gradients() -> None:
    torch.manual_seed(0)
    narrow = build(NARROW)
    wide, _ = widen(narrow, NARROW, 2, seed=1)
    then, now = narrow.state_dict()["blocks.3.conv2.weight"], dict(wide.named_parameters())["blocks.3.conv2.weight"]
    assert float(now.detach().std()) == pytest.approx(float(then.std()) / 2**0.5, rel=0.05)
    F.cross_entropy(wide(torch.rand(8, 3, 32, 32)), torch.arange(8) % 3).backward()
    assert now.grad is not None
    first, second = now.grad.chunk(2)
    assert (first - second).norm() > 0.1 * first.norm()


def arguments(folder: Path, data: Path) -> list[str]:
    run = ["classifier", "--classifier", str(folder / "base"), "--widen", "2", "--data", str(data)]
    where = ["--out", str(folder / "run"), "--cache", str(folder), "--device", "cpu", "--held-out", "9"]
    return [*run, *where, "--batch-size", "12", "--epochs", "1", "--method", "n-fgsm"]


def test_run_goes_on_from_a_wider_network(image_folder: Path, tmp_path: Path) -> None:
    base = make_checkpoint(architecture=NARROW)
    store.save(tmp_path / "base", base)
    assert main(arguments(tmp_path, image_folder)) == 0
    made = store.load(tmp_path / "run" / "checkpoint")
    assert made.card.architecture.width == 0.25
    assert made.card.training["widen"] == 2


def test_encoder_without_a_readout_is_widened_with_a_new_one(image_folder: Path, tmp_path: Path) -> None:
    base = make_checkpoint(architecture=NARROW)
    attach(base.classifier, NoReadout())
    base = replace(base, card=replace(base.card, readout=ReadoutCard(kind="none")))
    store.save(tmp_path / "base", base)
    assert main(arguments(tmp_path, image_folder)) == 0
    assert store.load(tmp_path / "run" / "checkpoint").card.architecture.width == 0.25


def test_width_of_no_whole_channels_is_refused() -> None:
    odd = replace(NARROW, width=0.13)
    with pytest.raises(ConfigError, match=r"widen=3: width=0\.13 has 8 channels, that times 3 25"):
        widen(build(odd), odd, 3, seed=0)


def test_widening_is_refused_without_a_width_or_a_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = Architecture(name="wide_resnet_10_1", num_classes=5)
    with pytest.raises(ConfigError, match=r"widen=2: of preact_resnet18 alone.*'wide_resnet_10_1'"):
        widen(build(other), other, 2, seed=0)
    assert main(["classifier", "--data", "x", "--out", str(tmp_path), "--widen", "2"]) == 2
    assert "widen=2: at least 1, and of a checkpoint: name it with --classifier" in capsys.readouterr().err
