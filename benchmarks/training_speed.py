"""`python benchmarks/training_speed.py --data DIR --before COMMIT`: the trainer of two commits, in turn in one run.

Each takes the same epochs of the same adversarial training (one step of PGD) with the same options;
what counts is the images a second of the last epoch's log line. Needs git and the repository's history.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option

SCRIPT = "benchmarks/training_speed.py"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class TrainingSpeedConfig:
    """Time the trainer of two commits."""

    data: str = option("an image folder, or cifar10")
    before: str = option("the commit that the other is compared with")
    after: str = option("the commit that is compared", "HEAD")
    arch: tuple[str, ...] = option("architectures that both know", ("wide_resnet_10_2", "preact_resnet18"))
    images: int = option("training images of an epoch", 2560)
    batch_size: int = option("images a step", 128)
    held_out: int = option("training images kept back", 100)
    epochs: int = option("of each run; the last one counts", 2)
    rounds: int = option("runs of each, in turn; the median of the rounds' ratios counts", 3)
    precision: str = option("of the forward passes: float32 or bfloat16", "float32")
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    out: Path = option("result file", results.FOLDER / "training_speed.json")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        for name in ("images", "batch_size", "epochs", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


def checkout(commit: str, folder: Path) -> str:
    """Write a commit's files into a folder and return its whole hash."""
    name = f"{commit}^{{commit}}"
    found = subprocess.run(["git", "rev-parse", "--verify", "--quiet", name], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise ConfigError(f"{commit} is no commit of {ROOT}; fetch the whole history, or name another one")
    whole = found.stdout.strip()
    files = subprocess.run(["git", "archive", whole], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        archive.extractall(folder, filter="data")
    return whole


def images_per_s(folder: Path, config: TrainingSpeedConfig, arch: str, out: Path) -> float:
    """Train by the files in a folder; return the last epoch's images a second."""
    module = "unperturb.training" if (folder / "unperturb").exists() else "training"
    options = {
        "data": str(Path(config.data).resolve()) if Path(config.data).is_dir() else config.data,
        "out": str(out),
        "arch": arch,
        "method": "pgd",
        "attack-steps": 1,
        "epochs": config.epochs,
        "batch-size": config.batch_size,
        "images": config.images + config.held_out,
        "held-out": config.held_out,
        "test-images": 100,
        "precision": config.precision,
        "device": config.device,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    ran = subprocess.run(
        [sys.executable, "-m", module, "classifier", *given],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise ConfigError(f"training {arch} by {folder.name} failed: {(ran.stderr.strip() or '-').splitlines()[-1]}")
    return float(json.loads((out / "log.jsonl").read_text().splitlines()[-1])["images_per_s"])


def measure(config: TrainingSpeedConfig) -> None:
    """Train by both, in turn, and write the rates."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("before", "after")}
        commits = {name: checkout(getattr(config, name), folder) for name, folder in folders.items()}
        rates = {arch: {name: list[float]() for name in folders} for arch in config.arch}
        for number in range(config.rounds):
            for arch, found in rates.items():
                for name in folders if number % 2 == 0 else reversed(folders):
                    found[name].append(
                        images_per_s(folders[name], config, arch, Path(temporary) / f"{arch}-{name}-{number}")
                    )
                    print(f"{arch}, {name}: {found[name][-1]:.0f} images/s", flush=True)
    whole = {"commits": commits, "images_per_s": rates}
    results.write(config.out, script=SCRIPT, config=as_json(config), results=whole)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    return run_command(TrainingSpeedConfig, measure, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
