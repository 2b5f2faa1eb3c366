"""`python benchmarks/serving/bulk_memory.py`: the memory of `unperturb purify DIR --out OUT` over many images."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unperturb.benchmarks.command import BenchmarkConfig, run_command
from unperturb.benchmarks.reporting import results
from unperturb.models.checkpoints.store import read_card, resolve
from unperturb.models.errors import ConfigError, UnperturbError
from unperturb.models.options import as_json, option

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-c", "from unperturb.service.cli import main; main()", "purify")
SAMPLES_EVERY_S = 0.1

SCRIPT = "benchmarks/serving/bulk_memory.py"


@dataclass(frozen=True, kw_only=True)
class BulkMemoryConfig(BenchmarkConfig):
    """Purify a folder of random 32x32 images in one process, and watch its memory."""

    n: int = option("images", 10_000)
    chunk: int = option("images to one part of the traces", 256)
    batch: int = option("images on the device at a time", 64)
    out: Path = option("result file", results.FOLDER / "bulk_memory.json")

    def __post_init__(self) -> None:
        """Raise ConfigError for counts that tell nothing."""
        if min(self.chunk, self.batch) < 1 or self.n < 2 * self.chunk:
            raise ConfigError(
                f"n={self.n} must be at least two chunks of {self.chunk}, and batch={self.batch} 1 or more"
            )


def write_images(folder: Path, *, count: int, seed: int) -> None:
    """PNG files of noise: random images compress least."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png")


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB; 0 when it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def watch(command: list[str], *, traces: Path) -> dict[str, Any]:
    """Run the command; its memory in MiB after its first part in `traces`, and at most: in all, and for each part."""
    after_first, peaks, started = 0.0, [0.0], time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            now = rss_mib(process.pid)
            if len(list(traces.glob("*.parquet"))) >= len(peaks):
                after_first = after_first or now
                peaks.append(0.0)
            peaks[-1] = max(peaks[-1], now)
            time.sleep(SAMPLES_EVERY_S)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UnperturbError(f"the command ended with status {process.returncode}")
    if not after_first:
        raise UnperturbError("the command ended before its memory was seen; raise --n")
    return {
        "seconds": seconds,
        "rss_after_first_chunk_mib": after_first,
        "peak_rss_mib": max(peaks),
        "peak_rss_by_chunk_mib": [peak for peak in peaks if peak],  # none is seen after a last part that ends it all
    }


def measure(config: BulkMemoryConfig) -> dict[str, Any]:
    """Purify the images in a temporary folder."""
    card = read_card(resolve(config.checkpoint))
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "images", Path(name) / "out"
        source.mkdir()
        write_images(source, count=config.n, seed=config.seed)
        options = {name: getattr(config, name) for name in ("checkpoint", "chunk", "batch", "seed", "device")}
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        found = watch([*COMMAND, str(source), "--out", str(out), *flags], traces=out / "traces")
        purified = sum(1 for _ in (out / "images").iterdir())
    if purified != config.n:
        raise UnperturbError(f"{purified} of {config.n} images were written")
    return {
        "checkpoint": {"id": card.id, "weights_sha256": card.weights_sha256},
        "count": config.n,
        **found,
        "images_per_second": config.n / found["seconds"],  # the start of the process included
    }


def measure_memory(config: BulkMemoryConfig) -> int:
    """Measure, write the result file, and say the figures; 2 for a bad option."""
    found = measure(config)
    results.write(config.out, script=SCRIPT, config=as_json(config), results=found)
    print(
        f"{found['count']} images in {found['seconds']:.0f} s ({found['images_per_second']:.1f}/s); resident memory "
        f"{found['rss_after_first_chunk_mib']:.0f} MiB after the first chunk, {found['peak_rss_mib']:.0f} MiB at most"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(BulkMemoryConfig, measure_memory, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
