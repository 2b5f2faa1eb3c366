import pytest
import torch

from tests.conftest import make_checkpoint
from unperturb.models.accuracy import correct, wilson
from unperturb.models.attacks.pgd import cross_entropy, kl_divergence, pgd


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (0, 1000), (10, 10), (352, 1000), (1, 3)])
def test_wilson_interval_matches_scipy(hits: int, n: int) -> None:
    found = wilson(hits, n)
    expected = pytest.importorskip("scipy.stats").binomtest(hits, n).proportion_ci(method="wilson")
    assert found.value == hits / n
    assert found.low <= found.value <= found.high
    assert abs(found.low - expected.low) < 1e-9
    assert abs(found.high - expected.high) < 1e-9


def test_pgd_raises_the_loss_more_than_noise_within_the_ball(images: torch.Tensor) -> None:
    classifier = make_checkpoint().classifier
    labels = classifier(images).argmax(1)
    attacked = pgd(classifier, images, labels)
    noisy = (images + 8 / 255 * torch.randn_like(images).sign()).clamp(0, 1)
    objective = cross_entropy(classifier, labels)
    assert (objective(attacked, 0) > objective(noisy, 0)).all()
    assert ((attacked - images).abs() <= 8 / 255 + 1e-6).all()
    assert torch.equal(pgd(classifier, images, labels), attacked)  # seeded by place


def test_kl_objective_is_zero_at_the_clean_image_and_positive_elsewhere(images: torch.Tensor) -> None:
    classifier = make_checkpoint().classifier
    objective = kl_divergence(classifier, classifier(images))
    assert objective(images, 0).abs().max() < 1e-6
    assert (objective(1 - images, 0) > 0).all()


def test_correct_counts_per_image_whatever_the_batch(images: torch.Tensor) -> None:
    classifier = make_checkpoint().classifier
    labels = classifier(images).argmax(1)
    labels[3] = (labels[3] + 1) % 3
    expected = [i != 3 for i in range(8)]
    assert correct(classifier, images, labels) == correct(classifier, images, labels, batch=3) == expected
