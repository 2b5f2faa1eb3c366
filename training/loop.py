"""The trainer's loop: epochs over shuffled indices, EMA, schedule, log, and a state file to resume from.

A method hands in a Task; what is here is the same for each of them.
"""

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from models.checkpoint import write_whole
from models.errors import ConfigError
from models.options import as_json, option
from training import world as worlds
from training.world import World

STATE, LOG = "state.pt", "log.jsonl"
SYNC_EVERY = 20  # steps between reads of the device for the progress bar
PLACE_ONLY = {"out", "device", "resume", "cache"}  # fields that may differ when a run is resumed


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has."""

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
    ema: float = option("decay of the averaged weights per step; 0 for none", 0.995)
    precision: Literal["auto", "float32", "bfloat16"] = option("of the forward passes; auto: bfloat16 on CUDA", "auto")
    seed: int = option("of weights, order, augmentation and attacks", 0)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    resume: bool = option("go on from the state in the run's folder", True)
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not (self.lr > 0 and self.weight_decay >= 0 and 0 <= self.momentum < 1):
            raise ConfigError(f"lr={self.lr}, weight_decay={self.weight_decay}, momentum={self.momentum}: out of range")
        if self.images < 0:
            raise ConfigError(f"images={self.images} is below 0")
        if not (0 <= self.ema < 1 and 0 <= self.warmup < 1):
            raise ConfigError(f"ema={self.ema} and warmup={self.warmup} must be in [0, 1)")


@runtime_checkable
class Task(Protocol):
    """A training method."""

    images: int  # in the training set

    @property
    def model(self) -> nn.Module:
        """What is trained, where it asks for a gradient."""
        ...

    @property
    def memory(self) -> nn.Module:
        """What else a resumed run needs: kept with the run's state, neither trained nor averaged."""
        ...

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch of training images, and figures (0-d tensors) for the progress bar."""
        ...

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Figures on held-out training images; "score" chooses the epoch (higher is better), without it the last is."""
        ...


class Fitted(NamedTuple):
    """The averaged model of the best epoch, that epoch's number (from 1) and figures."""

    model: nn.Module
    epoch: int
    figures: dict[str, int | float]


def learning_rate(config: RunConfig, progress: float) -> float:
    """The rate after `progress` (0 to 1) of the run."""
    if config.schedule == "constant":
        return config.lr
    warmup = config.warmup if config.schedule == "one-cycle" else 0.0
    if progress < warmup:
        return config.lr * progress / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The precision of forward passes."""
    half = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def fit(task: Task, config: RunConfig, world: World) -> Fitted:
    """Train to the last epoch, resuming from the run's folder where it has a state."""
    steps = task.images // config.batch_size
    if steps < 1 or config.batch_size % world.size:
        raise ConfigError(
            f"batch_size={config.batch_size} is over the {task.images} training images, "
            f"or no multiple of {world.size} processes"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    worlds.same_weights(world, task.model)
    worlds.same_weights(world, task.memory)
    optimizer = _optimizer(task.model, config)
    average = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    parts: dict[str, Any] = {
        "model": task.model, "memory": task.memory, "optimizer": optimizer, "average": average
    }  # fmt: skip
    done, best = _resume(config, parts)
    _probe(task, config, world)
    for epoch in range(done, config.epochs):
        figures = _epoch(task, config, world, optimizer, average, epoch, steps)
        if world.rank == 0:
            figures |= {f"held_out_{k}": v for k, v in task.validate(average.module).items()}
            score = figures.get("held_out_score", math.inf)
            if best is None or score == math.inf or score > best["figures"]["held_out_score"]:
                weights = {key: value.detach().clone() for key, value in average.module.state_dict().items()}
                best = {"epoch": epoch + 1, "figures": figures, "weights": weights}
            with (config.out / LOG).open("a") as log:
                log.write(json.dumps(figures) + "\n")
            _tensorboard(config.out, figures)
            _save(config, {name: part.state_dict() for name, part in parts.items()}, epoch + 1, best)
        worlds.wait(world)
    if world.rank == 0:
        assert best is not None
        average.module.load_state_dict(best["weights"])
        return Fitted(average.module, best["epoch"], best["figures"])
    return Fitted(average.module, config.epochs, {})


def _epoch(
    task: Task, config: RunConfig, world: World, optimizer: torch.optim.Optimizer, average: AveragedModel,
    epoch: int, steps: int,
) -> dict[str, int | float]:  # fmt: skip
    """One pass; the mean of the task's figures, rate and speed."""
    images = steps * config.batch_size
    order = torch.randperm(task.images, generator=torch.Generator().manual_seed(config.seed * 100_003 + epoch))
    local = config.batch_size // world.size
    sums: dict[str, Tensor] = {}
    started = time.perf_counter()
    rate = 0.0
    bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{config.epochs}", disable=world.rank != 0, unit="step")
    for step in bar:
        rate = learning_rate(config, (epoch * steps + step + 1) / (config.epochs * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        first = step * config.batch_size + world.rank * local
        with autocast(config, world.device):
            loss, figures = task.loss(order[first : first + local].to(world.device), epoch, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        worlds.average_gradients(world, task.model)
        optimizer.step()
        average.update_parameters(task.model)
        for name, value in {"loss": loss.detach(), **figures}.items():
            sums[name] = sums.get(name, torch.zeros((), device=world.device)) + value
        if step % SYNC_EVERY == SYNC_EVERY - 1:
            _show(bar, sums, step + 1, config, epoch, steps, time.perf_counter() - started)
    worlds.average(world, [*task.model.buffers(), *average.buffers()])
    means = {name: float(value) / steps for name, value in sums.items()}
    if not math.isfinite(means["loss"]):
        raise ConfigError(f"the loss is {means['loss']} in epoch {epoch + 1}; lower --lr={config.lr}")
    seconds = time.perf_counter() - started
    return {"epoch": epoch + 1, **means, "lr": rate, "seconds": seconds, "images_per_s": images / seconds}


def _show(bar: Any, sums: dict[str, Tensor], n: int, config: RunConfig, epoch: int, steps: int, spent_s: float) -> None:  # noqa: ANN401
    """Figures so far, images a second, and the minutes left to the end of the run, on the progress bar."""
    left_s = ((config.epochs - epoch) * steps - n) * spent_s / n
    speed = {"img/s": f"{n * config.batch_size / spent_s:.0f}", "left": f"{left_s / 60:.0f} min"}
    bar.set_postfix({name: f"{float(value) / n:.3f}" for name, value in sums.items()} | speed)


def _optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adam":
        return torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        trained, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )  # fmt: skip


def _probe(task: Task, config: RunConfig, world: World) -> None:
    """One whole step whose effects are undone: memory that is too small shows now, not in epoch 7."""
    kept = (*task.model.buffers(), *task.memory.buffers(), *task.memory.parameters())
    before = [(value, value.detach().clone()) for value in kept]
    try:
        with autocast(config, world.device):
            loss, _ = task.loss(torch.arange(config.batch_size // world.size, device=world.device), 0, 0)
        loss.backward()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"batch_size={config.batch_size} does not fit into the memory of {world.device}; use a smaller one"
        ) from error
    task.model.zero_grad(set_to_none=True)
    for tensor, value in before:
        tensor.detach().copy_(value)


def comparable(config: RunConfig) -> dict[str, Any]:
    """The configuration that a resumed run must share."""
    return {key: value for key, value in as_json(config).items() if key not in PLACE_ONLY}


def _resume(config: RunConfig, parts: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
    """Load the state of the run's folder into `parts`: finished epochs and the best so far."""
    file = config.out / STATE
    if not (config.resume and file.exists()):
        return 0, None
    state = torch.load(file, map_location="cpu", weights_only=True)
    mine, theirs = comparable(config), state["config"]
    if differing := sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)):
        raise ConfigError(
            f"{file} is of a run with other {', '.join(differing)}; use another --out, or --no-resume to begin again"
        )
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return state["epoch"], state["best"]


def _save(config: RunConfig, parts: dict[str, Any], epoch: int, best: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"config": comparable(config), "parts": parts, "epoch": epoch, "best": best}, buffer)
    write_whole(config.out / STATE, buffer.getvalue())


def _tensorboard(out: Path, figures: dict[str, int | float]) -> None:
    """Scalars for TensorBoard, where it is installed."""
    writer = _writer(out)
    if writer is not None:
        for name, value in figures.items():
            writer(name, float(value), int(figures["epoch"]))


def _writer(out: Path) -> Callable[[str, float, int], None] | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer = SummaryWriter(str(out / "tensorboard"))

    def write(name: str, value: float, epoch: int) -> None:
        writer.add_scalar(name, value, epoch)
        writer.flush()

    return write
