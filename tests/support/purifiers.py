"""What is known of a purifier's loss and of its result: the loss's formula, and images that end early."""

import numpy as np
import torch

from tests.conftest import make_config, make_defended
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.purifiers.reverse_attack import ReverseAttackConfig


def numpy_info_nce(z: np.ndarray, k: np.ndarray, tau: float, keep: np.ndarray | None = None) -> np.ndarray:
    """The formula of `info_nce`'s docstring, term by term."""
    losses = []
    for b in range(len(z)):
        counted = k if keep is None else k[keep[b]]
        terms = []
        for i in range(z.shape[1]):
            for j in range(z.shape[1]):
                if i != j:
                    positive = np.exp(z[b, i] @ z[b, j] / tau)
                    terms.append(-np.log(positive / (positive + np.exp(counted @ z[b, i] / tau).sum())))
        losses.append(np.mean(terms))
    return np.array(losses)


def halting(**changed: object) -> ReverseAttackConfig:
    config = make_config(steps=12)
    loop = ProjectedGradient(**{**vars(config.loop), **changed})
    return ReverseAttackConfig(loop=loop, views=2)


def some_end(images: torch.Tensor) -> ReverseAttackConfig:
    """A gate that half the images stay under, and a settling that ends others early."""
    first = make_defended(halting()).purifier.descend(images, seeds=torch.arange(8)).losses[0]
    return halting(gate=float(first.median()), settle=2)


def differing(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of values that differ by more than rounding."""
    return float(((one - other).abs() > 1e-3).float().mean())
