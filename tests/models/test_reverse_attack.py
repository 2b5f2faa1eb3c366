"""The purifier, and DESIGN's invariants 1 to 5."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import make_checkpoint, make_config, make_defended
from unperturb.models.contrastive.loss import NegativePolicy
from unperturb.models.errors import ConfigError
from unperturb.models.networks.head import NegativesBank
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttack, ReverseAttackConfig, preset, to_uint8


def test_presets_are_what_they_are_named_for() -> None:
    published = preset("published")
    assert (published.views, published.temperature) == (4, 0.2)
    loop = published.loop
    assert (loop.steps, loop.step_size, loop.epsilon, loop.start) == (40, 2 / 255, 16 / 255, "uniform")
    small, large = preset("default").loop, preset("transfer").loop
    assert small.steps * small.step_size <= small.epsilon < large.step_size * large.steps
    with pytest.raises(ConfigError, match=r"'best' is not one of default, vote, transfer, restorer, published"):
        preset("best")


def test_loss_is_lower_afterwards_on_views_that_no_step_used(images: torch.Tensor) -> None:
    config = make_config(steps=10, views=4)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, start="zero"))
    trace = make_defended(config).purify(images, seed=torch.arange(8)).trace
    assert trace.losses.shape == (10, 8)
    assert trace.loss_after.mean() < trace.loss_before.mean()
    assert trace.losses[-1].mean() < trace.losses[0].mean()


def test_trace_tells_the_distance(images: torch.Tensor) -> None:
    purified = make_defended().purify(images)
    difference = (purified.image - images).flatten(1)
    assert torch.allclose(purified.trace.linf, difference.abs().amax(1))
    assert torch.allclose(purified.trace.l2, difference.norm(dim=1))


@pytest.mark.parametrize("name", PRESETS)
def test_result_alone_and_in_a_batch_is_the_same(images: torch.Tensor, name: str) -> None:
    """Invariant 1."""
    defended = make_defended(PRESETS[name])
    together = defended.classify(images, seed=7)
    turned = defended.classify(images.flip(0), seed=7)
    for i in (0, 3, 7):
        alone = defended.classify(images[i : i + 1], seed=7)
        for other in (together.logits[i], turned.logits[7 - i]):
            assert torch.allclose(alone.logits[0].softmax(0), other.softmax(0), atol=1e-4)


def test_result_depends_on_the_seed(images: torch.Tensor) -> None:
    defended = make_defended()
    assert torch.equal(defended.purify(images, seed=1).image, defended.purify(images, seed=1).image)
    assert not torch.equal(defended.purify(images, seed=1).image, defended.purify(images, seed=2).image)


@pytest.mark.parametrize("restorer", [True, False], ids=["with a restorer", "without"])
def test_default_draws_nothing_and_moves_an_image_softly(images: torch.Tensor, restorer: bool) -> None:
    made = make_checkpoint()
    made = made if restorer else dataclasses.replace(made, restorer=None)
    defended = defend(made, preset("default"))
    one, other = (defended.classify(images, seed=seed) for seed in (1, 2))
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.logits, other.logits)
    moved = (one.image - images).abs()
    assert 0 < float(moved.max()) <= 1 / 255 + 1e-6
    inside = (images > 2 / 255) & (images < 1 - 2 / 255)
    assert moved[inside].unique().numel() > 100  # soft: not every pixel by the same


@pytest.mark.parametrize("batchmate", [float("nan"), float("inf"), 1e30])
def test_hostile_batchmate_changes_nothing(images: torch.Tensor, batchmate: float) -> None:
    defended = make_defended()
    expected = defended.purify(images[:4]).image
    hostile = images[:4].clone()
    hostile[2] = batchmate
    found = defended.purify(hostile).image
    assert torch.allclose(found[[0, 1, 3]], expected[[0, 1, 3]], atol=1e-3)


@pytest.mark.parametrize("epsilon", [0.0, 0.001, 0.5 / 255, 0.03, 8 / 255, 16 / 255])
def test_rounded_to_8_bits_it_is_still_within_epsilon(images: torch.Tensor, epsilon: float) -> None:
    """Invariant 3."""
    purified = make_defended(make_config(epsilon=epsilon)).purify(images).image
    stored = to_uint8(purified, images, epsilon=epsilon)
    assert stored.dtype == torch.uint8
    assert ((stored.float() / 255 - images).abs() <= epsilon + 1e-6).all()
    assert (purified >= 0).all()
    assert (purified <= 1).all()
    assert ((purified - images).abs() <= epsilon + 1e-6).all()


def test_rounding_of_a_received_image_between_levels_stays_within_epsilon() -> None:
    received = torch.rand(4, 3, 8, 8)
    for epsilon in (1 / 255, 0.03):
        purified = (received + epsilon * (2 * torch.rand(4, 3, 8, 8) - 1)).clamp(0, 1)
        stored = to_uint8(purified, received, epsilon=epsilon).float() / 255
        assert ((stored - received).abs() <= epsilon + 1e-5).all()
        assert ((stored - purified).abs() <= 1.5 / 255).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_every_grad_mode_and_gives_the_same(images: torch.Tensor, mode: type) -> None:
    """Invariant 4."""
    defended = make_defended()
    expected = defended(images)
    with mode():
        assert torch.allclose(defended(images.clone()), expected, atol=1e-5)


def test_leaves_no_grad_on_parameters_and_changes_no_buffer(images: torch.Tensor) -> None:
    """Invariant 4, also where the caller wants to train and has switched modes."""
    defended = make_defended().requires_grad_(True)
    defended.train()
    before = {name: value.clone() for name, value in defended.state_dict().items()}
    defended(images)
    defended.purify(images)
    assert all(parameter.grad is None for parameter in defended.parameters())
    for name, value in defended.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bpda_gradient_is_the_classifiers_at_the_purified_image(images: torch.Tensor) -> None:
    defended = make_defended()
    x = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(defended(x)[:, 0].sum(), x)
    z = defended.purify(images).image.requires_grad_()
    (expected,) = torch.autograd.grad(defended.classifier(z)[:, 0].sum(), z)
    assert torch.allclose(found, expected, atol=1e-5)


def test_unrolled_gradient_reaches_through_the_steps(images: torch.Tensor) -> None:
    """Invariant 4."""
    defended = make_defended(make_config(steps=2))
    x = images[:2].clone().requires_grad_()
    (identity,) = torch.autograd.grad(defended(x)[:, 0].sum(), x)
    defended.gradient = "full"
    (unrolled,) = torch.autograd.grad(defended(x)[:, 0].sum(), x)
    assert unrolled.isfinite().all()
    assert (unrolled - identity).abs().max() > 1e-3 * identity.abs().max()


class ForbiddenOps(TorchDispatchMode):
    """Refuses operations that read a value back to the host, or whose output shape depends on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert not any(name in func.name() for name in self.FORBIDDEN), func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "negatives",
    [NegativePolicy(), NegativePolicy(kind="subset", count=9), NegativePolicy(kind="drop-similar", fraction=0.2)],
    ids=lambda policy: policy.kind,
)
def test_no_step_reads_the_device_or_has_a_shape_that_depends_on_data(
    images: torch.Tensor, negatives: NegativePolicy
) -> None:
    """Invariant 5."""
    defended = make_defended(dataclasses.replace(make_config(), negatives=negatives))
    with ForbiddenOps():
        defended.purify(images[:2], seed=torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="nonzero"), ForbiddenOps():
        images.nonzero()


def test_false_negatives_are_removed_from_the_loss(images: torch.Tensor) -> None:
    plain = make_defended().purifier
    removed = make_defended(
        dataclasses.replace(make_config(), negatives=NegativePolicy(kind="drop-similar", fraction=0.3))
    ).purifier
    seeds = torch.arange(8)
    assert isinstance(plain, ReverseAttack)
    assert isinstance(removed, ReverseAttack)
    assert (removed.objective(images, seeds)(images, 0) < plain.objective(images, seeds)(images, 0)).all()


@pytest.mark.parametrize(
    "bad", [{"views": 1}, {"temperature": 0.0}, {"loop": dataclasses.replace(make_config().loop, direction="ascend")}]
)
def test_config_that_cannot_purify_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ReverseAttackConfig(**{"loop": make_config().loop, "views": 2, **bad})  # type: ignore[arg-type]


def test_subset_larger_than_the_bank_is_refused() -> None:
    tiny = make_checkpoint()
    assert tiny.head is not None
    config = dataclasses.replace(make_config(), negatives=NegativePolicy(kind="subset", count=41))
    bank = NegativesBank(torch.randn(40, 4), torch.arange(40))
    with pytest.raises(ConfigError, match="41 of a bank of 40"):
        ReverseAttack(tiny.classifier, tiny.head, bank, config)
