"""Switches of the classifier's and the head's training: by formula, and from the command line."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import make_checkpoint
from tests.support.training import assert_lowered, classifier_arguments, read_log, run_arguments
from unperturb.models.checkpoints import store
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.registry import build
from unperturb.training.__main__ import main
from unperturb.training.data import Split
from unperturb.training.state import STATE
from unperturb.training.supervised.adversarial import SupervisedBatch
from unperturb.training.supervised.classifier import ClassifierConfig, ClassifierTask
from unperturb.training.supervised.self_adaptive import AdaptiveTargets
from unperturb.training.supervised.weight_perturbation import at_worst_weights
from unperturb.training.world import World

HERE = World(0, 1, torch.device("cpu"))


def test_self_adaptive_targets_follow_the_predictions_in_numpy() -> None:
    """Huang et al. 2020, algorithm 1."""
    labels, momentum = torch.tensor([0, 2, 1, 1]), 0.9
    adaptive = AdaptiveTargets(
        labels, num_classes=3, label_smoothing=0.3, momentum=momentum, warmup_epochs=1, world=HERE
    )
    rows, logits = torch.tensor([2, 0]), torch.randn(2, 3)
    p = logits.double().softmax(1).numpy()
    begun = 0.7 * np.eye(3)[labels.numpy()] + 0.1
    for epoch, targets in ((0, begun[[2, 0]]), (1, momentum * begun[[2, 0]] + (1 - momentum) * p)):
        found = float(adaptive.fit(rows, epoch)(logits))
        weights = targets.max(1)
        expected = (weights * -(targets * np.log(p)).sum(1)).sum() / weights.sum()
        assert abs(found - expected) < 1e-5
    assert torch.allclose(adaptive.targets[[1, 3]], torch.from_numpy(begun[[1, 3]]).float())  # not in the batch


def test_self_adaptive_targets_of_a_batch_cost_no_table_of_all_images() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = operation(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.data_ptr() != adaptive.targets.data_ptr():
                self.elements = max(self.elements, made.numel())
            return made

    adaptive = AdaptiveTargets(
        torch.zeros(1000, dtype=torch.int64),
        num_classes=3,
        label_smoothing=0.0,
        momentum=0.5,
        warmup_epochs=0,
        world=HERE,
    )
    twice, predictions = torch.tensor([7, 3, 7]), torch.eye(3)
    with Largest() as made:  # type: ignore[no-untyped-call]
        adaptive._move(twice, predictions)
    assert made.elements <= predictions.numel()
    assert adaptive.targets[3].tolist() == [0.5, 0.5, 0.0]
    assert adaptive.targets[7].tolist() == [0.75, 0.0, 0.25]  # the mean of its two


def test_weight_perturbation_raises_the_loss_by_gamma_and_leaves_the_weights(images: torch.Tensor) -> None:
    """Wu et al. 2020, eq. 10, against a copy whose weights are moved by hand."""
    model = build(Architecture(name="wide_resnet_10_1", num_classes=3, activation="silu")).train()
    labels = torch.arange(8) % 3
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    moved = copy.deepcopy(model)
    loss = F.cross_entropy(moved(images), labels)
    layers = {name: value for name, value in moved.named_parameters() if value.ndim > 1}
    with torch.no_grad():
        for value, slope in zip(layers.values(), torch.autograd.grad(loss, list(layers.values())), strict=True):
            value.add_(0.01 * value.norm() * slope / slope.norm())
    forward = at_worst_weights(model, lambda run: F.cross_entropy(run(images), labels), gamma=0.01)
    found = F.cross_entropy(forward(images), labels)
    assert torch.allclose(found, F.cross_entropy(moved(images), labels), atol=1e-4)
    assert found > loss
    found.backward()
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name])
        assert value.grad is not None
    assert int(model.get_submodule("norm").get_buffer("num_batches_tracked")) == 1


def test_weight_perturbation_is_towards_the_targets_of_the_loss(images: torch.Tensor, tmp_path: Path) -> None:
    """Beside self-adaptive targets, which it moves no further."""
    config = ClassifierConfig(data="x", out=tmp_path, method="pgd", self_adaptive_from=0, weight_perturbation=0.1)
    model = build(Architecture(name="wide_resnet_10_1", num_classes=3, activation="silu")).train()
    labels, numbers = torch.arange(8) % 3, torch.arange(8)
    split = Split((255 * images).to(torch.uint8), labels)
    task = ClassifierTask(config, model, split, split, HERE)
    assert isinstance(task.memory, AdaptiveTargets)
    targets = torch.eye(3)[(labels + 1) % 3]
    task.memory.targets.copy_(targets)
    found = task.forward_pass(model, SupervisedBatch(images, labels, numbers, numbers), images)(images)
    assert torch.equal(task.memory.targets, targets)

    def at_worst(aims: torch.Tensor) -> torch.Tensor:
        return at_worst_weights(model, lambda run: F.cross_entropy(run(images), aims), gamma=0.1)(images)

    towards, away = at_worst(targets), at_worst(F.one_hot(labels, 3).float())
    assert torch.allclose(found, towards, atol=1e-4)
    assert not torch.allclose(found, away, atol=1e-2)


@pytest.mark.parametrize(
    "switches",
    [
        ["--self-adaptive-from", "2", "--method", "pgd"],
        ["--self-adaptive-from", "0", "--method", "trades"],
        ["--weight-perturbation", "5e-3", "--method", "trades"],
        ["--labelled", "0.34", "--method", "natural"],
        ["--labelled", "0.34", "--self-supervised-weight", "1", "--method", "natural"],
        [
            "--labelled",
            "0.34",
            "--self-supervised-weight",
            "1",
            "--method",
            "natural",
            "--false-negatives",
            "quantile",
            "--false-negatives-from",
            "2",
        ],
        ["--images", "40"],
    ],
    ids=lambda value: " ".join(value),
)
def test_switch_of_the_classifier_learns(switches: list[str], image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(classifier_arguments(image_folder, out, *switches, "--epochs", "8", "--test-images", "15")) == 0
    card = store.load(out / "checkpoint").card
    assert card.figures["test"]["clean_accuracy"] > 0.55
    assert card.figures["test"]["n"] == 15
    assert card.data["labelled"] == (21 if "--labelled" in switches else 40 if "--images" in switches else 63)


def test_resumed_self_adaptive_run_has_its_targets(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = classifier_arguments(image_folder, out, "--self-adaptive-from", "0", "--method", "natural")
    assert main([*arguments, "--epochs", "2", "--label-smoothing", "0"]) == 0
    state = torch.load(out / STATE, weights_only=True)
    targets = state["parts"]["memory"]["targets"]
    assert targets.shape == (63, 3)
    assert ((targets.amax(1) < 1).sum()) > 50  # they have moved
    assert torch.allclose(targets.sum(1), torch.ones(63), atol=1e-5)


def test_adversarial_head_learns_on_attacked_views(image_folder: Path, tmp_path: Path) -> None:
    store.save(tmp_path / "base", make_checkpoint(head=False))
    out = tmp_path / "head"
    arguments = run_arguments(
        "head",
        image_folder,
        out,
        classifier=tmp_path / "base",
        batch_size=21,
        epochs=3,
        held_out=9,
        bank_size=30,
        hidden=16,
        embedding_dim=8,
        adversarial=True,
        attack_steps=2,
        false_negatives="top",
    )
    assert main(arguments) == 0
    loaded = store.load(out / "checkpoint")
    assert loaded.card.head_training["adversarial"]
    assert_lowered(out, "loss")
    assert "precision" in read_log(out)[-1]
