"""`python benchmarks/papers/run.py --data cifar10`: train and measure every system of the field's root papers.

Each arm (benchmarks/papers/plan.py) is `unperturb train …`, once per seed, and one JSON file of results. The same
command goes on where it was killed: a finished seed is not run again, a begun one resumes after its last epoch.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.papers.measures import HARNESS_ATTACKS, MEASURES, Subject
from unperturb.benchmarks.papers.plan import SCALES, Arm, ScaleName, arms
from unperturb.benchmarks.reporting import results
from unperturb.models import provenance
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import CARD
from unperturb.models.errors import ConfigError, UnperturbError
from unperturb.models.options import as_json, option
from unperturb.models.pixels import Preprocessing
from unperturb.training import data

NAMES_IT = {"head": "classifier", "generator": "classifier"}  # how a command calls the checkpoint that it needs
PICTURES = Preprocessing(size=32)
MADE = {"generator": "generator"}  # the folder that a command writes, where it is not "checkpoint"

UNTOLD = ("data", "transfer_data", "imported", "runs", "arm")  # which are places, or told otherwise
SCRIPT = "benchmarks/papers/run.py"

MEASURING = threading.Lock()  # torch's generator is the whole process's, and so is what the harness watches


@dataclass(frozen=True, kw_only=True)
class PapersConfig:
    """Train and measure every system of the field's root papers."""

    data: str = option("cifar10, or a folder with train/<class>/* and test/<class>/*", "cifar10")
    transfer_data: str = option("cifar100, or such a folder, to which encoders are transferred", "cifar100")
    scale: ScaleName = option("small: minutes an arm on a CPU core; full: a GPU", "small")
    imported: str = option("checkpoint (unperturb import) for the arms imported…, not run without it", "")
    arm: tuple[str, ...] = option("an arm's name, or the beginning of several; may be repeated (default: all)", ())
    seeds: int = option("at most so many seeds of each arm", 3)
    jobs: int = option("arms at a time", 1)
    runs: Path = option("folder for states, logs and checkpoints", Path("runs/systems"))
    out: Path = option("folder for the result files", results.FOLDER / "systems")
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        known = arms(SCALES[self.scale])
        for start in self.arm:
            if not any(name.startswith(start) for name in known):
                raise ConfigError(f"arm {start!r} is not one of {', '.join(known)}")
            if start.startswith("imported") and not self.imported:
                raise ConfigError(f"arm {start!r} goes on from a checkpoint that has seen images: give --imported")


class Campaign:
    """The arms that are wanted, and what is known of them already."""

    def __init__(self, config: PapersConfig) -> None:
        self.config, self.arms = config, arms(SCALES[config.scale])
        self.imported = store.read_card(store.resolve(config.imported)) if config.imported else None
        self.wanted = [
            name
            for name in self.arms
            if (not config.arm or name.startswith(config.arm)) and (self.imported or not self.needs_imported(name))
        ]
        self.datasets: dict[str, data.DataSet] = {}
        for name in self.wanted:
            for needed in self.chain(name):
                self.dataset(needed)  # all are read before anything runs
        self.lock = threading.Lock()

    def run(self) -> list[str]:
        """Run every arm that has no result yet, each after the one that it needs; return what failed, and why."""
        waiting: list[tuple[str, int]] = []
        for seed in range(self.config.seeds):
            for name in self.wanted:
                if seed < self.arms[name].seeds and not self.known(name, seed):
                    self._queue(waiting, name, seed)
        running: dict[Future[None], tuple[str, int]] = {}
        finished: set[tuple[str, int] | None] = {None}
        failed: list[str] = []
        with ThreadPoolExecutor(self.config.jobs) as pool:
            while True:
                ready = [one for one in waiting if self.needed_by(*one) in finished]
                for one in ready[: self.config.jobs - len(running)]:
                    running[pool.submit(self._one, *one)] = one
                    waiting.remove(one)
                if not running:
                    return failed + [f"{name}, seed {seed}: not run" for name, seed in waiting]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    one = running.pop(future)
                    try:
                        future.result()
                        finished.add(one)
                    except UnperturbError as error:
                        failed.append(f"{one[0]}, seed {one[1]}: {error}")

    def _queue(self, waiting: list[tuple[str, int]], name: str, seed: int) -> None:
        """Return an arm behind those that it goes on from."""
        needed = self.needed_by(name, seed)
        if needed is not None:
            self._queue(waiting, *needed)
        if (name, seed) not in waiting:
            waiting.append((name, seed))

    def needed_by(self, name: str, seed: int) -> tuple[str, int] | None:
        """Return the arm that it goes on from, and that one's seed: its last, where it has fewer."""
        needs = self.arms[name].needs
        return None if needs is None else (needs, min(seed, self.arms[needs].seeds - 1))

    def known(self, name: str, seed: int) -> bool:
        """Return whether the arm's file has every figure of that seed, by the same options of the same data."""
        found = self._before(name).get(str(seed))
        return found is not None and found["figures"].keys() == set(self.arms[name].measures)

    def _before(self, name: str) -> dict[str, Any]:
        """Return the seeds of the arm's file, if they were made by the same options of the same data."""
        if not self.file(name).exists():
            return {}
        found = json.loads(self.file(name).read_text())["results"]
        return dict(found["seeds"]) if all(found[key] == value for key, value in self.identity(name).items()) else {}

    def identity(self, name: str) -> dict[str, Any]:
        """Return what an arm's figures depend on, beside the code and the seed."""
        return {
            "scale": self.config.scale,
            "options": self.chain(name),
            "data": self.dataset(name).name,
            "data_sha256": self.dataset(name).digest,
        }

    def file(self, name: str) -> Path:
        """Return the arm's result file."""
        return self.config.out / self.config.scale / f"{name}.json"

    def chain(self, name: str) -> dict[str, Any]:
        """Return the arm's command and options, whose weights it goes on from, what the harness is asked for, and the
        same of the arms that it needs.
        """
        arm = self.arms[name]
        own: dict[str, Any] = {"command": arm.command, **arm.options}
        if "classifier" in arm.options:
            own |= {"classifier_sha256": store.read_card(store.resolve(arm.options["classifier"])).weights_sha256}
        if "harness" in arm.measures:
            own |= {"harness": {"attacks": HARNESS_ATTACKS, **SCALES[self.config.scale].harness}}
        if arm.imported and self.imported:
            network = self.imported.architecture
            own |= {"imported": f"{network.name}, {network.image_size} pixels"}
            own |= {"imported_sha256": self.imported.weights_sha256}
        return {name: own} if arm.needs is None else {**self.chain(arm.needs), name: own}

    def _one(self, name: str, seed: int) -> None:
        arm, needed = self.arms[name], self.needed_by(name, seed)
        run = self.folder(name, seed)
        if arm.command and not (run / MADE.get(arm.command, "checkpoint") / CARD).exists():
            print(f"{name}, seed {seed}: training", flush=True)
            self._train(name, arm, seed, run)
        trained = run if arm.command or needed is None else self.folder(*needed)
        if self.known(name, seed):
            return
        torch.set_num_threads(self._threads())
        subject = Subject(
            trained / MADE.get(arm.command, "checkpoint"),
            trained,
            None if needed is None else self.folder(*needed) / "checkpoint",
            self.dataset(name),
            self.config.data,
            SCALES[self.config.scale],
            torch.device(self.config.device),
        )
        with MEASURING:
            started = time.perf_counter()
            figures = {measure: MEASURES[measure](subject) for measure in arm.measures}
        self._record(
            name,
            seed,
            {
                "commit": provenance.commit(),
                "training": _cost(run),
                "figures": figures,
                "measured_in_s": round(time.perf_counter() - started, 1),
            },
        )
        print(f"{name}, seed {seed}: done", flush=True)

    def dataset(self, name: str) -> data.DataSet:
        """Return what the arm is trained and measured on, in the pictures that its network takes."""
        source = self.config.transfer_data if "data" in self.arms[name].options else self.config.data
        how = self.imported.pictures if self.imported and self.needs_imported(name) else PICTURES
        key = f"{source} {how}"
        if key not in self.datasets:
            self.datasets[key] = data.load(source, how)
        return self.datasets[key]

    def needs_imported(self, name: str) -> bool:
        """Return whether the arm, or one that it needs, goes on from the imported checkpoint."""
        arm = self.arms[name]
        return arm.imported or (arm.needs is not None and self.needs_imported(arm.needs))

    def folder(self, name: str, seed: int) -> Path:
        """Return where an arm's run is: another place for other options or data."""
        identity = [self.identity(one) for one in self.chain(name)]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return self.config.runs / self.config.scale / f"{name}-{digest}" / str(seed)

    def _threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.config.jobs)

    def _train(self, name: str, arm: Arm, seed: int, run: Path) -> None:
        options = {**arm.options, "data": self.config.transfer_data if "data" in arm.options else self.config.data}
        if (needed := self.needed_by(name, seed)) is not None:
            options[NAMES_IT.get(arm.command, "encoder")] = str(self.folder(*needed) / "checkpoint")
        if arm.imported:
            options["classifier"] = self.config.imported
        options |= {"seed": str(seed), "out": str(run), "device": self.config.device}
        command = [sys.executable, "-m", "unperturb.training", arm.command]
        for key, value in options.items():
            command += [f"--{key}"] if value == "" else [f"--{key}", value]
        run.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads())}
        with (run / "output.txt").open("a") as output:
            done = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False)
        if done.returncode:
            tail = (run / "output.txt").read_text()[-500:]
            raise ConfigError(f"{name}, seed {seed}: training ended with status {done.returncode}: …{tail}")

    def _record(self, name: str, seed: int, found: dict[str, Any]) -> None:
        """Add the seed to the arm's file; what other options made is dropped."""
        settings = {k: v for k, v in as_json(self.config).items() if k not in UNTOLD}
        with self.lock:
            seeds = {**self._before(name), str(seed): found}
            results.write(
                self.file(name),
                script="benchmarks/papers/run.py",
                config=settings,
                results={**self.identity(name), "seeds": dict(sorted(seeds.items()))},
            )


def _cost(run: Path) -> dict[str, Any]:
    """Return seconds of the training, epochs, and images an epoch."""
    log = run / "log.jsonl"
    if not log.exists():
        return {}
    entries = {entry["epoch"]: entry for entry in map(json.loads, log.read_text().splitlines())}
    return {"seconds": round(sum(entry["seconds"] for entry in entries.values()), 1), "epochs": max(entries)}


def run_campaign(config: PapersConfig) -> int:
    """Train and measure the wanted arms; return 2 where one failed."""
    failed = Campaign(config).run()
    for line in failed:
        print(f"{SCRIPT}: {line}", file=sys.stderr)
    return 2 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(PapersConfig, run_campaign, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
