"""`unperturb train pretrain`: an encoder without labels -> a checkpoint with backbone, projector and bank.

`unperturb train linear` or `knn` makes a classifier of it.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unperturb.models.attacks.pgd import evaluating
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card, HeadCard
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.contrastive.loss import in_batch_negatives, info_nce
from unperturb.models.contrastive.views import make_views
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.head import NegativesBank
from unperturb.models.networks.readout import ReadoutCard
from unperturb.models.options import option
from unperturb.models.pixels import Preprocessing
from unperturb.training import data, held_out, loop, options, seeds, world
from unperturb.training.contrastive.contrast import (
    POLICY,
    Contrast,
    ContrastConfig,
    ContrastiveBatch,
    Loss,
    embed_together,
)
from unperturb.training.contrastive.deacl import DeACL
from unperturb.training.contrastive.encoder import BATCH, Encoder, bank_of, fresh, reopened
from unperturb.training.contrastive.moco import MoCo
from unperturb.training.contrastive.mutual_information import MutualInformation
from unperturb.training.contrastive.rocl import RoCL
from unperturb.training.contrastive.simclr import SimCLR
from unperturb.training.world import World


class PretrainingMethod(Protocol):
    """One way to train an encoder: `model` is trained, `memory` is what else a resumed run needs."""

    @property
    def model(self) -> nn.Module: ...  # noqa: D102

    @property
    def memory(self) -> nn.Module: ...  # noqa: D102

    def loss(self, batch: ContrastiveBatch) -> Loss:
        """Return the mean loss of a batch, and figures for the log."""
        ...


GOES_ON = ("deacl", "mutual-information")  # methods that need an encoder to begin with


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(ContrastConfig):
    """Train an encoder without labels: SimCLR, MoCo, RoCL, DeACL, or self-supervised adversarial training."""

    method: Literal["simclr", "moco", "rocl", "deacl", "mutual-information"] = option("training method", "simclr")
    encoder: str | None = option("checkpoint to begin with, its architecture and projector; deacl's teacher", None)
    arch: str = option("architecture (see models/networks/registry.py)", "preact_resnet18")
    activation: str = option("relu, silu, gelu, softplus, or native: as published", "native")
    image_size: int = option("side of the images in pixels", 32)
    epochs: int = option("passes over the training images", 100)
    batch_size: int = option("images a step, over all processes", 256)
    lr: float = option("peak learning rate", 1e-3)
    weight_decay: float = option("weight decay", 1e-6)
    optimizer: Literal["sgd", "adam"] = option("optimizer", "adam")
    warmup: float = option("share of the run in which one-cycle rises", 0.1)
    ema: float = option("decay of the averaged weights per step; 0 for none", 0.0)
    queue: int = option("keys kept as negatives (moco)", 4096)
    key_momentum: float = option("of the key encoder's weights (moco)", 0.99)
    adversarial_weight: float = option("λ, of the term that is of attacked views alone (rocl)", 1 / 256)
    id: str = option("name on the checkpoint's card", "encoder")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        if self.queue < 1 or self.adversarial_weight < 0 or not 0 <= self.key_momentum < 1:
            raise ConfigError(
                f"queue={self.queue}, adversarial_weight={self.adversarial_weight}, "
                f"key_momentum={self.key_momentum}: out of range"
            )
        if self.method in GOES_ON and self.encoder is None:
            raise ConfigError(f"method={self.method} goes on from a trained encoder; name its checkpoint: --encoder")


PRETRAINING_METHODS: dict[str, Callable[[PretrainConfig, Contrast, Encoder, World], PretrainingMethod]] = {
    "simclr": lambda _, contrast, encoder, __: SimCLR(contrast, encoder),
    "moco": lambda config, contrast, encoder, here: MoCo(
        contrast, encoder, here, queue=config.queue, key_momentum=config.key_momentum
    ),
    "rocl": lambda config, contrast, encoder, _: RoCL(contrast, encoder, adversarial_weight=config.adversarial_weight),
    "deacl": lambda _, contrast, encoder, __: DeACL(contrast, encoder),
    "mutual-information": lambda _, contrast, encoder, __: MutualInformation(contrast, encoder),
}


class PretrainTask:
    """The loop's task for PRETRAINING_METHODS."""

    def __init__(
        self, config: PretrainConfig, encoder: Encoder, train: data.Split, held: data.Split, here: World
    ) -> None:
        self.config, self.train, self.held = config, train, held
        self.images = len(train.labels)
        self.method = PRETRAINING_METHODS[config.method](config, Contrast(config, self.images, here), encoder, here)
        self.model, self.memory = self.method.model, self.method.memory

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the method's loss on a batch."""
        self.model.train()
        own = seeds.of_images(indices, seed=self.config.seed, epoch=epoch)
        batch = ContrastiveBatch(self.train.images[indices], indices, own, self.train.labels[indices], epoch, step)
        return self.method.loss(batch)

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Return NT-Xent of held-out images, in batches of nearly the same size.

        It says little of robustness, so that the last epoch is stored.
        """
        assert isinstance(averaged, Encoder)
        total, count, device = 0.0, len(self.held.labels), self.held.images.device
        with torch.no_grad(), evaluating(averaged), options.autocast(self.config, device):
            for indices in torch.arange(count, device=device).tensor_split(math.ceil(count / BATCH)):
                x = self.held.images[indices].float() / 255
                views = make_views(x, seeds=indices, step=0, views=2, policy=POLICY)
                embeddings = embed_together(averaged, views)
                negatives, keep = in_batch_negatives(embeddings)
                losses = info_nce(embeddings, negatives, temperature=self.config.temperature, keep=keep)
                total += float(losses.sum())
        return {"loss": total / count}


class Beginning(NamedTuple):
    """The images, the encoder, its card so far, and the card of the checkpoint that it was, if it was one."""

    dataset: data.DataSet
    encoder: Encoder
    card: Card
    was: Card | None = None


def _fresh(config: PretrainConfig) -> Beginning:
    """Return an encoder with weights of the seed."""
    dataset = data.load(config.data, Preprocessing(size=config.image_size), cache=config.cache)
    architecture = Architecture(
        name=config.arch,
        num_classes=len(dataset.classes),
        image_size=config.image_size,
        activation=config.activation,
    )
    head = HeadCard(hidden=config.hidden, embedding_dim=config.embedding_dim, temperature=config.temperature)
    card = Card(id=config.id, architecture=architecture, classes=dataset.classes, data={}, training={}, head=head)
    torch.manual_seed(config.seed)
    return Beginning(dataset, fresh(architecture, head), card)


def _from_checkpoint(name: str, config: PretrainConfig) -> Beginning:
    """Return a checkpoint's encoder, and the pictures as it takes them."""
    encoder, was = reopened(name)
    assert was.head is not None
    shape = {
        "arch": was.architecture.name,
        "activation": was.architecture.activation,
        "image_size": was.architecture.image_size,
        "hidden": was.head.hidden,
        "embedding_dim": was.head.embedding_dim,
    }
    options.refuse_fresh(config, [key for key, value in shape.items() if getattr(config, key) != value], name)
    dataset = data.load(config.data, was.pictures, cache=config.cache)
    card = Card(
        id=config.id,
        architecture=dataclasses.replace(was.architecture, num_classes=len(dataset.classes)),
        classes=dataset.classes,
        preprocessing=was.preprocessing,
        vote=was.vote,
        head=dataclasses.replace(was.head, temperature=config.temperature),
        data={},
        training={
            **shape,
            "encoder_sha256": was.weights_sha256,
            "encoder_training": was.training,
            "encoder_data": was.data,
        },
    )
    return Beginning(dataset, encoder, card, was)


def pretrain(config: PretrainConfig) -> None:
    """Train to the last epoch and write OUT/checkpoint: no readout yet; a projector and a bank, to purify with."""
    here = world.join(config.device)
    begun = _fresh(config) if config.encoder is None else _from_checkpoint(config.encoder, config)
    dataset, encoder, card, was = begun
    encoder.to(here.device)
    kept, held = held_out.training_images_for(was, dataset, config)
    train = data.resident(kept, here.device)
    task = PretrainTask(config, encoder, train, data.resident(held, here.device), here)
    made_of = {"data": dataset.digest} | ({"checkpoint": was.weights} if was else {})
    copies = [task.method.memory.encoder] if isinstance(task.method, MoCo) else []
    fitted = loop.fit(task, config, here, made_of=made_of, copies=copies)
    if here.rank == 0:
        trained = fitted.model
        assert isinstance(trained, Encoder)
        size = min(config.bank_size, len(train.labels))
        bank = NegativesBank(*bank_of(trained, train, size=size, seed=config.seed))
        made = dataclasses.replace(
            card,
            readout=ReadoutCard(kind="none"),
            data=data.described(dataset, train, held_out=config.held_out),
            training={
                **options.comparable(config),
                **card.training,
                "chosen_epoch": fitted.epoch,
                "at_that_epoch": fitted.figures,
            },
        )
        out = config.out / "checkpoint"
        store.save(out, Checkpoint(made, trained.backbone, trained.projector, bank))
        print(f"{out}: encoder by {config.method}, NT-Xent {fitted.figures['held_out_loss']:.3f} on held-out images")
    world.leave(here)
