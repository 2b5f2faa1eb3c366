"""The contrastive methods' losses, each against NumPy or its parts, and what they remember."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.purifiers import numpy_info_nce
from unperturb.models.attacks.pgd import evaluating
from unperturb.models.checkpoints.card import HeadCard
from unperturb.models.contrastive.views import make_views
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.registry import build
from unperturb.training import seeds
from unperturb.training.contrastive.contrast import POLICY, Contrast, ContrastiveBatch, Loss, Queue, embed_together
from unperturb.training.contrastive.deacl import DeACL
from unperturb.training.contrastive.encoder import Encoder, fresh
from unperturb.training.contrastive.false_negatives import Kind
from unperturb.training.contrastive.moco import MoCo
from unperturb.training.contrastive.mutual_information import MutualInformation
from unperturb.training.contrastive.pretrain import PretrainConfig
from unperturb.training.contrastive.rocl import RoCL
from unperturb.training.contrastive.simclr import SimCLR
from unperturb.training.data import Split
from unperturb.training.supervised.classifier import ClassifierConfig, ClassifierTask
from unperturb.training.supervised.semi_supervised import SemiSupervisedTask
from unperturb.training.world import World

HERE = World(0, 1, torch.device("cpu"))


def config(**changed: Any) -> PretrainConfig:
    values = {"data": "x", "out": Path("x"), "hidden": 16, "embedding_dim": 8, "attack_steps": 2, **changed}
    return PretrainConfig(**values)


def encoder() -> Encoder:
    torch.manual_seed(4)
    architecture = Architecture(name="wide_resnet_10_1", num_classes=3, activation="silu")
    return fresh(architecture, HeadCard(hidden=16, embedding_dim=8, temperature=0.5))


def batch(images: torch.Tensor, *, epoch: int = 9) -> ContrastiveBatch:
    numbers = torch.arange(len(images))
    return ContrastiveBatch((images * 255).byte(), numbers, numbers, numbers % 3, epoch, 0)


def contrast(**changed: Any) -> Contrast:
    return Contrast(config(**changed), 8, HERE)


def numpy_loss(embeddings: torch.Tensor, same: torch.Tensor | None = None, *, temperature: float = 0.5) -> float:
    """NT-Xent of [batch, views, dim] with every view of the other images as negatives, but for those of its kind."""
    z = embeddings.detach().double().numpy()
    size, views = z.shape[:2]
    keep = ~(np.eye(size, dtype=bool) if same is None else same.numpy()).repeat(views, axis=1)
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
    from unperturb.models.attacks.instance import away_from

    with evaluating(teacher):
        attacked = shared.attack.run(
            x, away_from(teacher.features, aims, distance="cos"), seeds=batch(images).seeds
        ).image
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


@pytest.mark.parametrize("kind", ["keep", "labels"])
def test_s4ls_loss_is_cross_entropy_of_labelled_images_and_nt_xent_of_all(kind: Kind, images: torch.Tensor) -> None:
    """Zhai et al. 2019, eq. 1; the oracle leaves out the negatives of an image's class."""
    torch.manual_seed(3)
    classifier = build(Architecture(name="wide_resnet_10_1", num_classes=3, activation="silu"))
    split = Split((images * 255).byte(), torch.arange(8) % 3)
    settings = ClassifierConfig(
        data="x",
        out=Path("x"),
        method="natural",
        label_smoothing=0.0,
        false_negatives=kind,
        false_negatives_from=0,
        self_supervised_weight=0.5,
    )
    supervised = ClassifierTask(settings, classifier, split, split, HERE)
    task = SemiSupervisedTask(supervised, classifier, settings, HERE, labelled=3, weight=0.5)
    twin = copy.deepcopy(task.model).train()
    indices = torch.tensor([5, 1, 7, 3, 0])
    rows = torch.randperm(3, generator=seeds.of_step(seed=0, epoch=2, step=9, stream=1))
    labelled = supervised.batch(rows, 2, 9)
    expected = F.cross_entropy(twin.backbone(labelled.x), labelled.labels).item()
    views = make_views(split.images[indices] / 255, seeds=2 * (1 << 32) + indices, step=0, views=2, policy=POLICY)
    same = split.labels[indices][:, None] == split.labels[indices] if kind == "labels" else None
    expected += 0.5 * numpy_loss(embed_together(twin, views), same)
    assert abs(task.loss(indices, 2, 9)[0].item() - expected) < 1e-5
