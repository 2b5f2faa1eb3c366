"""`python -m training classifier`: an image data set -> a checkpoint with a (robust) classifier."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import checkpoint
from models.attack import correct, pgd, wilson
from models.backbones import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    TORCHVISION,
    Architecture,
    build,
)
from models.checkpoint import Card, Checkpoint
from models.classifier import ImageClassifier
from models.errors import ConfigError
from models.options import option
from models.projected_gradient import ProjectedGradient
from training import data, loop, world
from training.adversarial import METHODS, Adversary, Method
from training.augment import pad_crop_flip
from training.loop import RunConfig


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """Train a classifier: natural, PGD or TRADES."""

    arch: str = option("architecture (see models/backbones.py)", "preact_resnet18")
    activation: str = option("relu, silu, gelu, softplus, or native: as published", "native")
    image_size: int = option("side of the images in pixels", 32)
    pretrained: bool = option("start from torchvision's ImageNet weights", False)
    method: Method = option("training loss", "trades")
    epsilon: float = option("attack radius, L-infinity", 8 / 255)
    attack_steps: int = option("steps of the training attack", 10)
    attack_step_size: float = option("step size of the training attack", 2 / 255)
    beta: float = option("weight of the KL term (trades)", 6.0)
    label_smoothing: float = option("label smoothing", 0.1)
    pad: int = option("pixels of padding before the random crop", 4)
    held_out: int = option("training images kept back to choose the epoch by PGD-10", 1000)
    id: str = option("name on the checkpoint's card", "classifier")


class ClassifierTask:
    """The loop's task for METHODS."""

    def __init__(self, config: ClassifierConfig, model: ImageClassifier, train: data.Split, held: data.Split) -> None:
        self.config, self.model, self.train, self.held = config, model, train, held
        self.images = len(train.labels)
        self.adversary = Adversary(
            attack=ProjectedGradient(
                direction="ascend", epsilon=config.epsilon, step_size=config.attack_step_size,
                steps=config.attack_steps, start="uniform",
            ),
            label_smoothing=config.label_smoothing,
            beta=config.beta,
        )  # fmt: skip

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss on a batch of augmented images, and its accuracy."""
        self.model.train()
        draw = torch.Generator().manual_seed((self.config.seed * 1000 + epoch) * 1_000_003 + int(indices[0]))
        x = pad_crop_flip(self.train.images[indices], pad=self.config.pad, generator=draw)
        labels = self.train.labels[indices]
        seeds = (self.config.seed * 1000 + epoch) * (1 << 32) + indices
        outcome = METHODS[self.config.method](self.model, (x, labels, seeds), self.adversary)
        return outcome.loss, {"accuracy": outcome.logits.detach().argmax(1).eq(labels).float().mean()}

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Clean and PGD-10 accuracy on the held-out training images."""
        with loop.autocast(self.config, self.held.images.device):
            figures = measure(averaged, self.held, epsilon=self.config.epsilon, steps=10)
        score = figures["clean_accuracy"] if self.config.method == "natural" else figures["pgd_accuracy"]
        return {name: figures[name] for name in ("clean_accuracy", "pgd_accuracy")} | {"score": score}


def measure(model: nn.Module, split: data.Split, *, epsilon: float, steps: int, batch: int = 250) -> dict[str, Any]:
    """Clean and PGD accuracy (random start, steps of a quarter of epsilon) on a split, with n and 95% intervals."""
    model.eval()
    clean: list[bool] = []
    robust: list[bool] = []
    for indices in torch.arange(len(split.labels)).split(batch):
        x, labels = split.images[indices].float() / 255, split.labels[indices]
        clean += correct(model, x, labels)
        attacked = pgd(
            model, x, labels, epsilon=epsilon, step_size=epsilon / 4, steps=steps, seeds=indices.to(x.device)
        )
        robust += correct(model, attacked, labels)
    before, after = wilson(sum(clean), len(clean)), wilson(sum(robust), len(robust))
    return {
        "n": before.n,
        "clean_accuracy": before.value,
        "clean_interval": [before.low, before.high],
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


def train_classifier(config: ClassifierConfig) -> None:
    """Train, choose the epoch on held-out training images, write OUT/checkpoint, and test that once."""
    here = world.join(config.device)
    dataset = data.load(config.data, image_size=config.image_size, cache=config.cache)
    if not 0 <= config.label_smoothing < 1 or config.attack_steps < 1:
        raise ConfigError(f"label_smoothing={config.label_smoothing}, attack_steps={config.attack_steps}: out of range")
    large = config.arch in TORCHVISION
    architecture = Architecture(
        name=config.arch, num_classes=len(dataset.classes), image_size=config.image_size, activation=config.activation,
        mean=IMAGENET_MEAN if large else CIFAR10_MEAN, std=IMAGENET_STD if large else CIFAR10_STD,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = build(architecture, pretrained=config.pretrained).to(here.device)
    kept, held = data.hold_out(dataset.train, config.held_out, seed=config.seed)
    task = ClassifierTask(config, model, data.resident(kept, here.device), data.resident(held, here.device))
    fitted = loop.fit(task, config, here)
    if here.rank == 0:
        assert isinstance(fitted.model, ImageClassifier)
        card = Card(
            id=config.id, architecture=architecture, classes=dataset.classes,
            data={
                "name": dataset.name, "sha256": dataset.digest, "train_images": len(dataset.train.labels),
                "held_out_of_train": config.held_out, "test_images": len(dataset.test.labels),
            },
            training={**loop.comparable(config), "chosen_epoch": fitted.epoch, "at_that_epoch": fitted.figures},
        )  # fmt: skip
        out = config.out / "checkpoint"
        checkpoint.save(out, Checkpoint(card, fitted.model))
        report(out, data.resident(dataset.test, here.device), config)
    world.leave(here)


def report(folder: Path, test: data.Split, config: ClassifierConfig) -> None:
    """Measure the checkpoint as stored on the test images, once, and write the figures on its card."""
    saved = checkpoint.load(folder, device=test.images.device)
    figures = measure(saved.classifier, test, epsilon=config.epsilon, steps=20)
    checkpoint.write_card(folder, dataclasses.replace(saved.card, figures={"test": figures}))
    print(f"{folder}: clean {figures['clean_accuracy']:.2%}, PGD-20 {figures['pgd_accuracy']:.2%} (n = {figures['n']})")
