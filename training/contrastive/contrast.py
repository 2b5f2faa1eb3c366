"""The common part of the contrastive methods: views, NT-Xent with its negatives, and the instance-wise attack."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unperturb.models.attacks.instance import Distance, away_from
from unperturb.models.attacks.pgd import evaluating
from unperturb.models.attacks.projected_gradient import ProjectedGradient, require_pixel_units
from unperturb.models.contrastive.loss import in_batch_negatives, info_nce
from unperturb.models.contrastive.views import ViewPolicy, make_views
from unperturb.models.errors import ConfigError
from unperturb.models.options import option
from unperturb.models.shapes import Float, Int
from unperturb.training import seeds
from unperturb.training import world as worlds
from unperturb.training.augment import pad_crop_flip
from unperturb.training.contrastive.encoder import Encoder
from unperturb.training.contrastive.false_negatives import FalseNegativeConfig, NegativeMask, Negatives
from unperturb.training.world import World

# SimCLR's views of small images (Chen et al. 2020, appendix B.9), every image's colours drawn anew
POLICY = ViewPolicy(crop_area=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


@dataclass(frozen=True, kw_only=True)
class ContrastConfig(FalseNegativeConfig):
    """The options of every contrastive run with an instance-wise attack."""

    hidden: int = option("width of the projector's hidden layer", 512)
    embedding_dim: int = option("length of an embedding", 128)
    temperature: float = option("of InfoNCE", 0.5)
    epsilon: float = option("radius of the instance-wise attack, L-infinity", 8 / 255)
    attack_steps: int = option("its steps", 7)
    attack_step_size: float = option("its step size", 0.007)
    distance: Distance = option("what it raises", "sim")
    bank_size: int = option("training images whose embeddings are stored as the purifier's negatives", 2000)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        least_of = {"hidden": 1, "embedding_dim": 2, "attack_steps": 0, "bank_size": 1, "held_out": 2}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        require_pixel_units(self.epsilon)
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0")
        if self.batch_size < 2:
            raise ConfigError("batch_size=1 leaves no negative in the batch; it must be at least 2")


class ContrastiveBatch(NamedTuple):
    """Images uint8, their numbers in the training set, seeds of this epoch, labels, the epoch and its step (from 0).

    The labels serve the oracle of false negatives and the report of a detector's precision, nothing else.
    """

    images: Tensor
    indices: Tensor
    seeds: Tensor
    labels: Tensor
    epoch: int
    step: int


class Loss(NamedTuple):
    """The mean loss and figures (0-d tensors) for the log."""

    loss: Tensor
    figures: dict[str, Tensor]


class Queue(nn.Module):
    """Embeddings of earlier batches [size, dim] as further negatives, their labels, and how many there are by now."""

    queue: Tensor
    labels: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, false_negatives: nn.Module, world: World) -> None:
        super().__init__()
        self.false_negatives, self.world = false_negatives, world  # the detector is saved with it
        device = world.device
        self.register_buffer("queue", torch.zeros(size, dim, device=device))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64, device=device))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64, device=device))

    def filled_part(self) -> tuple[Tensor, Tensor]:
        """Return copies of the embeddings and labels."""
        filled = int(self.filled)
        return self.queue[:filled].clone(), self.labels[:filled].clone()

    def push(self, embeddings: Tensor, labels: Tensor) -> None:
        """Put every process's embeddings in, the newest first."""
        embeddings, labels = worlds.gather(self.world, embeddings), worlds.gather(self.world, labels)
        size = len(self.queue)
        self.queue.copy_(torch.cat((embeddings, self.queue))[:size])
        self.labels.copy_(torch.cat((labels, self.labels))[:size])
        self.filled.add_(len(embeddings)).clamp_(max=size)


class Contrast:
    """One run's views, negatives and attack."""

    def __init__(self, config: ContrastConfig, images: int, world: World, *, policy: ViewPolicy = POLICY) -> None:
        self.config, self.policy, self.world = config, policy, world
        self.negatives = Negatives(config, images, world)
        self.attack = ProjectedGradient(
            direction="ascend",
            epsilon=config.epsilon,
            step_size=config.attack_step_size,
            steps=config.attack_steps,
            start="uniform",
        )

    def views(self, batch: ContrastiveBatch, count: int = 2) -> Float[Tensor, "batch views 3 h w"]:
        """Return random views of each image, in [0, 1]."""
        x = batch.images.float() / 255
        return make_views(x, seeds=batch.seeds, step=0, views=count, policy=self.policy)

    def weakly(self, batch: ContrastiveBatch) -> Float[Tensor, "batch 3 h w"]:
        """Return the images padded, cropped and flipped: what a classifier is trained on."""
        draw = seeds.of_step(seed=self.config.seed, epoch=batch.epoch, step=batch.step)
        return pad_crop_flip(batch.images, pad=4, generator=draw)

    def nt_xent(
        self,
        embeddings: Float[Tensor, "batch views dim"],
        batch: ContrastiveBatch,
        *,
        queue: tuple[Tensor, Tensor] | None = None,
    ) -> Loss:
        """Return NT-Xent over every ordered pair of an image's views (Chen et al. 2020, eq. 1).

        Negatives are every view of the batch's other images, and the queue's embeddings with their labels; without
        those that the detector takes to be false.
        """
        found, negatives = self.found(embeddings, batch, queue=queue)
        loss = info_nce(embeddings, negatives, temperature=self.config.temperature, keep=found.keep).mean()
        return Loss(loss, self.negatives.figures(found))

    def found(
        self, embeddings: Tensor, batch: ContrastiveBatch, *, queue: tuple[Tensor, Tensor] | None = None
    ) -> tuple[NegativeMask, Tensor]:
        """Return the negatives of every image [n, dim], and which of them count for it."""
        return self.negatives.found(embeddings, batch.labels, batch.indices, batch.epoch, queue=queue)

    def attacked(
        self,
        encoder: Encoder,
        x: Float[Tensor, "batch 3 h w"],
        target: Float[Tensor, "batch 3 h w"],
        seeds: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch 3 h w"]:
        """Attack `x` as RoCL does: away from the embedding of `target`, the others' targets as negatives
        (Kim et al. 2020, eq. 4); BatchNorm in eval mode.
        """
        with evaluating(encoder):
            with torch.no_grad():
                aims = encoder(target)
            negatives, others = in_batch_negatives(aims[:, None])
            objective = away_from(
                encoder,
                aims,
                distance=self.config.distance,
                negatives=negatives,
                keep=others,
                temperature=self.config.temperature,
            )
            return self.attack.run(x, objective, seeds=seeds).image


def embed_together(encoder: nn.Module, views: Float[Tensor, "batch views 3 h w"]) -> Float[Tensor, "batch views dim"]:
    """Embed all views in one pass, so that BatchNorm sees one batch."""
    embeddings: Tensor = encoder(views.flatten(0, 1))
    return embeddings.view(*views.shape[:2], -1)
