"""`unperturb train purifier`: a checkpoint -> the same with a purifier trained through the classifier behind it.

The images that it is trained on are attacked through everything, the purifier and the frozen classifier. What it is to
do is not to find a perturbation but to leave the classifier with the right class:

    CE(attacked, label)  +  β KL(clean || attacked)  +  γ KL(bare classifier on clean || clean)

(the first two are TRADES's terms on attacked images; JATP, arXiv 2106.05453, and AToP, ICLR 2024, train a purifier
likewise). A residual network begins as the identity: the last layer is zero. The classifier's weights are not touched.

Before a classifier that was never robust a residual network learns nothing at 8/255: what it does not find of a
perturbation goes around it, and a little is enough. An autoencoder lets nothing around, and learns.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.attacks.pgd import cross_entropy, evaluating
from unperturb.models.attacks.projected_gradient import ProjectedGradient, require_pixel_units
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card
from unperturb.models.errors import ConfigError
from unperturb.models.inference.folding import prepared
from unperturb.models.networks.restorer import Restorer, RestorerCard
from unperturb.models.options import option
from unperturb.models.purifiers.base import lacking
from unperturb.models.purifiers.defended import vote_of
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.models.purifiers.vote import Vote
from unperturb.training import data, held_out, loop, options, seeds, world
from unperturb.training.augment import pad_crop_flip
from unperturb.training.options import RunConfig
from unperturb.training.purifier.restorer import save_with
from unperturb.training.supervised.base import measure
from unperturb.training.supervised.n_fgsm import noisy_step

FRESH = ("network", "width", "depth", "scale", "reach")  # options that the card of `start` answers


@dataclass(frozen=True, kw_only=True)
class PurifierConfig(RunConfig):
    """Train a network that purifies through the frozen classifier behind it, on attacks that go through both."""

    checkpoint: str = option("checkpoint folder or shipped name; its classifier stays as it is", also=("--classifier",))
    start: str | None = option(
        "checkpoint whose purifier it begins with, of whatever classes: network, width, depth, scale and reach are its",
        None,
    )
    network: Literal["residual", "autoencoder"] = option(
        "residual: takes something off each pixel, for robust classifiers; autoencoder: draws the image anew",
        "residual",
    )
    width: int = option("channels of its layers; an autoencoder, of at least 8, doubles them with each halving", 64)
    depth: int | None = option(
        "its layers, beside the last (5); of an autoencoder, how often its side is halved (2)", None
    )
    scale: int = option("its layers work on images of a side 1/scale", 2)
    reach: float = option("how far a residual one may move a channel of a pixel", 8 / 255)
    epsilon: float = option("radius of the attack, L-infinity", 8 / 255)
    ramp: float | None = option(
        "share of the run in which the attack grows to that radius (0; of an autoencoder 0.25)", None
    )
    attack: Literal["n-fgsm", "pgd"] = option("training attack", "n-fgsm")
    attack_steps: int = option("steps of pgd", 3)
    attack_step_size: float = option("step size of pgd", 4 / 255)
    vote: bool = option("train for the vote: each batch goes through one of its shifts, drawn for it", False)
    beta: float | None = option(
        "weight of KL between the clean and the attacked prediction (1; of an autoencoder 0)", None
    )
    gamma: float | None = option(
        "weight of KL from the bare classifier's prediction on clean images (1; of an autoencoder 0)", None
    )
    label_smoothing: float = option("label smoothing", 0.0)
    pad: int = option("pixels of padding before the random crop", 4)
    assess: int = option(
        "test images to assess it on at the end, by `unperturb assess`; 0: none (python -m unperturb.training: none)",
        64,
    )
    epochs: int = option("passes over the training images", 10)
    batch_size: int = option("images a step", 128)
    lr: float = option("peak learning rate", 2e-3)
    weight_decay: float = option("weight decay", 1e-5)
    optimizer: Literal["sgd", "adam"] = option("optimizer", "adam")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        if (
            min(self.beta or 0, self.gamma or 0, self.pad) < 0
            or not 0 <= self.label_smoothing < 1
            or not 0 <= (self.ramp or 0) <= 1
        ):
            raise ConfigError(
                f"beta={self.beta}, gamma={self.gamma}, label_smoothing={self.label_smoothing}, ramp={self.ramp}, "
                f"pad={self.pad}: out of range"
            )
        if self.attack_steps < 1:
            raise ConfigError(f"attack_steps={self.attack_steps} must be at least 1")
        if self.assess < 0:
            raise ConfigError(f"assess={self.assess} is below 0")
        require_pixel_units(self.epsilon)


class Whole(nn.Module):
    """A restorer, or nothing, in front of a classifier that is no part of it, and of a vote or one of its views."""

    def __init__(self, restorer: Restorer | None, classifier: nn.Module, vote: Vote | None = None) -> None:
        super().__init__()
        self.restorer, self.vote = restorer, vote
        self._frozen = (classifier,)  # hidden from `parameters` and `train`

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of images in [0, 1]."""
        (classifier,), restored = self._frozen, x if self.restorer is None else self.restorer.restored(x)
        scores: Tensor = classifier(restored) if self.vote is None else self.vote.scores(classifier, restored)
        return scores


class PurifierTask:
    """The loop's task: the loss above, of a restorer in front of a frozen classifier."""

    def __init__(
        self,
        config: PurifierConfig,
        classifier: nn.Module,
        vote: Vote | None,
        model: Restorer,
        train: data.Split,
        *,
        processes: int = 1,
    ) -> None:
        self.config, self.classifier, self.model, self.train = config, classifier, model, train
        self.beta, self.gamma, self.ramp = config.beta or 0.0, config.gamma or 0.0, config.ramp or 0.0
        self.vote, self.views = vote, [Vote(shifts=(one,), mirrored=False) for one in vote.shifts] if vote else []
        self.images, self.memory = len(train.labels), nn.Module()
        self.steps = processes * max(1, self.images // config.batch_size)  # of an epoch, over all processes
        self.held: data.Split | None = None
        self.attack = ProjectedGradient(
            direction="ascend",
            epsilon=config.epsilon,
            step_size=config.attack_step_size,
            steps=config.attack_steps,
            start="uniform",
        )

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss on a batch of augmented images, and the share of attacked ones that are right."""
        self.model.train()
        draw = seeds.of_step(seed=self.config.seed, epoch=epoch, step=step)
        x, labels = pad_crop_flip(self.train.images[indices], pad=self.config.pad, generator=draw), self.train.labels
        view = self.views[int(torch.randint(len(self.views), (), generator=draw))] if self.views else None
        own = seeds.of_images(indices, seed=self.config.seed, epoch=epoch)
        done = (epoch + step / self.steps) / self.config.epochs
        share = min(1.0, done / self.ramp) if self.ramp else 1.0
        return self.of_batch(Whole(self.model, self.classifier, view), x, labels[indices], own, share=share)

    def of_batch(
        self, whole: Whole, x: Tensor, labels: Tensor, own: Tensor, *, share: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images in [0, 1] with a seed each, and the share of attacked ones that are right.

        They are attacked within `share` times the radius.
        """
        config = self.config
        crafted = self.crafted(whole, x, labels, own, share=share)
        if self.beta or self.gamma:
            clean, attacked = (part.float() for part in whole(torch.cat((x, crafted))).chunk(2))
        else:
            clean = attacked = whole(crafted).float()
        loss = F.cross_entropy(attacked, labels, label_smoothing=config.label_smoothing)
        if self.beta:
            loss = loss + self.beta * _kl(clean, attacked)
        if self.gamma:
            with torch.no_grad():
                bare = self.classifier(x) if whole.vote is None else whole.vote.scores(self.classifier, x)
            loss = loss + self.gamma * _kl(bare.float(), clean)
        return loss, {"accuracy": attacked.detach().argmax(1).eq(labels).float().mean()}

    def crafted(self, whole: Whole, x: Tensor, labels: Tensor, own: Tensor, *, share: float = 1.0) -> Tensor:
        """Return the images attacked through the whole, BatchNorm in eval mode meanwhile."""
        radius = share * self.config.epsilon
        if self.config.attack == "n-fgsm":
            return noisy_step(whole, x, labels, own, epsilon=radius)
        attack = replace(self.attack, epsilon=radius, step_size=share * self.attack.step_size)
        with evaluating(whole):
            return attack.run(x, cross_entropy(whole, labels), seeds=own).image

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Return clean and PGD-10 accuracy of the whole on held-out training images; the second is the score."""
        assert isinstance(averaged, Restorer)
        assert self.held is not None
        with options.autocast(self.config, self.held.images.device):
            figures = measure(
                Whole(averaged, self.classifier, self.vote), self.held, epsilon=self.config.epsilon, steps=10
            )
        shown = {name: figures[name] for name in ("clean_accuracy", "pgd_accuracy")}
        return {**shown, "score": shown["pgd_accuracy"]}


def _kl(target: Tensor, of: Tensor) -> Tensor:
    """Return the mean of KL(target || of) over images, from class scores."""
    return F.kl_div(of.log_softmax(1), target.softmax(1), reduction="batchmean")


def fresh(card: RestorerCard) -> Restorer:
    """Return a restorer that takes nothing off, its last layer being zero; an autoencoder as it is drawn."""
    restorer = Restorer(card)
    if card.kind == "autoencoder":
        return restorer
    last = restorer.layers[-1]
    assert isinstance(last, nn.Conv2d)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return restorer


def begun(config: PurifierConfig) -> tuple[Restorer, RestorerCard, Card | None]:
    """Return the network that is trained, its shape, and the card of the checkpoint that it is from, if from one."""
    if config.start is None:
        residual = config.network == "residual"
        card = RestorerCard(
            kind=config.network,
            width=config.width,
            depth=config.depth or (5 if residual else 2),
            scale=config.scale,
            epsilon=config.reach if residual else 1.0,
            times=1.0,
        )
        return fresh(card), card, None
    options.refuse_fresh(config, FRESH, config.start)
    first = store.load(config.start)
    if first.purifier is None or first.card.purifier is None:
        raise ConfigError(f"start={config.start}: {lacking('purifier', f'checkpoint {first.card.id!r}')}")
    return first.purifier.requires_grad_(), first.card.purifier, first.card


def resolved(config: PurifierConfig, card: RestorerCard) -> PurifierConfig:
    """Return the configuration with the network's shape, and the defaults of its kind."""
    residual = card.kind == "residual"
    weight, ramp = (1.0, 0.0) if residual else (0.0, 0.25)
    return replace(
        config,
        network=card.kind,
        width=card.width,
        depth=card.depth,
        scale=card.scale,
        reach=card.epsilon if residual else config.reach,
        beta=weight if config.beta is None else config.beta,
        gamma=weight if config.gamma is None else config.gamma,
        ramp=ramp if config.ramp is None else config.ramp,
    )


def train_purifier(config: PurifierConfig) -> None:
    """Train, choose the epoch on held-out training images, and write OUT/checkpoint."""
    here = world.join(config.device)
    base = store.load(config.checkpoint, device=here.device)
    dataset = data.load_for(base.card, config.data, cache=config.cache)
    torch.manual_seed(config.seed)
    model, card, start = begun(config)
    config = resolved(config, card)
    model = model.to(here.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    made_of = {"data": dataset.digest, "checkpoint": base.card.weights}
    if start is not None:
        made_of["start"] = start.weights_sha256
    kept, held = held_out.training_images_for(base.card, dataset, config, start=start)
    vote = vote_of(base.card, PRESETS["vote"]) if config.vote else None
    task = PurifierTask(
        config, prepared(base).classifier, vote, model, data.resident(kept, here.device), processes=here.size
    )
    task.held = data.resident(held, here.device)
    fitted = loop.fit(task, config, here, made_of=made_of)
    if here.rank == 0:
        with options.autocast(config, here.device):
            bare = measure(Whole(None, task.classifier, vote), task.held, epsilon=config.epsilon, steps=10)
        told = {"data_sha256": dataset.digest, "held_out_bare": bare, "start_sha256": made_of.get("start")}
        out = save_with("purifier", config, base, card, fitted, **told)
        print(
            f"{out}: on {bare['n']} held-out images, with the purifier (without{', the vote alone' * config.vote}): "
            f"clean {fitted.figures['held_out_clean_accuracy']:.1%} ({bare['clean_accuracy']:.1%}), "
            f"PGD-10 {fitted.figures['held_out_pgd_accuracy']:.1%} ({bare['pgd_accuracy']:.1%})"
        )
    world.leave(here)
