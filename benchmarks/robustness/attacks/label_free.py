"""Attacks that know no label and no class scores: instance-wise on the features, and a trained noise generator.

The instance-wise ones go through the purifier (backward = identity) and move an image's features away from what they
are; so they attack any encoder, whatever classifies on top of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.scene import Scene
from unperturb.models.attacks.instance import Distance, away_from
from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Float


def instance(scene: Scene, distance: Distance) -> Float[Tensor, "batch 3 h w"]:
    """RoCL's attack (Kim et al. 2020, eq. 4) with steps of a quarter of ε, away from the clean image's features.

    For `sim` the negatives are the features of the other images and of every image's photographic negative.
    """

    def embed(x: Tensor) -> Tensor:
        return scene.classifier.features(scene.defended.purified(x, seed=scene.served_seed))

    with torch.no_grad():
        targets, inverted = embed(scene.x), embed(1 - scene.x)
    negatives = F.normalize(torch.cat((targets, inverted)).float(), dim=1)
    itself = torch.eye(len(scene.x), dtype=torch.bool, device=scene.x.device)
    others = torch.cat((~itself, torch.ones_like(itself)), dim=1)
    loop = scene.threat.ball(step_size=scene.threat.epsilon / 4, steps=scene.budget.adaptive_steps, start="uniform")
    objective = away_from(embed, targets, distance=distance, negatives=negatives, keep=others)
    return loop.run(scene.x, objective, seeds=scene.seeds).image


def generated(scene: Scene) -> Float[Tensor, "batch 3 h w"]:
    """The noise of the run's generator, in one pass, scaled to the ball; it knows neither purifier nor label."""
    if scene.generator is None:
        raise ConfigError("the attack `generator` needs a trained one: --generator FOLDER")
    with torch.no_grad():
        return scene.project(scene.x + scene.threat.epsilon * scene.generator.noise(scene.x))
