"""`python benchmarks/purify_speed.py`: a purification's cost, beside the published procedure and the device's limit.

Ways to take the same steps with the same views and weights, in turn in one run, medians of repeated blocks: the
published procedure as it is described, this project's loop in eager PyTorch, captured (on a GPU), compiled; then the
presets, in the fastest way. The limit is the device's own: its rate at a large matrix product, in the backbone's
precision. Needs torch alone; any GPU with PyTorch will do.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import results
from benchmarks.published_procedure import PublishedProcedure
from models import checkpoint
from models.backbones import Architecture, build
from models.captured import Execution, Stepper
from models.checkpoint import Card, Checkpoint, HeadCard
from models.continuous import Purification
from models.contrastive import NegativesBank, ProjectionHead
from models.defended import reverse_attack_of
from models.errors import ConfigError, UnperturbError
from models.folding import Precision, prepared
from models.options import as_json, option, parse
from models.reverse_attack import PRESETS, ReverseAttackConfig
from training import data

HEAD = HeadCard(hidden=128, embedding_dim=8, temperature=0.2)
BANK = 2000
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrix product that the device's rate is measured with
COPY = {"cpu": 1 << 24, "cuda": 1 << 28}  # numbers in the copy that its bandwidth is measured with
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time the purifier."""

    checkpoint: str = option("shipped name or folder", "default")
    arch: str = option("instead of a checkpoint, this architecture with random weights", "")
    batch: tuple[str, ...] = option("images at a time; may be repeated (default: 1 8 64 512)", ("1", "8", "64", "512"))
    views: int = option("of every way but the presets", 4)
    steps: int = option("of every way but the presets", 40)
    blocks: int = option("times that each is timed, in turn; the median counts", 5)
    compiled: bool = option("also torch's compiler: a minute for every batch size", False)
    precision: Precision = option("of the captured and compiled ways", "float32")
    data: str = option("a data set whose first test images must keep their label in every way; empty: not checked", "")
    n: int = option("how many of them", 1000)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    out: Path | None = option("result file (default: results/purify_speed/<architecture>_<device>.json)", None)
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not all(size.isdigit() and int(size) > 0 for size in self.batch):
            raise ConfigError(f"batch={' '.join(self.batch)!r} are not whole numbers of at least 1")
        for name in ("steps", "blocks", "n"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


def subject(config: Config) -> Checkpoint:
    """The checkpoint, or random weights of an architecture behind a head of the usual size."""
    if not config.arch:
        return checkpoint.load(config.checkpoint, device=config.device)
    torch.manual_seed(0)
    architecture = Architecture(name=config.arch, num_classes=10)
    classifier = build(architecture).requires_grad_(False).to(config.device)
    head = ProjectionHead(
        feature_dim=classifier.feature_dim, hidden=HEAD.hidden, embedding_dim=HEAD.embedding_dim
    ).requires_grad_(False).to(config.device)  # fmt: skip
    bank = NegativesBank(torch.randn(BANK, HEAD.embedding_dim), torch.zeros(BANK, dtype=torch.int64)).to(config.device)
    names = tuple(str(number) for number in range(10))
    card = Card(id=config.arch, architecture=architecture, classes=names, data={}, training={}, head=HEAD)
    return Checkpoint(card, classifier, head, bank)


class Ways:
    """The same purification in several ways: name -> a function of images and seeds."""

    def __init__(self, config: Config, loaded: Checkpoint) -> None:
        self.config, self.device = config, torch.device(config.device)
        self.exact = prepared(loaded)
        self.rounded = self.exact if config.precision == "float32" else prepared(loaded, precision=config.precision)
        loop = dataclasses.replace(PRESETS["published"].loop, steps=config.steps)
        self.base = ReverseAttackConfig(loop=loop, views=config.views)
        executions: list[Execution] = ["captured"] if self.device.type == "cuda" else []
        executions += ["compiled"] if config.compiled else []
        self.steppers: dict[str, Stepper] = {"eager": Stepper(self.exact.classifier, self.device, execution="eager")}
        for name in executions:
            self.steppers[name] = Stepper(self.rounded.classifier, self.device, execution=name)
        self.fastest = next(reversed(self.steppers))

    def stage(self, way: str, config: ReverseAttackConfig | None = None) -> Purification:
        """The steps of one way."""
        ready = self.exact if way == "eager" else self.rounded
        return Purification(reverse_attack_of(ready, config or self.base))

    def all(self) -> dict[str, tuple[int, int, Callable[[Tensor, Tensor], Tensor]]]:
        """Name -> steps, views and the way itself."""
        plain = PublishedProcedure(subject(self.config), views=self.config.views, steps=self.config.steps)
        made: dict[str, tuple[int, int, Callable[[Tensor, Tensor], Tensor]]] = {
            "published procedure": (self.config.steps, self.config.views, lambda x, _: plain(x))
        }
        for way in self.steppers:
            made[way] = (self.config.steps, self.config.views, self.by(way, self.stage(way)))
        for name, preset in PRESETS.items():
            stage = self.stage(self.fastest, preset)
            made[f"preset {name}"] = (preset.loop.steps, preset.views, self.by(self.fastest, stage))
        return made

    def by(self, way: str, stage: Purification) -> Callable[[Tensor, Tensor], Tensor]:
        """Purify images in that way."""
        return lambda x, seeds: self.steppers[way].descend(stage, x, seeds=seeds).image


def measure(config: Config, ways: Ways, size: int) -> dict[str, Any]:
    """Every way on one batch of images, in turn."""
    device, side = ways.device, ways.exact.classifier.image_size
    x = torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    seeds = torch.arange(size, device=device)
    every = ways.all()
    spent: dict[str, list[float]] = {name: [] for name in every}
    memory: dict[str, int | None] = {}
    for block in range(-1, config.blocks):  # the first warms up
        for name, (_, _, run) in every.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            started = clock(device)
            run(x, seeds)
            if block >= 0:
                spent[name].append(clock(device) - started)
            memory[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    flop = step_flop(ways, x, seeds)
    found = {}
    for name, (steps, views, _) in every.items():
        seconds = statistics.median(spent[name])
        per_view = flop / config.views / size
        found[name] = {
            "steps": steps, "views": views, "seconds": spent[name], "ms": seconds * 1000,
            "ms_per_step": seconds * 1000 / steps, "images_per_s": size / seconds,
            "passes_per_s": size * steps * views / seconds, "peak_bytes": memory[name],
            "times_published_procedure": statistics.median(spent["published procedure"]) / seconds,
            "flop_per_s": per_view * views * steps * size / seconds,
        }  # fmt: skip
    return found


def step_flop(ways: Ways, x: Tensor, seeds: Tensor) -> float:
    """Floating-point operations of one eager step of the batch: a multiplication and an addition are two."""
    stage = ways.stage("eager")
    shorter = dataclasses.replace(stage.purifier.config, loop=stage.loop.stopped_after(1))
    with FlopCounterMode(display=False) as counter:
        ways.by("eager", ways.stage("eager", shorter))(x, seeds)
    return float(counter.get_total_flops())


def device_rate(device: torch.device, precision: Precision) -> float:
    """Floating-point operations per second of a large matrix product."""
    side = MATRIX[device.type]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    one = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        started = clock(device)
        one @ one
        best = min(best, clock(device) - started)
    return 2 * side**3 / best


def device_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written."""
    one = torch.zeros(COPY[device.type], device=device)
    other, best = torch.empty_like(one), float("inf")
    for _ in range(12):
        started = clock(device)
        other.copy_(one)
        best = min(best, clock(device) - started)
    return 2 * one.numel() * one.element_size() / best


def agreement(config: Config, ways: Ways) -> dict[str, Any]:
    """Labels of purified test images in every way of this project, against the eager one in float32."""
    dataset = data.load(config.data, image_size=ways.exact.classifier.image_size, cache=config.cache)
    images = dataset.test.images[: config.n]
    scores: dict[str, Tensor] = {}
    for way in ways.steppers:
        run, classifier = ways.by(way, ways.stage(way)), (ways.exact if way == "eager" else ways.rounded).classifier
        parts = []
        for numbers in torch.arange(len(images)).split(64):
            x = images[numbers].to(ways.device).float() / 255
            with torch.no_grad():
                parts.append(classifier(run(x, numbers.to(ways.device))).softmax(1).cpu())
        scores[way] = torch.cat(parts)
    exact = scores.pop("eager")
    top = exact.topk(2, dim=1).values
    margin = top[:, 0] - top[:, 1]
    found = {}
    for way, other in scores.items():
        differs = exact.argmax(1) != other.argmax(1)
        found[way] = {
            "n": len(exact), "same_label": float((~differs).float().mean()),
            "largest_margin_of_the_differing": float(margin[differs].max()) if differs.any() else None,
        }  # fmt: skip
    return found


def clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(arguments: list[str]) -> int:
    """Measure, write the result file after every batch size, and say the figures."""
    try:
        config = parse(Config, arguments, program="benchmarks/purify_speed.py")
        loaded = subject(config)
    except UnperturbError as error:
        print(f"benchmarks/purify_speed.py: {error}", file=sys.stderr)
        return 2
    ways = Ways(config, loaded)
    name = loaded.card.architecture.name
    where = torch.cuda.get_device_name(ways.device) if ways.device.type == "cuda" else "cpu"
    out = config.out or results.FOLDER / "purify_speed" / f"{name}_{where.replace(' ', '-')}.json"
    found: dict[str, Any] = {
        "architecture": name, "weights_sha256": loaded.card.weights_sha256 or None,
        "flop_per_s": device_rate(ways.device, config.precision),
        "bytes_per_s": device_bandwidth(ways.device),
        "fastest": ways.fastest, "batches": {},
    }  # fmt: skip
    for size in config.batch:
        found["batches"][size] = measure(config, ways, int(size))
        for way, cells in found["batches"][size].items():
            share = cells["flop_per_s"] / found["flop_per_s"]
            print(
                f"batch {size:>3}  {way:20} {cells['ms']:9.1f} ms  {cells['images_per_s']:9.1f} images/s  "
                f"{cells['times_published_procedure']:6.2f} x  {share:5.1%} of the device's rate",
                flush=True,
            )
        results.write(out, script="benchmarks/purify_speed.py", config=as_json(config), results=found)
    if config.data:
        found["agreement"] = agreement(config, ways)
        print(found["agreement"])
        results.write(out, script="benchmarks/purify_speed.py", config=as_json(config), results=found)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
