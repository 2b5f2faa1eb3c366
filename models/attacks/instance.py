"""Label-free instance-wise attack: move an image's representation away from its own (Kim, Tack, Hwang, NeurIPS 2020,
arXiv 2006.07589, eq. 4). No label is needed, so any encoder can be attacked.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb.models.attacks.projected_gradient import Objective
from unperturb.models.contrastive.loss import info_nce
from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Bool, Float

Distance = Literal["sim", "mse", "l1", "cos"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
Embed = Callable[[Tensor], Tensor]  # images [batch, 3, h, w] -> representations [batch, dim]


def away_from(
    embed: Embed,
    targets: Float[Tensor, "batch dim"],
    *,
    distance: Distance,
    negatives: Float[Tensor, "bank dim"] | None = None,
    keep: Bool[Tensor, "batch bank"] | None = None,
    temperature: float = 0.5,
) -> Objective:
    """Return the objective to raise: how far each image's representation is from its target.

    "sim":       InfoNCE of the pair against `negatives` (those that `keep` leaves), both of unit length
    "cos":       1 - cosine
    "mse", "l1": the mean of the squared and of the absolute differences of the representations as they are

    `mse`, `l1` and `cos` have no gradient at the target itself: start at random in the ball.
    """
    if distance == "sim" and negatives is None:
        raise ConfigError("distance=sim needs negatives")
    targets = targets.detach().float()

    def value(x: Tensor, _: int) -> Tensor:
        moved = embed(x).float()
        if distance == "mse":
            return (moved - targets).square().mean(1)
        if distance == "l1":
            return (moved - targets).abs().mean(1)
        moved, aims = F.normalize(moved, dim=1), F.normalize(targets, dim=1)
        if distance == "cos":
            return 1 - (moved * aims).sum(1)
        assert negatives is not None
        return info_nce(torch.stack((moved, aims), dim=1), negatives, temperature=temperature, keep=keep)

    return value
