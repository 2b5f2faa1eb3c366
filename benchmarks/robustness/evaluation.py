"""One model behind one purifier, under every attack: chunk by chunk, resumable, to one record."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unperturb.benchmarks.robustness import attacks as registry
from unperturb.benchmarks.robustness.attacks import ATTACKS, AUTOATTACK, FRESH_ATTACKS, TRANSFER
from unperturb.benchmarks.robustness.attacks.adaptive import FRESH
from unperturb.benchmarks.robustness.attacks.autoattack import autoattack
from unperturb.benchmarks.robustness.attacks.scene import Budget, Scene, Threat
from unperturb.benchmarks.robustness.counting import CountingClassifier
from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.benchmarks.robustness.figures import CLEAN, summarise
from unperturb.benchmarks.robustness.showing import show
from unperturb.benchmarks.robustness.units import Unit, Units, code_digest
from unperturb.models import provenance
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.generator import load as load_generator
from unperturb.models.provenance import digest_of
from unperturb.models.purifiers.base import NoPurifier, Purifier
from unperturb.models.purifiers.defended import DefendedClassifier, seeds_of

RESUBMITTED, RESUBMISSIONS = "resubmitted", 10
SERVED_SEED = 0  # the service's default


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what is done to every model and purifier.

    shard: (number from 0, count): every count-th chunk of `chunk` images, from the number on
    panel: images that the record shows
    generator: folder of the noise generator for the attack of that name
    """

    dataset: str
    threat: Threat
    budget: Budget
    attacks: tuple[str, ...]
    seed: int = 0
    chunk: int = 128
    shard: tuple[int, int] = (0, 1)
    panel: int = 6
    generator: Path | None = None

    def chunks(self, n: int) -> list[Tensor]:
        """Return the image numbers of every chunk of this shard."""
        return list(torch.arange(n).split(self.chunk))[self.shard[0] :: self.shard[1]]


class Evaluation:
    """A defended classifier on a set of images; `run` does the work and gives the record's results."""

    def __init__(
        self,
        subject: Checkpoint,
        make_purifier: Callable[[Checkpoint], Purifier],
        data: EvaluationSet,
        plan: Plan,
        *,
        folder: Path,
        device: torch.device,
        title: str = "",
    ) -> None:
        counting = CountingClassifier(subject.classifier.to(device)).requires_grad_(False)
        self.counting, self.data, self.plan, self.device, self.title = counting, data, plan, device, title
        purifier = make_purifier(dataclasses.replace(subject, classifier=counting)).to(device).requires_grad_(False)
        self.defended = DefendedClassifier(counting, purifier)
        self.purifies = not isinstance(purifier, NoPurifier)
        self.names = [name for name in plan.attacks if registry.applies(name, purifies=self.purifies)]
        if not plan.chunks(len(data.labels)):
            raise ConfigError(f"shard {plan.shard[0] + 1}/{plan.shard[1]} of {len(data.labels)} images is empty")
        self._check_logits()
        self.generator, noise = None, None
        if plan.generator is not None:
            self.generator, card = load_generator(plan.generator, device=device)
            noise = card.weights_sha256
        self.randomised = self._is_randomised()
        common = {
            "data": data.digest,
            "seed": plan.seed,
            "chunk": plan.chunk,
            "threat": dataclasses.asdict(plan.threat),
            "code": code_digest(),
            "versions": provenance.versions(),
            "device": device.type,
            "source": data.source,
            "architecture": dataclasses.asdict(subject.card.architecture),
            "dataset": plan.dataset,
        }
        self.static = Units(folder, {**common, "classifier": digest_of(counting)})
        self.units = Units(
            folder,
            {
                **common,
                "budget": dataclasses.asdict(plan.budget),
                "defended": digest_of(purifier),
                "purifier": describe(purifier),
                "warm": AUTOATTACK in self.names,
                "generator": noise,
            },
        )

    def _check_logits(self) -> None:
        x = self.data.images[:2].to(self.device)
        with torch.no_grad():
            logits = self.counting(x)
        classes = self.counting.num_classes
        if logits.shape != (len(x), classes):
            raise ConfigError(f"{self.title}: scores of shape {tuple(logits.shape)}, not [batch, {classes}]")
        if not logits.isfinite().all():
            raise ConfigError(f"{self.title}: the classifier returns NaN or infinite scores on the first images")

    def _is_randomised(self) -> bool:
        x = self.data.images[: self.plan.chunk][:16].to(self.device)
        with torch.no_grad():
            one, other = (self.defended.purifier.descend(x, seeds=seeds_of(seed, x)).image for seed in (0, 1))
        return not torch.allclose(one, other, rtol=0, atol=1e-3)

    def run(self) -> dict[str, Any]:
        """Run every attack on every chunk; return the record."""
        chunks = self.plan.chunks(len(self.data.labels))
        collected: dict[str, list[Unit]] = {}
        units_each = 1 + len(self.names) + self.randomised
        with tqdm(total=len(chunks) * units_each, desc=self.title, unit="unit", smoothing=0) as bar:
            for indices in chunks:
                for name, unit in self._chunk(indices, bar.set_postfix_str):
                    if name in collected:  # the first chunk's images are shown; the others' would fill the memory
                        unit = unit._replace(points=unit.points[:0])
                    collected.setdefault(name, []).append(unit)
                    bar.update()
        again = collected.pop(RESUBMITTED, [])
        draws = torch.cat([unit.right for unit in again], dim=1).int().tolist() if again else None
        outcomes = {name: torch.cat([unit.right for unit in units]).int().tolist() for name, units in collected.items()}
        counted = {name: units[0] for name, units in collected.items() if name != AUTOATTACK or not self.purifies}
        first = chunks[0]
        shown = show(
            self.defended,
            self.data.images[first].to(self.device),
            hardest(counted).to(self.device),
            self.data.labels[first].to(self.device),
            seed=SERVED_SEED,
            panel=self.plan.panel,
        )
        n = len(outcomes[CLEAN])
        return {
            "purifies": self.purifies,
            "purifier": describe(self.defended.purifier),
            "indices": torch.cat(chunks).tolist(),
            "outcomes": outcomes,
            "resubmitted": draws,
            "figures": summarise(outcomes, draws, purifies=self.purifies),
            "not_applicable": [name for name in self.plan.attacks if name not in self.names],
            "notes": sorted({note for units in collected.values() for unit in units for note in unit.notes}),
            "passes_per_image": {
                name: {
                    "forward": sum(unit.forward_passes for unit in units) / n,
                    "backward": sum(unit.backward_passes for unit in units) / n,
                }
                for name, units in collected.items()
                if name != AUTOATTACK
            },
            "timings": {
                "seconds": {name: sum(unit.seconds for unit in units) for name, units in collected.items()},
                "ms_per_image": shown.pop("ms_per_image"),
            },
            **shown,
        }

    def headline(self, found: dict[str, Any]) -> str:
        """Return one line of the result."""
        cells = found["figures"]["attacks"]
        shown = [f"{name} {cells[name]['accuracy']:.1%}" for name in (CLEAN, AUTOATTACK, TRANSFER) if name in cells]
        return f"{', '.join(shown)}, worst case {found['figures']['worst_case']['accuracy']:.1%}"

    def _chunk(self, indices: Tensor, say: Callable[[str], None]) -> Iterator[tuple[str, Unit]]:
        """Every unit of one chunk, stored ones from the disk; images that are wrong already are not attacked."""
        number = int(indices[0]) // self.plan.chunk
        whole = Scene(
            defended=self.defended,
            x=self.data.images[indices].to(self.device),
            labels=self.data.labels[indices].to(self.device),
            seeds=((self.plan.seed << 24) + indices).to(self.device),
            threat=self.plan.threat,
            budget=self.plan.budget,
            served_seed=SERVED_SEED,
            generator=self.generator,
        )

        def get(name: str, compute: Callable[[], Unit], units: Units = self.units) -> Unit:
            say(name)
            return units.get(name, number, lambda: self._timed(compute))

        clean = get(CLEAN, partial(self._judged, whole, whole.x))
        yield CLEAN, clean
        right = clean.right.to(self.device)
        seen, scene = {CLEAN: clean}, whole
        for name in self.names:
            if name == AUTOATTACK:
                unit = get(name, partial(self._autoattack, whole), self.static)
            elif name == TRANSFER:
                unit = get(name, partial(self._replayed, scene, right))
            else:
                unit = get(name, partial(self._attacked, name, scene, right))
            yield name, unit
            if name == AUTOATTACK and self.purifies:
                # What is broken without the purifier says nothing about it, but is a place to start from.
                scene = replace(whole, known=unit.points.to(self.device))
            else:
                seen[name] = unit
        if self.randomised:
            over = hashlib.sha256(",".join(self.names).encode()).hexdigest()[:12]
            yield RESUBMITTED, get(f"{RESUBMITTED}-{over}", partial(self._resubmitted, whole, seen))

    def _replayed(self, whole: Scene, right: Tensor) -> Unit:
        """The static classifier's adversarial images before the defense."""
        assert whole.known is not None
        return self._judged(whole, whole.known, also=right)

    def _attacked(self, name: str, whole: Scene, right: Tensor) -> Unit:
        """The attack on the images that the defense gets right; the others stay as they are, and wrong."""
        if not right.any():
            return self._judged(whole, whole.x)
        scene = whole.select(right)
        found = ATTACKS[name].run(scene)
        points = whole.x.clone()
        images, fallen = (
            found if isinstance(found, tuple) else (found, torch.zeros_like(scene.labels, dtype=torch.bool))
        )
        points[right] = images
        standing = right.clone()
        standing[right] = ~fallen
        return self._judged(whole, points, also=standing)

    def _judged(self, whole: Scene, points: Tensor, also: Tensor | None = None) -> Unit:
        """Return the points back in the ball and [0, 1], and the served answer to them."""
        points = whole.project(points)
        with torch.no_grad():
            logits = whole.logits(points).float()
        if not logits.isfinite().all():
            raise ConfigError(f"{self.title}: the defended classifier returns NaN or infinite scores")
        own = logits.gather(1, whole.labels[:, None])
        others = logits.scatter(1, whole.labels[:, None], float("-inf")).amax(1)
        right = logits.argmax(1).eq(whole.labels)
        right = right if also is None else right & also
        return Unit(points, right, own[:, 0] - others, [], 0, 0, 0.0)

    def _autoattack(self, whole: Scene) -> Unit:
        points, notes = autoattack(
            self.counting.counted,
            whole.x,
            whole.labels,
            threat=whole.threat,
            seed=self.plan.seed,
            batch=self.plan.chunk,
        )
        static = whole.against(DefendedClassifier(self.counting, NoPurifier(self.counting)))
        return self._judged(static, points)._replace(notes=notes)

    def _resubmitted(self, whole: Scene, seen: dict[str, Unit]) -> Unit:
        """Two points of each image under fresh seeds, right where both are: the one of the smallest margin as served,
        and the one that was made against fresh seeds, where that attack was run.
        """
        points = [hardest(seen).to(self.device)]
        points += [seen[name].points.to(self.device) for name in FRESH_ATTACKS if name in seen]
        draws = [
            torch.stack([whole.right(x, seed=FRESH // 2 + draw) for x in points]).all(0)
            for draw in range(RESUBMISSIONS)
        ]
        return Unit(points[0], torch.stack(draws), torch.zeros(len(whole.x)), [], 0, 0, 0.0)

    def _timed(self, compute: Callable[[], Unit]) -> Unit:
        """Return the unit with its time and passes."""
        counting = self.counting
        before, started = (counting.forward_passes, counting.backward_passes), time.perf_counter()
        unit = compute()
        return unit._replace(
            forward_passes=counting.forward_passes - before[0],
            backward_passes=counting.backward_passes - before[1],
            seconds=time.perf_counter() - started,
        )


def describe(purifier: Purifier) -> dict[str, Any]:
    """Return a purifier's kind and parameters, as JSON."""
    config = getattr(purifier, "config", None)
    plain = {name: value for name, value in vars(purifier).items() if isinstance(value, int | float | str)}
    described: dict[str, Any] = {
        "kind": type(purifier).__name__,
        "loop": dataclasses.asdict(purifier.loop),
        **{name: value for name, value in plain.items() if not name.startswith("_") and name != "training"},
    }
    return described if config is None else {**described, "config": dataclasses.asdict(config)}


def hardest(seen: dict[str, Unit]) -> Tensor:
    """Return of every image the point of the smallest margin: nearest to being broken, or broken by most."""
    margins = torch.stack([unit.margins for unit in seen.values()])
    points = torch.stack([unit.points for unit in seen.values()])
    return points[margins.argmin(0), torch.arange(margins.shape[1])]
