"""Purifiers of others that take steps on the classifier's own output, for comparison: Hedge Defense, Anti-Adversary."""

import torch
from torch import Tensor

from unperturb.models.attacks.pgd import cross_entropy
from unperturb.models.attacks.projected_gradient import RAMP, Objective, ProjectedGradient
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import Purifier
from unperturb.models.shapes import Float, Int

HEDGE_LOOP = ProjectedGradient(
    direction="ascend", epsilon=8 / 255, step_size=0.007, steps=20, start="uniform", ramp=RAMP
)
ANTI_ADVERSARY_LOOP = ProjectedGradient(direction="descend", epsilon=1.0, step_size=0.15, steps=2, ramp=RAMP)


class AntiAdversary(Purifier):
    """Descend the cross-entropy with the class that the received image is given (Alfarra et al., "Combating adversaries
    with anti-adversaries", AAAI 2022, section 3).

    Two sign steps of 0.15 that raise the classifier's confidence in its own prediction for the received image, in no
    ball but the pixel range.
    """

    def __init__(self, classifier: ImageClassifier, loop: ProjectedGradient = ANTI_ADVERSARY_LOOP) -> None:
        super().__init__(classifier, loop)

    def objective(self, x: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Objective:
        """Return cross-entropy with the predicted class; the prediction is taken once, from the received image."""
        with torch.inference_mode(False), torch.no_grad():  # the loss is differentiated: no inference tensors in it
            predicted = self.classifier(x).argmax(1)
        return cross_entropy(self.classifier, predicted)


class Hedge(Purifier):
    """Ascend the sum over all classes of the cross-entropy (Wu et al., "Attacking adversarial attacks as a defense",
    2021, arXiv 2106.04938).

    Twenty sign steps in a ball of 8/255, from a random point of it; with uniform targets that sum is C times
    KL(uniform || prediction) plus a constant. The last iterate is classified (the authors' code adds the logits of all
    iterates instead).
    """

    def __init__(self, classifier: ImageClassifier, loop: ProjectedGradient = HEDGE_LOOP) -> None:
        super().__init__(classifier, loop)

    def objective(self, x: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Objective:
        """Return the sum over classes c of -log p_c."""
        return lambda iterate, _: -self.classifier(iterate).float().log_softmax(1).sum(1)
