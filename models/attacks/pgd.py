"""Attacks on a static classifier: one objective each around the one loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.attacks.projected_gradient import Objective, ProjectedGradient
from unperturb.models.shapes import Float, Int

Classify = Callable[[Tensor], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm use its stored statistics inside the block; give every module its mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def cross_entropy(classify: Classify, labels: Int[Tensor, " batch"]) -> Objective:
    """Return the untargeted objective: to raise each image's cross-entropy with its own label."""
    return lambda x, _: F.cross_entropy(classify(x).float(), labels, reduction="none")


def kl_divergence(classify: Classify, clean_logits: Float[Tensor, "batch classes"]) -> Objective:
    """Return TRADES's objective (Zhang et al. 2019, eq. 5): to raise KL(clean prediction || prediction)."""
    target = clean_logits.detach().float().softmax(1)
    return lambda x, _: F.kl_div(classify(x).float().log_softmax(1), target, reduction="none").sum(1)


def pgd(
    classify: Classify,
    x: Float[Tensor, "batch 3 h w"],
    labels: Int[Tensor, " batch"],
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 20,
    seeds: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch 3 h w"]:
    """Attack by PGD with a random start in the L-infinity ball; `seeds` default to the image's place in the batch."""
    loop = ProjectedGradient(direction="ascend", epsilon=epsilon, step_size=step_size, steps=steps, start="uniform")
    seeds = torch.arange(len(x), device=x.device) if seeds is None else seeds
    return loop.run(x, cross_entropy(classify, labels), seeds=seeds).image
