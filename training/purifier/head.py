"""`unperturb train head`: a checkpoint's classifier -> the same with an InfoNCE head and a bank of negatives.

The classifier is frozen; the head learns to tell an image's views from those of the other images of the batch
(Mao et al., ICCV 2021, section 4; SimCLR's views without blur).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unperturb.models.attacks.pgd import evaluating
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import HeadCard
from unperturb.models.contrastive.loss import in_batch_negatives, info_nce
from unperturb.models.contrastive.views import ViewPolicy
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.head import NegativesBank, ProjectionHead
from unperturb.models.options import option
from unperturb.models.shapes import Bool, Float
from unperturb.training import data, held_out, loop, options, seeds, world
from unperturb.training.contrastive.contrast import Contrast, ContrastConfig, ContrastiveBatch, Queue
from unperturb.training.contrastive.encoder import BATCH, Encoder, bank_of
from unperturb.training.world import World


@dataclass(frozen=True, kw_only=True)
class HeadConfig(ContrastConfig):
    """Train the InfoNCE head of a frozen classifier, and build its bank of negatives."""

    classifier: str = option("checkpoint folder, shipped name, or robustbench:<Name>[:<dataset>:<threat>]")
    epochs: int = option("passes over the training images", 10)
    batch_size: int = option("images a step; the other images of the batch are the negatives", 1024)
    lr: float = option("peak learning rate", 1e-3)
    weight_decay: float = option("weight decay", 0.0)
    optimizer: Literal["sgd", "adam"] = option("optimizer", "adam")
    hidden: int = option("width of the head's hidden layer", 128)
    embedding_dim: int = option("length of an embedding", 16)
    temperature: float = option("InfoNCE temperature", 0.2)
    views: int = option("views of each image", 2)
    queue: int = option("embeddings of earlier batches kept as further negatives", 0)
    adversarial: bool = option("a further view of each image by RoCL's instance-wise attack on the head", False)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        for name, least in (("views", 2), ("queue", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")


class HeadTask:
    """The loop's task: InfoNCE of a head on frozen features."""

    def __init__(
        self,
        config: HeadConfig,
        classifier: ImageClassifier,
        head: ProjectionHead,
        train: data.Split,
        held: data.Split,
        here: World,
    ) -> None:
        self.config, self.classifier, self.model, self.train, self.held = config, classifier, head, train, held
        self.images = len(train.labels)
        self.contrast = Contrast(config, self.images, here, policy=ViewPolicy())
        self.memory = Queue(config.queue, config.embedding_dim, self.contrast.negatives.detector, here)

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean InfoNCE loss of a batch, and how often a view's nearest is a view of the same image."""
        self.model.train()
        own = seeds.of_images(indices, seed=self.config.seed, epoch=epoch)
        batch = ContrastiveBatch(self.train.images[indices], indices, own, self.train.labels[indices], epoch, step)
        encoder = Encoder(self.classifier, self.model)
        views = self.contrast.views(batch, self.config.views)
        if self.config.adversarial:
            attacked = self.contrast.attacked(encoder, views[:, 0], views[:, 1], own)
            views = torch.cat((views, attacked[:, None]), dim=1)
        embeddings = self._embed(self.model, views)
        found = self.contrast.nt_xent(embeddings, batch, queue=self.memory.filled_part())
        self.memory.push(embeddings.detach().flatten(0, 1), batch.labels.repeat_interleave(views.shape[1]))
        negatives, keep = in_batch_negatives(embeddings.detach())
        return found.loss, {**found.figures, "accuracy": _retrieval(embeddings.detach(), negatives, keep)}

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Return InfoNCE and retrieval accuracy on held-out training images, in batches of nearly the same size."""
        losses, accuracies, count = [], [], len(self.held.labels)
        with torch.no_grad(), evaluating(averaged), options.autocast(self.config, self.held.images.device):
            for indices in torch.arange(count, device=self.held.images.device).tensor_split(math.ceil(count / BATCH)):
                batch = ContrastiveBatch(self.held.images[indices], indices, indices, self.held.labels[indices], 0, 0)
                embeddings = self._embed(averaged, self.contrast.views(batch, self.config.views))
                negatives, keep = in_batch_negatives(embeddings)
                losses.append(info_nce(embeddings, negatives, temperature=self.config.temperature, keep=keep).sum())
                accuracies.append(_retrieval(embeddings, negatives, keep) * len(indices))
        loss, accuracy = (float(torch.stack(values).sum()) / count for values in (losses, accuracies))
        return {"loss": loss, "accuracy": accuracy, "score": -loss}

    def _embed(self, head: nn.Module, views: Tensor) -> Float[Tensor, "batch views dim"]:
        """Embed the views; gradients are computed for the head, not for the classifier."""
        with torch.no_grad():
            features = self.classifier.features(views.flatten(0, 1))
        embeddings: Tensor = head(features).float()
        return embeddings.view(*views.shape[:2], -1)


def _retrieval(
    embeddings: Float[Tensor, "batch views dim"],
    negatives: Float[Tensor, "bank dim"],
    keep: Bool[Tensor, "batch bank"],
) -> Tensor:
    """Return the share of images whose first view is nearer to their second than to every negative."""
    first, second = embeddings[:, 0], embeddings[:, 1]
    nearest = (first @ negatives.T).masked_fill(~keep, -2).amax(1)
    return ((first * second).sum(1) > nearest).float().mean()


def train_head(config: HeadConfig) -> None:
    """Train, choose the epoch on held-out training images, and write OUT/checkpoint: classifier, head and bank."""
    here = world.join(config.device)
    base = store.load(config.classifier, device=here.device)
    if base.card.weights_sha256:
        dataset = data.load_for(base.card, config.data, cache=config.cache)
    else:  # of no folder of ours: its classes are only numbered
        dataset = data.load(config.data, base.card.pictures, cache=config.cache)
        if len(dataset.classes) != base.classifier.num_classes:
            raise ConfigError(
                f"{config.data} has {len(dataset.classes)} classes, {config.classifier} {base.classifier.num_classes}"
            )
        base = dataclasses.replace(base, card=dataclasses.replace(base.card, classes=dataset.classes))
    torch.manual_seed(config.seed)
    kept, held = held_out.training_images_for(base.card, dataset, config)
    if config.bank_size > len(kept.labels):
        raise ConfigError(f"bank_size={config.bank_size} is over the {len(kept.labels)} training images")
    head = ProjectionHead(
        feature_dim=base.classifier.feature_dim, hidden=config.hidden, embedding_dim=config.embedding_dim
    ).to(here.device)
    train, held = data.resident(kept, here.device), data.resident(held, here.device)
    task = HeadTask(config, base.classifier, head, train, held, here)
    fitted = loop.fit(task, config, here, made_of={"data": dataset.digest, "checkpoint": base.card.weights})
    if here.rank == 0:
        assert isinstance(fitted.model, ProjectionHead)
        encoder = Encoder(base.classifier, fitted.model)
        bank = NegativesBank(*bank_of(encoder, task.train, size=config.bank_size, seed=config.seed))
        card = dataclasses.replace(
            base.card,
            head=HeadCard(hidden=config.hidden, embedding_dim=config.embedding_dim, temperature=config.temperature),
            head_training={
                **options.comparable(config),
                "data_sha256": dataset.digest,
                "chosen_epoch": fitted.epoch,
                "at_that_epoch": fitted.figures,
            },
        )
        out = config.out / "checkpoint"
        store.save(out, dataclasses.replace(base, card=card, head=fitted.model, bank=bank))
        loss = fitted.figures["held_out_loss"]
        print(f"{out}: head of InfoNCE {loss:.3f} on held-out images, bank of {config.bank_size}")
    world.leave(here)
