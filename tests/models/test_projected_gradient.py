import dataclasses

import numpy as np
import pytest
import torch

from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.errors import ConfigError


def loop(**changed: object) -> ProjectedGradient:
    base = ProjectedGradient(direction="ascend", epsilon=8 / 255, step_size=2 / 255, steps=5)
    return dataclasses.replace(base, **changed)  # type: ignore[arg-type]


def quadratic(x: torch.Tensor, step: int) -> torch.Tensor:
    weights = torch.linspace(-1, 1, x[0].numel()).view_as(x[0])
    return (weights * (x - 0.3).square()).sum((1, 2, 3)) * (1 + 0.1 * step)


def numpy_linf(x0: np.ndarray, p: ProjectedGradient) -> np.ndarray:
    """Madry et al., eq. 2.3, in NumPy, for `quadratic`."""
    weights = np.linspace(-1, 1, x0[0].size, dtype=np.float64).reshape(x0[0].shape)
    x, velocity = x0.copy(), np.zeros_like(x0)
    sign = 1 if p.direction == "ascend" else -1
    for step in range(p.steps):
        gradient = 2 * weights * (x - 0.3) * (1 + 0.1 * step)
        if p.momentum:
            velocity = p.momentum * velocity + gradient / np.abs(gradient).mean(axis=(1, 2, 3), keepdims=True)
            gradient = velocity
        size = np.abs(gradient)
        move = np.sign(gradient) if p.step == "sign" else gradient / (size + size.mean((1, 2, 3), keepdims=True))
        x = x + sign * p.step_size * move
        x = np.clip(np.clip(x, x0 - p.epsilon, x0 + p.epsilon), 0, 1)
    return x


@pytest.mark.parametrize("direction", ["ascend", "descend"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("step", ["sign", "soft"])
def test_linf_steps_match_numpy(images: torch.Tensor, direction: str, momentum: float, step: str) -> None:
    p = loop(direction=direction, momentum=momentum, step=step)
    x0 = images[:2].double() * 0.98 + 0.003  # off the objective's turning point
    found = p.run(x0, lambda x, step: quadratic(x, step), seeds=torch.arange(2)).image
    assert np.allclose(found.numpy(), numpy_linf(x0.numpy(), p), atol=1e-12)


def test_losses_rise_when_ascending_and_fall_when_descending(images: torch.Tensor) -> None:
    objective = lambda x, _: quadratic(x, 0)  # noqa: E731
    up = loop().run(images, objective, seeds=torch.arange(8)).losses
    down = loop(direction="descend").run(images, objective, seeds=torch.arange(8)).losses
    assert up.shape == (5, 8)
    assert (up.diff(dim=0) > 0).all()
    assert (down.diff(dim=0) < 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_result_stays_in_the_ball_and_in_the_unit_range(images: torch.Tensor, norm: str, start: str) -> None:
    p = loop(norm=norm, start=start, epsilon=0.5 if norm == "l2" else 8 / 255, step_size=0.2, steps=7)
    x = p.run(images, quadratic, seeds=torch.arange(8)).image
    distance = (x - images).flatten(1)
    size = distance.abs().amax(1) if norm == "linf" else distance.norm(dim=1)
    assert (size <= p.epsilon + 1e-6).all()
    assert size.max() > p.epsilon * 0.9
    assert x.min() >= 0
    assert x.max() <= 1


def test_uniform_start_fills_the_ball_and_depends_on_the_seed_alone(images: torch.Tensor) -> None:
    p = loop(start="uniform")
    middle = images.clamp(0.1, 0.9)
    begun = p.begin(middle, torch.arange(8))
    noise = (begun - middle) / p.epsilon
    assert noise.abs().max() <= 1.0001
    assert abs(noise.std() - 3**-0.5) < 0.01
    assert torch.equal(p.begin(middle[4:5], torch.tensor([4]))[0], begun[4])
    assert not torch.equal(p.begin(middle[4:5], torch.tensor([5]))[0], begun[4])


def test_ramp_keeps_a_step_continuous_where_the_sign_jumps() -> None:
    x0 = torch.full((1, 3, 2, 2), 0.5)
    gradient = torch.tensor([[[1.0, -1.0], [1e-7, -1e-7]]]).expand(1, 3, 2, 2)
    jump = loop().advance(x0, x0, gradient, None)[0] - x0
    smooth = loop(ramp=1e-3).advance(x0, x0, gradient, None)[0] - x0
    assert torch.allclose(jump.abs(), torch.full_like(jump, 2 / 255))
    assert torch.allclose(smooth[0, :, 0].abs(), torch.full((3, 2), 2 / 255))
    assert (smooth[0, :, 1].abs() < 1e-5).all()


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_unrolled_gradient_flows_through_every_step_and_matches_finite_differences(momentum: float, start: str) -> None:
    x0 = (0.3 + 0.4 * torch.rand(1, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    # smooth: no sign, no active bound
    p = loop(norm="l2", epsilon=0.25, step_size=0.05, steps=3, momentum=momentum, start=start)
    assert torch.autograd.gradcheck(
        lambda x: p.run(x, lambda z, s: (z**3).sum((1, 2, 3)), seeds=torch.arange(1), unrolled=True).image, (x0,)
    )


def test_soft_steps_own_gradient_matches_finite_differences() -> None:
    x0 = (0.3 + 0.4 * torch.rand(2, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    p = loop(epsilon=0.25, step_size=0.02, steps=3, step="soft")  # no active bound
    assert torch.autograd.gradcheck(
        lambda x: p.run(x, lambda z, s: (z**3).sum((1, 2, 3)), seeds=torch.arange(2), unrolled=True).image, (x0,)
    )


def test_unrolled_sign_steps_have_a_gradient_that_the_identity_has_not() -> None:
    x0 = (0.3 + 0.4 * torch.rand(2, 3, 4, 4)).requires_grad_()
    objective = lambda z, _: (z**3).sum((1, 2, 3))  # noqa: E731
    out = loop(steps=2).run(x0, objective, seeds=torch.arange(2), unrolled=True).image
    (gradient,) = torch.autograd.grad(out.sum(), x0)
    assert (gradient - 1).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 2])
def test_unrolled_steps_from_images_that_need_no_gradient_are_the_plain_ones(images: torch.Tensor, steps: int) -> None:
    plain, unrolled = (
        loop(steps=steps).run(images, quadratic, seeds=torch.arange(8), unrolled=kept) for kept in (False, True)
    )
    assert torch.equal(unrolled.image, plain.image)
    assert torch.equal(unrolled.losses, plain.losses)
    assert not unrolled.image.requires_grad


def test_unrolled_without_gradients_is_refused(images: torch.Tensor) -> None:
    with torch.no_grad(), pytest.raises(ConfigError, match="unrolled"):
        loop().run(images, quadratic, seeds=torch.arange(8), unrolled=True)


@pytest.mark.parametrize(
    "field",
    [
        {"epsilon": -0.1},
        {"epsilon": float("nan")},
        {"steps": -1},
        {"norm": "l1"},
        {"start": "ones"},
        {"step": "long"},
        {"step": "soft", "norm": "l2"},
        {"direction": "down"},
        {"step_size": float("inf")},
    ],
    ids=str,
)
def test_bad_parameter_is_refused_with_its_name(field: dict[str, object]) -> None:
    with pytest.raises((ConfigError, TypeError), match=next(iter(field))):
        loop(**field)


def test_linf_radius_beyond_all_pixels_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"epsilon=8\.0 .* as 8/255"):
        loop(epsilon=8.0)
    assert loop(epsilon=8.0, norm="l2").epsilon == 8
    assert loop(epsilon=1.0).epsilon == 1
