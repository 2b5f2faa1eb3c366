"""Hedge Defense (Wu et al., "Attacking adversarial attacks as a defense", 2021, arXiv 2106.04938), for comparison.

Twenty sign steps in a ball of 8/255, from a random point of it, that raise the sum of the cross-entropies with all
classes; with uniform targets that sum is C times KL(uniform || prediction) plus a constant. The last iterate is
classified (the authors' code adds the logits of all iterates instead).
"""

import torch

from unperturb.models.attacks.projected_gradient import RAMP, Objective, ProjectedGradient
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import Purifier
from unperturb.models.shapes import Float, Int

LOOP = ProjectedGradient(direction="ascend", epsilon=8 / 255, step_size=0.007, steps=20, start="uniform", ramp=RAMP)


class Hedge(Purifier):
    """Ascends the sum over all classes of the cross-entropy."""

    def __init__(self, classifier: ImageClassifier, loop: ProjectedGradient = LOOP) -> None:
        super().__init__(classifier, loop)

    def objective(self, x: Float[torch.Tensor, "batch 3 h w"], seeds: Int[torch.Tensor, " batch"]) -> Objective:
        """The sum over classes c of -log p_c."""
        return lambda iterate, _: -self.classifier(iterate).float().log_softmax(1).sum(1)
