"""Anti-Adversary (Alfarra et al., "Combating adversaries with anti-adversaries", AAAI 2022, section 3), for comparison.

Two sign steps of 0.15 that raise the classifier's confidence in its own prediction for the received image, in no ball
but the pixel range.
"""

import torch

from unperturb.models.attacks.pgd import cross_entropy
from unperturb.models.attacks.projected_gradient import RAMP, Objective, ProjectedGradient
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import Purifier
from unperturb.models.shapes import Float, Int

LOOP = ProjectedGradient(direction="descend", epsilon=1.0, step_size=0.15, steps=2, ramp=RAMP)


class AntiAdversary(Purifier):
    """Descends the cross-entropy with the class that the received image is given."""

    def __init__(self, classifier: ImageClassifier, loop: ProjectedGradient = LOOP) -> None:
        super().__init__(classifier, loop)

    def objective(self, x: Float[torch.Tensor, "batch 3 h w"], seeds: Int[torch.Tensor, " batch"]) -> Objective:
        """Cross-entropy with the predicted class; the prediction is taken once, from the received image."""
        with torch.inference_mode(False), torch.no_grad():  # the loss is differentiated: no inference tensors in it
            predicted = self.classifier(x).argmax(1)
        return cross_entropy(self.classifier, predicted)
