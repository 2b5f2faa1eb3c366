"""Readouts: soft nearest neighbours against NumPy, dense layers, encoders without one; in checkpoints and served."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_checkpoint
from tests.support.checkpoints import CARDS, with_readout
from unperturb.models.accuracy import correct
from unperturb.models.attacks.pgd import pgd
from unperturb.models.checkpoints import store
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.readout import WHOLE_BANK, NoReadout, ReadoutCard, SoftNeighbours


def neighbours(*, k: int = 5, temperature: float = 0.1, bank: int = 30) -> SoftNeighbours:
    generator = torch.Generator().manual_seed(2)
    return SoftNeighbours(
        torch.randn(bank, 6, generator=generator),
        torch.arange(bank) % 3,
        num_classes=3,
        neighbours=k,
        temperature=temperature,
    )


@pytest.mark.parametrize("k", [0, 1, 5, 30])
def test_votes_are_the_formula_in_numpy(k: int) -> None:
    readout, features = neighbours(k=k), torch.randn(7, 6)
    z = features.double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    similarity = z @ readout.bank.double().numpy().T / 0.1
    for row, found in zip(similarity, readout(features), strict=True):
        nearest = set(np.argsort(-row)[:k])
        sums = np.zeros(3)
        for n, value in enumerate(row):
            sums[int(readout.labels[n])] += np.exp(value) * ((n in nearest) + WHOLE_BANK)
        assert np.allclose(found.numpy(), np.log(sums), atol=1e-4)


def test_unanimous_neighbours_leave_a_gradient_to_the_attacker() -> None:
    """Plain kNN votes are constant there, which is how they mask gradients."""
    bank = torch.cat((torch.eye(4)[:1].repeat(10, 1) + 0.01 * torch.randn(10, 4), torch.eye(4)[1:2].repeat(10, 1)))
    readout = SoftNeighbours(bank, torch.arange(20) // 10, num_classes=2, neighbours=5, temperature=0.07)
    x = torch.eye(4)[:1].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(readout(x), torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[0, 1] > 0  # towards the other class


def test_class_without_images_has_a_finite_score() -> None:
    readout = SoftNeighbours(
        torch.randn(5, 4), torch.zeros(5, dtype=torch.int64), num_classes=3, neighbours=2, temperature=0.03
    )
    scores = readout(torch.randn(6, 4))
    assert scores.isfinite().all()
    assert (scores.argmax(1) == 0).all()


@pytest.mark.parametrize("kind", CARDS)
def test_checkpoint_keeps_its_readout(kind: str, tmp_path: Path, images: torch.Tensor) -> None:
    made = with_readout(CARDS[kind])
    store.save(tmp_path / "it", made, half=False)
    loaded = store.load(tmp_path / "it")
    assert loaded.card.readout == CARDS[kind]
    if kind == "none":
        assert isinstance(loaded.classifier.get_submodule("linear"), NoReadout)
        with pytest.raises(CheckpointError, match="unperturb train linear --encoder"):
            loaded.classifier(images)
    else:
        assert torch.allclose(loaded.classifier(images), made.classifier(images), atol=1e-5)


def test_pgd_breaks_a_nearest_neighbour_classifier(images: torch.Tensor) -> None:
    classifier = with_readout(CARDS["knn"]).classifier
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    moved = pgd(classifier, images, labels, epsilon=32 / 255, step_size=4 / 255, steps=20)
    assert sum(correct(classifier, moved, labels)) < len(labels) / 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "magic"}, "magic"),
        ({"kind": "dense", "hidden": 0}, "hidden=0"),
        ({"kind": "knn", "neighbours": 5, "bank_size": 4}, "neighbours=5"),
        ({"kind": "knn", "neighbours": 0, "bank_size": 0}, "bank_size=0"),
        ({"temperature": 0.001}, "temperature=0.001"),
    ],
    ids=lambda value: str(value),
)
def test_readout_that_cannot_be_is_refused(bad: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadoutCard(**bad)  # type: ignore[arg-type]
    store.save(tmp_path, make_checkpoint())
    card = tmp_path / store.CARD
    text = card.read_text()
    readout = {**dataclasses.asdict(ReadoutCard()), **bad}
    start, end = text.index('"readout": {'), text.index("}", text.index('"readout": {'))
    fields = ", ".join(f'"{k}": {v if not isinstance(v, str) else chr(34) + v + chr(34)}' for k, v in readout.items())
    card.write_text(text[:start] + '"readout": {' + fields + text[end:])
    with pytest.raises(CheckpointError, match=message):
        store.load(tmp_path)
