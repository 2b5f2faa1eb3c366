"""Images that end before the last step: gated at the first, or settled."""

import numpy as np
import pytest
import torch

from tests.conftest import make_defended
from tests.support.purifiers import differing, some_end
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.errors import ConfigError

TABLE = torch.tensor(
    [
        [1.0, 5.0, 5.0, 5.0],
        [9.0, 4.0, 4.0, 6.0],
        [9.0, 3.0, 4.5, 4.0],
        [9.0, 2.0, 4.1, 4.0],
        [9.0, 1.0, 1.0, 3.0],
        [9.0, 0.5, 1.0, 9.0],
    ]
)


def descent(**changed: object) -> ProjectedGradient:
    values = {"direction": "descend", "epsilon": 1.0, "step_size": 0.01, "steps": 6, **changed}
    return ProjectedGradient(**values)  # type: ignore[arg-type]


def told(x: torch.Tensor, step: int) -> torch.Tensor:
    """The table's losses, with a slope of 1 in every pixel."""
    slope = x.sum((1, 2, 3))
    return TABLE[step] + slope - slope.detach()


def steps_taken(losses: np.ndarray, gate: float | None, settle: int) -> int:
    """The rule, for one image."""
    for step in range(len(losses)):
        if gate is not None and losses[0] <= gate:
            return 0
        if settle and step + 1 >= 2 * settle:
            now, before = losses[step + 1 - settle : step + 1], losses[step + 1 - 2 * settle : step + 1 - settle]
            if not now.mean() < before.mean():
                return step
    return len(losses)


@pytest.mark.parametrize(("gate", "settle"), [(2.0, 0), (None, 1), (None, 2), (5.0, 1), (None, 4)])
def test_images_take_the_steps_that_the_rule_allows(gate: float | None, settle: int) -> None:
    x = torch.full((4, 3, 2, 2), 0.5)
    found = descent(gate=gate, settle=settle).run(x, told, seeds=torch.arange(4))
    expected = [steps_taken(TABLE[:, i].numpy(), gate, settle) for i in range(4)]
    assert ((0.5 - found.image[:, 0, 0, 0]) / 0.01).round().int().tolist() == expected
    for losses, steps in zip(found.losses.T, expected, strict=True):
        shown = min(steps + 1, 6)  # the loss that ends it is known
        assert torch.equal(losses[:shown].isnan(), torch.zeros(shown, dtype=torch.bool))
        assert losses[shown:].isnan().all()


def test_gated_image_is_the_one_received_whatever_the_start() -> None:
    x = torch.full((4, 3, 2, 2), 0.5)
    found = descent(gate=2.0, start="uniform", epsilon=0.1).run(x, told, seeds=torch.arange(4))
    assert torch.equal(found.image[0], x[0])
    assert not torch.isclose(found.image[1:], x[1:]).any()


def test_unrolled_gradient_of_images_that_end_is_that_of_the_steps_they_took() -> None:
    x = (0.3 + 0.4 * torch.rand(2, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    lower = float((x[0].detach() ** 3).sum()) + 1e-6

    def objective(z: torch.Tensor, _: int) -> torch.Tensor:
        return (z**3).sum((1, 2, 3)) + torch.tensor([0.0, 100.0])

    p = descent(norm="l2", epsilon=0.25, step_size=0.05, steps=3, gate=lower)
    image = p.run(x, objective, seeds=torch.arange(2), unrolled=True).image
    assert torch.equal(image[0], x[0])
    (gradient,) = torch.autograd.grad(image[0].sum(), x, retain_graph=True)
    assert torch.equal(gradient[0], torch.ones_like(x[0]))
    assert torch.autograd.gradcheck(lambda z: p.run(z, objective, seeds=torch.arange(2), unrolled=True).image[1], (x,))


def test_images_left_out_of_later_batches_end_as_in_the_whole_one(images: torch.Tensor) -> None:
    purifier, seeds = make_defended(some_end(images)).double().purifier, torch.arange(8)
    images = images.double()  # no rounding that steps would enlarge
    found = purifier.descend(images, seeds=seeds)
    whole = purifier.loop.run(images, purifier.objective(images, seeds), seeds=seeds)
    alone = [purifier.descend(images[i : i + 1], seeds=seeds[i : i + 1]) for i in range(8)]
    ended = found.losses.isnan().any(0)
    assert 0 < int(ended.sum()) <= 8
    assert torch.equal(found.losses.isnan(), whole.losses.isnan())
    for other in (whole.image, torch.cat([one.image for one in alone])):
        assert differing(found.image, other) < 0.01
    assert torch.equal(found.losses.isnan(), torch.cat([one.losses for one in alone], dim=1).isnan())


@pytest.mark.parametrize(
    "changed", [{"settle": -1}, {"gate": float("nan")}, {"gate": 1.0, "direction": "ascend"}], ids=str
)
def test_bad_rule_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changed))):
        descent(**changed)
