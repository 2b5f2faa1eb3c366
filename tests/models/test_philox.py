from statistics import NormalDist

import pytest
import torch

from unperturb.models.philox import gaussian, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), (k0, k1))) == expected


def test_uniform_is_uniform_and_differs_by_seed_step_stream_and_place() -> None:
    draws = uniform(torch.arange(200), 0, 0, 500)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005
    counts = torch.histc(draws, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    for other in (
        uniform(torch.arange(1, 201), 0, 0, 500),
        uniform(torch.arange(200), 1, 0, 500),
        uniform(torch.arange(200), 0, 1, 500),
    ):
        assert abs(torch.corrcoef(torch.stack((draws.flatten(), other.flatten())))[0, 1]) < 0.02


def test_uniform_of_an_image_does_not_depend_on_the_batch_or_the_count() -> None:
    seeds = torch.tensor([5, 2**40 + 5, 7])
    together = uniform(seeds, torch.tensor([3, 4, 5]), 2, 11)
    for i, step in enumerate((3, 4, 5)):
        assert torch.equal(uniform(seeds[i : i + 1], step, 2, 7)[0], together[i, :7])
    assert not torch.equal(together[0], uniform(seeds[1:2], 3, 2, 11)[0])  # the seed's upper half counts


def test_gaussian_draws_are_the_quantiles_of_the_uniform_ones() -> None:
    seeds = torch.arange(4)
    draws = gaussian(seeds, 0, 3, 5_000)
    expected = [NormalDist().inv_cdf(float(one)) for one in uniform(seeds, 0, 3, 5_000)[1, :500].clamp(1e-6, 1 - 1e-6)]
    assert draws[1, :500].tolist() == pytest.approx(expected, abs=2e-3)
    assert abs(float(draws.mean())) < 0.03
    assert float(draws.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(draws[2:3], gaussian(seeds[2:3], 0, 3, 5_000))
