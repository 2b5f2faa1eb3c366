"""`unperturb train linear`: an encoder's checkpoint -> a classifier whose last layer alone is trained.

Linear evaluation (Chen et al. 2020, section 4.2): the frozen encoder's features under one linear layer, or under dense
ones. With `--method natural` every image and its mirror image are encoded once; with `pgd` or `trades` the layer is
trained on attacked images (robust linear evaluation, Kim et al. 2020, section 4).
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.readout import ReadoutCard, attach, blank_readout
from unperturb.models.options import option
from unperturb.training import data, held_out, loop, options, seeds, world
from unperturb.training.contrastive.encoder import BATCH, bank_for
from unperturb.training.supervised.adversarial import MethodName, SupervisedBatch
from unperturb.training.supervised.base import SupervisedConfig, SupervisedTask, report


@dataclass(frozen=True, kw_only=True)
class LinearConfig(SupervisedConfig):
    """Train a linear layer, or dense layers, on a frozen encoder."""

    encoder: str = option("checkpoint folder or shipped name")
    hidden: int = option("width of a layer between; 0 for a linear layer alone", 0)
    method: MethodName = option("training loss", "natural")
    epochs: int = option("passes over the training images", 50)
    batch_size: int = option("images a step", 256)
    lr: float = option("peak learning rate", 3e-3)
    weight_decay: float = option("weight decay", 1e-6)
    optimizer: Literal["sgd", "adam"] = option("optimizer", "adam")
    ema: float = option("decay of the averaged weights per step; 0 for none", 0.0)
    label_smoothing: float = option("label smoothing", 0.0)
    id: str = option("name on the checkpoint's card", "linear")


class LinearTask(SupervisedTask):
    """The loop's task: `model` is the classifier, of which only the readout asks for gradients."""

    def __init__(self, config: LinearConfig, classifier: ImageClassifier, train: data.Split, held: data.Split) -> None:
        super().__init__(config, classifier, train, held)
        self.readout = classifier.get_submodule("linear")
        self.classifier = classifier

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the method's loss on a batch: of stored features, or of attacked images."""
        self.model.eval()  # the encoder's BatchNorm stays as it is
        if self.config.method != "natural":
            return self.supervised(self.model, self.batch(indices, epoch, step), epoch)
        draw = seeds.of_step(seed=self.config.seed, epoch=epoch, step=step)
        mirrored = torch.randint(2, (len(indices),), generator=draw).to(indices.device)
        batch = SupervisedBatch(self.encoded[mirrored, indices], self.train.labels[indices], indices, indices)
        return self.supervised(self.readout, batch, epoch)

    @cached_property
    def encoded(self) -> Tensor:
        """Return features of every image and of its mirror image [2, images, features]."""
        parts = []
        with torch.no_grad():
            for images in self.train.images.split(BATCH):
                x = images.float() / 255
                parts.append(torch.stack([self.classifier.features(side).float() for side in (x, x.flip(3))]))
        return torch.cat(parts, dim=1)


def train_linear(config: LinearConfig) -> None:
    """Train, choose the epoch on held-out training images, write OUT/checkpoint, and test that once."""
    here = world.join(config.device)
    torch.manual_seed(config.seed)
    base = store.load(config.encoder, device=here.device)
    if base.card.readout.kind == "knn":
        raise ConfigError(f"{config.encoder} classifies by nearest neighbours; name the encoder that it was made of")
    dataset = data.load(config.data, base.card.pictures, cache=config.cache)
    architecture = dataclasses.replace(base.card.architecture, num_classes=len(dataset.classes))
    classifier = base.classifier
    classifier.num_classes = len(dataset.classes)
    card = ReadoutCard(kind="dense", hidden=config.hidden) if config.hidden else ReadoutCard()
    readout = blank_readout(card, feature_dim=classifier.feature_dim, num_classes=classifier.num_classes)
    attach(classifier, (readout or nn.Linear(classifier.feature_dim, classifier.num_classes)).to(here.device))
    kept, held = held_out.training_images_for(base.card, dataset, config)
    task = LinearTask(config, classifier, data.resident(kept, here.device), data.resident(held, here.device))
    fitted = loop.fit(
        task,
        config,
        here,
        made_of={"data": dataset.digest, "checkpoint": base.card.weights},
        collapsed=task.collapsed,
    )
    if here.rank == 0:
        assert isinstance(fitted.model, ImageClassifier)
        made = dataclasses.replace(
            base.card,
            id=config.id,
            architecture=architecture,
            classes=dataset.classes,
            readout=card,
            figures={},
            data=data.described(dataset, kept, held_out=config.held_out),
            training={
                **options.comparable(config),
                "chosen_epoch": fitted.epoch,
                "at_that_epoch": fitted.figures,
                "encoder_sha256": base.card.weights_sha256,
                "encoder_training": base.card.training,
                "encoder_data": base.card.data,
            },
        )
        out = config.out / "checkpoint"
        bank = bank_for(base, dataset, task.train, seed=config.seed)
        store.save(out, Checkpoint(made, fitted.model, base.head, bank))
        report(out, dataset.test, epsilon=config.epsilon, images=config.test_images, device=here.device)
    world.leave(here)
