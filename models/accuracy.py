"""Accuracy: which images a classifier gets right, and the proportion of them with its interval."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unperturb.models.attacks.pgd import Classify
from unperturb.models.shapes import Float, Int

Z = 1.959963984540054  # of the normal distribution, 95%


class Accuracy(NamedTuple):
    """A proportion of correct answers and its 95% Wilson interval."""

    value: float
    n: int
    low: float
    high: float


def wilson(correct: int, n: int) -> Accuracy:
    """Return accuracy with the 95% score interval (Wilson 1927); n of at least 1."""
    share = correct / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Accuracy(share, n, min(low, share), max(high, share))  # rounding may leave it outside by a last bit


def correct(
    classify: Classify, images: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"], *, batch: int = 250
) -> list[bool]:
    """Return, per image, whether `classify` gives its label."""
    with torch.no_grad():
        parts = [classify(x).argmax(1).eq(y) for x, y in zip(images.split(batch), labels.split(batch), strict=True)]
    return torch.cat(parts).tolist() if parts else []
