"""Batch continuously: the slots of one model on one device, each of which is taken one step further at a time."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.inference.captured import Execution, Stepper
from unperturb.models.inference.continuous import Slots, Stage, features_of
from unperturb.service.engine.messages import Outcome, Work
from unperturb.service.engine.slot import Slot, SlotResult, by_stage, stack, stack_if_there
from unperturb.service.engine.stages import ATTACK, begin_passes, finish_passes, stages_of, step_passes
from unperturb.service.errors import UnprocessableError

log = logging.getLogger("unperturb.engine")


class ContinuousBatch:
    """Hold the slots of one replica. Nothing of a slot outlives it: the next image in its place begins from itself."""

    def __init__(self, loaded: Checkpoint, device: torch.device, *, execution: Execution) -> None:
        self.classifier, self.stages, self.device = loaded.classifier, stages_of(loaded), device
        self.stepper = Stepper(self.classifier, device, execution=execution)
        self.batch_count = self.pass_count = 0  # through the classifier: what costs are estimated by
        self.image_size = loaded.classifier.image_size
        self.slots: list[Slot] = []

    def admit(self, works: Iterable[Work]) -> list[SlotResult]:
        """Give each image a slot, and return those that cannot begin."""
        begun: list[Slot] = []
        failed: list[SlotResult] = []
        for work in works:
            try:
                begun.append(self._slot(work))
            except (RuntimeError, KeyError) as error:
                if isinstance(error, torch.AcceleratorError):
                    raise
                failed.append(SlotResult(work.id, error))
        failed += self._isolated(self._begin, begun)
        refused = {ended.id for ended in failed}
        self.slots += [slot for slot in begun if slot.work.id not in refused]
        return failed

    def free(self, ids: Iterable[int]) -> None:
        """Free the slots of images that have ended, or that nobody waits for any more."""
        freed = set(ids)
        self.slots = [slot for slot in self.slots if slot.work.id not in freed]

    def advance(self) -> list[SlotResult]:
        """Take every slot one step further, and return the results of those that have done their last."""
        ended = self._isolated(self._step, [slot for slot in self.slots if not slot.finished])
        self.free(id for id, _ in ended)
        outcomes: list[SlotResult] = []
        finished = [slot for slot in self.slots if slot.finished]
        ended += self._isolated(lambda slots: outcomes.extend(self._finish(slots)), finished)
        self.free(slot.work.id for slot in finished)
        return ended + outcomes

    def _slot(self, work: Work) -> Slot:
        image = torch.from_numpy(work.image).to(self.device)
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        stage = self.stages[work.stage] if work.stage is not None else None
        return Slot(work, stage, image, image, time.monotonic())

    def _isolated(self, work: Callable[[list[Slot]], None], slots: list[Slot]) -> list[SlotResult]:
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
                log.exception("an image failed")
                return [SlotResult(slots[0].work.id, error)]
            log.warning("a batch of %d failed (%s); its images are tried one at a time", len(slots), error)
            return [ended for slot in slots for ended in self._isolated(work, [slot])]
        return []

    def _begin(self, slots: list[Slot]) -> None:
        """Set the first iterate and the stage's anchor; the label that an attack leads away from is what it has now."""
        attacked = [slot for slot in slots if slot.work.stage == ATTACK]
        labels: list[int] = []
        with torch.no_grad():
            if attacked:
                labels = self.classifier(torch.stack([slot.x0 for slot in attacked])).argmax(1).tolist()
            first = []
            for stage, part in by_stage(slots):
                x0 = stack(part, "x0")
                begun = stage.first(x0, self._integers(slot.work.seed for slot in part))
                first.append((part, begun, stage.anchor(x0)))
                self.pass_count += sum(begin_passes(slot.work.stage) for slot in part)
        for slot, label in zip(attacked, labels, strict=True):
            slot.label = label
        for part, images, anchors in first:
            for i, slot in enumerate(part):
                slot.x, slot.anchor = images[i], None if anchors is None else anchors[i]

    def _step(self, slots: list[Slot]) -> None:
        parts = by_stage(slots)
        states = [(stage, self._state(part)) for stage, part in parts]
        stepped = self.stepper.step(states)
        counts = [len(slots)] if self.stepper.together else [len(part) for _, part in parts]
        self.batch_count += sum(len(self.stepper.sizes(count)) for count in counts)
        self.pass_count += sum(len(part) * step_passes(stage.rows) for stage, part in parts)
        for (_, part), after in zip(parts, stepped, strict=True):
            losses = after.losses.cpu()  # they say who goes on
            for i, slot in enumerate(part):
                slot.losses.append(losses[i])
                slot.velocity = None if after.velocity is None else after.velocity[i]
                if slot.loop.halts and not slot.loop.goes_on(torch.stack(slot.losses)[:, None]):
                    slot.halted, slot.x = True, slot.x if slot.step else slot.x0
                else:
                    slot.x, slot.step = after.x[i], slot.step + 1

    def _finish(self, slots: list[Slot]) -> list[SlotResult]:
        """Put images through the classifier again: losses before and after on new views, both classifications."""
        started = time.monotonic()
        parts = by_stage(slots)
        staged = [slot for _, part in parts for slot in part]
        ordered = staged + [slot for slot in slots if slot.stage is None]
        with torch.no_grad():
            measured = [(stage, part, self._at_end(stage, part)) for stage, part in parts if stage.rows]
            shown = [_after_and_before(stage, state) for stage, _, state in measured]
            views = [rows for one in shown for rows in one]
            seen = [stage.seen(stack(part, "x")) for stage, part in parts]
            features = features_of(self.classifier, [*views, stack(ordered, "x0"), *seen])
            self.batch_count += 1
            self.pass_count += sum(finish_passes(slot.work.stage) for slot in slots)
            received, *logits = (self.classifier.logits(part).float() for part in features[len(views) :])
            unpurified = received.softmax(1).cpu().numpy()
            scored = [stage.scores(one).softmax(1).cpu().numpy() for (stage, _), one in zip(parts, logits, strict=True)]
            of_views = iter(features)
            losses = [
                both
                for (stage, part, state), one in zip(measured, shown, strict=True)
                for both in _losses(part, [stage.loss_of(state, next(of_views)).tolist() for _ in one])
            ]
            linf = (stack(staged, "x") - stack(staged, "x0")).abs().amax((1, 2, 3)).tolist() if staged else []
        purified = np.concatenate([*scored, unpurified[len(staged) :]])
        of_slot = iter(losses)
        now = time.monotonic()
        done = []
        for i, slot in enumerate(ordered):
            outcome = Outcome(
                purified[i],
                unpurified[i],
                queue_ms=(slot.began_at - slot.work.queued_at) * 1000,
                purify_ms=(started - slot.began_at) * 1000 if slot.stage else 0.0,
                classify_ms=(now - started) * 1000,
            )
            if slot.stage is not None:
                before, after = next(of_slot) if slot.stage.rows else (None, None)
                outcome = outcome._replace(
                    image=slot.x.cpu().numpy().copy() if slot.work.wants_image else None,
                    steps=slot.step,
                    losses=tuple(torch.stack(slot.losses).tolist()) if slot.losses else (),
                    loss_before=before,
                    loss_after=after,
                    linf=linf[i],
                )
            done.append(SlotResult(slot.work.id, _if_finite(outcome)))
        return done

    def _at_end(self, stage: Stage, slots: list[Slot]) -> Slots:
        """Return the state of slots of a stage at the step after its last: views that are drawn are its own."""
        state = self._state(slots)
        return state._replace(steps=torch.full_like(state.steps, stage.loop.steps))

    def _state(self, slots: list[Slot]) -> Slots:
        return Slots(
            x0=stack(slots, "x0"),
            x=stack(slots, "x"),
            velocity=stack_if_there(slots, "velocity"),
            seeds=self._integers(slot.work.seed for slot in slots),
            steps=self._integers(slot.step for slot in slots),
            labels=self._integers(slot.label for slot in slots),
            anchors=stack_if_there(slots, "anchor"),
        )

    def _integers(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64).to(self.device)


def _after_and_before(stage: Stage, state: Slots) -> tuple[Tensor, ...]:
    """Return what the classifier sees of the images as they are, and as received on the same views.

    Without the latter where the stage draws nothing: the first step had those very views.
    """
    if not stage.draws:
        return (stage.inputs(state, state.x),)
    twice = state._replace(seeds=state.seeds.repeat(2), steps=state.steps.repeat(2))
    return stage.inputs(twice, torch.cat((state.x, state.x0))).chunk(2)


def _losses(slots: list[Slot], measured: list[list[float]]) -> Iterator[tuple[float, float]]:
    """Return each image's loss as received and as it is, from those of what `_after_and_before` returns."""
    after, *before = measured
    return zip(before[0] if before else (float(slot.losses[0]) for slot in slots), after, strict=True)


def _if_finite(outcome: Outcome) -> Outcome | Exception:
    if np.isfinite(np.concatenate((outcome.scores, outcome.unpurified_scores, outcome.losses))).all():
        return outcome
    return UnprocessableError("the model's scores for this image are not finite numbers")
