"""The classifier's training losses: natural, PGD (Madry et al. 2018), N-FGSM, TRADES (Zhang et al. 2019).

Each first crafts the images that it trains on, by the one loop with BatchNorm in eval mode, then computes its loss by
any forward pass that it is given: the model's own, or one with other weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.attacks.pgd import Classify, cross_entropy, evaluating, kl_divergence
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.shapes import Float, Int
from unperturb.training.supervised.n_fgsm import noisy_step
from unperturb.training.supervised.qub import quadratic_upper_bound

MethodName = Literal["natural", "pgd", "n-fgsm", "trades"]
Fit = Callable[[Tensor], Tensor]  # logits [batch, classes] -> the mean loss towards the batch's targets


class LossAndLogits(NamedTuple):
    """The mean loss, and the logits of the images that the accuracy on the progress bar is of."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "batch classes"]


class SupervisedBatch(NamedTuple):
    """Images in [0, 1], labels, seeds, and the images' numbers in the training set."""

    x: Tensor
    labels: Tensor
    seeds: Tensor
    indices: Tensor


@dataclass(frozen=True)
class SupervisedMethod:
    """craft: model, batch, attack -> the images to train on; loss: forward, batch, those images, fit, β -> outcome."""

    craft: Callable[[nn.Module, SupervisedBatch, ProjectedGradient], Tensor]
    loss: Callable[[Classify, SupervisedBatch, Tensor, Fit, float], LossAndLogits]


def smoothed(labels: Int[Tensor, " batch"], label_smoothing: float) -> Fit:
    """Return cross-entropy towards smoothed labels."""
    return lambda logits: F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def _as_they_are(model: nn.Module, batch: SupervisedBatch, attack: ProjectedGradient) -> Tensor:
    return batch.x


def _away_from_labels(model: nn.Module, batch: SupervisedBatch, attack: ProjectedGradient) -> Tensor:
    with evaluating(model):
        return attack.run(batch.x, cross_entropy(model, batch.labels), seeds=batch.seeds).image


def _away_from_predictions(model: nn.Module, batch: SupervisedBatch, attack: ProjectedGradient) -> Tensor:
    with evaluating(model):
        with torch.no_grad():
            clean = model(batch.x)
        return attack.run(batch.x, kl_divergence(model, clean), seeds=batch.seeds).image


def _one_noisy_step(model: nn.Module, batch: SupervisedBatch, attack: ProjectedGradient) -> Tensor:
    return noisy_step(model, batch.x, batch.labels, batch.seeds, epsilon=attack.epsilon)


def _on_crafted(forward: Classify, batch: SupervisedBatch, crafted: Tensor, fit: Fit, beta: float) -> LossAndLogits:
    logits = forward(crafted)
    return LossAndLogits(fit(logits), logits)


def _clean_and_gap(forward: Classify, batch: SupervisedBatch, crafted: Tensor, fit: Fit, beta: float) -> LossAndLogits:
    """Return clean cross-entropy + β · KL(clean prediction || attacked prediction) (eq. 5)."""
    logits, attacked_logits = forward(torch.cat((batch.x, crafted))).chunk(2)
    gap = F.kl_div(attacked_logits.float().log_softmax(1), logits.float().softmax(1), reduction="batchmean")
    return LossAndLogits(fit(logits) + beta * gap, attacked_logits)


def _bound(forward: Classify, batch: SupervisedBatch, crafted: Tensor, fit: Fit, beta: float) -> LossAndLogits:
    """Return the quadratic upper bound of the attacked images' loss; both halves in one pass, as in TRADES."""
    logits, attacked_logits = forward(torch.cat((batch.x, crafted))).chunk(2)
    return LossAndLogits(quadratic_upper_bound(logits, attacked_logits, fit), attacked_logits)


SUPERVISED_METHODS: dict[str, SupervisedMethod] = {
    "natural": SupervisedMethod(_as_they_are, _on_crafted),
    # with one step: FGSM from a random start (FGSM-RS, Wong et al. 2020)
    "pgd": SupervisedMethod(_away_from_labels, _on_crafted),
    "n-fgsm": SupervisedMethod(_one_noisy_step, _on_crafted),
    "trades": SupervisedMethod(_away_from_predictions, _clean_and_gap),
}


def method_of(name: MethodName, *, qub: bool) -> SupervisedMethod:
    """Return the method of a name, with the quadratic upper bound in place of the attacked images' cross-entropy."""
    method = SUPERVISED_METHODS[name]
    return replace(method, loss=_bound) if qub else method
