"""`python benchmarks/robustbench_eval.py --data DIR`: purified classifiers beside RobustBench's models.

Every model behind every defense is one run, and one JSON file in --out. A run that was killed goes on where it was when
the same command is given again. Rules: Croce et al., "Evaluating the adversarial robustness of adaptive test-time
defenses", ICML 2022.
"""

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.robustness import attacks
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.corruptions import CorruptionRun, NoiseRun
from unperturb.benchmarks.robustness.data import PUBLISHED, EvaluationSet, folder_classes, is_own, load_images
from unperturb.benchmarks.robustness.device import open_device
from unperturb.benchmarks.robustness.estimate import announce
from unperturb.benchmarks.robustness.evaluation import Evaluation
from unperturb.benchmarks.robustness.fingerprint import fingerprint
from unperturb.benchmarks.robustness.plan import Plan
from unperturb.benchmarks.robustness.subjects import defense_of, described_model, load_subject, ready
from unperturb.benchmarks.robustness.surrogate import surrogate_of
from unperturb.benchmarks.robustness.threat import EPSILON, NORMS, Threat
from unperturb.benchmarks.robustness.workers import share
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.benchmark_classes import class_names
from unperturb.models.networks.generator import load as load_generator
from unperturb.models.networks.robustbench import PREFIX, parse_name
from unperturb.models.options import as_json, option

SCRIPT = "benchmarks/robustbench_eval.py"
NONE = "none"
RUNS: dict[str, type[Evaluation]] = {"corruptions": CorruptionRun, "noise": NoiseRun}  # others are attacked


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Score purified classifiers by the field's rules: AutoAttack, transfer, adaptive attacks, the worst case."""

    model: tuple[str, ...] = option(
        "shipped name, checkpoint folder, robustbench:<Name>[:<dataset>:<threat>], or package.module:factory on the "
        "Python path; may be repeated",
        ("default",),
    )
    purifier: tuple[str, ...] = option(
        "none, vote[:shifts=2], reverse-attack[:preset|key=value,…[,vote=2]], anti-adversary, hedge, "
        "restorer[:times=N], or package.module:Class[:key=value,…] on the Python path; may be repeated",
        ("none", "reverse-attack"),
    )
    dataset: str = option("what the images are: cifar10, cifar100, imagenet, or a name for your own", "cifar10")
    threat_model: Literal["Linf", "L2", "corruptions", "noise"] = option(
        "the ball, the common corruptions, or Gaussian noise in no ball", "Linf"
    )
    epsilon: float | None = option("radius in pixel units of [0, 1]; default 8/255 (Linf), 0.5 (L2)", None)
    data: Path | None = option("folder of class folders or .npz file; default: RobustBench's own loader", None)
    n_examples: int = option("test images, the first ones", 1000)
    image_size: int | None = option("side of the images of a factory's model; default 32, for imagenet 224", None)
    attacks: str = option("all, fast, or names between commas", "all")
    surrogate: str | None = option(
        "another classifier of the same classes, named as for --model: images made on it are an attack of their own",
        None,
    )
    generator: Path | None = option("folder of a noise generator (unperturb train generator), as an attack", None)
    budget: Literal["fast", "standard", "full"] = option("steps, restarts and draws of the attacks", "standard")
    seed: int = option("of the attacks' own draws", 0)
    chunk: int = option("images attacked together: the batch, and what is lost at most when a run is killed", 128)
    shard: str = option("1/1, or as in 3/16: every 16th chunk from the third; torchrun's ranks are shards", "1/1")
    workers: int = option("processes that share the cores of a CPU; for a small network as many as cores are faster", 1)
    panel: int = option("images to store in the record: clean, attacked, purified; 0 for none", 6)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    out: Path = option("folder for the result files", Path("results"))
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        for name in ("n_examples", "chunk", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.panel < 0:
            raise ConfigError(f"panel={self.panel} is below 0")
        if self.workers > 1 and not self.device.startswith("cpu"):
            raise ConfigError(f"workers={self.workers} share a CPU's cores, not {self.device}; there --shard helps")
        if self.dataset not in PUBLISHED and self.data is None:
            raise ConfigError(f"dataset={self.dataset!r}: your own images need --data; known: {', '.join(PUBLISHED)}")
        self._plan(None)

    def plan(self, device: torch.device) -> Plan:
        """Return the plan of every run."""
        return self._plan(device)

    def _plan(self, device: torch.device | None) -> Plan:
        chosen: tuple[str, ...] = ()
        if self.threat_model not in RUNS:
            chosen = attacks.chosen(self.attacks, with_surrogate=self.surrogate is not None)
        elif self.surrogate is not None:
            raise ConfigError(f"surrogate={self.surrogate!r}: it attacks in a ball, not under {self.threat_model}")
        if (attacks.GENERATOR in chosen) != (self.generator is not None):
            raise ConfigError(f"attacks={self.attacks!r}: the attack `generator` and --generator FOLDER go together")
        epsilon = EPSILON.get(self.threat_model, 8 / 255) if self.epsilon is None else self.epsilon
        load = device is not None and self.generator is not None
        return Plan(
            threat=Threat(norm=NORMS.get(self.threat_model, "linf"), epsilon=epsilon),
            budget=BUDGETS[self.budget],
            attacks=chosen,
            seed=self.seed,
            chunk=self.chunk,
            shard=self._shard(),
            panel=self.panel,
            generator=load_generator(self.generator, device=device)[0] if load else None,  # type: ignore[arg-type]
        )

    def _shard(self) -> tuple[int, int]:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        number, _, count = self.shard.partition("/")
        if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
            raise ConfigError(f"shard={self.shard!r} is not of the form 3/16")
        return (int(number) - 1) * world + rank, int(count) * world


def load_model(spec: str, config: EvaluationConfig) -> Checkpoint:
    """Return a checkpoint, a factory's model, or RobustBench's classifier, by default for the run's data and threat."""
    published = config.dataset in PUBLISHED
    if spec.startswith(PREFIX):
        dataset = config.dataset if published else "cifar10"
        name, dataset, threat = parse_name(spec, dataset=dataset, threat=config.threat_model)
        spec = f"{PREFIX}{name}:{dataset}:{threat}"
        if published and dataset != config.dataset:
            raise ConfigError(f"model {spec} is for another data set than --dataset {config.dataset}")
    size = config.image_size or (224 if config.dataset == "imagenet" else 32)
    classes = class_names(config.dataset) if published else folder_classes(config.data)
    return load_subject(spec, classes=classes, image_size=size)


def result_name(config: EvaluationConfig, plan: Plan, described: dict[str, Any], purifier: str) -> str:
    """The result file's name: everything that tells two runs apart, the rarer of it as a digest."""
    model = described["model"]["spec"]
    radius: str = config.threat_model
    if config.threat_model not in RUNS:
        epsilon = plan.threat.epsilon
        radius += f"-{epsilon:.4g}" if config.threat_model == "L2" else f"-{epsilon * 255:.4g}of255"
    parts = [model, purifier, config.dataset, radius, f"n{config.n_examples}", config.budget, f"seed{config.seed}"]
    if plan.attacks and plan.attacks != attacks.NAMES:
        parts.append("fast" if plan.attacks == attacks.FAST else "+".join(plan.attacks))
    rarer = {
        "chunk": None if plan.chunk == EvaluationConfig.chunk else plan.chunk,
        "image_size": config.image_size,
        "generator": None if plan.generator is None else fingerprint(plan.generator),
        **({"surrogates": described["surrogates"]} if attacks.SURROGATE in plan.attacks else {}),
        "data": described["data"]["sha256"] if described["data"]["own"] else None,
    }
    if any(rarer.values()):
        parts.append(hashlib.sha256(json.dumps(rarer).encode()).hexdigest()[:8])
    number, count = plan.shard
    name = "_".join("".join(c if c.isalnum() or c in ".=-+" else "-" for c in part) for part in parts)
    if len(name) > 160:  # a file name has 255 bytes at most
        name = f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name + (f".shard-{number + 1}-of-{count}" if count > 1 else "") + ".json"


def run_all(config: EvaluationConfig) -> list[Path]:
    """Check everything, then every run; the result files."""
    device = open_device(config.device)
    plan = config.plan(device)
    if not plan.chunks(config.n_examples):
        print(f"shard {plan.shard[0] + 1}/{plan.shard[1]} of {config.n_examples} images is empty: nothing to do")
        return []
    runs = _runs(config, plan, device)
    announce([run for *_, run in runs], workers=config.workers)
    if config.workers > 1:
        share(_work, config, config.workers)  # what follows finds all of it stored
    files = []
    for described, purifier, run in runs:
        found = {**described, "purifier_spec": purifier, **run.run()}
        file = config.out / result_name(config, plan, found, purifier)
        settings = {**as_json(config), "model": described["model"]["spec"], "purifier": purifier}
        for place in ("data", "generator"):
            settings.pop(place)
        if run.plan.surrogate is None:
            settings.pop("surrogate")
        else:
            settings["surrogate"] = run.plan.surrogate.described["spec"]
        results.write(file, script=SCRIPT, config=settings, results=found)
        files.append(file)
        print(f"{file}: {run.headline(found)}", flush=True)
    return files


def _work(config: EvaluationConfig, number: int) -> None:
    """Do a worker's part of every run."""
    device = open_device(config.device)
    plan = config.plan(device)
    shard, count = plan.shard
    plan = dataclasses.replace(plan, shard=(shard + number * count, count * config.workers), panel=0)
    if plan.chunks(config.n_examples):
        for *_, run in _runs(config, plan, device):
            run.run()


def _runs(config: EvaluationConfig, plan: Plan, device: torch.device) -> list[tuple[dict[str, Any], str, Evaluation]]:
    subjects = {model: load_model(model, config) for model in config.model}
    plans = dict.fromkeys(subjects, plan)
    if config.surrogate is not None:
        other = load_model(config.surrogate, config)
        name = _name(config.surrogate, other)
        for model, subject in subjects.items():
            surrogate = surrogate_of(subject, other, name=name, device=device, seed=plan.seed)
            plans[model] = dataclasses.replace(plan, surrogate=surrogate)
    return [
        run for model, subject in subjects.items() for run in _runs_of(model, subject, config, plans[model], device)
    ]


def _runs_of(
    model: str, subject: Checkpoint, config: EvaluationConfig, plan: Plan, device: torch.device
) -> list[tuple[dict[str, Any], str, Evaluation]]:
    """Return what the record says of model and data, the purifier, and the run, of every purifier of a model.

    The bare classifier is evaluated in any case: every other row is paired with it.
    """
    subject = ready(subject, device)
    data = load_images(
        config.dataset,
        config.data,
        n=config.n_examples,
        how=subject.card.pictures,
        classes=subject.card.classes,
        cache=config.cache,
    )
    name = _name(model, subject)
    described = _described(subject, name, data, config, plan)
    kind = RUNS.get(config.threat_model, Evaluation)
    made: dict[str, Evaluation] = {}
    for purifier in dict.fromkeys((NONE, *config.purifier)):
        defended = defense_of(purifier, subject)
        made[purifier] = kind(
            defended, data, plan, folder=config.out, bare=made.get(NONE), title=f"{name} + {purifier}"
        )
        if isinstance(run := made[purifier], CorruptionRun):
            run.dataset = config.dataset
    return [(described, purifier, made[purifier]) for purifier in dict.fromkeys(config.purifier)]


def _name(model: str, subject: Checkpoint) -> str:
    """Return what a record calls a model: no path of a machine."""
    if model != subject.card.id and Path(model).is_dir():
        return f"{subject.card.id}-{subject.card.weights_sha256[:8]}"
    if model in store.shipped_names():
        return subject.card.id
    return subject.card.architecture.name if model.startswith(PREFIX) else model


def _described(
    subject: Checkpoint, name: str, data: EvaluationSet, config: EvaluationConfig, plan: Plan
) -> dict[str, Any]:
    return {
        "model": described_model(subject, name),
        "classes": list(subject.card.classes),
        "data": {
            "dataset": config.dataset,
            "source": data.source,
            "sha256": data.digest,
            "own": is_own(config.dataset, data.source),
        },
        "threat": {"model": config.threat_model, "epsilon": plan.threat.epsilon},
        "budget": {"name": config.budget, **dataclasses.asdict(plan.budget)},
        "shard": f"{plan.shard[0] + 1}/{plan.shard[1]}",
    }


def evaluate(config: EvaluationConfig) -> int:
    """Run every model behind every purifier."""
    run_all(config)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(EvaluationConfig, evaluate, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
