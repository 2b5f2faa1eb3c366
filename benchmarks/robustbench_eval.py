"""`python benchmarks/robustbench_eval.py --data DIR`: purified classifiers beside RobustBench's models.

Every model behind every purifier is one run, and one JSON file in --out. A run that was killed goes on where it was
when the same command is given again. Rules: Croce et al., "Evaluating the adversarial robustness of adaptive test-time
defenses", ICML 2022.
"""

import dataclasses
import hashlib
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.robustness import attacks
from unperturb.benchmarks.robustness.attacks.scene import BUDGETS, Threat
from unperturb.benchmarks.robustness.corruptions import CorruptionRun
from unperturb.benchmarks.robustness.data import EvaluationSet, load_images
from unperturb.benchmarks.robustness.estimate import announce
from unperturb.benchmarks.robustness.evaluation import Evaluation, Plan
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.robustbench import PREFIX, parse_name
from unperturb.models.options import as_json, option
from unperturb.models.provenance import digest_of
from unperturb.models.purifiers.registry import build_purifier

EPSILON = {"Linf": 8 / 255, "L2": 0.5}

SCRIPT = "benchmarks/robustbench_eval.py"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Score purified classifiers by the field's rules: AutoAttack, transfer, adaptive attacks, the worst case."""

    model: tuple[str, ...] = option(
        "shipped name, checkpoint folder, or robustbench:<Name>[:<dataset>:<threat>]; may be repeated", ("default",)
    )
    purifier: tuple[str, ...] = option(
        "none, reverse-attack[:preset|key=value,…], anti-adversary, hedge, denoiser[:times=N]; may be repeated",
        ("none", "reverse-attack"),
    )
    dataset: Literal["cifar10", "cifar100", "imagenet"] = option("what the images are", "cifar10")
    threat_model: Literal["Linf", "L2", "corruptions"] = option("the ball, or the common corruptions", "Linf")
    epsilon: float | None = option("radius in pixel units of [0, 1]; default 8/255 (Linf), 0.5 (L2)", None)
    data: Path | None = option("folder of class folders or .npz file; default: RobustBench's own loader", None)
    n_examples: int = option("test images, the first ones", 1000)
    attacks: str = option("all, fast, or names between commas", "all")
    generator: Path | None = option("folder of a noise generator (unperturb train generator), as an attack", None)
    budget: Literal["fast", "standard", "full"] = option("steps, restarts and draws of the attacks", "standard")
    seed: int = option("of the attacks' own draws", 0)
    chunk: int = option("images attacked together: the batch, and what is lost at most when a run is killed", 128)
    shard: str = option("1/1, or as in 3/16: every 16th chunk from the third; torchrun's ranks are shards", "1/1")
    panel: int = option("images to store in the record: clean, attacked, purified; 0 for none", 6)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    out: Path = option("folder for the result files", Path("results"))
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        for name in ("n_examples", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.panel < 0:
            raise ConfigError(f"panel={self.panel} is below 0")
        self.plan()

    def plan(self) -> Plan:
        """Return the plan of every run."""
        chosen = () if self.threat_model == "corruptions" else attacks.chosen(self.attacks)
        if (attacks.GENERATOR in chosen) != (self.generator is not None):
            raise ConfigError(f"attacks={self.attacks!r}: the attack `generator` and --generator FOLDER go together")
        norm: Literal["linf", "l2"] = "l2" if self.threat_model == "L2" else "linf"
        epsilon = EPSILON.get(self.threat_model, 8 / 255) if self.epsilon is None else self.epsilon
        return Plan(
            dataset=self.dataset,
            threat=Threat(norm=norm, epsilon=epsilon),
            budget=BUDGETS[self.budget],
            attacks=chosen,
            seed=self.seed,
            chunk=self.chunk,
            shard=self._shard(),
            panel=self.panel,
            generator=self.generator,
        )

    def _shard(self) -> tuple[int, int]:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        number, _, count = self.shard.partition("/")
        if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
            raise ConfigError(f"shard={self.shard!r} is not of the form 3/16")
        return (int(number) - 1) * world + rank, int(count) * world


def load_model(spec: str, config: EvaluationConfig) -> Checkpoint:
    """A checkpoint of this project, or a classifier of RobustBench: by default that for the run's data and threat."""
    if spec.startswith(PREFIX):
        name, dataset, threat = parse_name(spec, dataset=config.dataset, threat=config.threat_model)
        spec = f"{PREFIX}{name}:{dataset}:{threat}"
        if dataset != config.dataset:
            raise ConfigError(f"model {spec} is for another data set than --dataset {config.dataset}")
    return store.load(spec)


def result_name(config: EvaluationConfig, plan: Plan, model: str, purifier: str) -> str:
    """The result file's name: everything that tells two runs apart."""
    radius = f"{config.threat_model}-{plan.threat.epsilon * 255:.4g}of255"
    if config.threat_model == "corruptions":
        radius = "corruptions"
    parts = [model, purifier, config.dataset, radius, f"n{config.n_examples}", config.budget, f"seed{config.seed}"]
    if plan.attacks and plan.attacks != attacks.NAMES:
        parts.append("fast" if plan.attacks == attacks.FAST else "+".join(plan.attacks))
    number, count = plan.shard
    name = "_".join("".join(c if c.isalnum() or c in ".=-+" else "-" for c in part) for part in parts)
    if len(name) > 160:  # a file name has 255 bytes at most
        name = f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name + (f".shard-{number + 1}-of-{count}" if count > 1 else "") + ".json"


def open_device(name: str) -> torch.device:
    """Return the device, ready and set to give the same answer twice; under torchrun each process has its own GPU."""
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r} is not on this machine ({reason}); --device cpu always is") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def run_all(config: EvaluationConfig) -> list[Path]:
    """Check everything, then every run; the result files."""
    plan, device = config.plan(), open_device(config.device)
    if not plan.chunks(config.n_examples):
        print(f"shard {plan.shard[0] + 1}/{plan.shard[1]} of {config.n_examples} images is empty: nothing to do")
        return []
    runs: list[tuple[str, str, Checkpoint, EvaluationSet, Evaluation]] = []
    for model in config.model:
        subject = load_model(model, config)
        data = load_images(
            config.dataset,
            config.data,
            n=config.n_examples,
            image_size=subject.classifier.image_size,
            classes=subject.card.classes,
            cache=config.cache,
        )
        if model != subject.card.id and Path(model).is_dir():
            model = f"{subject.card.id}-{subject.card.weights_sha256[:8]}"  # no path of a machine in names
        for purifier in config.purifier:
            make = partial(build_purifier, purifier)
            title = f"{model} + {purifier}"
            kind = CorruptionRun if config.threat_model == "corruptions" else Evaluation
            run = kind(subject, make, data, plan, folder=config.out, device=device, title=title)
            runs.append((model, purifier, subject, data, run))
    if config.threat_model != "corruptions":
        announce([run for *_, run in runs])
    files = []
    for model, purifier, subject, data, run in runs:
        found = run.run()
        file = config.out / result_name(config, plan, model, purifier)
        described = {
            "model": {
                "spec": subject.card.architecture.name if model.startswith(PREFIX) else subject.card.id,
                "architecture": subject.card.architecture.name,
                "weights_sha256": subject.card.weights_sha256 or digest_of(subject.classifier),
            },
            "classes": list(subject.card.classes),
            "purifier_spec": purifier,
            "data": {"dataset": config.dataset, "source": data.source, "sha256": data.digest},
            "threat": {"model": config.threat_model, "epsilon": plan.threat.epsilon},
            "budget": {"name": config.budget, **dataclasses.asdict(plan.budget)},
            "shard": f"{plan.shard[0] + 1}/{plan.shard[1]}",
        }
        settings = {**as_json(config), "model": model, "purifier": purifier}
        for place in ("data", "generator"):
            settings.pop(place)
        results.write(file, script=SCRIPT, config=settings, results={**described, **found})
        files.append(file)
        print(f"{file}: {run.headline(found)}", flush=True)
    return files


def evaluate(config: EvaluationConfig) -> int:
    """Run every model behind every purifier."""
    run_all(config)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(EvaluationConfig, evaluate, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
