"""The attack by a surrogate: images made on another classifier, by an attacker who has neither this one nor its defense
(Papernot et al., "Transferability in machine learning", 2016).
"""

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.apgd import apgd
from unperturb.benchmarks.robustness.attacks.scene import Judged, Scene, cross_entropy_loss
from unperturb.models.shapes import Float


def made(scene: Scene) -> Float[Tensor, "n 3 h w"]:
    """Return the images that APGD makes on the scene's own bare classifier, by cross-entropy from the random points of
    `apgd-ce`; of several starts that of the highest loss.

    Not ended where that classifier is just wrong: what is wrong by more is sooner wrong elsewhere.
    """

    def losses(x: Tensor, rows: Tensor) -> Tensor:
        return cross_entropy_loss(scene.classifier(x), scene.labels[rows])

    every = torch.arange(len(scene.x), device=scene.x.device)
    found, highest = scene.x, torch.full((len(every),), float("-inf"), device=scene.x.device)
    for restart in range(scene.budget.restarts):
        start = scene.threat.ball(start="uniform").begin(scene.x, scene.seeds * (1 << 12) + restart)
        points = apgd(scene, lambda x, rows: Judged(losses(x, rows), None), steps=scene.budget.apgd_steps, start=start)
        with torch.no_grad():
            reached = losses(points, every)
        higher = reached > highest
        found, highest = torch.where(higher.view(-1, 1, 1, 1), points, found), torch.where(higher, reached, highest)
    return found


def shown(scene: Scene) -> Float[Tensor, "n 3 h w"]:
    """Return the surrogate's images, which the scene of this attack knows, to be judged."""
    assert scene.known is not None
    return scene.known
