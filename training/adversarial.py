"""The classifier's training losses: natural, PGD (Madry et al. 2018), TRADES (Zhang et al. 2019).

Each maps a batch to its loss and the images whose logits it trained on; the attack is the one loop, with BatchNorm in
eval mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attack import cross_entropy, evaluating, kl_divergence
from models.classifier import ImageClassifier
from models.projected_gradient import ProjectedGradient
from models.shapes import Float, Int

Method = Literal["natural", "pgd", "trades"]


class Outcome(NamedTuple):
    """The mean loss, and the logits of the images that the accuracy on the progress bar is of."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "batch classes"]


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The attack of a training step, and the loss around it."""

    attack: ProjectedGradient
    label_smoothing: float
    beta: float  # TRADES: weight of the KL term


Batch = tuple[Tensor, Tensor, Tensor]  # images in [0, 1], labels, seeds


def natural(model: ImageClassifier, batch: Batch, adversary: Adversary) -> Outcome:
    """Cross-entropy on the images as they are."""
    x, labels, _ = batch
    logits = model(x)
    return Outcome(_smoothed(logits, labels, adversary), logits)


def pgd(model: ImageClassifier, batch: Batch, adversary: Adversary) -> Outcome:
    """Cross-entropy on attacked images; one step with a random start is Wong et al. 2020 (FGSM-RS)."""
    x, labels, seeds = batch
    with evaluating(model):
        attacked = adversary.attack.run(x, cross_entropy(model, labels), seeds=seeds).image
    logits = model(attacked)
    return Outcome(_smoothed(logits, labels, adversary), logits)


def trades(model: ImageClassifier, batch: Batch, adversary: Adversary) -> Outcome:
    """Clean cross-entropy + β · KL(clean prediction || attacked prediction), the attack raising that KL (eq. 5)."""
    x, labels, seeds = batch
    with evaluating(model):
        with torch.no_grad():
            clean = model(x)
        attacked = adversary.attack.run(x, kl_divergence(model, clean), seeds=seeds).image
    logits, attacked_logits = model(torch.cat((x, attacked))).chunk(2)
    gap = F.kl_div(attacked_logits.float().log_softmax(1), logits.float().softmax(1), reduction="batchmean")
    return Outcome(_smoothed(logits, labels, adversary) + adversary.beta * gap, attacked_logits)


def _smoothed(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], adversary: Adversary) -> Tensor:
    return F.cross_entropy(logits.float(), labels, label_smoothing=adversary.label_smoothing)


METHODS: dict[str, Callable[[ImageClassifier, Batch, Adversary], Outcome]] = {
    "natural": natural,
    "pgd": pgd,
    "trades": trades,
}
