"""The detectors of false negatives."""

import pytest
import torch

from unperturb.models.errors import ConfigError
from unperturb.training.contrastive.false_negatives import FalseNegatives


def scene(batch: int = 6, negatives: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Similarities, who is another, who is of the same class (the nearer ones, mostly), and the anchors' numbers."""
    similarity = torch.rand(batch, negatives) * 2 - 1
    others = torch.rand(batch, negatives) > 0.1
    same = similarity + 0.2 * torch.randn_like(similarity) > 0.6
    return similarity, others, same, torch.arange(batch) + 10


def test_keep_leaves_nothing_out() -> None:
    similarity, others, same, indices = scene()
    found = FalseNegatives("keep", images=20, fraction=0.1).find(similarity, others, same, indices)
    assert torch.equal(found.keep, others)
    assert found.dropped == 0


def test_top_leaves_out_the_nearest_share() -> None:
    similarity, others, same, indices = scene()
    found = FalseNegatives("top", images=20, fraction=0.2).find(similarity, others, same, indices)
    count = round(0.2 * int(others.sum(1).min()))
    for row in range(6):
        left_out = others[row] & ~found.keep[row]
        assert left_out.sum() == count
        assert similarity[row][left_out].min() >= similarity[row][found.keep[row]].max()


def test_labels_leave_out_exactly_the_anchors_class() -> None:
    similarity, others, same, indices = scene()
    found = FalseNegatives("labels", images=20, fraction=0.2).find(similarity, others, same, indices)
    assert torch.equal(found.keep, others & ~same)
    assert found.hits == found.dropped == found.of_class


def test_precision_is_counted_against_the_labels() -> None:
    similarity, others, same, indices = scene()
    found = FalseNegatives("top", images=20, fraction=0.2).find(similarity, others, same, indices)
    dropped = others & ~found.keep
    assert int(found.hits) == int((dropped & same).sum())
    assert int(found.dropped) == int(dropped.sum())
    assert int(found.possible) == int(others.sum())
    assert found.hits / found.dropped > found.of_class / found.possible  # better than chance


def test_learned_threshold_converges_to_the_quantile() -> None:
    """Each anchor's similarities have a distribution of their own; a batch is a small sample of it."""
    torch.manual_seed(0)
    centres, spreads = torch.linspace(-0.4, 0.4, 5), torch.linspace(0.05, 0.25, 5)
    detector = FalseNegatives("quantile", images=5, fraction=0.2, rate=0.02)
    everyone = torch.ones(5, 16, dtype=torch.bool)
    history = []
    for _ in range(1500):
        similarity = centres[:, None] + spreads[:, None] * torch.randn(5, 16)
        detector.find(similarity, everyone, everyone, torch.arange(5))
        history.append(detector.threshold.clone())
    exact = torch.distributions.Normal(centres, spreads).icdf(torch.tensor(0.8))
    assert (torch.stack(history[500:]).mean(0) - exact).abs().max() < 0.03


def test_before_it_is_active_it_learns_and_leaves_nothing_out() -> None:
    similarity, others, same, indices = scene()
    detector = FalseNegatives("quantile", images=20, fraction=0.2)
    found = detector.find(similarity, others, same, indices, active=False)
    assert torch.equal(found.keep, others)
    assert found.dropped > 0
    assert detector.seen.nonzero()[:, 0].tolist() == indices.tolist()


@pytest.mark.parametrize("kind", ["labels", "quantile", "top"])
def test_an_anchor_always_keeps_a_negative(kind: str) -> None:
    similarity, others, _, indices = scene(negatives=3)
    others[:] = True
    detector = FalseNegatives(kind, images=20, fraction=0.99)  # type: ignore[arg-type]
    detector.threshold[:], detector.seen[:] = -2, True
    found = detector.find(similarity, others, torch.ones_like(others), indices)
    assert found.keep.any(1).all()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_share_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction="):
        FalseNegatives("top", images=5, fraction=fraction)
