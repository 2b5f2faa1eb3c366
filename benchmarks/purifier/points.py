"""The images that purifiers are measured on, and what a purifier does to them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from unperturb.models.accuracy import correct
from unperturb.models.attacks.pgd import Classify, pgd
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.defended import DefendedClassifier, seeds_of


class Points(NamedTuple):
    """The same images [n, 3, h, w] in [0, 1] as they are, attacked, and under noise of the attack's size."""

    clean: Tensor
    attacked: Tensor
    noisy: Tensor
    labels: Tensor

    def sets(self) -> dict[str, Tensor]:
        """Return the three sets by name."""
        return {"clean": self.clean, "attacked": self.attacked, "noise": self.noisy}


def make_points(
    classifier: ImageClassifier, images: Tensor, labels: Tensor, *, epsilon: float, steps: int, seed: int, batch: int
) -> Points:
    """Attack the static classifier (PGD, random start from the image's index and the seed, steps of epsilon / 4).

    The control is random signs of size epsilon: the same L-infinity size as the attack, and about its L2 size.
    `images` is uint8 [n, 3, h, w].
    """
    clean = images.float() / 255
    attacked = _attacked(classifier, clean, labels, epsilon=epsilon, steps=steps, seed=seed, batch=batch)
    signs = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean.device).sub(0.5).sign()
    return Points(clean, attacked, (clean + epsilon * signs).clamp(0, 1), labels)


def _attacked(
    classify: Classify, clean: Tensor, labels: Tensor, *, epsilon: float, steps: int, seed: int, batch: int
) -> Tensor:
    parts = [
        pgd(
            classify,
            clean[chunk],
            labels[chunk],
            epsilon=epsilon,
            step_size=epsilon / 4,
            steps=steps,
            seeds=seed * (1 << 32) + chunk,
        )
        for chunk in tqdm(torch.arange(len(labels), device=labels.device).split(batch), desc="PGD", leave=False)
    ]
    return torch.cat(parts)


class PurifiedSet(NamedTuple):
    """Per image: whether its purified version is classified right; the InfoNCE loss before and after."""

    correct: list[bool]
    loss_before: list[float]
    loss_after: list[float]


def purify_all(
    defended: DefendedClassifier, images: Tensor, labels: Tensor, *, seed: int, batch: int, name: str
) -> PurifiedSet:
    """Purify and classify; the seed is every image's own, as in the service."""
    rows = PurifiedSet([], [], [])
    for x, y in tqdm(list(zip(images.split(batch), labels.split(batch), strict=True)), desc=name, leave=False):
        with torch.no_grad():
            purified = defended.purify(x, seed=seed)
            rows.correct.extend(defended.scores(purified.image).argmax(1).eq(y).tolist())
        rows.loss_before.extend(purified.trace.loss_before.tolist())
        rows.loss_after.extend(purified.trace.loss_after.tolist())
    return rows


def bpda(
    defended: DefendedClassifier, clean: Tensor, labels: Tensor, *, epsilon: float, steps: int, seed: int, batch: int
) -> list[bool]:
    """PGD through the defense (backward = identity; the attacker knows the seed): which images withstand it."""

    def classify(x: Tensor) -> Tensor:
        scores: Tensor = defended(x, seed=seeds_of(seed, x))
        return scores

    attacked = _attacked(classify, clean, labels, epsilon=epsilon, steps=steps, seed=seed, batch=batch)
    return correct(classify, attacked, labels, batch=batch)


def mean(values: list[float]) -> float:
    """Return the mean, as JSON takes it."""
    return float(torch.tensor(values, dtype=torch.float64).mean())


def describe(purification: PurifiedSet) -> dict[str, Any]:
    """Return the mean losses, for a result file."""
    return {"loss_before": mean(purification.loss_before), "loss_after": mean(purification.loss_after)}
