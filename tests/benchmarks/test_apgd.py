"""APGD: exact before a linear classifier, and as the paper has it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.scenes import exactly_robust, linear_scene
from unperturb.benchmarks.robustness import attacks
from unperturb.benchmarks.robustness.attacks import adaptive
from unperturb.benchmarks.robustness.attacks.apgd import apgd, checkpoints
from unperturb.benchmarks.robustness.attacks.scene import Judged, dlr_loss
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.benchmarks.robustness.evaluation import Evaluation
from unperturb.benchmarks.robustness.plan import Plan
from unperturb.benchmarks.robustness.subjects import defense_of, ready
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.networks.classifier import Architecture


@pytest.mark.parametrize("threat", [Threat(norm="linf", epsilon=1 / 255), Threat(norm="l2", epsilon=0.05)], ids=str)
def test_linear_classifier_is_broken_exactly_where_the_closed_form_says(threat: Threat) -> None:
    scene = linear_scene(threat)
    exact = exactly_robust(scene)
    assert 0.1 < exact.float().mean() < 0.9
    found = scene.project(adaptive.bpda_apgd_ce(scene))
    assert torch.equal(scene.right(found), exact)


@pytest.mark.parametrize("threat", [Threat(norm="linf", epsilon=1 / 255), Threat(norm="l2", epsilon=0.05)], ids=str)
def test_reported_accuracy_of_a_linear_classifier_is_the_exact_one(threat: Threat, tmp_path: Path) -> None:
    scene = linear_scene(threat, n=16)
    architecture = Architecture(name="linear", num_classes=2, image_size=8)
    subject = Checkpoint(
        Card(id="linear", architecture=architecture, classes=("0", "1"), data={}, training={}), scene.classifier
    )
    plan = Plan(threat=threat, budget=BUDGETS["fast"], attacks=attacks.FAST, chunk=16)
    data = EvaluationSet(scene.x, scene.labels, "generated", str(threat))
    found = Evaluation(defense_of("none", ready(subject, torch.device("cpu"))), data, plan, folder=tmp_path).run()
    exact = exactly_robust(scene)
    assert 0 < exact.float().mean() < 1
    assert found["figures"]["worst_case"]["accuracy"] == exact.double().mean().item()
    assert found["outcomes"]["apgd-ce"] == exact.int().tolist()


@pytest.mark.parametrize("threat", [Threat(norm="linf", epsilon=1 / 255), Threat(norm="l2", epsilon=0.05)], ids=str)
def test_targeted_loss_breaks_a_linear_classifier_of_five_classes_exactly(threat: Threat) -> None:
    scene = linear_scene(threat, classes=5)
    scene = replace(scene, budget=replace(BUDGETS["standard"], targets=4, apgd_steps=100))
    broken = ~scene.right(scene.project(adaptive.bpda_apgd_dlr(scene)))
    exact = exactly_robust(scene)
    assert not (broken & exact).any()
    assert (broken != ~exact).sum() <= 2  # the ratio's denominator turns the gradient a little


def test_apgd_halves_at_the_published_checkpoints() -> None:
    # p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06) from 0 and 0.22 (Croce & Hein 2020, section 3)
    assert checkpoints(100)[:7] == [22, 41, 57, 70, 80, 87, 93]


def test_apgd_follows_numpys_reading_of_algorithm_1() -> None:
    target, steps, eps = 0.31, 20, 0.1
    scene = linear_scene(Threat(norm="linf", epsilon=eps), n=1)
    scale = torch.linspace(0.5, 2, 192).view(1, 3, 8, 8)
    objective = lambda x, _: Judged((-((x - target) ** 2) * scale).sum((1, 2, 3)), None)  # noqa: E731
    found = apgd(scene, objective, steps=steps, start=scene.x)
    weight, x0 = scale[0].double().numpy(), scene.x[0].double().numpy()

    def f(x: NDArray[np.float64]) -> float:
        return float(-(weight * (x - target) ** 2).sum())

    def clip(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(np.clip(x, x0 - eps, x0 + eps), 0, 1)

    x, last, eta, rises, mark = x0, x0, 2 * eps, 0, 0
    loss = best_loss = f(x)
    best, eta_was, best_was = x, eta, best_loss
    for k in range(1, steps + 1):
        z = clip(x + eta * np.sign(-2 * weight * (x - target)))
        new = z if k == 1 else clip(x + 0.75 * (z - x) + 0.25 * (x - last))
        last, x = x, new
        rises, loss = rises + (f(x) > loss), f(x)
        if loss > best_loss:
            best, best_loss = x, loss
        if k in checkpoints(steps):
            stalled = rises < 0.75 * (k - mark) or (eta_was == eta and best_was == best_loss)
            eta_was, best_was, mark, rises = eta, best_loss, k, 0
            if stalled:
                eta, x, loss = eta / 2, best, best_loss
    assert np.abs(found[0].double().numpy() - best).max() < 1e-4


def test_dlr_losses_are_those_of_the_paper() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, -1.0], [0.0, 2.0, 1.0, 4.0]])
    labels, targets = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert torch.allclose(dlr_loss(logits, labels), torch.tensor([-(3 - 1) / (3 - 0.5), -(2 - 4) / (4 - 1.0)]))
    wanted = torch.tensor([-(3 - 0.5) / (3 - (0.5 - 1) / 2), -(2 - 4) / (4 - (1 + 0) / 2)])
    assert torch.allclose(dlr_loss(logits, labels, targets), wanted)
