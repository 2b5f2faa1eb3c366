"""One defended classifier on a set of images, under every attack that applies: resumable, to one record.

The bare classifier is evaluated on the same images under the same budget, and every figure of a defense stands beside
it. An image that an attack has broken leaves, but where a figure of one attack alone is wanted.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unperturb.benchmarks.reporting import columns
from unperturb.benchmarks.robustness.attacks import (
    ATTACKS,
    AUTOATTACK,
    DEFENDED_AUTOATTACK,
    FRESH_ATTACKS,
    GRADIENT,
    SURROGATE,
    TRANSFER,
    Attack,
)
from unperturb.benchmarks.robustness.attacks.adaptive import FRESH
from unperturb.benchmarks.robustness.attacks.autoattack import LEAST_CLASSES
from unperturb.benchmarks.robustness.attacks.scene import Scene
from unperturb.benchmarks.robustness.attacks.surrogate import made
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.collecting import (
    LARGER_PREFIX,
    PARTS_PREFIX,
    RESUBMITTED,
    SURROGATE_IMAGES,
    results_of,
)
from unperturb.benchmarks.robustness.counting import CountingClassifier
from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.benchmarks.robustness.figures import CLEAN, LARGER, LESS
from unperturb.benchmarks.robustness.foreign import AnyPurifier
from unperturb.benchmarks.robustness.identity import REASONS, Identity, describe, missing
from unperturb.benchmarks.robustness.judging import hardest, joined, judged, nothing, spread
from unperturb.benchmarks.robustness.plan import Plan
from unperturb.benchmarks.robustness.showing import show
from unperturb.benchmarks.robustness.surrogate import Surrogate
from unperturb.benchmarks.robustness.units import Unit, Units, digest_of_tensors
from unperturb.models.errors import ConfigError
from unperturb.models.purifiers.base import NoPurifier
from unperturb.models.purifiers.defended import DefendedClassifier

RESUBMISSIONS = 10
SERVED_SEED = 0  # the service's default


class Evaluation:
    """A defended classifier on a set of images; `run` does the work and gives the record's results.

    The classifier counts its passes. `bare` is the evaluation of the same classifier without a defense on the same
    images, None where this one has none.
    """

    def __init__(
        self,
        defended: DefendedClassifier,
        data: EvaluationSet,
        plan: Plan,
        *,
        folder: Path,
        bare: "Evaluation | None" = None,
        title: str = "",
    ) -> None:
        self.defended, self.data, self.plan, self.bare, self.title = defended, data, plan, bare, title
        if not isinstance(defended.classifier, CountingClassifier):
            raise TypeError("the classifier has to count its passes: subjects.ready")
        self.counting = defended.classifier
        self.device = next(iter(defended.state_dict().values()), torch.zeros(0)).device
        if not plan.chunks(len(data.labels)):
            raise ConfigError(f"shard {plan.shard[0] + 1}/{plan.shard[1]} of {len(data.labels)} images is empty")
        self._check_logits(self.counting, title)
        if plan.surrogate is not None:
            self._check_logits(plan.surrogate.counting, plan.surrogate.title)
        self.randomised = self.purifies and self._is_randomised()
        lacks = missing(plan.attacks, defended, randomised=self.randomised)
        self.names = [name for name in plan.attacks if name not in lacks]
        self.could_not_run = {name: REASONS[need] for name, need in lacks.items() if need in REASONS}
        few = self.counting.num_classes < LEAST_CLASSES and {AUTOATTACK, DEFENDED_AUTOATTACK}.intersection(self.names)
        self.notes = [f"with {self.counting.num_classes} classes AutoAttack's apgd-t was left out"] if few else []
        if isinstance(defended.purifier, AnyPurifier) and defended.purifier.mixes:
            self.notes.append(
                "an image's purification depends on the images beside it, or on chance that no seed fixes: these "
                f"figures are of batches of up to {plan.chunk}, and of this run"
            )
        self.weaker = self._weaker()
        self._last: dict[int, dict[str, Unit]] = {}
        self.units, self.identity = Units(folder), Identity(defended, plan.generator, seed=plan.seed)

    @property
    def purifies(self) -> bool:
        """Return whether there is a defense at all: a purifier, or a vote."""
        return self.defended.vote is not None or not isinstance(self.defended.purifier, NoPurifier)

    def _check_logits(self, classifier: CountingClassifier, title: str) -> None:
        x = self.data.images[:2].to(self.device)
        with torch.no_grad():
            logits = classifier(x)
        classes = classifier.num_classes
        if logits.shape != (len(x), classes):
            raise ConfigError(f"{title}: scores of shape {tuple(logits.shape)}, not [batch, {classes}]")
        if not logits.isfinite().all():
            raise ConfigError(f"{title}: the classifier returns NaN or infinite scores on the first images")
        if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(len(x), device=x.device), atol=1e-4):
            raise ConfigError(f"{title}: the classifier returns probabilities; scores before the softmax are needed")

    def _weaker(self) -> list[str]:
        """Return why the attacks are less than a judge's."""
        purifier, allowed = self.defended.purifier, self.plan.budget.unrolled_steps
        found = []
        if purifier.stopped_after(allowed).loop.steps < purifier.loop.steps:
            found.append(f"the full gradient goes through the first {allowed} of {purifier.loop.steps} steps")
        if isinstance(purifier, AnyPurifier) and not purifier.has_gradient:
            found.append(
                "no gradient comes through the purifier: apgd-ce and AutoAttack take the identity in its place"
            )
        elif self.purifies and not self._gives_a_gradient():
            found.append("no gradient comes through the purifier: apgd-ce and AutoAttack have none to follow")
        if self.purifies and (less := self.plan.budget.less_than(BUDGETS["standard"])):
            found.append(f"{LESS} ({', '.join(less)})")
        return found

    def _gives_a_gradient(self) -> bool:
        x = self.data.images[:2].to(self.device).requires_grad_()
        scores = self.defended.attacked_by("full", steps=self.plan.budget.unrolled_steps)(x)
        weights = torch.arange(1.0, 1 + scores.shape[1], device=self.device)
        return scores.requires_grad and bool(torch.autograd.grad((scores * weights).sum(), x)[0].any())

    def _is_randomised(self) -> bool:
        x, purifier = self.data.images[: self.plan.chunk][:16].to(self.device), self.defended.purifier
        if isinstance(purifier, AnyPurifier) and purifier.draws:
            return True
        seeds = torch.arange(len(x), device=self.device)  # of each image its own: what is drawn seldom shows, too
        with torch.no_grad():
            one, other = (purifier.descend(x, seeds=seeds + first).image for first in (0, len(x) + 1))
        return not torch.allclose(one, other, rtol=0, atol=1e-3)

    def run(self) -> dict[str, Any]:
        """Run every attack on every chunk; return the record."""
        chunks = self.plan.chunks(len(self.data.labels))
        collected: dict[str, list[Unit]] = {}
        bare: dict[str, list[Unit]] = {}
        with tqdm(total=len(chunks), desc=self.title, unit="chunk", smoothing=0) as bar:
            for indices in chunks:
                for into, evaluation in ((bare, self.bare), (collected, self)):
                    for name, unit in evaluation.chunk(indices, bar.set_postfix_str).items() if evaluation else ():
                        if name in into:  # the first chunk's images are shown; the others' would fill the memory
                            unit = unit._replace(points=unit.points[:0])
                        into.setdefault(name, []).append(unit)
                bar.update()
        surrogates = [] if self.plan.surrogate is None else [self.plan.surrogate.described]
        found = results_of(collected, bare if self.bare else None, chunks, weaker=self.weaker, surrogates=surrogates)
        counted = {name: units[0] for name, units in collected.items() if name in found["outcomes"]}
        first = chunks[0]
        shown = show(
            self.defended,
            self.data.images[first].to(self.device),
            hardest(counted).to(self.device),
            self.data.labels[first].to(self.device),
            seed=SERVED_SEED,
            panel=self.plan.panel,
        )
        return {
            "purifies": self.purifies,
            "purifier": describe(self.defended),
            **self.identity.of_record(),
            "could_not_run": self.could_not_run,
            "notes": self.notes,
            **found,
            "timings": {**found["timings"], "ms_per_image": shown.pop("ms_per_image")},
            **shown,
        }

    def headline(self, found: dict[str, Any]) -> str:
        """Return one line of the result."""
        figures = found["figures"]
        worst = f"clean {figures['clean']['accuracy']:.1%}, worst case {figures['worst_case']['accuracy']:.1%}"
        if figures["gain"] is None:
            return worst
        gained, interval = figures["gain"]["mean"], tuple(figures["gain"]["interval"])
        gain = columns.gained(gained, interval, figures.get("weaker", ())).whole
        return f"gain {gain} points, n = {figures['gain']['n']:,}, {worst}"

    def scene(self, indices: Tensor) -> Scene:
        """Return the images of a chunk before the defense."""
        return Scene(
            defended=self.defended,
            x=self.data.images[indices].to(self.device),
            labels=self.data.labels[indices].to(self.device),
            seeds=((self.plan.seed << 24) + indices).to(self.device),
            threat=self.plan.threat,
            budget=self.plan.budget,
            served_seed=SERVED_SEED,
            attack_seed=self.plan.seed,
            generator=self.plan.generator,
        )

    def chunk(self, indices: Tensor, say: Callable[[str], None]) -> dict[str, Unit]:
        """Return every unit of one chunk, stored ones from the disk."""
        first = int(indices[0])
        if first not in self._last:
            self._last = {first: dict(self._units(indices, say))}
        return self._last[first]

    def _units(self, indices: Tensor, say: Callable[[str], None]) -> Iterator[tuple[str, Unit]]:
        scene = self.scene(indices)
        number = int(indices[0]) // self.plan.chunk
        if TRANSFER in self.names and self.bare is not None:
            scene = replace(scene, known=self.bare.chunk(indices, say)[AUTOATTACK].points.to(self.device))
        clean = self._get(CLEAN, number, scene, partial(judged, scene, scene.x, title=self.title))
        yield CLEAN, clean
        right = clean.right.to(self.device)
        seen, left = {CLEAN: clean}, right
        for name in self.names:
            attack, before = ATTACKS[name], scene
            if name == SURROGATE:
                shown = self._of_surrogate(number, scene, say)
                yield SURROGATE_IMAGES, shown
                before = replace(scene, known=shown.points.to(self.device))
            rows = {"right": right, "left": left}.get(attack.on)
            rows = seen[attack.on].right.to(self.device) if rows is None else rows
            unit = None
            for part, run in attack.runs.items():
                say(f"{self.title}: {name} {part}".strip())
                found = self._attacked(name, part, attack, run, number, before, rows)
                if part:
                    yield PARTS_PREFIX + part, found
                unit = found if unit is None else joined(unit, found)
                rows = found.right.to(self.device)
            assert unit is not None
            yield name, unit
            seen[name] = unit
            left = left & ~(unit.attacked & ~unit.right).to(self.device)
        if GRADIENT in self.names:
            yield from self._larger(number, scene, left, say)
        if self.randomised:
            points = [hardest(seen), *(seen[fresh].points for fresh in FRESH_ATTACKS if fresh in seen)]
            compute = partial(self._resubmitted, scene, [x.to(self.device) for x in points])
            over = {"over": digest_of_tensors(*points), "draws": RESUBMISSIONS, "first": FRESH // 2}
            yield RESUBMITTED, self._get(RESUBMITTED, number, scene, compute, over)

    def _attacked(
        self, name: str, part: str, attack: Attack, run: Callable[..., Any], number: int, scene: Scene, rows: Tensor
    ) -> Unit:
        """Return the attack on the images of the mask; the others stay as they are."""
        surrogate = None if self.plan.surrogate is None else self.plan.surrogate.identity
        identity = self.identity.of_attack(name, attack, self.plan.budget, surrogate)
        compute = partial(self._run, run, scene, rows)
        return self._get(f"{name}-{part}" if part else name, number, scene, compute, identity, rows)

    def _of_surrogate(self, number: int, scene: Scene, say: Callable[[str], None]) -> Unit:
        """Return the images made on the surrogate, of every image of the chunk: the same before every defense."""
        surrogate = self.plan.surrogate
        assert surrogate is not None
        say(surrogate.title)
        own = surrogate.scene(scene)

        def compute() -> Unit:
            return judged(own, made(own), title=surrogate.title)

        identity = surrogate.identity.of_attack(SURROGATE, ATTACKS[SURROGATE], self.plan.budget)
        return self._get(SURROGATE_IMAGES, number, own, compute, identity, by=surrogate)

    def _run(self, run: Callable[..., Any], scene: Scene, rows: Tensor) -> Unit:
        if not rows.any():
            return nothing(scene)
        chosen = scene.select(rows)
        found = run(chosen)
        images, fallen = found if isinstance(found, tuple) else (found, torch.zeros_like(chosen.labels) != 0)
        unit = judged(chosen, images, title=self.title)
        return spread(unit._replace(right=unit.right & ~fallen), scene, rows)

    def _larger(
        self, number: int, scene: Scene, left: Tensor, say: Callable[[str], None]
    ) -> Iterator[tuple[str, Unit]]:
        """Yield the gradient attack in larger balls, each on the images that are left."""
        for times in LARGER:
            try:
                threat = replace(scene.threat, epsilon=times * scene.threat.epsilon)
            except ConfigError:  # no ball of that size
                return
            say(f"epsilon x {times}")
            attack, wider = ATTACKS[GRADIENT], replace(scene, threat=threat)
            unit = self._attacked(GRADIENT, f"x{times}", attack, attack.run, number, wider, left)
            yield f"{LARGER_PREFIX}{times}", unit
            left = unit.right.to(self.device)

    def _resubmitted(self, scene: Scene, points: list[Tensor]) -> Unit:
        """Return two points of each image under fresh seeds, right where both are: the one of the smallest margin as
        served, and the one that was made against fresh seeds, where that attack was run.
        """
        draws = [
            torch.stack([scene.right(x, seed=FRESH // 2 + draw) for x in points]).all(0)
            for draw in range(RESUBMISSIONS)
        ]
        return nothing(scene)._replace(points=points[0], right=torch.stack(draws))

    def _get(
        self,
        name: str,
        number: int,
        scene: Scene,
        compute: Callable[[], Unit],
        identity: dict[str, Any] | None = None,
        rows: Tensor | None = None,
        by: Surrogate | None = None,
    ) -> Unit:
        """Return the stored unit, or the computed one with its time and passes, those of this classifier or `by`."""
        counting, judge = (self.counting, self.identity) if by is None else (by.counting, by.identity)

        def timed() -> Unit:
            before, started = (counting.forward_passes, counting.backward_passes), time.perf_counter()
            unit = compute()
            return unit._replace(
                forward_passes=counting.forward_passes - before[0],
                backward_passes=counting.backward_passes - before[1],
                seconds=time.perf_counter() - started,
            )

        whole = {
            **judge.of_judge(),
            **(identity or {}),
            "threat": dataclasses.asdict(scene.threat),
            "images": digest_of_tensors(scene.x, scene.labels, scene.seeds, scene.known, rows),
        }
        return self.units.get(name, number, whole, timed)
