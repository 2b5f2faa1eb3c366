"""`unperturb.benchmarks.evaluate`: a model of one's own, alone and behind purifiers, as a report."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.reporting.report import Report
from unperturb.benchmarks.robustness import attacks as registry
from unperturb.benchmarks.robustness.budgets import BUDGETS, Budget
from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.benchmarks.robustness.device import open_device
from unperturb.benchmarks.robustness.estimate import announce
from unperturb.benchmarks.robustness.evaluation import Evaluation
from unperturb.benchmarks.robustness.foreign import left_as_they_were
from unperturb.benchmarks.robustness.plan import Plan
from unperturb.benchmarks.robustness.subjects import classes_of, defense_of, described_model, ready, subject_of
from unperturb.benchmarks.robustness.surrogate import Surrogate, surrogate_of
from unperturb.benchmarks.robustness.threat import EPSILON, NORMS, Threat
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError, DataError
from unperturb.models.shapes import Float, Int

SCRIPT = "benchmarks/robustbench_eval.py"


def evaluate(
    model: nn.Module | Checkpoint,
    images: Float[Tensor, "n 3 side side"],
    labels: Int[Tensor, " n"],
    *,
    purifier: Any = None,  # noqa: ANN401
    surrogate: nn.Module | Checkpoint | None = None,
    threat: Literal["Linf", "L2"] = "Linf",
    epsilon: float | None = None,
    attacks: str = "all",
    budget: Literal["fast", "standard", "full"] | Budget = "standard",
    seed: int = 0,
    chunk: int = 128,
    classes: tuple[str, ...] | None = None,
    name: str = "model",
    dataset: str = "own",
    store: str | Path | None = None,
    device: str = "cpu",
) -> Report:
    """Attack a classifier, alone and behind purifiers, on the same images under the same budget.

    model:    maps images in [0, 1] to class scores; a module of yours, or a checkpoint of `unperturb.load`, which has
              an image size and classes of its own
    purifier: None; a specification (`reverse-attack:transfer`, `vote:shifts=2`, `package.module:Class:key=value`); an
              object of the protocol in `unperturb.benchmarks.robustness.foreign`, a module from images to images, or a
              preprocessor of ART's; or several of them by name
    surrogate: another classifier of the same classes (by name, where both have names), on which an attacker who knows
              neither the model nor a purifier makes images: with it the attack `surrogate` is run, too
    epsilon:  in pixel units of [0, 1]; by default 8/255 (Linf) or 0.5 (L2)
    attacks:  all, fast, or names between commas
    budget:   one of the harness's, or a `Budget` of your own
    store:    folder for what has been computed, so that a stopped call goes on where it was; None: kept nowhere

    The plan and its estimated time are printed first. Raises ConfigError or DataError naming what is wrong, before any
    attack.
    """
    images, labels = _checked(images, labels)
    budgets, allowance = ({"own": budget}, "own") if isinstance(budget, Budget) else (BUDGETS, budget)
    chosen = _chosen(threat, allowance, budgets, attacks, chunk, with_surrogate=surrogate is not None)
    where, threads = open_device(device), torch.get_num_threads()
    subject = ready(subject_of(model, name=name, classes=classes, image_size=images.shape[-1]), where)
    if int(labels.max()) >= subject.classifier.num_classes:
        raise DataError(f"label {int(labels.max())} of a classifier with {subject.classifier.num_classes} classes")
    plan = Plan(
        threat=Threat(norm=NORMS[threat], epsilon=EPSILON[threat] if epsilon is None else epsilon),
        budget=budgets[allowance],
        attacks=chosen,
        seed=seed,
        chunk=chunk,
        panel=0,
        surrogate=None if surrogate is None else _surrogate(surrogate, subject, images.shape[-1], seed),
    )
    digest = hashlib.sha256(images.contiguous().numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    data = EvaluationSet(images, labels, "given", digest)
    described = {
        "model": described_model(subject, name),
        "classes": list(subject.card.classes),
        "data": {"dataset": dataset, "source": "given", "sha256": digest, "own": True},
        "threat": {"model": threat, "epsilon": plan.threat.epsilon},
        "budget": {"name": allowance, **dataclasses.asdict(plan.budget)},
        "shard": "1/1",
    }
    config = {"n_examples": len(images), "seed": seed, "device": device, "budget": allowance, "attacks": attacks}
    try:
        with tempfile.TemporaryDirectory() as scratch, left_as_they_were([purifier]):
            folder = Path(store or scratch)
            runs = {
                spec: Evaluation(defense_of(own, subject), data, plan, folder=folder, title=f"{name} + {spec}")
                for spec, own in _named(purifier).items()
            }
            bare = runs["none"]
            for run in runs.values():
                run.bare = None if run is bare else bare
            announce(list(runs.values()))
            records = [
                results.record(
                    script=SCRIPT,
                    config={**config, "model": name, "purifier": spec},
                    results={**described, "purifier_spec": spec, **run.run()},
                )
                for spec, run in runs.items()
            ]
    finally:
        torch.set_num_threads(threads)
    return Report(records)


def _checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float32 and int64 on the CPU; raise DataError for what they can't be."""
    for what, given in (("images", images), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise DataError(
                f"{what} are a {type(given).__name__}; a torch.Tensor is needed, as torch.as_tensor makes one"
            )
    images, labels = images.detach().cpu(), labels.detach().cpu()
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not len(images):
        raise DataError(f"images are {list(images.shape)} {images.dtype}; floats [n, 3, side, side] are needed")
    if images.shape[2] != images.shape[3]:
        raise DataError(f"images of {images.shape[2]} x {images.shape[3]} pixels: square ones are needed")
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise DataError(f"labels are {list(labels.shape)} {labels.dtype}; int64 [{len(images)}] is needed")
    if not (images.min() >= 0 and images.max() <= 1):
        low, high = float(images.min()), float(images.max())
        raise DataError(f"images from {low:g} to {high:g}: pixels are needed in [0, 1]; divide 8-bit ones by 255")
    if int(labels.min()) < 0:
        raise DataError(f"label {int(labels.min())} is below 0")
    return images.float(), labels


def _surrogate(given: nn.Module | Checkpoint, subject: Checkpoint, image_size: int, seed: int) -> Surrogate:
    """Return it beside the subject, whose classes it has where it names none."""
    own = isinstance(given, Checkpoint) or classes_of(given)
    other = subject_of(
        given, name=registry.SURROGATE, classes=None if own else subject.card.classes, image_size=image_size
    )
    device = next((parameter.device for parameter in subject.classifier.parameters()), torch.device("cpu"))
    return surrogate_of(subject, other, name=other.card.id, device=device, seed=seed)


def _chosen(
    threat: str, budget: str, budgets: Mapping[str, Budget], attacks: str, chunk: int, *, with_surrogate: bool
) -> tuple[str, ...]:
    """Return the attacks; raise ConfigError with the known names."""
    for name, value, known in (("threat", threat, NORMS), ("budget", budget, budgets)):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(known)}")
    if not isinstance(attacks, str):
        raise ConfigError(f"attacks={attacks!r}: names between commas, in one string")
    chosen = registry.chosen(attacks, with_surrogate=with_surrogate)
    if registry.GENERATOR in chosen:
        raise ConfigError(f"attacks={attacks!r}: the attack `generator` is for the command line")
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1")
    return chosen


def _named(purifier: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the purifiers by name, `none` first."""
    if purifier is None:
        return {"none": None}
    if isinstance(purifier, Mapping):
        if "none" in purifier:
            raise ConfigError("the row `none` is always there: give the purifiers another name")
        return {"none": None, **purifier}
    if isinstance(purifier, str):
        return {"none": None, purifier: purifier}
    return {"none": None, type(purifier).__name__: purifier}
