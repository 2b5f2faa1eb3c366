"""The slots of one model on one device, and the tick that takes each of them one step further."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from models.continuous import Slots, Stage, features_of, step_together
from models.errors import DeadlineError, UnprocessableError
from service.jobs import Job, Outcome
from service.loaded import ATTACK, LoadedModel, Replica, bucket, finish_passes, step_passes

log = logging.getLogger("unperturb.engine")


@dataclass(eq=False)
class Slot:
    """A job in progress: the image as received and as it is, the steps done, and the loss before each."""

    job: Job
    stage: Stage | None
    x0: Tensor
    x: Tensor
    began_at: float
    label: int = 0
    step: int = 0
    velocity: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether its last step is done."""
        return self.stage is None or self.step >= self.stage.loop.steps


class Done(NamedTuple):
    """A job that has left its slot, and what came of it."""

    job: Job
    result: Outcome | Exception


class Lane:
    """Slots of one replica. Nothing of a slot outlives it: the next job in its place begins from its own image.

    pad: fill each pass through the classifier up to a power of two of rows with zero images, as captured graphs of
    fixed sizes need; without them padding only costs time.
    """

    def __init__(self, replica: Replica, *, pad: bool) -> None:
        self.replica, self.pad = replica, pad
        self.slots: list[Slot] = []

    def admit(self, jobs: Iterable[Job]) -> list[Done]:
        """Give each job a slot; those that cannot begin come back."""
        began_at = time.perf_counter()
        begun = []
        for job in jobs:
            stage = self.replica.stages[job.stage] if job.stage is not None else None
            image = job.pixels(self.replica.device)
            begun.append(Slot(job, stage, image, image, began_at))
        failed = self._isolated(self._begin, begun)
        refused = {done.job for done in failed}
        self.slots += [slot for slot in begun if slot.job not in refused]
        return failed

    def tick(self) -> list[Done]:
        """One step for every slot, then the outcomes of those that have done their last."""
        done = self._drop(lambda slot: slot.job.over, DeadlineError("the deadline passed before the last step"))
        done += self._isolated(self._step, [slot for slot in self.slots if not slot.finished])
        self._keep_all_but(done)
        finished = [slot for slot in self.slots if slot.finished]
        outcomes: list[Done] = []
        done += self._isolated(lambda slots: outcomes.extend(self._finish(slots)), finished)
        done += outcomes
        self._keep_all_but(done)
        return done

    def drop_all(self, error: Exception) -> list[Done]:
        """Empty every slot, with `error` for its job."""
        return self._drop(lambda _: True, error)

    def rehearse(self, model: LoadedModel, size: int) -> float:
        """`size` black images through a step and the end of every stage; the seconds that a pass took."""
        black = torch.zeros(3, model.image_size, model.image_size, dtype=torch.uint8)
        started, passes = time.perf_counter(), 0
        for stage in (None, *self.replica.stages):
            jobs = [Job(model, black, stage, 0, math.inf, _ignore) for _ in range(size)]
            failed = self.admit(jobs) + self.tick()
            for slot in self.slots:  # not all of its steps: they are alike
                slot.step = slot.stage.loop.steps if slot.stage else 0
            for _, result in (*failed, *self.tick()):
                if isinstance(result, Exception):
                    raise result
            found = self.replica.stages.get(stage or "")
            passes += size * (step_passes(found) + finish_passes(found) if found else 1)
        return (time.perf_counter() - started) / passes

    def _drop(self, wanted: Callable[[Slot], bool], error: Exception) -> list[Done]:
        done = [Done(slot.job, error) for slot in self.slots if wanted(slot)]
        self._keep_all_but(done)
        return done

    def _keep_all_but(self, done: list[Done]) -> None:
        gone = {result.job for result in done}
        self.slots = [slot for slot in self.slots if slot.job not in gone]

    def _isolated(self, work: Callable[[list[Slot]], None], slots: list[Slot]) -> list[Done]:
        """Do `work` on all slots together; where that fails, on each alone, so that only the guilty ones fail.

        `work` changes no slot unless it succeeds. A device that has failed is not a slot's fault, and is raised.
        """
        if not slots:
            return []
        try:
            work(slots)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(slots) == 1:
                log.exception("job failed")
                return [Done(slots[0].job, error)]
            log.warning("a batch of %d failed (%s); its images are tried one at a time", len(slots), error)
            return [done for slot in slots for done in self._isolated(work, [slot])]
        return []

    def _begin(self, slots: list[Slot]) -> None:
        """The first iterate, and the label that an attack leads away from: the one that the image has now."""
        attacked = [slot for slot in slots if slot.job.stage == ATTACK]
        labels: list[int] = []
        with torch.no_grad():
            if attacked:
                labels = self.replica.classifier(torch.stack([slot.x0 for slot in attacked])).argmax(1).tolist()
            first = [
                (part, stage.loop.begin(_stack(part, "x0"), self._integers(slot.job.seed for slot in part)))
                for stage, part in _by_stage(slots)
            ]
        for slot, label in zip(attacked, labels, strict=True):
            slot.label = label
        for part, images in first:
            for slot, x in zip(part, images, strict=True):
                slot.x = x

    def _step(self, slots: list[Slot]) -> None:
        parts = _by_stage(slots)
        states = [(stage, self._state(part)) for stage, part in parts]
        rows = sum(stage.rows * len(part) for stage, part in parts)
        stepped = step_together(self.replica.classifier, states, pad_to=self._pad_to(rows))
        for (stage, part), after in zip(parts, stepped, strict=True):
            for i, slot in enumerate(part):
                slot.x = after.x[i]
                slot.velocity = None if after.velocity is None else after.velocity[i]
                slot.losses.append(after.losses[i])
                slot.step += 1
                slot.job.passes_left -= step_passes(stage)

    def _finish(self, slots: list[Slot]) -> list[Done]:
        """The losses before and after on new views, and both classifications, in one pass through the classifier."""
        started = time.perf_counter()
        parts = _by_stage(slots)
        plain = [slot for slot in slots if slot.stage is None]
        ordered = [slot for _, part in parts for slot in part] + plain
        images: list[Tensor] = []
        states: list[Slots] = []
        with torch.no_grad():
            for stage, part in parts:
                states.append(self._state(part))
                images += [stage.inputs(states[-1], states[-1].x0), stage.inputs(states[-1], states[-1].x)]
            images += [_stack(ordered, "x0"), _stack(ordered, "x")]
            rows = sum(len(image) for image in images)
            *features, before, after = features_of(self.replica.classifier, images, pad_to=self._pad_to(rows))
            scores = self.replica.classifier.logits(torch.cat((before, after))).float().softmax(1)
            losses = [
                stage.loss_of(state, part).cpu()
                for (stage, _), state, *pair in zip(parts, states, features[::2], features[1::2], strict=True)
                for part in pair
            ]
            linf = (_stack(ordered, "x") - _stack(ordered, "x0")).abs().amax((1, 2, 3)).tolist()
        unpurified, purified = scores.cpu().chunk(2)
        loss_before = torch.cat(losses[::2]).tolist() if losses else []
        loss_after = torch.cat(losses[1::2]).tolist() if losses else []
        now = time.perf_counter()
        done = []
        for i, slot in enumerate(ordered):
            outcome = Outcome(
                purified[i], unpurified[i], queue_ms=(slot.began_at - slot.job.queued_at) * 1000,
                purify_ms=(started - slot.began_at) * 1000 if slot.stage else 0.0,
                classify_ms=(now - started) * 1000,
            )  # fmt: skip
            if slot.stage is not None:
                outcome = outcome._replace(
                    image=slot.x.cpu().clone() if slot.job.wants_image else None,
                    losses=tuple(torch.stack(slot.losses).tolist()) if slot.losses else (),
                    loss_before=loss_before[i], loss_after=loss_after[i],
                    linf=linf[i],
                )  # fmt: skip
            done.append(Done(slot.job, _if_finite(outcome)))
        return done

    def _state(self, slots: list[Slot]) -> Slots:
        velocity = _stack(slots, "velocity") if slots[0].velocity is not None else None
        return Slots(
            x0=_stack(slots, "x0"), x=_stack(slots, "x"), velocity=velocity,
            seeds=self._integers(slot.job.seed for slot in slots),
            steps=self._integers(slot.step for slot in slots),
            labels=self._integers(slot.label for slot in slots),
        )  # fmt: skip

    def _integers(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64).to(self.replica.device)

    def _pad_to(self, rows: int) -> int:
        return bucket(rows) if self.pad else 0


def _by_stage(slots: list[Slot]) -> list[tuple[Stage, list[Slot]]]:
    """The slots that have a stage, together with those of the same stage and state."""
    parts: dict[tuple[int, bool], tuple[Stage, list[Slot]]] = {}
    for slot in slots:
        if slot.stage is not None:
            key = id(slot.stage), slot.velocity is None
            parts.setdefault(key, (slot.stage, []))[1].append(slot)
    return list(parts.values())


def _ignore(_: Outcome | Exception) -> None:
    """Nobody waits for a rehearsal."""


def _stack(slots: list[Slot], name: str) -> Tensor:
    return torch.stack([getattr(slot, name) for slot in slots])


def _if_finite(outcome: Outcome) -> Outcome | Exception:
    numbers = torch.cat((outcome.scores, outcome.unpurified_scores, torch.tensor(outcome.losses)))
    if bool(numbers.isfinite().all()):
        return outcome
    return UnprocessableError("the model's scores for this image are not finite numbers")
