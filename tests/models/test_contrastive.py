import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.purifiers import numpy_info_nce
from unperturb.models.contrastive.loss import NegativePolicy, in_batch_negatives, info_nce
from unperturb.models.errors import ConfigError
from unperturb.models.networks.head import NegativesBank, ProjectionHead


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("views", [2, 4])
def test_info_nce_matches_the_formula_in_numpy(views: int) -> None:
    z, k = unit(5, views, 6), unit(30, 6)
    keep = torch.rand(5, 30) > 0.4
    for mask in (None, keep):
        found = info_nce(z, k, temperature=0.2, keep=mask)
        expected = numpy_info_nce(z.numpy(), k.numpy(), 0.2, None if mask is None else mask.numpy())
        assert np.allclose(found.numpy(), expected, atol=1e-12)


def test_form_with_all_positives_in_one_matches_numpy() -> None:
    """Kim et al. 2020, eq. 2."""
    z, k = unit(4, 3, 6), unit(10, 6)
    terms = []
    for image in z.numpy():
        for i in range(3):
            positive = sum(np.exp(image[i] @ image[j] / 0.5) for j in range(3) if j != i)
            terms.append(-np.log(positive / (positive + np.exp(k.numpy() @ image[i] / 0.5).sum())))
    found = info_nce(z, k, temperature=0.5, together=True)
    assert np.allclose(found.numpy(), np.array(terms).reshape(4, 3).mean(1), atol=1e-12)
    pair = z[:, :2]
    assert torch.allclose(info_nce(pair, k, temperature=0.5, together=True), info_nce(pair, k, temperature=0.5))


def test_quantile_drops_what_is_nearer_than_a_negatives_own_share() -> None:
    bank, embeddings = unit(40, 6).float(), unit(7, 2, 6).float()
    policy = NegativePolicy(kind="quantile", fraction=0.2)
    thresholds = policy.thresholds(bank)
    assert thresholds is not None
    for n in range(40):
        own = np.sort(np.delete((bank @ bank[n]).numpy(), n))[::-1]
        assert abs(float(thresholds[n]) - own[8]) < 1e-6  # 8 of the other 39 are nearer: a fifth
    keep = policy.keep(embeddings, bank, torch.arange(7), thresholds)
    assert keep is not None
    similarity = F.normalize(embeddings.mean(1), dim=1) @ bank.T
    expected = (similarity <= thresholds).scatter(1, similarity.argmin(1, keepdim=True), True)
    assert torch.equal(keep, expected)
    assert (~keep).any()
    alone = NegativePolicy(kind="quantile", fraction=0.9).keep(
        embeddings, bank, torch.arange(7), torch.full((40,), -2.0)
    )
    assert alone is not None
    assert (alone.sum(1) == 1).all()


def test_two_views_with_in_batch_negatives_are_simclrs_nt_xent() -> None:
    z = unit(7, 2, 5)
    negatives, keep = in_batch_negatives(z)
    flat = torch.cat((z[:, 0], z[:, 1]))
    similarity = (flat @ flat.T / 0.5).fill_diagonal_(float("-inf"))
    expected = F.cross_entropy(similarity, torch.arange(14).roll(7))
    assert torch.allclose(info_nce(z, negatives, temperature=0.5, keep=keep).mean(), expected)


def test_info_nce_of_an_image_does_not_depend_on_the_batch() -> None:
    z, k = unit(6, 3, 8), unit(20, 8)
    together = info_nce(z, k, temperature=0.2)
    assert torch.allclose(info_nce(z[2:3], k, temperature=0.2)[0], together[2])


def test_info_nce_gradient_matches_finite_differences() -> None:
    z, k = unit(2, 3, 4).requires_grad_(), unit(9, 4)
    assert torch.autograd.gradcheck(lambda e: info_nce(e, k, temperature=0.2), (z,))


def test_info_nce_is_full_precision_under_autocast() -> None:
    z, k = unit(4, 2, 8).float(), unit(50, 8).float()
    exact = info_nce(z, k, temperature=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(info_nce(z, k, temperature=0.2), exact, atol=1e-6)


def test_one_view_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        info_nce(unit(3, 1, 4), unit(5, 4), temperature=0.2)


def test_subset_keeps_the_count_and_depends_on_the_seed_alone() -> None:
    z, k = unit(4, 2, 5).float(), unit(50, 5).float()
    policy = NegativePolicy(kind="subset", count=12)
    keep = policy.keep(z, k, torch.tensor([1, 2, 1, 3]))
    assert keep is not None
    assert (keep.sum(1) == 12).all()
    assert torch.equal(keep[0], keep[2])
    assert not torch.equal(keep[0], keep[1])


def test_drop_similar_removes_the_nearest_share() -> None:
    z, k = unit(4, 2, 5).float(), unit(50, 5).float()
    keep = NegativePolicy(kind="drop-similar", fraction=0.1).keep(z, k, torch.arange(4))
    assert keep is not None
    similarity = z.mean(1) @ k.T
    for i in range(4):
        assert set(similarity[i].topk(5).indices.tolist()) == set((~keep[i]).nonzero().flatten().tolist())


def test_all_keeps_everything() -> None:
    assert NegativePolicy().keep(unit(1, 2, 3).float(), unit(4, 3).float(), torch.arange(1)) is None


@pytest.mark.parametrize("bad", [{"kind": "subset"}, {"kind": "drop-similar", "fraction": 1.0}])
def test_policy_that_leaves_nothing_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="negatives"):
        NegativePolicy(**bad)  # type: ignore[arg-type]


def test_head_and_bank_have_unit_lengths() -> None:
    head = ProjectionHead(feature_dim=6, hidden=5, embedding_dim=4).eval()
    assert torch.allclose(head(torch.randn(3, 6)).norm(dim=1), torch.ones(3))
    bank = NegativesBank(torch.randn(10, 4) * 5, torch.arange(10))
    assert torch.allclose(bank.embeddings.norm(dim=1), torch.ones(10))
    with pytest.raises(ConfigError, match="bank of 0"):
        NegativesBank(torch.randn(0, 4), torch.arange(0))
