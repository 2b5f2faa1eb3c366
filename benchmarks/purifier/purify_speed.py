"""`python benchmarks/purifier/purify_speed.py`: what a purification costs, beside the published procedure.

Ways to take the same steps with the same views and weights, in turn in one run, medians of repeated blocks: the
published procedure as it is described, this project's loop in eager PyTorch, captured (on a GPU), compiled; and the
presets, in the fastest of those. The limit is the device's own: its rate at a large matrix product, in the precision of
the way; float32 is no TF32. All steps of a batch are timed, with the restored view before them where a preset has one,
and not the losses and classifications that the service reports as well. Needs torch alone; any GPU with it will do.
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unperturb.benchmarks.command import BenchmarkConfig, run_command
from unperturb.benchmarks.purifier.published_procedure import PublishedProcedure
from unperturb.benchmarks.reporting import results
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card, HeadCard
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.devices import opened_device
from unperturb.models.errors import ConfigError
from unperturb.models.inference.captured import Execution, Stepper
from unperturb.models.inference.continuous import ReverseAttackStage
from unperturb.models.inference.folding import Precision, prepared
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.head import NegativesBank, ProjectionHead
from unperturb.models.networks.registry import build
from unperturb.models.options import as_json, option
from unperturb.models.purifiers.defended import reverse_attack_of
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttackConfig
from unperturb.training import data

HEAD = HeadCard(hidden=128, embedding_dim=8, temperature=0.2)
BANK = 2000
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrix product that the device's rate is measured with
COPY = {"cpu": 1 << 24, "cuda": 1 << 28}  # numbers in the copy that its bandwidth is measured with
Run = Callable[[Tensor, Tensor], Tensor]

SCRIPT = "benchmarks/purifier/purify_speed.py"


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(BenchmarkConfig):
    """Time the purifier."""

    arch: str = option("instead of a checkpoint, this architecture with random weights", "")
    batch: tuple[str, ...] = option("images at a time; may be repeated", ("1", "8", "64", "512"))
    views: int = option("of every way but the presets", 4)
    steps: int = option("of every way but the presets", 40)
    blocks: int = option("times that each is timed, in turn; the median counts", 5)
    compiled: bool = option("also torch's compiler: a minute for every batch size", False)
    precision: Precision = option("also this one of the backbone, and of the captured and compiled ways", "float32")
    data: str = option("a data set whose first test images must keep their label in every way; empty: not checked", "")
    n: int = option("how many of them", 1000)
    out: Path | None = option("result file (default: results/purify_speed/<architecture>_<device>.json)", None)
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if not all(size.isdigit() and int(size) > 0 for size in self.batch):
            raise ConfigError(f"batch={' '.join(self.batch)!r} are not whole numbers of at least 1")
        for name in ("steps", "blocks", "n"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


def subject(config: SpeedConfig) -> Checkpoint:
    """The checkpoint, or random weights of an architecture behind a head of the usual size."""
    torch.manual_seed(config.seed)
    if not config.arch:
        return store.load(config.checkpoint, device=config.device)
    architecture = Architecture(name=config.arch, num_classes=10)
    classifier = build(architecture).eval().requires_grad_(False).to(config.device)
    head = (
        ProjectionHead(feature_dim=classifier.feature_dim, hidden=HEAD.hidden, embedding_dim=HEAD.embedding_dim)
        .eval()
        .requires_grad_(False)
        .to(config.device)
    )
    bank = NegativesBank(torch.randn(BANK, HEAD.embedding_dim), torch.zeros(BANK, dtype=torch.int64)).to(config.device)
    names = tuple(str(number) for number in range(10))
    card = Card(id=config.arch, architecture=architecture, classes=names, data={}, training={}, head=HEAD)
    return Checkpoint(card, classifier, head, bank)


class Way(NamedTuple):
    """One way to take steps: in which precision, on which classifier, and how."""

    precision: Precision
    ready: Checkpoint
    stepper: Stepper

    def run(self, config: ReverseAttackConfig) -> Run:
        """Purify images."""
        stage = ReverseAttackStage(reverse_attack_of(self.ready, config))
        return lambda x, seeds: self.stepper.descend(stage, x, seeds=seeds).image


class Ways:
    """The same purification in several ways, by name."""

    def __init__(self, config: SpeedConfig, loaded: Checkpoint) -> None:
        self.config, self.device = config, opened_device(config.device)
        loop = dataclasses.replace(PRESETS["published"].loop, steps=config.steps)
        self.base = ReverseAttackConfig(loop=loop, views=config.views)
        self.plain = PublishedProcedure(subject(config), views=config.views, steps=config.steps)
        precisions: set[Precision] = {"float32", config.precision}
        self.rates = {name: device_rate(self.device, name) for name in precisions}
        self.ways: dict[str, Way] = {}
        self.add("eager", "float32", prepared(loaded), "eager")
        ready = self.ways["eager"].ready
        rounded = "" if config.precision == "float32" else f", {config.precision}"
        if rounded:
            ready = prepared(loaded, precision=config.precision)
            self.add(f"eager{rounded}", config.precision, ready, "eager")
        if self.device.type == "cuda":
            self.add(f"captured{rounded}", config.precision, ready, "captured")
        if config.compiled:
            self.add(f"compiled{rounded}", config.precision, ready, "compiled")

    def add(self, name: str, precision: Precision, ready: Checkpoint, execution: Execution) -> None:
        """Add a way."""
        self.ways[name] = Way(precision, ready, Stepper(ready.classifier, self.device, execution=execution))


class Timed(NamedTuple):
    """Return what is timed: its precision, steps and views."""

    precision: Precision
    steps: int
    views: int
    run: Run


def measure(config: SpeedConfig, ways: Ways, size: int) -> dict[str, Any]:
    """Every way on one batch of images, in turn, once before it counts; the first turn says which way is fastest."""
    device, side = ways.device, ways.ways["eager"].ready.classifier.image_size
    x = torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(config.seed)).to(device)
    seeds = torch.arange(size, device=device)
    every = {"published procedure": Timed("float32", config.steps, config.views, lambda x, _: ways.plain(x))}
    for name, way in ways.ways.items():
        every[name] = Timed(way.precision, config.steps, config.views, way.run(ways.base))
    memory = {name: _peak(device, one.run, x, seeds) for name, one in every.items()}
    spent: dict[str, list[float]] = {name: [_seconds(device, one.run, x, seeds)] for name, one in every.items()}
    fastest = min(ways.ways, key=lambda name: spent[name][0])
    for name, preset in PRESETS.items():
        if not preset.loop.steps:
            continue
        way, label = ways.ways[fastest], f"preset {name}"
        every[label] = Timed(way.precision, preset.loop.steps, preset.views, way.run(preset))
        memory[label] = _peak(device, every[label].run, x, seeds)
        spent[label] = [_seconds(device, every[label].run, x, seeds)]
    for _ in range(config.blocks - 1):
        for name, one in every.items():
            spent[name].append(_seconds(device, one.run, x, seeds))
    flop = step_flop(ways, x, seeds) / config.views / size
    plain = statistics.median(spent["published procedure"])
    found: dict[str, Any] = {}
    for name, (precision, steps, views, _) in every.items():
        seconds, passes = statistics.median(spent[name]), size * steps * views
        found[name] = {
            "precision": precision,
            "steps": steps,
            "views": views,
            "seconds": spent[name],
            "ms": seconds * 1000,
            "ms_per_step": seconds * 1000 / steps,
            "images_per_s": size / seconds,
            "passes_per_s": passes / seconds,
            "peak_bytes": memory[name],
            "times_published_procedure": plain / seconds,
            "flop_per_s": flop * passes / seconds,
            "of_rate": flop * passes / seconds / ways.rates[precision],
        }
        found[name]["way"] = fastest if name.startswith("preset") else name
    return found


def _seconds(device: torch.device, run: Run, x: Tensor, seeds: Tensor) -> float:
    started = clock(device)
    run(x, seeds)
    return clock(device) - started


def _peak(device: torch.device, run: Run, x: Tensor, seeds: Tensor) -> int | None:
    """Return bytes that the first run needed beyond what was there before, a graph's own included; None on a CPU."""
    if device.type != "cuda":
        run(x, seeds)
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(x, seeds)
    return torch.cuda.max_memory_allocated(device) - before


def step_flop(ways: Ways, x: Tensor, seeds: Tensor) -> float:
    """Return floating-point operations of one eager step of the batch: a multiplication and an addition are two."""
    once = dataclasses.replace(ways.base, loop=ways.base.loop.stopped_after(1))
    with FlopCounterMode(display=False) as counter:
        ways.ways["eager"].run(once)(x, seeds)
    return float(counter.get_total_flops())


def device_rate(device: torch.device, precision: Precision) -> float:
    """Return floating-point operations per second of a large matrix product."""
    side = MATRIX[device.type]
    one = torch.randn(side, side, device=device, dtype=getattr(torch, precision))
    best = float("inf")
    for _ in range(12):
        started = clock(device)
        one @ one
        best = min(best, clock(device) - started)
    return 2 * side**3 / best


def device_bandwidth(device: torch.device) -> float:
    """Return bytes per second of a copy, read and written."""
    one = torch.zeros(COPY[device.type], device=device)
    other, best = torch.empty_like(one), float("inf")
    for _ in range(12):
        started = clock(device)
        other.copy_(one)
        best = min(best, clock(device) - started)
    return 2 * one.numel() * one.element_size() / best


def agreement(config: SpeedConfig, ways: Ways, dataset: data.DataSet) -> dict[str, Any]:
    """Labels of test images purified by the preset `default` in every way, against the eager one in float32."""
    images = dataset.test.images[: config.n]
    scores: dict[str, Tensor] = {}
    for name, way in ways.ways.items():
        run, parts = way.run(PRESETS["default"]), []
        for numbers in torch.arange(len(images)).split(64):
            x = images[numbers].to(ways.device).float() / 255
            with torch.no_grad():
                parts.append(way.ready.classifier(run(x, numbers.to(ways.device))).softmax(1).cpu())
        scores[name] = torch.cat(parts)
    exact = scores.pop("eager")
    top = exact.topk(2, dim=1).values
    margin = top[:, 0] - top[:, 1]
    found = {}
    for name, other in scores.items():
        differs = exact.argmax(1) != other.argmax(1)
        found[name] = {
            "n": len(exact),
            "same_label": float((~differs).float().mean()),
            "largest_margin_of_the_differing": float(margin[differs].max()) if differs.any() else None,
        }
    return found


def clock(device: torch.device) -> float:
    """Wait until the device has done what it was given, and return the clock's seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_purifier(config: SpeedConfig) -> int:
    """Measure, write the result file after every batch size, and say the figures."""
    ways = Ways(config, subject(config))
    if config.data and len(ways.ways) == 1:
        raise ConfigError("data: there is one way alone here, and nothing to compare it with")
    card = ways.ways["eager"].ready.card
    dataset = data.load(config.data, card.pictures, cache=config.cache) if config.data else None
    where = torch.cuda.get_device_name(ways.device) if ways.device.type == "cuda" else "cpu"
    out = config.out or results.FOLDER / "purify_speed" / f"{card.architecture.name}_{where.replace(' ', '-')}.json"
    found: dict[str, Any] = {
        "architecture": card.architecture.name,
        "weights_sha256": card.weights_sha256 or None,
        "flop_per_s": ways.rates,
        "bytes_per_s": device_bandwidth(ways.device),
        "batches": {},
        "allocator": os.environ.get("GLIBC_TUNABLES", ""),
    }
    if dataset is not None:
        found["agreement"] = agreement(config, ways, dataset)
        print(found["agreement"], flush=True)
    for size in config.batch:
        found["batches"][size] = measure(config, ways, int(size))
        for name, cells in found["batches"][size].items():
            print(
                f"batch {size:>3}  {name:20} {cells['ms']:9.1f} ms  {cells['images_per_s']:9.1f} images/s  "
                f"{cells['times_published_procedure']:6.2f} x  {cells['of_rate']:5.1%} of the device's rate",
                flush=True,
            )
        results.write(out, script=SCRIPT, config=as_json(config), results=found)
    print(out)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(SpeedConfig, time_purifier, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
