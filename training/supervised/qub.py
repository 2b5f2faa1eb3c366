"""QUB, the quadratic upper bound of the adversarial loss (You and Lee, ICML 2025, arXiv 2601.13645, eq. 7).

    L(f(x)) + (f(x_adv) - f(x))ᵀ ∇L(f(x)) + ¼ · ‖f(x_adv) - f(x)‖²

with ∇L(f(x)) = softmax f(x) - y: cross-entropy is convex in the logits and its Hessian's largest eigenvalue is at most
½, so that this is nowhere below L(f(x_adv)); it presses the attacked logits towards the clean ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unperturb.models.shapes import Float


def quadratic_upper_bound(
    logits: Float[Tensor, "batch classes"],
    attacked: Float[Tensor, "batch classes"],
    fit: Callable[[Tensor], Tensor],
) -> Float[Tensor, ""]:
    """Return the mean bound; `fit` gives a batch's mean cross-entropy towards its (smoothed) targets."""
    logits, attacked = logits.float(), attacked.float()
    clean = fit(logits)
    (slope,) = torch.autograd.grad(clean, logits, create_graph=True)  # (softmax - y) / batch
    gap = attacked - logits
    return clean + (gap * slope).sum() + 0.25 * gap.square().sum(1).mean()
