"""The options of every training run, and what follows from them: rate, precision, what a resumed run must share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unperturb.models.errors import ConfigError
from unperturb.models.inference.folding import native
from unperturb.models.options import as_json, option
from unperturb.training import seeds, state

FILES = {"resume_from", "data", "checkpoint", "classifier", "encoder", "start"}  # what lies there counts, not where
PLACE_ONLY = {"out", "device", "resume", "cache", "save_every_s", *FILES}  # may differ when a run is resumed


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of every training run."""

    data: str = option("cifar10, cifar100, or a folder with train/<class>/* and test/<class>/*")
    out: Path = option("folder of the run: state, log, checkpoint")
    images: int = option("training images to use, a random subset; 0 for all", 0)
    held_out: int = option("training images kept back to measure on", 1000)
    epochs: int = option("passes over the training images", 60)
    batch_size: int = option("images a step, over all processes (contrast is within each)", 128)
    lr: float = option("peak learning rate", 0.2)
    weight_decay: float = option("weight decay", 5e-4)
    momentum: float = option("Nesterov momentum (sgd)", 0.9)
    optimizer: Literal["sgd", "adam"] = option("optimizer", "sgd")
    schedule: Literal["one-cycle", "cosine", "constant"] = option("learning rate over the run", "one-cycle")
    warmup: float = option("share of the run in which one-cycle rises", 0.25)
    ema: float = option("decay of the averaged weights per step, less in the first steps; 0 for none", 0.995)
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "of the forward passes; auto: bfloat16 where the device computes in it", "auto"
    )
    seed: int = option("of weights, order, augmentation and attacks", 0)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    resume: bool = option("go on from the state in the run's folder", True)
    resume_from: Path | None = option("averaged weights to go on from (ema.safetensors of an unfinished run)", None)
    epoch: int = option("epochs that those weights have behind them", 0)
    save_every_s: float = option("seconds between states in the middle of an epoch", 600.0)
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb/images)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.held_out < 1:
            raise ConfigError(
                f"held_out={self.held_out} must be at least 1: what training keeps back is what it is measured on"
            )
        if not 0 <= self.seed < seeds.SEEDS:
            raise ConfigError(f"seed={self.seed} must be from 0 to {seeds.SEEDS - 1}")
        if not (self.lr > 0 and self.weight_decay >= 0 and 0 <= self.momentum < 1):
            raise ConfigError(f"lr={self.lr}, weight_decay={self.weight_decay}, momentum={self.momentum}: out of range")
        if self.images < 0:
            raise ConfigError(f"images={self.images} is below 0")
        if not (0 <= self.ema < 1 and 0 <= self.warmup < 1):
            raise ConfigError(f"ema={self.ema} and warmup={self.warmup} must be in [0, 1)")
        if (self.resume_from is None) != (self.epoch == 0) or not 0 <= self.epoch < self.epochs:
            raise ConfigError(
                f"resume_from={self.resume_from}, epoch={self.epoch}: the weights and the epochs behind them "
                f"go together, 1 to {self.epochs - 1}"
            )


def refuse_fresh(config: RunConfig, names: Sequence[str], start: str) -> None:
    """Raise ConfigError for an option of a fresh network beside a checkpoint whose card says what it is."""
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(type(config), name)}
    if given:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(f"{said}: of a fresh network; the card of {start} says what it is")


def learning_rate(config: RunConfig, progress: float) -> float:
    """Return the rate after `progress` (0 to 1) of the run."""
    if config.schedule == "constant":
        return config.lr
    warmup = config.warmup if config.schedule == "one-cycle" else 0.0
    if progress < warmup:
        return config.lr * progress / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the precision of forward passes."""
    precision = native(device) if config.precision == "auto" else config.precision
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def comparable(config: RunConfig) -> dict[str, Any]:
    """Return the configuration that a resumed run must share; the weights that it began with by their digest."""
    kept = {key: value for key, value in as_json(config).items() if key not in PLACE_ONLY}
    return kept | {"resume_from_sha256": state.digest(config.resume_from)}
