"""Attacks on the bare classifier alone: what an attacker can do who does not know of the defense."""

from torch import Tensor

from unperturb.benchmarks.robustness.attacks.apgd import apgd
from unperturb.benchmarks.robustness.attacks.scene import Judged, Scene, margin
from unperturb.models.shapes import Float


def transferred(scene: Scene) -> Float[Tensor, "n 3 h w"]:
    """Return AutoAttack's images of the bare classifier, to be judged behind the defense.

    AutoAttack ends where an image is just broken, and leaves it as it was where it fails or had nothing to do.
    """
    assert scene.known is not None
    return scene.known


def transferred_further(scene: Scene) -> Float[Tensor, "n 3 h w"]:
    """Return these images moved on to where the bare classifier is wrong by most: APGD on its margin, not ended early.

    So every image is attacked, also one that AutoAttack leaves as it was.
    """
    assert scene.known is not None

    def objective(x: Tensor, rows: Tensor) -> Judged:
        return Judged(-margin(scene.classifier(x), scene.labels[rows]), None)

    return apgd(scene, objective, steps=scene.budget.apgd_steps, start=scene.known)
