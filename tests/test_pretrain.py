"""Contrastive pre-training, its readouts, and the classifier's switches, from the command line and by formula."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import checkpoint
from models.attack import evaluating
from models.backbones import Architecture, build
from models.checkpoint import HeadCard
from models.readout import NoReadout, SoftNeighbours
from models.views import make_views
from tests.test_contrastive import numpy_info_nce
from training.__main__ import main
from training.classifier import ClassifierConfig, ClassifierTask
from training.contrast import POLICY, Batch, Contrast, Loss, Queue, embed_together
from training.data import Split
from training.deacl import DeACL
from training.encoder import Encoder, fresh
from training.moco import MoCo
from training.mutual_information import MutualInformation
from training.pretrain import GOES_ON, METHODS, PretrainConfig
from training.rocl import RoCL
from training.semi_supervised import SemiSupervisedTask
from training.simclr import SimCLR
from training.world import World

HERE = World(0, 1, torch.device("cpu"))
SMALL = ["--batch-size", "21", "--held-out", "9", "--device", "cpu", "--hidden", "16", "--embedding-dim", "8",
         "--attack-steps", "1", "--attack-step-size", "8/255", "--bank-size", "30"]  # fmt: skip


def config(**changed: Any) -> PretrainConfig:
    values = {"data": "x", "out": Path("x"), "hidden": 16, "embedding_dim": 8, "attack_steps": 2, **changed}
    return PretrainConfig(**values)


def encoder() -> Encoder:
    torch.manual_seed(4)
    architecture = Architecture(name="wide_resnet_10_1", num_classes=3, activation="silu")
    return fresh(architecture, HeadCard(hidden=16, embedding_dim=8, temperature=0.5))


def batch(images: torch.Tensor, *, epoch: int = 9) -> Batch:
    numbers = torch.arange(len(images))
    return Batch((images * 255).byte(), numbers, numbers, numbers % 3, epoch)


def contrast(**changed: Any) -> Contrast:
    return Contrast(config(**changed), 8, HERE)


def numpy_loss(embeddings: torch.Tensor, temperature: float = 0.5) -> float:
    """NT-Xent of [batch, views, dim] with every view of the other images as negatives."""
    z = embeddings.detach().double().numpy()
    size, views = z.shape[:2]
    keep = ~np.eye(size, dtype=bool).repeat(views, axis=1)
    return float(numpy_info_nce(z, z.reshape(size * views, -1), temperature, keep).mean())


def test_simclrs_loss_is_nt_xent_of_its_views(images: torch.Tensor) -> None:
    model, shared = encoder(), contrast()
    expected = numpy_loss(embed_together(model, shared.views(batch(images))))
    assert abs(SimCLR(shared, model).loss(batch(images)).loss.item() - expected) < 1e-5


def test_rocls_loss_is_every_pair_of_three_and_a_little_of_one(images: torch.Tensor) -> None:
    model, shared = encoder(), contrast()
    views = shared.views(batch(images))
    attacked = shared.attacked(model, views[:, 0], views[:, 1], batch(images).seeds)
    z = embed_together(copy.deepcopy(model), torch.cat((views, attacked[:, None]), dim=1)).detach().double().numpy()
    keep = ~np.eye(8, dtype=bool).repeat(3, axis=1)
    flat = z.reshape(24, -1)
    expected = numpy_info_nce(z, flat, 0.5, keep).mean() + 0.25 * numpy_info_nce(z[:, 1:], flat, 0.5, keep).mean()
    found = RoCL(shared, model, adversarial_weight=0.25).loss(batch(images)).loss
    assert abs(found.item() - expected) < 1e-5


def test_instance_attack_of_training_raises_the_loss_and_leaves_batchnorm_alone(images: torch.Tensor) -> None:
    model, shared = encoder(), contrast(attack_steps=5, attack_step_size=2 / 255)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    views = shared.views(batch(images))
    moved = shared.attacked(model, views[:, 0], views[:, 1], batch(images).seeds)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert model.training
    assert (moved - views[:, 0]).abs().max() <= 8 / 255 + 1e-6
    with evaluating(model), torch.no_grad():
        before, after = (numpy_loss(torch.stack((model(x), model(views[:, 1])), 1)) for x in (views[:, 0], moved))
    assert after > before + 0.01


def test_mocos_loss_is_infonce_against_other_keys_and_the_queue(images: torch.Tensor) -> None:
    model, shared = encoder(), contrast()
    method = MoCo(shared, model, HERE, queue=10, key_momentum=0.5)
    stored = F.normalize(torch.randn(6, 8), dim=1)
    method.memory.push(stored, torch.zeros(6, dtype=torch.int64))
    views = shared.views(batch(images))
    twin = copy.deepcopy(model)
    queries = embed_together(twin, views).detach().double().numpy()
    keys = queries  # the key encoder begins as the encoder
    terms = []
    for image in range(8):
        others = np.concatenate([keys[i] for i in range(8) if i != image] + [stored.double().numpy()])
        for view in range(2):
            query, positive = queries[image, view], keys[image, 1 - view]
            top = np.exp(query @ positive / 0.5)
            terms.append(-np.log(top / (top + np.exp(others @ query / 0.5).sum())))
    assert abs(method.loss(batch(images)).loss.item() - np.mean(terms)) < 1e-5


def test_mocos_keys_follow_and_its_queue_turns_over(images: torch.Tensor) -> None:
    model = encoder()
    method = MoCo(contrast(), model, HERE, queue=20, key_momentum=0.75)
    before = [weight.clone() for weight in method.memory.encoder.parameters()]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    method.memory.follow(model, 0.75)
    for old, new, target in zip(before, method.memory.encoder.parameters(), model.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * target, atol=1e-6)
    for _ in range(2):
        method.loss(batch(images))
    keys, labels = method.memory.filled_part()
    assert keys.shape == (20, 8)
    assert labels[:16].tolist() == (torch.arange(8) % 3).repeat_interleave(2).tolist()


def test_deacls_loss_is_its_two_cosines(images: torch.Tensor) -> None:
    teacher = encoder()
    shared = contrast()
    method = DeACL(shared, teacher)
    with torch.no_grad():
        for weight in teacher.backbone.parameters():
            weight.mul_(1.02)  # the student has moved
    x = shared.weakly(batch(images))
    assert isinstance(method.memory, Encoder)
    aims = method.memory.features(x)
    from models.instance_attack import away_from

    with evaluating(teacher):
        attacked = shared.attack.run(
            x, away_from(teacher.features, aims, distance="cos"), seeds=batch(images).seeds
        ).image  # fmt: skip
    clean, moved = copy.deepcopy(teacher).features(torch.cat((x, attacked))).chunk(2)
    expected = -F.cosine_similarity(clean, aims).mean() - 2 * F.cosine_similarity(moved, clean).mean()
    assert abs(method.loss(batch(images)).loss.item() - expected.item()) < 1e-5
    assert not any(weight.requires_grad for weight in method.memory.parameters())


def test_mutual_information_is_bounded_by_the_loss(images: torch.Tensor) -> None:
    model, shared = encoder(), contrast()
    found: Loss = MutualInformation(shared, model).loss(batch(images))
    assert abs(float(found.figures["nats"]) - (np.log(15) - found.loss.item())) < 1e-5


@pytest.mark.parametrize("kind", ["top", "quantile", "labels"])
def test_removed_negatives_lower_the_loss_and_are_reported(kind: str, images: torch.Tensor) -> None:
    with_them = SimCLR(contrast(), encoder()).loss(batch(images))
    without = SimCLR(contrast(false_negatives=kind, false_negative_share=0.3), encoder()).loss(batch(images))
    assert without.loss < with_them.loss
    assert 0 <= without.figures["precision"] <= 1
    assert with_them.figures == {}
    early = SimCLR(contrast(false_negatives=kind, false_negatives_from=20), encoder()).loss(batch(images))
    assert torch.allclose(early.loss, with_them.loss)


def test_queue_keeps_the_newest() -> None:
    queue = Queue(5, 2, torch.nn.Module(), HERE)
    assert len(queue.filled_part()[0]) == 0
    queue.push(torch.ones(3, 2), torch.ones(3, dtype=torch.int64))
    queue.push(2 * torch.ones(4, 2), 2 * torch.ones(4, dtype=torch.int64))
    embeddings, labels = queue.filled_part()
    assert labels.tolist() == [2, 2, 2, 2, 1]
    assert embeddings[:, 0].tolist() == [2, 2, 2, 2, 1]


def test_s4ls_loss_is_cross_entropy_of_labelled_images_and_nt_xent_of_all(images: torch.Tensor) -> None:
    """Zhai et al. 2019, eq. 1."""
    torch.manual_seed(3)
    classifier = build(Architecture(name="wide_resnet_10_1", num_classes=3, activation="silu"))
    split = Split((images * 255).byte(), torch.arange(8) % 3)
    settings = ClassifierConfig(data="x", out=Path("x"), method="natural", label_smoothing=0.0)
    supervised = ClassifierTask(settings, classifier, split, split, HERE)
    task = SemiSupervisedTask(supervised, classifier, labelled=3, weight=0.5)
    twin = copy.deepcopy(task.model).train()
    indices = torch.tensor([5, 1, 7, 3, 0])
    rows = torch.randperm(3, generator=torch.Generator().manual_seed(2 * 1_000_003 + 5))
    labelled = supervised.batch(rows, 2)
    expected = F.cross_entropy(twin.backbone(labelled.x), labelled.labels).item()
    views = make_views(split.images[indices] / 255, seeds=2 * (1 << 32) + indices, step=0, views=2, policy=POLICY)
    expected += 0.5 * numpy_loss(embed_together(twin, views))
    assert abs(task.loss(indices, 2, 9)[0].item() - expected) < 1e-5


def pretrain_arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", "--data", str(data), "--out", str(out), "--cache", str(out.parent), *SMALL, *more]


FRESH = ["--arch", "wide_resnet_10_1", "--activation", "silu"]


@pytest.fixture(scope="module")
def simclr(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simclr") / "run"
    assert main(pretrain_arguments(image_folder, out, *FRESH, "--epochs", "3", "--lr", "5e-3")) == 0
    return out / "checkpoint"


@pytest.mark.parametrize("method", METHODS)
def test_method_learns_and_makes_an_encoder(method: str, image_folder: Path, tmp_path: Path, simclr: Path) -> None:
    begin = ["--encoder", str(simclr)] if method in GOES_ON else FRESH
    out = tmp_path / "run"
    arguments = pretrain_arguments(image_folder, out, *begin, "--method", method, "--epochs", "5", "--lr", "5e-3",
                                   "--queue", "30", "--schedule", "constant", "--distance", "sim")  # fmt: skip
    assert main(arguments) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = log[-1]["loss"] if method != "moco" else log[-1]["loss"] - 1.5  # its queue grows
    assert last < log[0]["loss"]
    loaded = checkpoint.load(out / "checkpoint")
    assert isinstance(loaded.classifier.get_submodule("linear"), NoReadout)
    assert loaded.head is not None
    assert loaded.bank is not None
    assert loaded.bank.embeddings.shape == (30, 8)
    assert loaded.card.training["method"] == method
    assert loaded.card.training["chosen_epoch"] == 5
    assert ("encoder_sha256" in loaded.card.training) == (method in GOES_ON)


def test_readouts_of_an_encoder_classify(image_folder: Path, tmp_path: Path, simclr: Path) -> None:
    common = ["--encoder", str(simclr), "--data", str(image_folder), "--cache", str(tmp_path), "--device", "cpu"]
    training = ["--epochs", "30", "--batch-size", "21", "--held-out", "9", "--lr", "1e-2"]
    for name, arguments in {
        "linear": ["linear", *training],
        "dense": ["linear", "--hidden", "16", *training],
        "robust": ["linear", "--method", "pgd", "--attack-steps", "1", *training],
        "knn": ["knn", "--neighbours", "9"],
    }.items():
        out = tmp_path / name
        assert main([*arguments, *common, "--out", str(out), "--id", name]) == 0
        made, base = checkpoint.load(out / "checkpoint"), checkpoint.load(simclr)
        assert made.card.figures["test"]["clean_accuracy"] > 0.6, name
        assert made.card.id == name
        for key, value in base.classifier.state_dict().items():  # what was frozen is as it was
            assert torch.equal(made.classifier.state_dict()[key], value), (name, key)
        assert made.head is not None  # the projector purifies for it
    assert isinstance(checkpoint.load(tmp_path / "knn/checkpoint").classifier.get_submodule("linear"), SoftNeighbours)


@pytest.mark.parametrize("command", ["linear", "knn"])
def test_encoder_is_transferred_to_other_classes(
    command: str, image_folder: Path, tmp_path: Path, simclr: Path
) -> None:
    """Its purifier's negatives are then images of those."""
    for split in ("train", "test"):
        for old, new in (("red", "warm"), ("blue", "cold")):
            shutil.copytree(image_folder / split / old, tmp_path / "data" / split / new)
    more = ["--epochs", "5", "--batch-size", "10", "--held-out", "9"] if command == "linear" else ["--neighbours", "9"]
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--cache", str(tmp_path)]
    assert main([command, "--encoder", str(simclr), *places, *more, "--device", "cpu"]) == 0
    made = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert made.card.classes == ("cold", "warm")
    assert made.card.architecture.num_classes == made.classifier.num_classes == 2
    assert made.bank is not None
    assert set(made.bank.labels.tolist()) == {0, 1}


def test_resumed_contrast_goes_on_with_its_queue_and_thresholds(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [
        *FRESH,
        "--method",
        "moco",
        "--queue",
        "100",
        "--false-negatives",
        "quantile",
        "--false-negatives-from",
        "1",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(pretrain_arguments(image_folder, whole, *more)) == 0
    from training import loop

    saving, count = loop._save, iter(range(100))

    def stop(*arguments: Any) -> None:
        saving(*arguments)
        if next(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("training.loop._save", stop)
    assert main(pretrain_arguments(image_folder, stopped, *more)) == 130
    monkeypatch.setattr("training.loop._save", saving)
    assert main(pretrain_arguments(image_folder, stopped, *more)) == 0
    ends = [json.loads((out / "log.jsonl").read_text().splitlines()[-1]) for out in (whole, stopped)]
    assert abs(ends[0]["loss"] - ends[1]["loss"]) < 0.02  # without its queue it would be 0.5 lower
    weights = [checkpoint.load(out / "checkpoint").classifier.state_dict() for out in (whole, stopped)]
    for name, value in weights[0].items():
        assert torch.allclose(value.float(), weights[1][name].float(), atol=5e-3), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--method", "deacl"], "--encoder"),
        (["pretrain", "--temperature", "0"], "temperature=0"),
        (["pretrain", "--false-negative-share", "1"], "false_negative_share=1"),
        (["pretrain", "--encoder", "nowhere"], "nowhere"),
        (["pretrain", "--images", "1000"], "images=1000"),
        (["pretrain", "--queue", "0"], "queue=0"),
        (["linear", "--encoder", "nowhere"], "nowhere"),
        (["knn", "--encoder", "default", "--bank", "1000"], "bank_size=1000"),
        (["knn", "--encoder", "default", "--bank", "20"], "neighbours=75"),
        (["classifier", "--labelled", "0"], "labelled=0"),
        (["classifier", "--weight-perturbation", "-1"], "weight_perturbation=-1"),
        (["classifier", "--self-adaptive-momentum", "2"], "self_adaptive_momentum=2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_argument_is_refused_with_its_name(
    arguments: list[str], message: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = [] if arguments[0] == "knn" else ["--held-out", "9"]
    more = ["--data", str(image_folder), "--out", str(tmp_path / "run"), "--device", "cpu", "--cache", str(tmp_path)]
    assert main([*arguments, *more, *held]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("command", ["moco", "generator", "self-adaptive"])
def test_two_processes_share_what_they_remember(
    command: str, image_folder: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    """torchrun with two CPU processes: queues, thresholds and targets are of both; a generator has no float buffer."""
    out = tmp_path / "run"
    places = ["--data", str(image_folder), "--out", str(out), "--cache", str(tmp_path), "--device", "cpu"]
    small = ["--batch-size", "20", "--held-out", "9", "--epochs", "1"]
    arguments = {
        "moco": ["pretrain", "--method", "moco", *FRESH, "--queue", "200", "--false-negatives", "quantile",
                 "--hidden", "16", "--embedding-dim", "8", "--bank-size", "30"],
        "generator": ["generator", "--classifier", str(tiny_folder), "--width", "8"],
        "self-adaptive": ["classifier", "--method", "natural", *FRESH, "--self-adaptive-from", "0"],
    }[command]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training"]
    done = subprocess.run(
        [*launch, *arguments, *places, *small], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    memory = torch.load(out / "state.pt", weights_only=True)["parts"]["memory"]
    if command == "moco":
        assert memory["filled"] == 120  # 3 steps of 20 images with 2 views, of both processes
        assert memory["false_negatives.seen"].sum() == 60
    elif command == "self-adaptive":
        assert (memory["targets"].amax(1) < 1).sum() == 60
