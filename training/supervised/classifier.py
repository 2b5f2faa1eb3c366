"""`unperturb train classifier`: an image data set -> a checkpoint with a (robust) classifier.

It begins with fresh weights, or goes on from a checkpoint, such as an imported one (fine-tuning).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unperturb.models.attacks.pgd import Classify
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Architecture,
    ImageClassifier,
)
from unperturb.models.networks.readout import attach
from unperturb.models.networks.registry import TORCHVISION, build
from unperturb.models.options import option
from unperturb.models.pixels import Preprocessing
from unperturb.training import data, held_out, loop, options, world
from unperturb.training.contrastive.encoder import Encoder, trainable
from unperturb.training.contrastive.false_negatives import FalseNegativeConfig
from unperturb.training.supervised.adversarial import Fit, SupervisedBatch
from unperturb.training.supervised.base import SupervisedConfig, SupervisedTask, report
from unperturb.training.supervised.self_adaptive import AdaptiveTargets
from unperturb.training.supervised.semi_supervised import SemiSupervisedTask
from unperturb.training.supervised.weight_perturbation import at_worst_weights
from unperturb.training.supervised.widening import widen
from unperturb.training.world import World

FRESH = ("arch", "width", "activation", "image_size", "pretrained")  # options that a checkpoint's card answers


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(SupervisedConfig, FalseNegativeConfig):
    """Train a classifier: natural, PGD, N-FGSM or TRADES."""

    classifier: str | None = option("checkpoint to go on from, of any classes, in place of a fresh network", None)
    widen: int = option("factor on that checkpoint's channels, its logits kept (Net2Net); 1: as it is", 1)
    arch: str = option("architecture (see models/networks/registry.py)", "preact_resnet18")
    width: float = option("factor on preact_resnet18's channels", 1.0)
    activation: str = option("relu, silu, gelu, softplus, or native: as published", "native")
    image_size: int = option("side of the images in pixels", 32)
    pretrained: bool = option("start from torchvision's ImageNet weights", False)
    self_adaptive_from: int | None = option("epoch from which self-adaptive targets move (default: never)", None)
    self_adaptive_momentum: float = option("of self-adaptive targets", 0.9)
    weight_perturbation: float = option("gamma of adversarial weight perturbation; 0 for none", 0.0)
    labelled: float = option("share of the training images whose labels are used", 1.0)
    self_supervised_weight: float = option("of NT-Xent on all training images (S4L); 0 for none", 0.0)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        if self.classifier is not None:
            options.refuse_fresh(self, FRESH, self.classifier)
        if self.widen < 1 or (self.widen > 1 and self.classifier is None):
            raise ConfigError(f"widen={self.widen}: at least 1, and of a checkpoint: name it with --classifier")
        if not (0 < self.labelled <= 1 and self.self_supervised_weight >= 0 and self.weight_perturbation >= 0):
            raise ConfigError(
                f"labelled={self.labelled}, self_supervised_weight={self.self_supervised_weight}, "
                f"weight_perturbation={self.weight_perturbation}: out of range"
            )
        if self.self_adaptive_from is not None and self.epoch > self.self_adaptive_from:
            raise ConfigError(
                f"epoch={self.epoch}, self_adaptive_from={self.self_adaptive_from}: resume_from holds weights, not the "
                "targets that have moved by then; go on from the run's own folder"
            )
        if self.qub and self.self_adaptive_from is not None:
            raise ConfigError("qub=True bounds a mean of cross-entropies, which self-adaptive targets weight: not both")
        if self.false_negatives != "keep" and not self.self_supervised_weight:
            raise ConfigError(
                f"false_negatives={self.false_negatives!r}: only S4L has negatives; set --self-supervised-weight"
            )
        if not 0 <= self.self_adaptive_momentum < 1 or (self.self_adaptive_from or 0) < 0:
            raise ConfigError(
                f"self_adaptive_momentum={self.self_adaptive_momentum}, self_adaptive_from={self.self_adaptive_from}: "
                "out of range"
            )


class ClassifierTask(SupervisedTask):
    """A whole classifier, with self-adaptive targets and weight perturbation where they are asked for."""

    config: ClassifierConfig

    def __init__(
        self, config: ClassifierConfig, model: ImageClassifier, train: data.Split, held: data.Split, here: World
    ) -> None:
        super().__init__(config, model, train, held)
        if config.self_adaptive_from is not None:
            self.memory = AdaptiveTargets(
                train.labels,
                num_classes=model.num_classes,
                label_smoothing=config.label_smoothing,
                momentum=config.self_adaptive_momentum,
                warmup_epochs=config.self_adaptive_from,
                world=here,
            )

    def fit(self, batch: SupervisedBatch, epoch: int) -> Fit:
        """Return the loss towards self-adaptive targets, or towards the labels."""
        if isinstance(self.memory, AdaptiveTargets):
            return self.memory.fit(batch.indices, epoch)
        return super().fit(batch, epoch)

    def forward_pass(self, model: nn.Module, batch: SupervisedBatch, crafted: Tensor) -> Classify:
        """Return the forward pass at the worst weights nearby, or at the weights."""
        if not self.config.weight_perturbation:
            return model
        fit = self.fit(batch, -1)  # before any epoch in which targets move
        return at_worst_weights(
            model,
            lambda forward: self.method.loss(forward, batch, crafted, fit, self.config.beta).loss,
            gamma=self.config.weight_perturbation,
        )


class Beginning(NamedTuple):
    """What a training begins with: the images, the network, its card so far, the digests of what it is made of, and the
    card of the checkpoint that it was, if it was one.
    """

    dataset: data.DataSet
    model: ImageClassifier
    card: Card
    made_of: dict[str, str]
    was: Card | None = None


def _fresh(config: ClassifierConfig, here: World) -> Beginning:
    """Return a network with weights of the seed, or torchvision's, for the data set's classes."""
    dataset = data.load(config.data, Preprocessing(size=config.image_size), cache=config.cache)
    large = config.arch in TORCHVISION
    architecture = Architecture(
        name=config.arch,
        num_classes=len(dataset.classes),
        image_size=config.image_size,
        activation=config.activation,
        width=config.width,
        mean=IMAGENET_MEAN if large else CIFAR10_MEAN,
        std=IMAGENET_STD if large else CIFAR10_STD,
    )
    torch.manual_seed(config.seed)
    model = build(architecture, pretrained=config.pretrained).to(here.device)
    card = Card(id=config.id, architecture=architecture, classes=dataset.classes, data={}, training={})
    return Beginning(dataset, model, card, {"data": dataset.digest})


def _from_checkpoint(name: str, config: ClassifierConfig, here: World) -> Beginning:
    """Return a checkpoint's network and the pictures as it takes them; for other classes its last layer is new."""
    base = store.load(name, device=here.device)
    trainable(base.card)
    dataset = data.load(config.data, base.card.pictures, cache=config.cache)
    torch.manual_seed(config.seed)
    model, classes = base.classifier.requires_grad_(True), len(dataset.classes)
    if base.card.classes != dataset.classes or base.card.readout.kind != "linear":
        attach(model, nn.Linear(model.feature_dim, classes).to(here.device))
        model.num_classes = classes
    architecture = replace(base.card.architecture, num_classes=classes)
    if config.widen > 1:
        model, architecture = widen(model, architecture, config.widen, seed=config.seed)
    card = Card(
        id=config.id,
        architecture=architecture,
        classes=dataset.classes,
        preprocessing=base.card.preprocessing,
        data={},
        training={
            "classifier_sha256": base.card.weights_sha256,
            "classifier_training": base.card.training,
            "classifier_data": base.card.data,
        },
    )
    return Beginning(dataset, model, card, {"data": dataset.digest, "checkpoint": base.card.weights}, base.card)


def train_classifier(config: ClassifierConfig) -> None:
    """Train, choose the epoch on held-out training images, write OUT/checkpoint, and test that once."""
    here = world.join(config.device)
    begun = _fresh(config, here) if config.classifier is None else _from_checkpoint(config.classifier, config, here)
    dataset, model = begun.dataset, begun.model
    kept, held = held_out.training_images_for(begun.was, dataset, config)
    labelled = max(1, round(config.labelled * len(kept.labels)))
    if config.labelled < 1:  # those whose labels are used come first
        order = torch.randperm(len(kept.labels), generator=torch.Generator().manual_seed(config.seed + 2))
        kept = data.Split(kept.images[order], kept.labels[order])
    if not config.self_supervised_weight:
        kept = data.Split(kept.images[:labelled], kept.labels[:labelled])
    train, held = data.resident(kept, here.device), data.resident(held, here.device)
    supervised = ClassifierTask(config, model, train, held, here)
    task: loop.Task = supervised
    if config.self_supervised_weight:
        task = SemiSupervisedTask(
            supervised, model, config, here, labelled=labelled, weight=config.self_supervised_weight
        )
    fitted = loop.fit(task, config, here, made_of=begun.made_of, collapsed=supervised.collapsed)
    if here.rank == 0:
        classifier = fitted.model.backbone if isinstance(fitted.model, Encoder) else fitted.model
        assert isinstance(classifier, ImageClassifier)
        card = replace(
            begun.card,
            data={**data.described(dataset, kept, held_out=config.held_out), "labelled": labelled},
            training={
                **options.comparable(config),
                "chosen_epoch": fitted.epoch,
                "at_that_epoch": fitted.figures,
                **begun.card.training,
            },
        )
        out = config.out / "checkpoint"
        store.save(out, Checkpoint(card, classifier))
        report(out, dataset.test, epsilon=config.epsilon, images=config.test_images, device=here.device)
    world.leave(here)
