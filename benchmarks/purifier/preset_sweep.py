"""`python benchmarks/purifier/preset_sweep.py --data DIR`: candidates for the presets, on held-out training images.

The images are those that the classifier's and head's training kept back, so that the test images stay untouched until
a preset is chosen.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unperturb.benchmarks.command import BenchmarkConfig, run_command
from unperturb.benchmarks.purifier import points
from unperturb.benchmarks.reporting import results
from unperturb.models.accuracy import correct
from unperturb.models.attacks.projected_gradient import RAMP, ProjectedGradient
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.contrastive.loss import NegativePolicy
from unperturb.models.contrastive.views import ViewPolicy
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option
from unperturb.models.purifiers.defended import DefendedClassifier, defend
from unperturb.models.purifiers.restored import restored_of
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttackConfig
from unperturb.training import data, held_out

BASE = ProjectedGradient(direction="descend", epsilon=8 / 255, step_size=2 / 255, steps=5, ramp=RAMP)

SCRIPT = "benchmarks/purifier/preset_sweep.py"


@dataclass(frozen=True, kw_only=True)
class SweepConfig(BenchmarkConfig):
    """Sweep the purifier's parameters on held-out training images."""

    data: str = option("the data set that the checkpoint was trained on")
    n: int = option("held-out training images", 1000)
    epsilon: float = option("attack radius, L-infinity", 8 / 255)
    batch: int = option("images in a batch", 125)
    restored: bool = option("sweep what the restored view depends on", False)
    out: Path | None = option("result file (default: results/preset_sweep.json, or preset_sweep_restored.json)", None)
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for counts below 1."""
        if self.n < 1 or self.batch < 1:
            raise ConfigError(f"n={self.n} and batch={self.batch} must be at least 1")


def restored_candidates() -> dict[str, ReverseAttackConfig]:
    """5 steps of 2/255 with 2 mirrored views and a restored one in a ball of 8/255, and one change at a time."""
    base = ReverseAttackConfig(loop=BASE, views=2, restored=1.0)

    def loop(**changed: Any) -> ReverseAttackConfig:  # noqa: ANN401
        return dataclasses.replace(base, loop=dataclasses.replace(BASE, **changed))

    return {
        "taken off 8 times": base,
        "taken off 4 times": dataclasses.replace(base, restored=0.5),
        "taken off 16 times": dataclasses.replace(base, restored=2.0),
        "crops and colours": dataclasses.replace(base, policy=ViewPolicy()),
        "1 step of 8/255": loop(steps=1, step_size=8 / 255),
        "1 step of 6/255": loop(steps=1, step_size=6 / 255),
        "1 step of 4/255": loop(steps=1, step_size=4 / 255),
        "2 steps of 4/255": loop(steps=2, step_size=4 / 255),
        "10 steps": loop(steps=10),
        "10 steps, radius 16/255": loop(steps=10, epsilon=16 / 255),
    }


def candidates() -> dict[str, ReverseAttackConfig]:
    """The published preset; and from 5 steps of 2/255 with 2 views in a ball of 8/255, one change at a time."""

    def loop(**changed: Any) -> ProjectedGradient:  # noqa: ANN401
        return dataclasses.replace(BASE, **changed)

    def drop(fraction: float) -> NegativePolicy:
        return NegativePolicy(kind="drop-similar", fraction=fraction)

    base = ReverseAttackConfig(loop=loop(), views=2)
    return {
        "published": PRESETS["published"],
        "base": base,
        "1 step of 8/255": dataclasses.replace(base, loop=loop(steps=1, step_size=8 / 255)),
        "2 steps of 4/255": dataclasses.replace(base, loop=loop(steps=2, step_size=4 / 255)),
        "3 steps of 4/255, momentum 0.75": dataclasses.replace(
            base, loop=loop(steps=3, step_size=4 / 255, momentum=0.75)
        ),
        "4 views": dataclasses.replace(base, views=4),
        "8 views": dataclasses.replace(base, views=8),
        "10 steps": dataclasses.replace(base, loop=loop(steps=10)),
        "10 steps, 4 views": dataclasses.replace(base, loop=loop(steps=10), views=4),
        "10 steps of 1/255": dataclasses.replace(base, loop=loop(steps=10, step_size=1 / 255)),
        "momentum 0.75": dataclasses.replace(base, loop=loop(momentum=0.75)),
        "radius 12/255, 8 steps": dataclasses.replace(base, loop=loop(epsilon=12 / 255, steps=8)),
        "uniform start": dataclasses.replace(base, loop=loop(start="uniform")),
        "temperature 0.1": dataclasses.replace(base, temperature=0.1),
        "temperature 0.5": dataclasses.replace(base, temperature=0.5),
        "without the nearest 10%": dataclasses.replace(base, negatives=drop(0.1)),
        "without the nearest 30%": dataclasses.replace(base, negatives=drop(0.3)),
    }


def denoised(
    loaded: Checkpoint, sets: dict[str, Tensor], labels: Tensor, static: dict[str, list[bool]]
) -> dict[str, Any]:
    """No reverse attack: the restored view is what is classified."""
    defended = DefendedClassifier(loaded.classifier, restored_of(loaded))
    found = {}
    for name, before in static.items():
        right = correct(defended, sets[name], labels)
        found[name] = {**results.accuracy(right), "gain": results.gain(right, before)}
    print("restored view itself", {name: f"{cell['gain']['mean']:+.1%}" for name, cell in found.items()})
    return found


def sweep(config: SweepConfig) -> int:
    """Sweep, write the result file, and say the figures."""
    loaded = store.load(config.checkpoint, device=config.device)
    if config.restored:
        restored_of(loaded)
    dataset = data.load(config.data, loaded.card.pictures, cache=config.cache)
    images, labels = data.first(held_out.kept_back(dataset, loaded.card), config.n, torch.device(config.device))
    made = points.make_points(
        loaded.classifier, images, labels, epsilon=config.epsilon, steps=20, seed=config.seed, batch=config.batch
    )
    names = ("clean", "attacked")
    static = {name: correct(loaded.classifier, made.sets()[name], labels) for name in names}
    rows: dict[str, Any] = {"no purifier": {name: results.accuracy(static[name]) for name in names}}
    print({name: f"{cell['accuracy']:.1%}" for name, cell in rows["no purifier"].items()})
    if config.restored:
        rows["restored view itself"] = denoised(loaded, made.sets(), labels, static)
    for title, candidate in (restored_candidates() if config.restored else candidates()).items():
        defended = defend(loaded, candidate)
        rows[title] = {"parameters": dataclasses.asdict(candidate)}
        started = time.perf_counter()
        for name in names:
            found = points.purify_all(
                defended, made.sets()[name], labels, seed=config.seed, batch=config.batch, name=title
            )
            rows[title][name] = {
                **results.accuracy(found.correct),
                "gain": results.gain(found.correct, static[name]),
                **points.describe(found),
            }
        rows[title]["ms_per_image"] = (time.perf_counter() - started) * 1000 / (2 * len(labels))
        clean, attacked = (rows[title][name]["gain"]["mean"] for name in names)
        print(f"{title:24} clean {clean:+.1%}  attacked {attacked:+.1%}  {rows[title]['ms_per_image']:.0f} ms")
    record = {"checkpoint": {"id": loaded.card.id, "weights_sha256": loaded.card.weights_sha256}, "rows": rows}
    out = config.out or results.FOLDER / f"preset_sweep{'_restored' * config.restored}.json"
    results.write(out, script=SCRIPT, config=as_json(config), results=record)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(SweepConfig, sweep, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
