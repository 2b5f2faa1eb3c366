"""What `benchmarks/papers/run.py` trains and measures: every system of the field's root papers as arms, at two scales.

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
    measures: names in benchmarks/papers/measures.py
    seeds:    how many, from 0
    """

    command: str
    options: Options
    needs: str | None = None
    measures: tuple[str, ...] = ("test",)
    seeds: int = 3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is common to all arms; `small` is for two CPU cores, `full` for a GPU."""

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
        head={"classifier": "default", "epochs": "20"},
        harness={"n-examples": "1000", "budget": "standard"},
        test_images=0,
    ),
}


def arms(scale: Scale) -> dict[str, Arm]:
    """Every arm by name, those that others need first."""
    contrast, tuned = scale.contrast, {**scale.contrast, **scale.fine_tuning}
    tested = {"test-images": str(scale.test_images)}
    untested = {"test-images": "1"}  # what is measured at several radii instead
    readout = {**scale.readout, **tested}
    made: dict[str, Arm] = {}

    def pretrain(name: str, method: str, more: Options, needs: str | None = None) -> None:
        base = contrast if needs is None else {k: v for k, v in tuned.items() if k not in ("arch", "activation")}
        measures = ("detector",) if "false-negatives" in more else ()
        made[name] = Arm(command="pretrain", options={**base, "method": method, **more}, needs=needs, measures=measures)

    def linear(name: str) -> None:
        options = {**readout, **untested}
        made[f"{name}-linear"] = Arm(command="linear", options=options, needs=name, measures=("radii",))

    def neighbours(name: str, encoder: str) -> None:
        options = {**scale.knn, **untested}
        made[name] = Arm(command="knn", options=options, needs=encoder, measures=("neighbours",))

    def supervised(name: str, base: Options, more: Options, *, measures: tuple[str, ...] = ("test",)) -> None:
        made[name] = Arm(command="classifier", options={**base, **tested, **more}, measures=measures)

    pretrain("simclr", "simclr", {})
    linear("simclr")
    pretrain("rocl", "rocl", {})
    linear("rocl")
    made["simclr-instance"] = Arm(command="", options={}, needs="simclr-linear", measures=("instance",))
    neighbours("simclr-knn", "simclr")
    pretrain("simclr-longer", "simclr", {}, "simclr")  # as many epochs as the next
    neighbours("simclr-longer-knn", "simclr-longer")
    pretrain("mutual-information", "mutual-information", {}, "simclr")
    neighbours("mutual-information-knn", "mutual-information")
    supervised("natural", scale.supervised, {"method": "natural"})
    neighbours("natural-knn", "natural")
    pretrain("deacl", "deacl", {}, "simclr")
    linear("deacl")
    pretrain("moco", "moco", {})
    linear("moco")
    for kind in ("top", "quantile", "labels"):
        pretrain(f"simclr-{kind}", "simclr", {"false-negatives": kind, **scale.false_negatives})
        linear(f"simclr-{kind}")
    supervised("silu", scale.overfitting, {"activation": "silu"}, measures=("test", "overfitting"))
    supervised("relu", scale.overfitting, {"activation": "relu"}, measures=("test", "overfitting"))
    warm = str(int(scale.overfitting["epochs"]) // 4)
    supervised(
        "self-adaptive",
        scale.overfitting,
        {"activation": "silu", "self-adaptive-from": warm},
        measures=("test", "overfitting"),
    )
    supervised(
        "weight-perturbation",
        scale.overfitting,
        {"activation": "silu", "weight-perturbation": "5e-3"},
        measures=("test", "overfitting"),
    )
    epochs = int(contrast["epochs"])
    supervised("labels-only", scale.labels, {"epochs": str(epochs * 10)})  # as many steps as S4L: a tenth of the images
    supervised("s4l", scale.labels, {"epochs": str(epochs), "self-supervised-weight": "1"})
    made["rocl-robust-linear"] = Arm(
        command="linear",
        options={**readout, "method": "pgd", "attack-steps": "3", "attack-step-size": "4/255", "epochs": "5"},
        needs="rocl",
    )
    made["efficientnet"] = Arm(
        command="classifier",
        options={**scale.frozen, **tested, "arch": "efficientnet_b0", "method": "natural"},
        seeds=1,
    )
    made["efficientnet-dense"] = Arm(
        command="linear", options={**readout, **untested, "hidden": "256"}, needs="efficientnet", seeds=1
    )
    made["generator"] = Arm(
        command="generator",
        options={**scale.generator, **tested},
        needs="efficientnet-dense",
        measures=("generator",),
        seeds=5,  # they differ much
    )
    for name, more in (("head-plain", {}), ("head-robust", {"adversarial": ""})):
        made[name] = Arm(command="head", options={**scale.head, **more}, measures=("harness",))
    for name in ("simclr", "rocl"):
        made[f"{name}-transfer"] = Arm(command="linear", options={**readout, "data": "cifar100"}, needs=name)
    return made


ScaleName = Literal["small", "full"]
