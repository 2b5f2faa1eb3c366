"""Plan what run.py trains and measures: every system of the field's root papers as arms, at two scales.

An arm is one training command, run once per seed, and the measurements that are taken of its checkpoint. Arms that are
compared have the same schedule, data and seeds.
"""

from dataclasses import dataclass
from typing import Literal

Options = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training command.

    needs:    the arm whose checkpoint of the same seed is given to it, as --encoder or --classifier
    imported: whether it goes on from the campaign's imported checkpoint, given to it as --classifier
    measures: names in benchmarks/papers/measures.py
    seeds:    how many, from 0
    """

    command: str
    options: Options
    needs: str | None = None
    imported: bool = False
    measures: tuple[str, ...] = ("test",)
    seeds: int = 3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Hold what is common to all arms; `small` is for two CPU cores, `full` for a GPU."""

    contrast: Options  # of pre-training
    fine_tuning: Options  # of what goes on from a pre-trained encoder
    readout: Options
    knn: Options
    false_negatives: Options
    supervised: Options
    overfitting: Options  # few images, many epochs
    labels: Options  # S4L
    generator: Options
    frozen: Options  # the classifier that the generator attacks
    fine_tuned: Options  # the same of an imported network
    head: Options
    harness: Options
    test_images: int


SCALES: dict[str, Scale] = {
    "small": Scale(
        contrast={
            "arch": "wide_resnet_10_1",
            "activation": "silu",
            "images": "5000",
            "epochs": "20",
            "batch-size": "128",
            "lr": "2e-3",
            "hidden": "256",
            "embedding-dim": "64",
            "attack-steps": "3",
            "attack-step-size": "4/255",
            "held-out": "250",
        },
        fine_tuning={"epochs": "8"},
        readout={"images": "5000", "epochs": "50", "held-out": "250"},
        knn={"bank": "5000"},
        false_negatives={"false-negative-share": "0.05"},
        supervised={
            "arch": "wide_resnet_10_1",
            "activation": "silu",
            "images": "5000",
            "epochs": "20",
            "batch-size": "128",
            "lr": "0.1",
            "held-out": "250",
            "label-smoothing": "0",
            "ema": "0.9",
        },
        overfitting={
            "arch": "wide_resnet_10_2",
            "image-size": "16",
            "images": "1000",
            "epochs": "40",
            "batch-size": "50",
            "lr": "0.05",
            "schedule": "constant",
            "ema": "0",
            "held-out": "500",
            "label-smoothing": "0",
            "pad": "0",
            "method": "pgd",
            "epsilon": "4/255",
            "attack-steps": "2",
            "attack-step-size": "3/255",
        },
        labels={
            "arch": "wide_resnet_10_1",
            "activation": "silu",
            "images": "5000",
            "labelled": "0.1",
            "batch-size": "100",
            "lr": "0.05",
            "method": "natural",
            "held-out": "250",
            "label-smoothing": "0",
            "ema": "0.9",
        },
        generator={"images": "5000", "epochs": "5", "held-out": "250", "width": "16"},
        frozen={
            "images": "10000",
            "epochs": "16",
            "batch-size": "64",
            "optimizer": "adam",
            "lr": "2e-3",
            "ema": "0.9",
            "label-smoothing": "0",
            "held-out": "250",
        },
        fine_tuned={
            "images": "20000",
            "epochs": "4",
            "batch-size": "64",
            "optimizer": "adam",
            "lr": "1e-3",
            "weight-decay": "0",
            "ema": "0.99",
            "pad": "8",
        },
        head={
            "classifier": "default",
            "images": "5000",
            "epochs": "4",
            "batch-size": "250",
            "held-out": "500",
            "attack-steps": "2",
            "attack-step-size": "6/255",
        },
        harness={"n-examples": "128", "budget": "fast"},
        test_images=1000,
    ),
    "full": Scale(
        contrast={
            "arch": "preact_resnet18",
            "epochs": "200",
            "batch-size": "512",
            "hidden": "2048",
            "queue": "16384",
        },
        fine_tuning={"epochs": "50"},
        readout={"epochs": "100"},
        knn={},
        false_negatives={"false-negatives-from": "60"},
        supervised={"arch": "preact_resnet18", "epochs": "60"},
        overfitting={
            "arch": "preact_resnet18",
            "epochs": "120",
            "schedule": "cosine",
            "method": "pgd",
            "attack-steps": "10",
            "ema": "0",
        },
        labels={"arch": "preact_resnet18", "labelled": "0.1", "method": "natural"},
        generator={"epochs": "10"},
        frozen={"epochs": "100"},
        fine_tuned={"epochs": "20", "optimizer": "adam", "lr": "1e-3", "weight-decay": "0", "pad": "8"},
        head={"classifier": "default", "epochs": "20"},
        harness={"n-examples": "1000", "budget": "standard"},
        test_images=0,
    ),
}


class Building:
    """The arms of a scale, while they are added one after the other."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.tested = {"test-images": str(scale.test_images)}
        self.untested = {"test-images": "1"}  # what is measured at several radii instead
        self.readout = {**scale.readout, **self.tested}
        self.made: dict[str, Arm] = {}

    def pretrain(self, name: str, method: str, more: Options, needs: str | None = None) -> None:
        """Add an encoder, from random weights or from the one that it needs."""
        base = self.scale.contrast
        if needs is not None:
            base = {**base, **self.scale.fine_tuning}
            base = {key: value for key, value in base.items() if key not in ("arch", "activation")}
        measures = ("detector",) if "false-negatives" in more else ()
        options = {**base, "method": method, **more}
        self.made[name] = Arm(command="pretrain", options=options, needs=needs, measures=measures)

    def linear(self, name: str) -> None:
        """Add a linear classifier on an encoder's features."""
        options = {**self.readout, **self.untested}
        self.made[f"{name}-linear"] = Arm(command="linear", options=options, needs=name, measures=("radii",))

    def neighbours(self, name: str, encoder: str) -> None:
        """Add a kNN classifier on an encoder's features."""
        options = {**self.scale.knn, **self.untested}
        self.made[name] = Arm(command="knn", options=options, needs=encoder, measures=("neighbours",))

    def supervised(self, name: str, base: Options, more: Options, *, measures: tuple[str, ...] = ("test",)) -> None:
        """Add a classifier trained with labels."""
        self.made[name] = Arm(command="classifier", options={**base, **self.tested, **more}, measures=measures)


def arms(scale: Scale) -> dict[str, Arm]:
    """Return every arm by name, those that others need first."""
    plan = Building(scale)
    _add_contrastive(plan)
    _add_supervised(plan)
    _add_readouts(plan)
    return plan.made


def _add_contrastive(plan: Building) -> None:
    plan.pretrain("simclr", "simclr", {})
    plan.linear("simclr")
    plan.pretrain("rocl", "rocl", {})
    plan.linear("rocl")
    plan.made["simclr-instance"] = Arm(command="", options={}, needs="simclr-linear", measures=("instance",))
    plan.neighbours("simclr-knn", "simclr")
    plan.pretrain("simclr-longer", "simclr", {}, "simclr")  # as many epochs as the next
    plan.neighbours("simclr-longer-knn", "simclr-longer")
    plan.pretrain("mutual-information", "mutual-information", {}, "simclr")
    plan.neighbours("mutual-information-knn", "mutual-information")
    plan.supervised("natural", plan.scale.supervised, {"method": "natural"})
    plan.neighbours("natural-knn", "natural")
    plan.pretrain("deacl", "deacl", {}, "simclr")
    plan.linear("deacl")
    plan.pretrain("moco", "moco", {})
    plan.linear("moco")
    for kind in ("top", "quantile", "labels"):
        plan.pretrain(f"simclr-{kind}", "simclr", {"false-negatives": kind, **plan.scale.false_negatives})
        plan.linear(f"simclr-{kind}")


def _add_supervised(plan: Building) -> None:
    plan.supervised("silu", plan.scale.overfitting, {"activation": "silu"}, measures=("test", "overfitting"))
    plan.supervised("relu", plan.scale.overfitting, {"activation": "relu"}, measures=("test", "overfitting"))
    warm = str(int(plan.scale.overfitting["epochs"]) // 4)
    plan.supervised(
        "self-adaptive",
        plan.scale.overfitting,
        {"activation": "silu", "self-adaptive-from": warm},
        measures=("test", "overfitting"),
    )
    plan.supervised(
        "weight-perturbation",
        plan.scale.overfitting,
        {"activation": "silu", "weight-perturbation": "5e-3"},
        measures=("test", "overfitting"),
    )
    epochs = int(plan.scale.contrast["epochs"])
    plan.supervised(
        "labels-only", plan.scale.labels, {"epochs": str(epochs * 10)}
    )  # as many steps as S4L: a tenth of the images
    plan.supervised("s4l", plan.scale.labels, {"epochs": str(epochs), "self-supervised-weight": "1"})


def _add_readouts(plan: Building) -> None:
    plan.made["rocl-robust-linear"] = Arm(
        command="linear",
        options={**plan.readout, "method": "pgd", "attack-steps": "3", "attack-step-size": "4/255", "epochs": "5"},
        needs="rocl",
    )
    plan.made["efficientnet"] = Arm(
        command="classifier",
        options={**plan.scale.frozen, **plan.tested, "arch": "efficientnet_b0", "method": "natural"},
        seeds=1,
    )
    plan.made["efficientnet-dense"] = Arm(
        command="linear", options={**plan.readout, **plan.untested, "hidden": "256"}, needs="efficientnet", seeds=1
    )
    plan.made["generator"] = Arm(
        command="generator",
        options={**plan.scale.generator, **plan.tested},
        needs="efficientnet-dense",
        measures=("generator",),
        seeds=5,  # they differ much
    )
    plan.made["imported"] = Arm(
        command="classifier",
        options={**plan.scale.fine_tuned, **plan.tested, "method": "natural"},
        imported=True,
        seeds=1,
    )
    plan.made["imported-generator"] = Arm(
        command="generator",
        options={**plan.scale.generator, **plan.tested, "epochs": "10"},  # the poster's
        needs="imported",
        measures=("generator",),
        seeds=5,
    )
    for name, more in (("head-plain", {}), ("head-robust", {"adversarial": ""})):
        plan.made[name] = Arm(command="head", options={**plan.scale.head, **more}, measures=("harness",))
    for name in ("simclr", "rocl"):
        plan.made[f"{name}-transfer"] = Arm(command="linear", options={**plan.readout, "data": "cifar100"}, needs=name)


ScaleName = Literal["small", "full"]
