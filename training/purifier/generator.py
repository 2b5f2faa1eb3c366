"""`unperturb train generator`: a frozen classifier -> a network that makes noise against its representation.

A contrastive attack generator (after Uysal and Baytaş): no labels; the noise raises the contrastive loss of the frozen
features between an image, a view of it and its attacked version, in the form with all positives in one:

    raise  -log( Σ_j exp(z_i·z_j / τ) / (Σ_j exp(z_i·z_j / τ) + Σ_n exp(z_i·z_n / τ)) )     (Kim et al. 2020, eq. 2)
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.accuracy import correct
from unperturb.models.attacks.projected_gradient import require_pixel_units
from unperturb.models.checkpoints import store
from unperturb.models.contrastive.loss import info_nce
from unperturb.models.contrastive.views import make_views
from unperturb.models.errors import ConfigError
from unperturb.models.networks import generator
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.generator import GeneratorCard, NoiseGenerator
from unperturb.models.networks.readout import MAKE_ONE
from unperturb.models.options import option
from unperturb.models.provenance import digest_of
from unperturb.training import data, held_out, loop, options, seeds, world
from unperturb.training.contrastive.contrast import POLICY
from unperturb.training.contrastive.encoder import BATCH
from unperturb.training.contrastive.false_negatives import FalseNegativeConfig, Negatives
from unperturb.training.world import World


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(FalseNegativeConfig):
    """Train a generator of adversarial noise against a frozen classifier's features, without labels."""

    classifier: str = option("checkpoint folder or shipped name")
    epsilon: float = option("radius of the noise, L-infinity", 8 / 255)
    width: int = option("channels of the generator at full size, a multiple of 8", 32)
    temperature: float = option("of the contrastive loss", 0.5)
    epochs: int = option("passes over the training images", 10)
    batch_size: int = option("images a step; the others of the batch are the negatives", 128)
    lr: float = option("peak learning rate", 1e-3)
    weight_decay: float = option("weight decay", 0.0)
    optimizer: Literal["sgd", "adam"] = option("optimizer", "adam")
    ema: float = option("decay of the averaged weights per step; 0 for none", 0.0)
    held_out: int = option("training images kept back for the log; the last epoch is the one that is stored", 1000)
    test_images: int = option("test images to measure on, the first ones; 0 for all", 0)
    id: str = option("name on the generator's card", "generator")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        if self.test_images < 0:
            raise ConfigError(f"test_images={self.test_images} is below 0")
        require_pixel_units(self.epsilon)
        if self.temperature <= 0 or self.batch_size < 2:
            raise ConfigError(
                f"temperature={self.temperature} must be above 0, batch_size={self.batch_size} at least 2"
            )


class GeneratorTask:
    """The loop's task: `model` is the generator; the classifier stays as it is."""

    def __init__(
        self,
        config: GeneratorConfig,
        classifier: ImageClassifier,
        model: NoiseGenerator,
        train: data.Split,
        held: data.Split,
        here: World,
    ) -> None:
        self.config, self.classifier, self.model, self.train, self.held = config, classifier, model, train, held
        self.images = len(train.labels)
        self.negatives = Negatives(config, self.images, here)
        self.memory = self.negatives.detector

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the contrastive loss of a batch of images, negated."""
        self.model.train()
        own = seeds.of_images(indices, seed=self.config.seed, epoch=epoch)
        x = self.train.images[indices].float() / 255
        (view,) = make_views(x, seeds=own, step=0, views=1, policy=POLICY).unbind(1)
        with torch.no_grad():
            fixed = [self._embed(images) for images in (x, view)]
        embeddings = torch.stack((*fixed, self._embed(self.model(x))), dim=1)
        found, negatives = self.negatives.found(embeddings, self.train.labels[indices], indices, epoch)
        raised = info_nce(
            embeddings, negatives, temperature=self.config.temperature, keep=found.keep, together=True
        ).mean()
        moved = (embeddings[:, 0] * embeddings[:, 2]).sum(1).mean()
        return -raised, {"cosine": moved.detach(), **self.negatives.figures(found)}

    def _embed(self, x: Tensor) -> Tensor:
        return F.normalize(self.classifier.features(x).float(), dim=1)

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Return accuracy on held-out training images, as they are and attacked; the last epoch is stored."""
        return accuracies(self.classifier, averaged, self.held)


def accuracies(classifier: ImageClassifier, attack: nn.Module, split: data.Split) -> dict[str, int | float]:
    """Return accuracy on images as they are, and attacked."""
    right: dict[str, list[bool]] = {"clean": [], "attacked": []}
    with torch.no_grad():
        for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
            x = images.float() / 255
            right["clean"] += correct(classifier, x, labels)
            right["attacked"] += correct(classifier, attack(x), labels)
    return {f"{name}_accuracy": sum(values) / len(values) for name, values in right.items()}


def train_generator(config: GeneratorConfig) -> None:
    """Train to the last epoch, write OUT/generator, and test that once."""
    here = world.join(config.device)
    torch.manual_seed(config.seed)
    base = store.load(config.classifier, device=here.device)
    if base.card.readout.kind == "none":
        raise ConfigError(f"{config.classifier} {MAKE_ONE}")
    dataset = data.load_for(base.card, config.data, cache=config.cache)
    if dataset.train.images.shape[-1] % 4:
        raise ConfigError(f"images of {dataset.train.images.shape[-1]} pixels: a generator needs a multiple of 4")
    model = NoiseGenerator(width=config.width, epsilon=config.epsilon).to(here.device)
    kept, held = held_out.training_images_for(base.card, dataset, config)
    before = digest_of(base.classifier)
    task = GeneratorTask(
        config, base.classifier, model, data.resident(kept, here.device), data.resident(held, here.device), here
    )
    fitted = loop.fit(task, config, here, made_of={"data": dataset.digest, "checkpoint": base.card.weights})
    if here.rank == 0:
        assert isinstance(fitted.model, NoiseGenerator)
        test = data.first(dataset.test, config.test_images, here.device)
        figures = {"n": len(test.labels), **accuracies(base.classifier, fitted.model.eval(), test)}
        out = config.out / "generator"
        card = GeneratorCard(
            id=config.id,
            epsilon=config.epsilon,
            width=config.width,
            classifier_sha256=(before, digest_of(base.classifier)),
            data=data.described(dataset, kept, held_out=config.held_out),
            training={**options.comparable(config), "at_last_epoch": fitted.figures},
            figures={"test": figures},
        )
        generator.save(out, fitted.model, card)
        clean, attacked = figures["clean_accuracy"], figures["attacked_accuracy"]
        print(f"{out}: accuracy {clean:.2%} -> {attacked:.2%} (n = {len(test.labels)})")
    world.leave(here)
