import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import make_checkpoint
from tests.support import broken_defenses
from tests.support.broken_defenses import FineAndCoarse, RandomResizing, Replay, Rounding
from unperturb.benchmarks.robustness.attacks import NAMES
from unperturb.benchmarks.robustness.attacks.autoattack import autoattack
from unperturb.benchmarks.robustness.attacks.scene import BUDGETS, Threat
from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.benchmarks.robustness.evaluation import Evaluation, Plan
from unperturb.benchmarks.robustness.figures import merge, summarise
from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.networks.robustbench import load_robustbench
from unperturb.models.purifiers.base import NoPurifier, Purifier
from unperturb.models.purifiers.registry import build_purifier

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
        as_checkpoint(classifier),
        lambda subject: make(subject.classifier),
        data,
        plan,
        folder=folder,
        device=torch.device("cpu"),
    )
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


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "timings"}


QUICK = replace(
    PLAN,
    chunk=4,
    attacks=("noise", "bpda-apgd-ce", "rays", "batchmate"),
    budget=replace(BUDGETS["fast"], apgd_steps=3, rays_queries=5, mate_steps=1, mates=1),
)


def tiny_evaluation(
    folder: Path, images: Tensor, plan: Plan = QUICK, spec: str = "reverse-attack:steps=2"
) -> Evaluation:
    subject = make_checkpoint()
    data = EvaluationSet(images, torch.arange(len(images)) % 3, "generated", "eight")
    return Evaluation(
        subject,
        lambda with_counts: build_purifier(spec, with_counts),
        data,
        plan,
        folder=folder,
        device=torch.device("cpu"),
    )


def test_run_that_is_stopped_at_every_unit_ends_with_the_same_record(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = tiny_evaluation(tmp_path / "a", images).run()
    left = 0

    def stop_after_one(self: Evaluation, compute: Callable[[], Any]) -> Any:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return timed(self, compute)

    timed = Evaluation._timed
    monkeypatch.setattr(Evaluation, "_timed", stop_after_one)
    for _ in range(100):
        left = 1
        try:
            resumed = tiny_evaluation(tmp_path / "b", images).run()
            break
        except KeyboardInterrupt:
            continue
    assert json.dumps(comparable(resumed)) == json.dumps(comparable(undisturbed))


def test_shards_merge_to_the_whole(images: Tensor, tmp_path: Path) -> None:
    whole = tiny_evaluation(tmp_path / "whole", images).run()
    parts = [tiny_evaluation(tmp_path / "parts", images, replace(QUICK, shard=(number, 2))).run() for number in (1, 0)]
    merged = merge(parts)
    for key in ("indices", "outcomes", "resubmitted", "figures", "purifier"):
        assert merged[key] == whole[key], key
    with pytest.raises(ValueError, match="missing"):
        merge(parts[:1])
    with pytest.raises(ValueError, match="budget"):
        merge([parts[0], {**parts[1], "budget": {"name": "full"}}])


def test_only_attacks_that_do_not_apply_leave_the_clean_accuracy(images: Tensor, tmp_path: Path) -> None:
    found = tiny_evaluation(tmp_path, images, replace(QUICK, attacks=("unrolled",)), "none").run()
    assert list(found["outcomes"]) == ["clean"]
    assert found["not_applicable"] == ["unrolled"]


def test_chunk_without_an_image_that_is_right_is_not_attacked(images: Tensor, tmp_path: Path) -> None:
    subject = make_checkpoint()
    wrong = (subject.classifier(images).argmax(1) + 1) % 3
    evaluation = Evaluation(
        subject,
        lambda counted: NoPurifier(counted.classifier),
        EvaluationSet(images, wrong, "generated", "wrong"),
        replace(QUICK, attacks=NAMES),
        folder=tmp_path,
        device=torch.device("cpu"),
    )
    found = evaluation.run()
    assert found["figures"]["worst_case"]["accuracy"] == 0


def test_foreign_classifier_reaches_autoattacks_process(images: Tensor) -> None:
    foreign = load_robustbench("robustbench:Wong2020Fast", image_size=32, weights=False).requires_grad_(False)
    with torch.no_grad():
        wrong = (foreign(images[:2]).argmax(1) + 1) % 10
    points, _ = autoattack(foreign, images[:2], wrong, threat=PLAN.threat, seed=0)
    assert torch.equal(points, images[:2])  # nothing to attack


def test_empty_shard_is_refused(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard 3/3"):
        tiny_evaluation(tmp_path, images, replace(QUICK, shard=(2, 3)))


def test_worst_case_counts_an_image_broken_by_any_attack_but_not_the_static_one_behind_a_purifier() -> None:
    outcomes = {"clean": [1, 1, 1, 1], "autoattack": [0, 0, 0, 1], "transfer": [1, 1, 0, 1], "rays": [1, 0, 1, 1]}
    assert summarise(outcomes, None, purifies=True)["worst_case"]["accuracy"] == 0.5
    assert summarise(outcomes, None, purifies=False)["worst_case"]["accuracy"] == 0.25
    again = summarise(outcomes, [[1, 1, 0, 0], [1, 0, 0, 0]], purifies=True)["resubmitted"]
    assert again["mean"] == 3 / 8
    assert again["worst_of_draws"]["accuracy"] == 0.25


def test_reverse_attack_trips_the_flags_of_a_loop_and_of_randomness(images: Tensor, tmp_path: Path) -> None:
    flags = tiny_evaluation(tmp_path, images).run()["flags"]
    assert flags["optimisation_loop"]
    assert flags["randomised"]
    assert flags["zero_gradients"] == flags["of_images"]
    flags = tiny_evaluation(tmp_path, images, spec="none").run()["flags"]
    assert flags == {"randomised": False, "zero_gradients": 0, "of_images": 4, "optimisation_loop": False}


def test_passes_are_counted_per_image(images: Tensor, tmp_path: Path) -> None:
    found = tiny_evaluation(tmp_path, images).run()
    # the restored view, 2 steps of 2 views and the answer; only the views are differentiated
    assert found["passes_per_image"]["clean"] == {"forward": 6.0, "backward": 4.0}


class NotANumber(ImageClassifier):
    def __init__(self) -> None:
        super().__init__(feature_dim=1, num_classes=3, image_size=32)

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1]

    def logits(self, features: Tensor) -> Tensor:
        return torch.full((len(features), 3), float("nan"))


def test_classifier_that_returns_nan_is_refused_before_any_attack(images: Tensor, tmp_path: Path) -> None:
    data = EvaluationSet(images, torch.zeros(8, dtype=torch.long), "generated", "eight")
    with pytest.raises(ConfigError, match="NaN"):
        Evaluation(
            as_checkpoint(NotANumber()),
            lambda subject: NoPurifier(subject.classifier),
            data,
            PLAN,
            folder=tmp_path,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize(
    ("n", "seeds", "tolerance"), [(48, 1, 0.05), pytest.param(256, 3, 0.01, marks=pytest.mark.slow)]
)
def test_apgd_is_as_strong_as_the_reference_implementation(
    gratings_net: ImageClassifier, tmp_path: Path, n: int, seeds: int, tolerance: float
) -> None:
    from pyautoattack.autopgd_base import APGDAttack

    data = broken_defenses.evaluation_set(n)
    threat = Threat(norm="linf", epsilon=6 / 255)
    plan = replace(
        PLAN,
        threat=threat,
        chunk=n,
        attacks=("autoattack", "bpda-apgd-ce", "bpda-apgd-dlr", "square"),
        budget=replace(BUDGETS["fast"], apgd_steps=50, targets=3, square_queries=200),
    )
    found = evaluate(gratings_net, NoPurifier, data, tmp_path, plan)
    ours, theirs = [], []
    for seed in range(seeds):  # one random start is worth a point by itself
        attack = APGDAttack(
            gratings_net,
            n_iter=50,
            n_restarts=1,
            eps=threat.epsilon,
            norm="Linf",
            seed=seed,
            device="cpu",
            eot_iter=1,
            rho=0.75,
        )
        points = attack.perturb(data.images, data.labels)
        theirs.append(float(gratings_net(points).argmax(1).eq(data.labels).float().mean()))
        again = replace(plan, seed=seed, attacks=("bpda-apgd-ce",))
        ours.append(accuracies(evaluate(gratings_net, NoPurifier, data, tmp_path, again))["bpda-apgd-ce"])
    assert 0.05 < sum(theirs) / seeds < 0.95
    assert abs(sum(ours) - sum(theirs)) / seeds <= tolerance
    own = [all(row) for row in zip(*(found["outcomes"][name] for name in plan.attacks[1:]), strict=True)]
    assert sum(own) / len(own) <= accuracies(found)["autoattack"] + tolerance
