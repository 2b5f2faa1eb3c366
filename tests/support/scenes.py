"""Scenes for attacks: a linear classifier, whose robustness has a closed form."""

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.scene import Scene
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import NoPurifier
from unperturb.models.purifiers.defended import DefendedClassifier


class LinearClassifier(ImageClassifier):
    """Two or more classes by one matrix on the pixels: its robustness has a closed form."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(feature_dim=weight.shape[1], num_classes=len(weight), image_size=8)
        self.weight = torch.nn.Parameter(weight)

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        scores: Tensor = features @ self.weight.T
        return scores


def linear(classes: int = 2) -> LinearClassifier:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(classes, 192, generator=generator)
    return LinearClassifier(weight - weight.mean(1, keepdim=True)).requires_grad_(False)  # grey decides nothing


def linear_scene(threat: Threat, *, classes: int = 2, n: int = 200) -> Scene:
    """Images far enough from 0 and 1 for the box never to bind, with labels that the classifier gives them."""
    generator = torch.Generator().manual_seed(6)
    classifier = linear(classes)
    x = 0.5 + 0.05 * torch.randn(n, 3, 8, 8, generator=generator).clamp(-3, 3)
    labels = classifier(x).argmax(1)
    return Scene(
        defended=DefendedClassifier(classifier, NoPurifier(classifier)),
        x=x,
        labels=labels,
        seeds=torch.arange(n),
        threat=threat,
        budget=BUDGETS["fast"],
    )


def exactly_robust(scene: Scene) -> Tensor:
    """The label's margin over every other class, less epsilon times the dual norm of the weights' difference."""
    weight = scene.classifier.weight
    assert isinstance(weight, Tensor)
    dual = 1 if scene.threat.norm == "linf" else 2
    logits: Tensor = scene.classifier(scene.x)
    own = logits.gather(1, scene.labels[:, None])
    reach: Tensor = scene.threat.epsilon * (weight[scene.labels][:, None] - weight[None]).norm(p=dual, dim=2)
    slack = own - logits - reach  # image class
    return (slack > 0).scatter(1, scene.labels[:, None], True).all(1)
