"""`unperturb train restorer`: a checkpoint -> the same with a network that estimates an attack's perturbation.

The training images are attacked once, by PGD on the bare classifier; the network is shown each image with and without
its perturbation and fitted to it by least squares (Liao et al., CVPR 2018, section 3.3). It knows the attack that it
was trained on, and whoever knows it can attack it: benchmarks/robustbench_eval.py does.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from unperturb.models.attacks.pgd import evaluating, pgd
from unperturb.models.attacks.projected_gradient import require_pixel_units
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.restorer import Restorer, RestorerCard
from unperturb.models.options import option
from unperturb.training import data, held_out, loop, options, seeds, world
from unperturb.training.options import RunConfig


@dataclass(frozen=True, kw_only=True)
class RestorerConfig(RunConfig):
    """Train the network that takes an attack's perturbation off, for the reverse attack's restored view."""

    checkpoint: str = option("checkpoint folder or shipped name; its classifier is attacked, its parts are kept")
    width: int = option("channels of its layers", 32)
    depth: int = option("its layers, beside the last", 5)
    epsilon: float = option("radius of the attack, L-infinity", 8 / 255)
    attack_steps: int = option("steps of the attack", 7)
    attack_step_size: float = option("step size of the attack", 2 / 255)
    epochs: int = option("passes over the training images", 10)
    batch_size: int = option("images a step, each with and without its perturbation", 50)
    lr: float = option("peak learning rate", 4e-3)
    weight_decay: float = option("weight decay", 1e-3)
    optimizer: Literal["sgd", "adam"] = option("optimizer", "adam")
    ema: float = option("decay of the averaged weights per step; 0 for none", 0.0)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        super().__post_init__()
        if self.attack_steps < 1:
            raise ConfigError(f"attack_steps={self.attack_steps} must be at least 1")
        require_pixel_units(self.epsilon)


class RestorerTask:
    """The loop's task: least squares between the estimate and the perturbation, in shares of epsilon."""

    def __init__(
        self, config: RestorerConfig, classifier: ImageClassifier, model: Restorer, train: data.Split, held: data.Split
    ) -> None:
        self.config, self.classifier, self.model, self.train, self.held = config, classifier, model, train, held
        self.images, self.memory = len(train.labels), nn.Module()

    @cached_property
    def noise(self) -> Tensor:
        """Return the perturbation of every training image as float16."""
        return self._noise(self.train)

    @cached_property
    def held_noise(self) -> Tensor:
        """Return the perturbation of every held-out image as float16."""
        return self._noise(self.held)

    def _noise(self, split: data.Split) -> Tensor:
        """Attack every image of a split, in float32; return what that adds, as float16."""
        made = []
        numbers = torch.arange(len(split.labels), device=split.labels.device)
        with torch.autocast(split.images.device.type, enabled=False):
            for some in tqdm(numbers.split(data.at_once(split.images)), desc="attacking", disable=None, leave=False):
                moved = pgd(
                    self.classifier,
                    split.images[some].float() / 255,
                    split.labels[some],
                    epsilon=self.config.epsilon,
                    step_size=self.config.attack_step_size,
                    steps=self.config.attack_steps,
                    seeds=some,
                )
                made.append((moved - split.images[some].float() / 255).half())
            return torch.cat(made)

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean square error on images as they are and attacked, half of the batches mirrored."""
        self.model.train()
        x, noise = self.train.images[indices].float() / 255, self.noise[indices].float()
        draw = seeds.of_step(seed=self.config.seed, epoch=epoch, step=step)
        if torch.rand((), generator=draw) < 0.5:
            x, noise = x.flip(3), noise.flip(3)
        found = self.model(torch.cat((x, x + noise))).float()
        wanted = torch.cat((torch.zeros_like(noise), noise)) / self.config.epsilon
        loss = F.mse_loss(found, wanted)
        return loss, {"signs": _signs(found[len(x) :].detach(), noise)}

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Return, of held-out images, the error on attacked ones, and the share of its signs that are right."""
        errors, signs = [], []
        with torch.no_grad(), evaluating(averaged), options.autocast(self.config, self.held.images.device):
            numbers = torch.arange(len(self.held.labels), device=self.held.images.device)
            for some in numbers.split(data.at_once(self.held.images)):
                noise = self.held_noise[some].float()
                found = averaged(self.held.images[some].float() / 255 + noise).float()
                errors.append(F.mse_loss(found, noise / self.config.epsilon, reduction="none").mean((1, 2, 3)))
                signs.append(_signs(found, noise))
        error, right = float(torch.cat(errors).mean()), float(torch.stack(signs).mean())
        return {"error": error, "signs": right, "score": -error}


def _signs(found: Tensor, noise: Tensor) -> Tensor:
    """Return the share of the perturbed pixels whose sign is found."""
    moved = noise != 0
    return ((found.sign() == noise.sign()) & moved).sum() / moved.sum().clamp(min=1)


def train_restorer(config: RestorerConfig) -> None:
    """Train, choose the epoch on held-out training images, and write OUT/checkpoint."""
    here = world.join(config.device)
    base = store.load(config.checkpoint, device=here.device)
    dataset = data.load_for(base.card, config.data, cache=config.cache)
    torch.manual_seed(config.seed)
    card = RestorerCard(width=config.width, depth=config.depth, epsilon=config.epsilon)
    model = Restorer(card).to(here.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    kept, held = held_out.training_images_for(base.card, dataset, config)
    task = RestorerTask(
        config, base.classifier, model, data.resident(kept, here.device), data.resident(held, here.device)
    )
    fitted = loop.fit(task, config, here, made_of={"data": dataset.digest, "checkpoint": base.card.weights})
    if here.rank == 0:
        out = save_with("restorer", config, base, card, fitted, data_sha256=dataset.digest)
        print(f"{out}: {fitted.figures['held_out_signs']:.1%} of the signs of an attack's pixels are found")
    world.leave(here)


def save_with(
    part: Literal["restorer", "purifier"],
    config: RunConfig,
    base: store.Checkpoint,
    card: RestorerCard,
    fitted: loop.Fitted,
    **training: object,
) -> Path:
    """Write OUT/checkpoint, `base` with the part that was trained; `training` goes onto the card. Return it."""
    how = {
        **options.comparable(config),
        **training,
        "chosen_epoch": fitted.epoch,
        "at_that_epoch": fitted.figures,
    }
    changed: dict[str, Any] = {part: card, f"{part}_training": how, "gates": {}}  # they were of other weights
    network: dict[str, Any] = {part: fitted.model}
    out = config.out / "checkpoint"
    store.save(out, dataclasses.replace(base, card=dataclasses.replace(base.card, **changed), **network))
    return out
