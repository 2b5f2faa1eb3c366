"""`python benchmarks/purifier/purification.py --data DIR`: what the shipped purifier is worth, and what it costs.

On the first n test images: the classifier and every preset on clean images, on PGD-20 points of the static classifier
(transfer), and on noise of the same size; the default preset under an adaptive attack (BPDA); and the time per image
beside a plain version of the published procedure, taken in turn in one run.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unperturb.benchmarks.command import BenchmarkConfig, run_command
from unperturb.benchmarks.purifier import points
from unperturb.benchmarks.purifier.published_procedure import PublishedProcedure
from unperturb.benchmarks.reporting import results
from unperturb.models.accuracy import correct
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option
from unperturb.models.purifiers.defended import defend, presets_of
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.training import data

SCRIPT = "benchmarks/purifier/purification.py"
FOLDER = results.FOLDER / "purification"


@dataclass(frozen=True, kw_only=True)
class PurificationConfig(BenchmarkConfig):
    """Measure a checkpoint's purifier on test images."""

    data: str = option("cifar10, cifar100, or an image folder; its test split is used, in file order")
    presets: str = option("presets with commas, `default` among them; all that it has unless set", "")
    n: int = option("test images, the first ones", 1000)
    adaptive_n: int = option("test images for the adaptive attack, the first ones; 0 for none", 500)
    epsilon: float = option("attack radius, L-infinity", 8 / 255)
    steps: int = option("attack steps, of a quarter of epsilon", 20)
    batch: int = option("images in a batch", 125)
    timed: int = option("images in the batch that is timed", 64)
    repeats: int = option("times that each timing is taken, in turn; the fastest counts", 3)
    out: Path | None = option("result file (default: results/purification/<card's id>.json)", None)
    write_card: bool = option("also write the figures on the checkpoint's card", False)
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        for name in ("n", "steps", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.timed < 2 or self.timed > self.n or not 0 <= self.adaptive_n <= self.n:
            raise ConfigError(f"timed={self.timed} must be 2 to n={self.n}, adaptive_n={self.adaptive_n} 0 to n")

    def chosen(self, card: Card) -> list[str]:
        """Return the presets that are measured; raise ConfigError for one that the checkpoint has not."""
        had = presets_of(card)
        chosen = self.presets.split(",") if self.presets else list(had)
        if lacking := set(chosen).difference(had):
            raise ConfigError(
                f"presets={self.presets}: {card.id!r} has {', '.join(had)}, not {', '.join(sorted(lacking))}"
            )
        if self.adaptive_n and "default" not in chosen:
            raise ConfigError(f"presets={self.presets}: the adaptive attack is on `default`, or --adaptive-n 0")
        return chosen


def measure(config: PurificationConfig, loaded: Checkpoint, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracies of the classifier and of every preset, on the same points."""
    seed, batch = config.seed, config.batch
    made = points.make_points(
        loaded.classifier, images, labels, epsilon=config.epsilon, steps=config.steps, seed=seed, batch=batch
    )
    static = {name: correct(loaded.classifier, x, labels) for name, x in made.sets().items()}
    found: dict[str, Any] = {"classifier": {name: results.accuracy(values) for name, values in static.items()}}
    for preset in config.chosen(loaded.card):
        defended = defend(loaded, PRESETS[preset])
        found[preset] = {}
        for name, x in made.sets().items():
            rows = points.purify_all(defended, x, labels, seed=seed, batch=batch, name=f"{preset}, {name}")
            found[preset][name] = {
                **results.accuracy(rows.correct),
                "gain": results.gain(rows.correct, static[name]),
                **points.describe(rows),
            }
    if config.adaptive_n:
        first = slice(config.adaptive_n)
        withstood = points.bpda(
            defend(loaded, PRESETS["default"]),
            made.clean[first],
            labels[first],
            epsilon=config.epsilon,
            steps=config.steps,
            seed=seed,
            batch=batch,
        )
        found["default"]["adaptive_bpda"] = {
            **results.accuracy(withstood),
            "gain": results.gain(withstood, static["attacked"][first]),
        }
    return found


def time_each(config: PurificationConfig, loaded: Checkpoint, images: Tensor) -> dict[str, Any]:
    """Milliseconds per image, each the fastest of its turns; ratios to the plain published procedure."""
    x = images[: config.timed].float() / 255
    fresh = store.load(config.checkpoint, device=config.device)  # its weights want gradients: not the others'
    runs: dict[str, Callable[[], object]] = {
        "classifier": lambda: loaded.classifier(x),
        "published_procedure": PublishedProcedureRun(fresh, x),
    }
    for name in config.chosen(loaded.card):
        defended = defend(loaded, PRESETS[name])
        runs[name] = lambda defended=defended: defended(x, seed=config.seed)  # type: ignore[misc]
    best: dict[str, float] = {}
    for _ in range(config.repeats):
        for name, run in runs.items():
            started = _clock(config.device)
            with torch.enable_grad() if name == "published_procedure" else torch.no_grad():
                run()
            spent = (_clock(config.device) - started) * 1000 / config.timed
            best[name] = min(spent, best.get(name, float("inf")))
    plain = best["published_procedure"]
    return {
        "batch": config.timed,
        "ms_per_image": best,
        "times_faster_than_published_procedure": {name: plain / best[name] for name in config.chosen(loaded.card)},
    }


class PublishedProcedureRun:
    """One timed run of the plain procedure."""

    def __init__(self, loaded: Checkpoint, x: Tensor) -> None:
        self.procedure, self.x = PublishedProcedure(loaded), x

    def __call__(self) -> Tensor:
        """Purify the batch."""
        return self.procedure(self.x)


def _clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_purifier(config: PurificationConfig) -> int:
    """Measure, write the result file, and say the figures."""
    loaded = store.load(config.checkpoint, device=config.device)
    config.chosen(loaded.card)
    dataset = data.load(config.data, loaded.card.pictures, cache=config.cache)
    images, labels = (t[: config.n].to(config.device) for t in dataset.test)
    found = {
        "checkpoint": {"id": loaded.card.id, "weights_sha256": loaded.card.weights_sha256},
        "accuracy": measure(config, loaded, images, labels),
        "time": time_each(config, loaded, images),
    }
    out = config.out or FOLDER / f"{loaded.card.id}.json"
    results.write(out, script=SCRIPT, config=as_json(config), results=found)
    if config.write_card:
        folder = store.resolve(config.checkpoint)
        card = store.read_card(folder)
        figures = {**card.figures, "purification": found["accuracy"]}
        store.write_card(folder, dataclasses.replace(card, figures=figures))
    for row, cells in found["accuracy"].items():
        print(f"{row:10}", "  ".join(f"{name} {cell['accuracy']:.1%}" for name, cell in cells.items()))
    print({name: f"{value:.1f} ms" for name, value in found["time"]["ms_per_image"].items()})
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(PurificationConfig, measure_purifier, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
