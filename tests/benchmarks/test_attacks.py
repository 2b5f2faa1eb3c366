import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import SMALL, make_checkpoint, make_defended
from tests.support.scenes import exactly_robust, linear_scene
from unperturb.benchmarks.robustness import attacks
from unperturb.benchmarks.robustness.attacks import adaptive, black_box, controls, label_free, transfer
from unperturb.benchmarks.robustness.attacks.autoattack import PARTS, run_part
from unperturb.benchmarks.robustness.attacks.scene import Scene, cross_entropy_loss, margin
from unperturb.benchmarks.robustness.budgets import Budget
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.models import philox
from unperturb.models.attacks.instance import DISTANCES, Distance
from unperturb.models.attacks.projected_gradient import Descent
from unperturb.models.errors import ConfigError
from unperturb.models.networks.generator import NoiseGenerator
from unperturb.models.purifiers.base import NoPurifier, Purifier
from unperturb.models.purifiers.defended import DefendedClassifier
from unperturb.models.purifiers.rivals import AntiAdversary, Hedge

TINY = Budget(
    apgd_steps=5,
    restarts=2,
    eot=2,
    targets=2,
    autoattack_steps=3,
    autoattack_queries=20,
    lambdas=(0.1, 10.0),
    unrolled_steps=2,
    adaptive_steps=3,
    square_queries=20,
    rays_queries=60,
    mates=2,
    mate_steps=2,
)
THREATS = [Threat(norm="linf", epsilon=8 / 255), Threat(norm="l2", epsilon=0.5)]
NARROW = Threat(norm="linf", epsilon=1 / 255)  # which hardly breaks an image: an attack goes on to its last step


def tiny_scene(images: Tensor, threat: Threat, defended: DefendedClassifier | None = None) -> Scene:
    defended = defended or make_defended()
    with torch.no_grad():
        labels = defended(images, seed=0).argmax(1)
    return Scene(
        defended=defended,
        x=images,
        labels=labels,
        seeds=torch.arange(8),
        threat=threat,
        budget=TINY,
        generator=NoiseGenerator(width=8, epsilon=8 / 255),
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_instance_attack_moves_the_purified_features_further_than_noise(images: Tensor, distance: Distance) -> None:
    scene = tiny_scene(images, THREATS[0])
    moved = []
    with torch.no_grad():
        for x in (scene.x, controls.noise(scene), label_free.instance(scene, distance)):
            features = scene.classifier.features(scene.defended.purified(x, seed=0))
            moved.append(torch.nn.functional.normalize(features, dim=1))
    by_noise, by_attack = ((x - moved[0]).norm(dim=1).mean() for x in moved[1:])
    assert by_attack > 1.5 * by_noise


def test_one_image_alone_can_be_attacked_without_labels(images: Tensor) -> None:
    scene = tiny_scene(images, THREATS[0]).select(torch.tensor([3]))
    assert label_free.instance(scene, "sim").isfinite().all()


def test_generator_is_scaled_to_the_ball_and_asked_for_where_it_is_missing(images: Tensor) -> None:
    scene = tiny_scene(images, Threat(norm="linf", epsilon=0.2))
    assert scene.generator is not None
    expected = (images + 0.2 * scene.generator.noise(images)).clamp(0, 1)
    assert torch.allclose(label_free.generated(scene), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="--generator"):
        label_free.generated(replace(scene, generator=None))


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", [*attacks.ATTACKS])
def test_every_attack_stays_in_the_ball_does_the_same_twice_and_changes_no_weight(
    images: Tensor, name: str, threat: Threat
) -> None:
    scene = replace(tiny_scene(images, threat), known=images)
    before = {key: value.clone() for key, value in scene.defended.state_dict().items()}
    for run in attacks.ATTACKS[name].runs.values():
        found = tensors_of(run(scene))
        if threat.norm == "linf":
            assert all(torch.equal(one, other) for one, other in zip(found, tensors_of(run(scene)), strict=True))
        points = found[0]
        points = scene.project(points) if name == attacks.DEFENDED_AUTOATTACK else points  # FAB's is the nearest one
        delta = (points - images).flatten(1)
        size = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
        assert (size <= threat.epsilon + 1e-6).all()
        assert points.min() >= 0
        assert points.max() <= 1
        assert not points.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in scene.defended.state_dict().items())


def tensors_of(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def before_rival(images: Tensor, purifier: type[AntiAdversary] | type[Hedge]) -> Scene:
    classifier = make_defended().classifier
    scene = tiny_scene(images, NARROW, DefendedClassifier(classifier, purifier(classifier).stopped_after(4)))
    return replace(scene, budget=replace(TINY, restarts=1))


@pytest.mark.parametrize("purifier", [AntiAdversary, Hedge])
def test_adaptive_attacks_on_the_rivals_lower_the_margin_below_that_of_every_random_start(
    images: Tensor, purifier: type[AntiAdversary] | type[Hedge]
) -> None:
    scene = before_rival(images, purifier)

    def mean_margin(x: Tensor) -> float:
        with torch.no_grad():
            return margin(scene.logits(x), scene.labels).mean().item()

    ball = scene.threat.ball(start="uniform")
    starts = [mean_margin(ball.begin(images, scene.seeds + 8 * draw)) for draw in range(5)]
    for name in ("apgd-ce", "apgd-t", "intermediate"):
        (points,) = tensors_of(attacks.ATTACKS[name].run(scene))
        assert mean_margin(points) < min(starts) - (max(starts) - min(starts)), name


@pytest.mark.parametrize("purifier", [None, AntiAdversary, Hedge], ids=["reverse attack", "anti-adversary", "hedge"])
def test_contrastive_attack_meets_the_purifiers_objective_the_more_the_larger_its_weight(
    images: Tensor, purifier: type[AntiAdversary] | type[Hedge] | None
) -> None:
    scene = before_rival(images, purifier) if purifier else tiny_scene(images, NARROW)
    own = scene.defended.purifier
    met = []
    for weight in (0.01, 1.0, 100.0):
        budget = replace(TINY, lambdas=(weight,), restarts=1)
        points = adaptive.bpda_contrastive(replace(scene, budget=budget))
        with torch.no_grad():
            met.append(own.objective(points, torch.zeros_like(scene.labels))(points, 0).mean().item())
    assert met == sorted(set(met), reverse=own.loop.direction == "descend")  # no two are equal


class Saturating(Purifier):
    """Its second step takes an image where cross-entropy has no slope left; after the first it is as it was."""

    def descend(self, x: Tensor, *, seeds: Tensor, unrolled: bool = False) -> Descent:
        further = 1e6 if self.loop.steps > 1 else 1.0
        return Descent(0.5 + further * (x - 0.5), x.new_zeros((0, len(x))))


def test_attack_on_the_intermediate_iterate_breaks_what_the_last_one_gives_no_slope_for() -> None:
    scene = linear_scene(Threat(norm="linf", epsilon=1 / 255), n=40)
    loop = replace(NoPurifier(scene.classifier).loop, steps=2)
    scene = scene.against(DefendedClassifier(scene.classifier, Saturating(scene.classifier, loop)))
    exact = exactly_robust(scene)
    assert scene.right(adaptive.bpda_apgd_ce(scene)).float().mean() > exact.float().mean() + 0.2
    assert torch.equal(scene.right(adaptive.intermediate(scene)), exact)


def test_square_and_rays_break_a_classifier_without_its_gradient() -> None:
    scene = linear_scene(Threat(norm="linf", epsilon=8 / 255), n=40)
    budget = replace(scene.budget, square_queries=300, rays_queries=500)
    scene = replace(scene, budget=budget)
    assert not exactly_robust(scene).any()
    for attack in (black_box.square, black_box.rays):
        assert scene.right(scene.project(attack(scene))).float().mean() < 0.5, attack.__name__


class Averaging(Purifier):
    """Ties an image to its batch: what the published procedure's negatives do, in the extreme."""

    def descend(self, x: Tensor, *, seeds: Tensor, unrolled: bool = False) -> Descent:
        return Descent((0.2 * x + 0.8 * x.mean(0, keepdim=True)), x.new_zeros((0, len(x))))


def test_batchmate_breaks_a_defense_that_mixes_images_and_no_other() -> None:
    scene = linear_scene(Threat(norm="linf", epsilon=1 / 255), n=10)
    coupled = Averaging(scene.classifier, NoPurifier(scene.classifier).loop)
    open_scene = scene.against(DefendedClassifier(scene.classifier, coupled))
    alone = open_scene.defended(scene.x[:1])  # one image: the mean of the batch is itself
    assert torch.allclose(alone, scene.classifier(scene.x[:1]), atol=1e-5)
    _, broken = controls.batchmate(replace(open_scene, budget=replace(TINY, mates=4, mate_steps=5)))
    assert broken.float().mean() > 0.8
    _, broken = controls.batchmate(scene)
    assert not broken.any()


class NoisyNegative(Purifier):
    """The image's negative under strong noise: the identity as its backward points the wrong way."""

    def descend(self, x: Tensor, *, seeds: Tensor, unrolled: bool = False) -> Descent:
        noise = 0.2 * (philox.uniform(seeds, 0, 7, x[0].numel()).view_as(x) - 0.5)
        return Descent(1 - x + noise, x.new_zeros((0, len(x))))


def test_expected_full_gradient_breaks_a_random_defense_that_bpda_does_not() -> None:
    scene = linear_scene(Threat(norm="linf", epsilon=8 / 255), n=40)
    noisy = NoisyNegative(scene.classifier, NoPurifier(scene.classifier).loop)
    scene = scene.against(DefendedClassifier(scene.classifier, noisy))
    scene = replace(scene, labels=scene.defended(scene.x, seed=0).argmax(1), budget=replace(TINY, eot=4))
    by_bpda, in_full = (
        scene.right(scene.project(attacks.ATTACKS[name].run(scene))).float().mean()  # type: ignore[arg-type]
        for name in ("bpda-apgd-ce-fresh", "apgd-ce-fresh")
    )
    assert by_bpda > 0.8
    assert in_full < 0.1


def test_autoattack_agrees_with_the_closed_form_of_a_linear_classifier() -> None:
    scene = linear_scene(Threat(norm="linf", epsilon=1 / 255), classes=5, n=30)
    right = torch.ones(30, dtype=torch.bool)
    for run in attacks.ATTACKS[attacks.AUTOATTACK].runs.values():
        part = scene.select(right)
        points = run(part)
        assert isinstance(points, Tensor)
        right[right.clone()] = part.right(part.project(points))
    assert torch.equal(right, exactly_robust(scene))


def test_autoattacks_parts_are_the_reference_drivers_one_after_another(images: Tensor) -> None:
    """The driver runs in a process of its own, since it never takes its tracing function back."""
    classifier = make_checkpoint(architecture=replace(SMALL, num_classes=5)).classifier
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    threat = Threat(norm="linf", epsilon=6 / 255)
    script = Path(__file__).parents[1] / "support" / "autoattack_driver.py"
    with tempfile.TemporaryDirectory() as folder:
        torch.save((classifier, images, labels, threat.epsilon), Path(folder) / "in.pt")
        subprocess.run([sys.executable, str(script), folder], check=True, capture_output=True)
        expected = torch.load(Path(folder) / "out.pt")
    right, points = torch.ones(8, dtype=torch.bool), images.clone()
    for part in PARTS:
        found = run_part(
            part,
            classifier,
            images[right],
            labels[right],
            classes=5,
            threat=threat,
            steps=100,
            queries=200,
            seed=3,
        )
        with torch.no_grad():
            withstands = classifier(found).argmax(1).eq(labels[right])
        rows = right.nonzero()[:, 0]
        points[rows[~withstands]] = found[~withstands]
        right[rows] = withstands
    assert 0 < right.sum() < 8
    assert torch.equal(points, expected)


def test_epsilon_of_8_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="8/255"):
        Threat(norm="linf", epsilon=8)


@pytest.mark.parametrize("text", ["", "pgd", "noise,pgd"])
def test_unknown_attack_is_refused_with_the_names(text: str) -> None:
    with pytest.raises(ConfigError, match="bpda-apgd-ce"):
        attacks.chosen(text)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_images_moved_on_are_wrong_by_more_before_the_bare_classifier_and_are_its_own(
    images: Tensor, threat: Threat
) -> None:
    scene = tiny_scene(images, threat)
    classifier = scene.classifier
    scene = replace(scene, known=scene.project(scene.x + 0.01 * torch.randn_like(scene.x)))

    def wrong_by(x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = classifier(x).double()
        own = logits.gather(1, scene.labels[:, None])[:, 0]
        found: Tensor = logits.scatter(1, scene.labels[:, None], float("-inf")).amax(1) - own
        return found

    assert scene.known is not None
    assert torch.equal(transfer.transferred(scene), scene.known)
    moved = transfer.transferred_further(scene)
    assert (wrong_by(moved) >= wrong_by(scene.known) - 1e-6).all()
    assert (wrong_by(moved) > wrong_by(scene.known)).any()
    assert torch.allclose(scene.project(moved), moved, atol=1e-6)
    assert torch.equal(moved, transfer.transferred_further(scene))
    undefended = DefendedClassifier(classifier, NoPurifier(classifier))
    assert torch.equal(moved, transfer.transferred_further(scene.against(undefended)))  # it knows of no defense


def test_transfer_brings_autoattack_with_it_and_twice_the_attack_that_it_doubles() -> None:
    assert attacks.chosen("transfer") == ("autoattack", "transfer", "transfer-further")
    assert attacks.chosen("apgd-ce-twice") == ("apgd-ce", "apgd-ce-twice")
    assert cross_entropy_loss(torch.zeros(1, 2), torch.tensor([0])).item() == pytest.approx(0.6931, abs=1e-4)
