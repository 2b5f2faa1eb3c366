"""`unperturb train knn`: an encoder's checkpoint -> a classifier by soft k nearest neighbours; nothing is trained.

Its scores, and so its gradients, are those of models/networks/readout.py: a classifier like any other.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from unperturb.models.attacks.projected_gradient import require_pixel_units
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.readout import ReadoutCard, SoftNeighbours, attach
from unperturb.models.options import option
from unperturb.training import data, world
from unperturb.training.contrastive.encoder import bank_for, bank_of
from unperturb.training.supervised.base import report


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Make a nearest-neighbour classifier of an encoder."""

    encoder: str = option("checkpoint folder or shipped name")
    data: str = option("cifar10, cifar100, or a folder with train/<class>/* and test/<class>/*")
    out: Path = option("folder for the checkpoint")
    neighbours: int = option("images that vote; 0 for the whole bank", 75)
    temperature: float = option("of the votes", 0.07)
    bank: int = option("training images in the bank, random ones; 0 for all", 0)
    epsilon: float = option("radius of the attack that it is measured by, L-infinity", 8 / 255)
    test_images: int = option("test images to measure on, the first ones; 0 for all", 0)
    seed: int = option("of the bank", 0)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb/images)", None)
    id: str = option("name on the checkpoint's card", "knn")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        for name in ("neighbours", "bank", "test_images"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is below 0")
        require_pixel_units(self.epsilon)


def make_knn(config: KnnConfig) -> None:
    """Fill the bank, write OUT/checkpoint, and test that once: clean and under PGD-20."""
    here = world.join(config.device)
    if here.size > 1:
        raise ConfigError("one process makes a nearest-neighbour classifier; start it without torchrun")
    base = store.load(config.encoder, device=here.device)
    dataset = data.load(config.data, base.card.pictures, cache=config.cache)
    train = data.resident(dataset.train, here.device)
    classifier, classes = base.classifier, len(dataset.classes)
    card = ReadoutCard(
        kind="knn",
        neighbours=config.neighbours,
        bank_size=config.bank or len(train.labels),
        temperature=config.temperature,
    )
    attach(classifier, nn.Identity())  # the bank holds features
    classifier.num_classes = classes
    bank, labels = bank_of(classifier, train, size=card.bank_size, seed=config.seed)
    attach(
        classifier,
        SoftNeighbours(bank, labels, num_classes=classes, neighbours=card.neighbours, temperature=card.temperature),
    )
    made = dataclasses.replace(
        base.card,
        id=config.id,
        classes=dataset.classes,
        readout=card,
        figures={},
        architecture=dataclasses.replace(base.card.architecture, num_classes=classes),
        data=data.described(dataset, train, held_out=0),
        training={
            "method": "knn",
            "seed": config.seed,
            "encoder_sha256": base.card.weights_sha256,
            "encoder_training": base.card.training,
            "encoder_data": base.card.data,
        },
    )
    out = config.out / "checkpoint"
    store.save(out, Checkpoint(made, classifier, base.head, bank_for(base, dataset, train, seed=config.seed)))
    report(out, dataset.test, epsilon=config.epsilon, images=config.test_images, device=here.device)
