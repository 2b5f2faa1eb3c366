"""The common part of training with labels: its options, the loop's task, and how a classifier is measured."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unperturb.models.accuracy import correct, wilson
from unperturb.models.attacks.pgd import Classify, pgd
from unperturb.models.attacks.projected_gradient import ProjectedGradient, require_pixel_units
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.options import option
from unperturb.training import data, options, seeds
from unperturb.training.augment import pad_crop_flip
from unperturb.training.options import RunConfig
from unperturb.training.supervised.adversarial import Fit, MethodName, SupervisedBatch, method_of, smoothed


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(RunConfig):
    """The options of every run with labels."""

    method: MethodName = option("training loss", "trades")
    epsilon: float = option("attack radius, L-infinity", 8 / 255)
    attack_steps: int = option("steps of the training attack", 10)
    attack_step_size: float = option("step size of the training attack", 2 / 255)
    beta: float = option("weight of the KL term (trades)", 6.0)
    qub: bool = option("quadratic upper bound in place of the attacked images' cross-entropy (pgd, n-fgsm)", False)
    collapse: float = option("fall of PGD accuracy from the best epoch at which the run goes back there; 0: never", 0.2)
    label_smoothing: float = option("label smoothing", 0.1)
    pad: int = option("pixels of padding before the random crop", 4)
    held_out: int = option("training images kept back to choose the epoch by PGD-10", 1000)
    test_images: int = option("test images to measure on, the first ones; 0 for all", 0)
    id: str = option("name on the checkpoint's card", "classifier")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        if self.test_images < 0:
            raise ConfigError(f"test_images={self.test_images} is below 0")
        if not 0 <= self.label_smoothing < 1 or self.attack_steps < 1 or min(self.pad, self.beta) < 0:
            raise ConfigError(
                f"label_smoothing={self.label_smoothing}, attack_steps={self.attack_steps}, pad={self.pad}, "
                f"beta={self.beta}: out of range"
            )
        require_pixel_units(self.epsilon)
        if self.qub and self.method not in ("pgd", "n-fgsm"):
            raise ConfigError(f"qub=True bounds the loss of attacked images: --method pgd or n-fgsm, not {self.method}")
        if not 0 <= self.collapse < 1:
            raise ConfigError(f"collapse={self.collapse} must be in [0, 1), a share of the held-out images")


class SupervisedTask:
    """The loop's task for SUPERVISED_METHODS, on the classifier that `model` is."""

    memory: nn.Module

    def __init__(self, config: SupervisedConfig, model: nn.Module, train: data.Split, held: data.Split) -> None:
        self.config, self.model, self.train, self.held = config, model, train, held
        self.images = len(train.labels)
        self.memory = nn.Module()
        self.method = method_of(config.method, qub=config.qub)
        self.attack = ProjectedGradient(
            direction="ascend",
            epsilon=config.epsilon,
            step_size=config.attack_step_size,
            steps=config.attack_steps,
            start="uniform",
        )

    def batch(self, indices: Tensor, epoch: int, step: int) -> SupervisedBatch:
        """Return those training images, augmented by draws of their own."""
        draw = seeds.of_step(seed=self.config.seed, epoch=epoch, step=step)
        x = pad_crop_flip(self.train.images[indices], pad=self.config.pad, generator=draw)
        own = seeds.of_images(indices, seed=self.config.seed, epoch=epoch)
        return SupervisedBatch(x, self.train.labels[indices], own, indices)

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the method's loss on a batch of augmented images, and its accuracy."""
        self.model.train()
        return self.supervised(self.model, self.batch(indices, epoch, step), epoch)

    def supervised(self, model: nn.Module, batch: SupervisedBatch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the method's loss of a classifier, and its accuracy."""
        crafted = self.method.craft(model, batch, self.attack)
        forward = self.forward_pass(model, batch, crafted)
        outcome = self.method.loss(forward, batch, crafted, self.fit(batch, epoch), self.config.beta)
        return outcome.loss, {"accuracy": outcome.logits.detach().argmax(1).eq(batch.labels).float().mean()}

    def fit(self, batch: SupervisedBatch, epoch: int) -> Fit:
        """Return what the logits of a batch are fitted to."""
        return smoothed(batch.labels, self.config.label_smoothing)

    def forward_pass(self, model: nn.Module, batch: SupervisedBatch, crafted: Tensor) -> Classify:
        """Return the forward pass that the loss is computed by."""
        return model

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Return clean accuracy on the held-out training images, and but for natural training PGD-10 accuracy."""
        natural = self.config.method == "natural"
        with options.autocast(self.config, self.held.images.device):
            figures = measure(averaged, self.held, epsilon=self.config.epsilon, steps=0 if natural else 10)
        shown = ("clean_accuracy",) if natural else ("clean_accuracy", "pgd_accuracy")
        return {name: figures[name] for name in shown} | {"score": figures[shown[-1]]}

    def collapsed(self, best: float, score: float) -> bool:
        """Tell whether PGD accuracy fell by `collapse`, not by chance: catastrophic overfitting (Wong et al. 2020)."""
        if not self.config.collapse or self.config.method == "natural":
            return False
        n = len(self.held.labels)
        apart = wilson(round(score * n), n).high < wilson(round(best * n), n).low
        return apart and best - score >= self.config.collapse


def measure(model: nn.Module, split: data.Split, *, epsilon: float, steps: int) -> dict[str, Any]:
    """Measure clean and PGD accuracy (random start, steps of a quarter of epsilon) on a split, with 95% intervals.

    With no steps, clean accuracy alone.
    """
    model.eval()
    clean: list[bool] = []
    robust: list[bool] = []
    for indices in torch.arange(len(split.labels)).split(data.at_once(split.images)):
        x, labels = split.images[indices].float() / 255, split.labels[indices]
        clean += correct(model, x, labels)
        if not steps:
            continue
        attacked = pgd(
            model, x, labels, epsilon=epsilon, step_size=epsilon / 4, steps=steps, seeds=indices.to(x.device)
        )
        robust += correct(model, attacked, labels)
    before = wilson(sum(clean), len(clean))
    figures = {"n": before.n, "clean_accuracy": before.value, "clean_interval": [before.low, before.high]}
    if not steps:
        return figures
    after = wilson(sum(robust), len(robust))
    return {
        **figures,
        "pgd_accuracy": after.value,
        "pgd_interval": [after.low, after.high],
        "pgd": {
            "epsilon": epsilon,
            "step_size": epsilon / 4,
            "steps": steps,
            "restarts": 1,
            "seed": "image index",
        },
    }


def report(folder: Path, test: data.Split, *, epsilon: float, images: int, device: torch.device) -> None:
    """Measure the checkpoint as stored on the first `images` test images (0: all), once; the figures go on its card."""
    test = data.first(test, images, device)
    saved = store.load(folder, device=device)
    figures = measure(saved.classifier, test, epsilon=epsilon, steps=20)
    store.write_card(folder, dataclasses.replace(saved.card, figures={"test": figures}))
    print(f"{folder}: clean {figures['clean_accuracy']:.2%}, PGD-20 {figures['pgd_accuracy']:.2%} (n = {figures['n']})")
