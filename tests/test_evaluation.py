from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attacks import NAMES
from benchmarks.attacks.autoattack import autoattack
from benchmarks.attacks.scene import BUDGETS, Threat
from benchmarks.evaluation import Evaluation, Plan
from benchmarks.evaluation_data import EvaluationSet
from models.backbones import Architecture
from models.checkpoint import Card, Checkpoint
from models.classifier import ImageClassifier
from models.purifier import Purifier
from tests import broken_defenses
from tests.broken_defenses import FineAndCoarse, RandomResizing, Replay, Rounding

PLAN = Plan(dataset="cifar10", threat=Threat(norm="linf", epsilon=8 / 255), budget=BUDGETS["fast"], attacks=NAMES)


def as_checkpoint(classifier: ImageClassifier) -> Checkpoint:
    classes = tuple(str(number) for number in range(classifier.num_classes))
    architecture = Architecture(name="test", num_classes=len(classes))
    return Checkpoint(Card(id="test", architecture=architecture, classes=classes, data={}, training={}), classifier)


def evaluate(
    classifier: ImageClassifier,
    make: Callable[[ImageClassifier], Purifier],
    data: EvaluationSet,
    folder: Path,
    plan: Plan = PLAN,
) -> dict[str, Any]:
    evaluation = Evaluation(
        as_checkpoint(classifier), lambda subject: make(subject.classifier), data, plan, folder=folder,
        device=torch.device("cpu"),
    )  # fmt: skip
    return evaluation.run()


def accuracies(found: dict[str, Any]) -> dict[str, float]:
    return {name: cell["accuracy"] for name, cell in found["figures"]["attacks"].items()}


@pytest.fixture(scope="module")
def gratings_net() -> ImageClassifier:
    return broken_defenses.natural_classifier()


def test_rounding_to_3_bits_withstands_transfer_and_is_broken(tmp_path: Path) -> None:
    classifier = FineAndCoarse()
    found = evaluate(classifier, Rounding, classifier.images(48), tmp_path)
    accuracy = accuracies(found)
    assert accuracy["autoattack"] < 0.05
    assert accuracy["transfer"] > 0.4
    assert found["figures"]["worst_case"]["accuracy"] < 0.05
    assert found["flags"]["zero_gradients"] == found["flags"]["of_images"]
    assert not found["flags"]["optimisation_loop"]


def test_random_resizing_withstands_transfer_and_is_broken(gratings_net: ImageClassifier, tmp_path: Path) -> None:
    found = evaluate(gratings_net, RandomResizing, broken_defenses.evaluation_set(48), tmp_path)
    assert accuracies(found)["transfer"] > 0.4
    assert found["figures"]["worst_case"]["accuracy"] < 0.05
    assert found["flags"]["randomised"]
    assert found["figures"]["resubmitted"]["draws"] == 10


def test_replayed_table_of_known_points_withstands_transfer_and_is_broken(
    gratings_net: ImageClassifier, tmp_path: Path
) -> None:
    data = broken_defenses.evaluation_set(32)
    known, _ = autoattack(gratings_net, data.images, data.labels, threat=PLAN.threat, seed=PLAN.seed, batch=PLAN.chunk)
    found = evaluate(gratings_net, lambda classifier: Replay(classifier, known, data.images), data, tmp_path)
    assert accuracies(found)["transfer"] > 0.9
    assert found["figures"]["worst_case"]["accuracy"] < 0.05
