"""Attacks on a static classifier, and the accuracy that is left: one objective each around the one loop."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.attacks.projected_gradient import Objective, ProjectedGradient
from unperturb.models.shapes import Float, Int

Classify = Callable[[Tensor], Tensor]


class Accuracy(NamedTuple):
    """A proportion of correct answers and its 95% Wilson interval."""

    value: float
    n: int
    low: float
    high: float


def wilson(correct: int, n: int) -> Accuracy:
    """Accuracy with the 95% score interval (Wilson 1927); n of at least 1."""
    z = 1.959963984540054
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Accuracy(share, n, max(0.0, centre - half), min(1.0, centre + half))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """BatchNorm with its stored statistics inside the block; every module's mode as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def cross_entropy(classify: Classify, labels: Int[Tensor, " batch"]) -> Objective:
    """The untargeted objective: raise each image's cross-entropy with its own label."""
    return lambda x, _: F.cross_entropy(classify(x).float(), labels, reduction="none")


def kl_divergence(classify: Classify, clean_logits: Float[Tensor, "batch classes"]) -> Objective:
    """TRADES's objective (Zhang et al. 2019, eq. 5): raise KL(clean prediction || prediction)."""
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
    """PGD with a random start in the L-infinity ball; `seeds` default to the image's place in the batch."""
    loop = ProjectedGradient(direction="ascend", epsilon=epsilon, step_size=step_size, steps=steps, start="uniform")
    seeds = torch.arange(len(x), device=x.device) if seeds is None else seeds
    return loop.run(x, cross_entropy(classify, labels), seeds=seeds).image


def correct(
    classify: Classify, images: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"], *, batch: int = 250
) -> list[bool]:
    """Per image, whether `classify` gives its label."""
    with torch.no_grad():
        parts = [classify(x).argmax(1).eq(y) for x, y in zip(images.split(batch), labels.split(batch), strict=True)]
    return torch.cat(parts).tolist() if parts else []
