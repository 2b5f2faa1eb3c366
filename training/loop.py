"""The trainer's loop: epochs over shuffled indices, EMA, schedule, log, and a state file to resume from.

A method hands in a Task; what is here is the same for each of them.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from unperturb.models.errors import ConfigError
from unperturb.training import seeds, state
from unperturb.training import world as worlds
from unperturb.training.log import RunLog, show
from unperturb.training.options import RunConfig, autocast, comparable, learning_rate
from unperturb.training.state import AVERAGED, BEST, STATE, Progress
from unperturb.training.world import World

SYNC_EVERY = 20  # steps between reads of the device for the progress bar
ATTEMPTS = 3  # how often a run goes back to its best epoch before it ends there


@runtime_checkable
class Task(Protocol):
    """A training method."""

    images: int  # in the training set

    @property
    def model(self) -> nn.Module:
        """Return what is trained, where it asks for a gradient."""
        ...

    @property
    def memory(self) -> nn.Module:
        """Return what else a resumed run needs: kept with the run's state, neither trained nor averaged."""
        ...

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a batch of training images, and figures (0-d tensors) for the progress bar.

        `step` counts the batches of the epoch over all processes: no two have one number.
        """
        ...

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Return figures on held-out training images; the epoch of the highest "score" is stored, or else the last."""
        ...


class Fitted(NamedTuple):
    """The averaged model of the best epoch, that epoch's number (from 1) and figures."""

    model: nn.Module
    epoch: int
    figures: dict[str, int | float]


def fit(
    task: Task,
    config: RunConfig,
    world: World,
    *,
    made_of: Mapping[str, str],
    collapsed: Callable[[float, float], bool] | None = None,
    copies: Sequence[nn.Module] = (),
) -> Fitted:
    """Train to the last epoch, going on from the run's folder where it has a state.

    `made_of` are the digests of what it is made of, by name: of the data, and of a checkpoint that it begins with.

    `collapsed(best score, score)` says after an epoch whether the run has to go back to its best one; it then takes
    the training images in another order, and ends there after going back three times.

    `copies` of the model move after it: they begin with the same averaged weights (`resume_from`) as it does.
    """
    steps = task.images // config.batch_size
    if steps < 1 or config.batch_size % world.size:
        raise ConfigError(
            f"batch_size={config.batch_size} is over the {task.images} training images, "
            f"or no multiple of {world.size} processes"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    run = _Run(task, config, world, steps, made_of)
    run.resume(copies)
    if run.unfinished:
        run.probe()
    with RunLog(config.out, writes=world.rank == 0, lines=run.progress.lines) as log:
        while run.unfinished:
            figures = run.epoch()
            if world.rank == 0:
                figures |= {f"held_out_{k}": v for k, v in task.validate(run.average.module).items()}
                if run.judge(figures, collapsed):
                    figures["went_back_to"] = run.progress.epoch
                log.write(figures)
                run.progress.lines += 1
                run.save(STATE)
            run.follow()
    return run.fitted()


Tensors = list[Tensor] | tuple[Tensor, ...]


class _Run:
    """One run: what is trained, its average and optimizer, and where it is."""

    def __init__(self, task: Task, config: RunConfig, world: World, steps: int, made_of: Mapping[str, str]) -> None:
        self.task, self.config, self.world, self.steps = task, config, world, steps
        self.progress, self.comparable = Progress(), {**comparable(config), **made_of}
        worlds.same_weights(world, task.model)
        worlds.same_weights(world, task.memory)
        self.optimizer = _optimizer(task.model, config)
        self.average = AveragedModel(task.model, multi_avg_fn=self._average, use_buffers=True)
        self.parts: dict[str, Any] = {
            "model": task.model,
            "memory": task.memory,
            "optimizer": self.optimizer,
            "average": self.average,
        }

    @property
    def unfinished(self) -> bool:
        """Return whether an epoch is left to be trained."""
        return self.progress.epoch < self.config.epochs and self.progress.attempt <= ATTEMPTS

    def resume(self, copies: Sequence[nn.Module]) -> None:
        """Go on from the folder's state, or else from the weights that the configuration names."""
        if self.config.resume and (self.config.out / STATE).exists():
            self._load(STATE)
        elif self.config.resume_from is not None:
            state.take_over(self.config.resume_from, (self.task.model, self.average.module, *copies))
            self.average.n_averaged.fill_(1)  # or the first step would put the model in the average's place
            self.progress.epoch = self.config.epoch

    def save(self, name: str) -> None:
        """Write a state of the run to its folder."""
        state.save(self.config.out / name, self.comparable, self.parts, self.progress, self.world.device)

    def _load(self, name: str) -> None:
        self.progress = state.load(self.config.out / name, self.comparable, self.parts, self.world.device)

    def probe(self) -> None:
        """Take one whole step and undo its effects: memory that is too small shows now, not in epoch 7."""
        task, local = self.task, self.config.batch_size // self.world.size
        kept = (*task.model.buffers(), *task.memory.buffers(), *task.memory.parameters())
        before, device = [(value, value.detach().clone()) for value in kept], self.world.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast(self.config, device):
                loss, _ = task.loss(torch.arange(local, device=device), 0, 0)
                loss.backward()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"batch_size={self.config.batch_size} does not fit into the memory of {self.world.device}; "
                "use a smaller one"
            ) from error
        task.model.zero_grad(set_to_none=True)
        for tensor, value in before:
            tensor.detach().copy_(value)

    def epoch(self) -> dict[str, Any]:
        """Do the rest of an epoch; return the means of the task's figures over all of it, the rate and the speed."""
        now, config, world, steps = self.progress, self.config, self.world, self.steps
        images, local = config.batch_size, config.batch_size // world.size
        order = seeds.order(self.task.images, seed=config.seed, epoch=now.epoch, attempt=now.attempt)
        started = saved = time.perf_counter()
        before_s, first, rate = now.seconds, now.step, 0.0
        bar = tqdm(
            range(first, steps),
            desc=f"epoch {now.epoch + 1}/{config.epochs}",
            disable=world.rank != 0,
            unit="step",
            initial=first,
            total=steps,
        )
        for step in bar:
            rate = learning_rate(config, (now.epoch * steps + step + 1) / (config.epochs * steps))
            at = step * images + world.rank * local
            figures = self._step(order[at : at + local].to(world.device), step, rate)
            for name, value in figures.items():
                now.sums[name] = now.sums.get(name, torch.zeros((), device=world.device)) + value
            now.step, clock = step + 1, time.perf_counter()
            now.seconds = before_s + clock - started
            # several processes have statistics of their own until the epoch's end
            due = world.size == 1 and clock - saved > config.save_every_s and now.step < steps
            shown = now.step % SYNC_EVERY == 0
            if due or shown or now.step == steps:
                self._require_finite(now.sums["loss"])
            if shown:
                left = (config.epochs - now.epoch) * steps - now.step
                show(bar, now.sums, steps=now.step, images=now.step * images, spent_s=now.seconds, left=left)
            if due:
                self.save(STATE)
                saved = time.perf_counter()
        worlds.average(world, [*self.task.model.buffers(), *self.average.buffers()])
        means = {name: float(value) / steps for name, value in now.sums.items()}
        number, seconds = now.epoch + 1, now.seconds
        now.epoch, now.step, now.sums, now.seconds = number, 0, {}, 0.0
        return {"epoch": number, **means, "lr": rate, "seconds": seconds, "images_per_s": steps * images / seconds}

    def _require_finite(self, loss: Tensor) -> None:
        """Raise ConfigError where the loss is NaN or infinite; the state that was saved before stays."""
        if math.isfinite(loss):
            return
        averaged, epochs = self.config.out / AVERAGED, self.progress.epoch
        on = f", with another --out, and go on there by --resume-from {averaged} --epoch {epochs}"
        raise ConfigError(
            f"the loss is {float(loss)} in epoch {epochs + 1}; lower --lr={self.config.lr}"
            + on * (state.exported_epoch(averaged) == epochs)
        )

    def _step(self, indices: Tensor, step: int, rate: float) -> dict[str, Tensor]:
        """Take one step of the optimizer and the average; return the loss and the task's figures."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(self.config, self.world.device):
            number = step * self.world.size + self.world.rank
            loss, figures = self.task.loss(indices, self.progress.epoch, number)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        worlds.average_gradients(self.world, self.task.model)
        self.optimizer.step()
        self.average.update_parameters(self.task.model)
        return {"loss": loss.detach(), **figures}

    def _average(self, averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        """Move the average towards the weights: its decay grows to `ema`, so that a short run's is of its end."""
        if not averaged[0].is_floating_point():  # counters and indices have no mean
            for own, value in zip(averaged, current, strict=True):
                own.copy_(value)
            return
        taken = self.progress.epoch * self.steps + self.progress.step
        decay = min(self.config.ema, (1 + taken) / (10 + taken))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def judge(self, figures: dict[str, Any], collapsed: Callable[[float, float], bool] | None) -> bool:
        """Keep the epoch if it is the best, or go back to the best if it has collapsed; return whether it has."""
        now, score = self.progress, figures.get("held_out_score", math.inf)
        best = -math.inf if now.best is None else now.best["score"]
        if collapsed is not None and now.best is not None and collapsed(best, score):
            self._load(BEST)
            self.progress.attempt, self.progress.lines = now.attempt + 1, now.lines
            tqdm.write(f"epoch {figures['epoch']} collapsed ({best:.1%} -> {score:.1%}): back to {self.progress.epoch}")
            return True
        if score > best or score == math.inf:
            now.best = {"epoch": now.epoch, "score": score, "figures": figures}
            if score != math.inf:
                self.save(BEST)
        state.export(self.config.out / AVERAGED, self.average.module, epoch=now.epoch)
        return False

    def follow(self) -> None:
        """Go, on every process, where rank 0 is: to the next epoch, or back."""
        if self.world.size == 1:
            return
        place = torch.tensor([self.progress.epoch, self.progress.attempt], device=self.world.device)
        before = self.progress.attempt
        worlds.broadcast(place)
        if int(place[1]) != before and self.world.rank != 0:
            self._load(BEST)
            self.progress.attempt = int(place[1])
        worlds.wait(self.world)

    def fitted(self) -> Fitted:
        """Return the average after the best epoch, or after the last where epochs are not scored."""
        best = self.progress.best
        if self.world.rank != 0 or best is None:
            return Fitted(self.average.module, self.progress.epoch, {})
        if best["score"] != math.inf and best["epoch"] != self.progress.epoch:
            self._load(BEST)
        return Fitted(self.average.module, best["epoch"], best["figures"])


def _optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adam":
        return torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
        fused=True,
    )
