"""The measurements of benchmarks/papers/run.py: a trained arm's folder -> figures, as JSON-ready values."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unperturb.benchmarks.papers.plan import Scale
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.robustbench_eval import EvaluationConfig, run_all
from unperturb.benchmarks.robustness.attacks.controls import NOISE_STREAM, signs
from unperturb.models import philox
from unperturb.models.accuracy import correct
from unperturb.models.attacks.instance import DISTANCES, away_from
from unperturb.models.attacks.pgd import pgd
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.checkpoints import store
from unperturb.models.contrastive.loss import NegativePolicy, in_batch_negatives
from unperturb.models.contrastive.views import ViewPolicy, make_views
from unperturb.models.networks.generator import load as load_generator
from unperturb.models.networks.readout import SoftNeighbours, attach
from unperturb.models.options import parse
from unperturb.models.provenance import digest_of
from unperturb.training import data

EPSILON = 8 / 255
RADII = (2, 8)  # of 255
CHUNK = 250


@dataclass(frozen=True)
class Subject:
    """A checkpoint folder, the folder of the training run (its log), the checkpoint that it goes on from, the data and
    its source, scale and device.
    """

    folder: Path
    run: Path
    base: Path | None
    dataset: data.DataSet
    source: str
    scale: Scale
    device: torch.device

    def test(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return images in [0, 1], labels and numbers, in chunks."""
        count = min(self.scale.test_images or len(self.dataset.test.labels), len(self.dataset.test.labels))
        numbers = torch.arange(count)
        return [
            (
                self.dataset.test.images[some].to(self.device).float() / 255,
                self.dataset.test.labels[some].to(self.device),
                some.to(self.device),
            )
            for some in numbers.split(CHUNK)
        ]


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test(subject: Subject) -> dict[str, Any]:
    """Return what the trainer measured, once, on the test images: clean and PGD-20 at 8/255."""
    return dict(store.read_card(subject.folder).figures["test"])


def radii(subject: Subject) -> dict[str, Any]:
    """Measure clean accuracy, and that under PGD-20 at several radii, the classifier's own gradient."""
    classifier = store.load(subject.folder, device=subject.device).classifier
    right: dict[str, list[bool]] = {}
    for x, labels, numbers in subject.test():
        right.setdefault("clean", []).extend(correct(classifier, x, labels))
        for radius in RADII:
            epsilon = radius / 255
            moved = pgd(classifier, x, labels, epsilon=epsilon, step_size=epsilon / 4, steps=20, seeds=numbers)
            right.setdefault(f"pgd-{radius}/255", []).extend(correct(classifier, moved, labels))
    return {name: results.accuracy(values) for name, values in right.items()}


def neighbours(subject: Subject) -> dict[str, Any]:
    """Clean accuracy of a kNN classifier, and that under PGD-20 through its own votes and through those of its whole
    bank: an image that either breaks is broken.
    """
    classifier = store.load(subject.folder, device=subject.device).classifier
    votes = classifier.get_submodule("linear")
    assert isinstance(votes, SoftNeighbours)
    everyone = SoftNeighbours(
        votes.bank, votes.labels, num_classes=votes.num_classes, neighbours=0, temperature=votes.temperature
    )
    right: dict[str, list[bool]] = {}
    for x, labels, numbers in subject.test():
        right.setdefault("clean", []).extend(correct(classifier, x, labels))
        for radius in RADII:
            standing = []
            for surrogate in (votes, everyone):
                attach(classifier, surrogate)
                epsilon = radius / 255
                moved = pgd(classifier, x, labels, epsilon=epsilon, step_size=epsilon / 4, steps=20, seeds=numbers)
                attach(classifier, votes)
                standing.append(correct(classifier, moved, labels))
            right.setdefault(f"pgd-{radius}/255", []).extend(all(pair) for pair in zip(*standing, strict=True))
    return {name: results.accuracy(values) for name, values in right.items()}


def instance(subject: Subject) -> dict[str, Any]:
    """Measure accuracy under the label-free attacks of an encoder's features, and under noise of the same size.

    The attack knows neither labels nor the readout. 20 steps of 2/255 within 8/255.
    """
    classifier = store.load(subject.folder, device=subject.device).classifier
    loop = ProjectedGradient(direction="ascend", epsilon=EPSILON, step_size=2 / 255, steps=20, start="uniform")
    right: dict[str, list[bool]] = {}
    for x, labels, numbers in subject.test():
        right.setdefault("clean", []).extend(correct(classifier, x, labels))
        right.setdefault("noise", []).extend(correct(classifier, signs(x, numbers, epsilon=EPSILON), labels))
        with torch.no_grad():
            targets = classifier.features(x)
        unit = torch.nn.functional.normalize(targets, dim=1)
        negatives, others = in_batch_negatives(unit[:, None])
        for distance in DISTANCES:
            objective = away_from(classifier.features, targets, distance=distance, negatives=negatives, keep=others)
            moved = loop.run(x, objective, seeds=numbers).image
            right.setdefault(distance, []).extend(correct(classifier, moved, labels))
    return {name: results.accuracy(values) for name, values in right.items()}


def detector(subject: Subject) -> dict[str, Any]:
    """Return precision and recall of the detector in training's last epoch, and of the policies on the stored bank."""
    last = _log(subject.run)[-1]
    figures: dict[str, Any] = {"training": {name: last[name] for name in ("precision", "recall", "chance")}}
    loaded = store.load(subject.folder, device=subject.device)
    assert loaded.head is not None
    assert loaded.bank is not None
    for kind in ("drop-similar", "quantile"):
        policy = NegativePolicy(kind=kind, fraction=0.1)
        thresholds = policy.thresholds(loaded.bank.embeddings)
        hits = dropped = of_class = possible = 0
        for x, labels, numbers in subject.test():
            views = make_views(x, seeds=numbers, step=0, views=2, policy=ViewPolicy())  # as the purifier's
            with torch.no_grad():
                embeddings = loaded.head(loaded.classifier.features(views.flatten(0, 1))).unflatten(0, (len(x), 2))
            keep = policy.keep(embeddings, loaded.bank.embeddings, numbers, thresholds)
            assert keep is not None
            same = labels[:, None] == loaded.bank.labels
            hits += int((~keep & same).sum())
            dropped += int((~keep).sum())
            of_class += int(same.sum())
            possible += same.numel()
        figures[f"bank, {kind}"] = {
            "precision": hits / max(dropped, 1),
            "recall": hits / of_class,
            "chance": of_class / possible,
        }
    return figures


def overfitting(subject: Subject) -> dict[str, Any]:
    """Return robust accuracy on held-out training images at the best and at the last epoch (mean of the last three)."""
    curve = [entry["held_out_pgd_accuracy"] for entry in _log(subject.run)]
    smooth = [sum(curve[max(0, i - 2) : i + 1]) / len(curve[max(0, i - 2) : i + 1]) for i in range(len(curve))]
    best = max(smooth)
    return {
        "best": best,
        "best_epoch": smooth.index(best) + 1,
        "last": smooth[-1],
        "gap": best - smooth[-1],
        "curve": curve,
    }


def generator(subject: Subject) -> dict[str, Any]:
    """Measure accuracy as it is, under the generator's noise, and under random noise of that size: signs, and uniform.

    Also what the generator gains over each, paired by image, and whether the classifier's digest is what it was.
    """
    assert subject.base is not None
    made, card = load_generator(subject.folder, device=subject.device)
    classifier = store.load(subject.base, device=subject.device).classifier
    right: dict[str, list[bool]] = {}
    for x, labels, numbers in subject.test():
        with torch.no_grad():
            attacked = made(x)
        draws = philox.uniform(numbers, 0, NOISE_STREAM, x[0].numel()).view_as(x)
        shown = {
            "clean": x,
            "noise": signs(x, numbers, epsilon=made.epsilon),
            "uniform": (x + made.epsilon * (2 * draws - 1)).clamp(0, 1),
            "generator": attacked,
        }
        for name, images in shown.items():
            right.setdefault(name, []).extend(correct(classifier, images, labels))
    same = card.classifier_sha256[0] == card.classifier_sha256[1] == digest_of(classifier)
    others = [name for name in right if name != "generator"]
    return {
        **{name: results.accuracy(values) for name, values in right.items()},
        "less_than": {name: results.gain(right["generator"], right[name]) for name in others},
        "classifier_unchanged": same,
    }


def harness(subject: Subject) -> dict[str, Any]:
    """Judge the reverse attack with the run's head by benchmarks/robustbench_eval.py: transfer and worst case.

    The runs of a scale share a folder, since AutoAttack on the classifier alone is the same for every head of it. An
    attack that is run only on what those before it left has no figure of its own; what it broke is in the outcomes.
    """
    out = subject.run.parents[1] / "harness"
    arguments = [
        "--model",
        str(subject.folder),
        "--purifier",
        "reverse-attack",
        "--attacks",
        HARNESS_ATTACKS,
        "--out",
        str(out),
        "--device",
        str(subject.device),
        "--panel",
        "0",
    ]
    if Path(subject.source).exists():
        arguments += ["--data", subject.source, "--dataset", subject.dataset.name]
    for key, value in subject.scale.harness.items():
        arguments += [f"--{key}", value]
    (file,) = run_all(parse(EvaluationConfig, arguments, program="benchmarks/robustbench_eval.py"))
    found = json.loads(file.read_text())["results"]
    figures = found["figures"]
    shown = {name: cells["alone"] for name, cells in figures["attacks"].items() if cells["alone"]}
    return {**shown, "worst_case": figures["worst_case"], "gain": figures["gain"], "outcomes": found["outcomes"]}


HARNESS_ATTACKS = "autoattack,noise,apgd-ce,transfer,bpda-apgd-ce,bpda-apgd-dlr,bpda-contrastive"
MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "test": test,
    "radii": radii,
    "neighbours": neighbours,
    "instance": instance,
    "detector": detector,
    "overfitting": overfitting,
    "generator": generator,
    "harness": harness,
}
