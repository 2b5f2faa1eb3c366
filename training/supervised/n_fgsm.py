"""N-FGSM (de Jorge et al., NeurIPS 2022, arXiv 2202.01181, algorithm 1): one step of ε from a noisy image.

    η ~ U(-2ε, 2ε),  x' = clamp(x + η),  x_adv = clamp(x' + ε · sign ∇L(x')),  clamp to [0, 1]

Nothing is projected back to the ε-ball around x: that, and the noise of twice its radius, is what keeps training by
one step from catastrophic overfitting.
"""

from dataclasses import replace

from torch import Tensor, nn

from unperturb.models.attacks.pgd import cross_entropy, evaluating
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.shapes import Float, Int

NOISE = 2.0  # the noise's radius in units of epsilon (their k at 8/255)


def noisy_step(
    model: nn.Module,
    x: Float[Tensor, "batch 3 h w"],
    labels: Int[Tensor, " batch"],
    seeds: Int[Tensor, " batch"],
    *,
    epsilon: float,
) -> Float[Tensor, "batch 3 h w"]:
    """Return the images to train on, in [0, 1], at most 3ε from `x`; BatchNorm is in eval mode meanwhile."""
    step = ProjectedGradient(direction="ascend", epsilon=epsilon, step_size=epsilon, steps=1)
    noisy = replace(step, epsilon=NOISE * epsilon, start="uniform").begin(x, seeds)
    with evaluating(model):
        return step.run(noisy, cross_entropy(model, labels), seeds=seeds).image
