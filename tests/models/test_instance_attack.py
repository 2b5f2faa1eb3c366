"""Label-free instance-wise attack: each distance against NumPy, and what it does to an encoder."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_checkpoint
from unperturb.models.attacks.instance import DISTANCES, Distance, away_from
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.errors import ConfigError

LOOP = ProjectedGradient(direction="ascend", epsilon=8 / 255, step_size=2 / 255, steps=6, start="uniform")


@pytest.mark.parametrize("distance", DISTANCES)
def test_distance_is_the_formula_in_numpy(distance: Distance) -> None:
    moved, targets = torch.randn(5, 6), torch.randn(5, 6)
    negatives, keep = F.normalize(torch.randn(9, 6), dim=1), torch.rand(5, 9) > 0.3
    found = away_from(lambda x: moved, targets, distance=distance, negatives=negatives, keep=keep, temperature=0.4)(
        torch.zeros(5, 3, 8, 8), 0
    )
    a, b, k = moved.double().numpy(), targets.double().numpy(), negatives.double().numpy()
    ua, ub = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    for i in range(5):
        own = k[keep[i].numpy()]
        one, other = (
            -np.log(np.exp(ua[i] @ ub[i] / 0.4) / (np.exp(ua[i] @ ub[i] / 0.4) + np.exp(own @ side / 0.4).sum()))
            for side in (ua[i], ub[i])
        )
        expected = {
            "sim": (one + other) / 2,
            "cos": 1 - ua[i] @ ub[i],
            "mse": ((a[i] - b[i]) ** 2).mean(),
            "l1": np.abs(a[i] - b[i]).mean(),
        }[distance]
        assert abs(float(found[i]) - expected) < 1e-5


@pytest.mark.parametrize("distance", DISTANCES)
def test_attack_moves_features_further_than_noise_does(distance: Distance, images: torch.Tensor) -> None:
    classifier = make_checkpoint().classifier
    with torch.no_grad():
        targets = classifier.features(images)
    negatives = F.normalize(targets, dim=1)
    keep = ~torch.eye(len(images), dtype=torch.bool)
    objective = away_from(classifier.features, targets, distance=distance, negatives=negatives, keep=keep)
    moved = LOOP.run(images, objective, seeds=torch.arange(8)).image
    noise = (images + LOOP.epsilon * torch.randn_like(images).sign()).clamp(0, 1)
    assert (moved - images).abs().max() <= LOOP.epsilon + 1e-6
    with torch.no_grad():
        still, by_noise, by_attack = (objective(x, 0) for x in (images, noise, moved))
        assert (by_attack - still > 2 * (by_noise - still)).all()


def test_an_images_attack_does_not_depend_on_the_other_iterates(images: torch.Tensor) -> None:
    classifier, images = make_checkpoint().classifier.double(), images.double()  # no rounding that steps would enlarge
    with torch.no_grad():
        targets = classifier.features(images)
    negatives = F.normalize(torch.randn(20, targets.shape[1], dtype=torch.float64), dim=1)
    loop = ProjectedGradient(**{**vars(LOOP), "ramp": 1e-3})
    one, all_of_them = (
        loop.run(
            images[rows],
            away_from(classifier.features, targets[rows], distance="sim", negatives=negatives),
            seeds=torch.arange(8)[rows],
        ).image
        for rows in (slice(3, 4), slice(None))
    )
    assert torch.allclose(one[0], all_of_them[3], atol=1e-4)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="negatives"):
        away_from(lambda x: x, torch.zeros(1, 2), distance="sim")
