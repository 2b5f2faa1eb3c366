import dataclasses

import pytest
import torch
import torch.nn.functional as F

from unperturb.models.contrastive.views import (
    ViewParameters,
    ViewPolicy,
    apply,
    color,
    draw,
    luma,
    make_views,
    resized_crop,
    shift_hue,
)
from unperturb.models.errors import ConfigError
from unperturb.models.purifiers.reverse_attack import MIRRORED, PAIR

PLAIN = dict(
    crop_area=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    flip=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    grayscale=0.0,
)


def parameters(batch: int, **changed: torch.Tensor) -> ViewParameters:
    """A view that changes nothing, but for what is given."""
    one, zero, no = torch.ones(batch), torch.zeros(batch), torch.zeros(batch, dtype=torch.bool)
    same = ViewParameters(zero, zero, one, one, no, one, one, one, zero, no)
    return same._replace(**changed)


def test_view_without_change_returns_the_image(images: torch.Tensor) -> None:
    assert torch.allclose(apply(images, parameters(8), ViewPolicy()), images, atol=2e-6)


@pytest.mark.parametrize(
    "policy",
    [
        ViewPolicy(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0)),
        dataclasses.replace(ViewPolicy(), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grayscale=0.0),
        MIRRORED,
        dataclasses.replace(MIRRORED, flip=0.0),
    ],
    ids=["uncropped", "uncoloured", "mirrored", "as it is"],
)
def test_work_that_a_policy_never_asks_for_changes_nothing(policy: ViewPolicy, images: torch.Tensor) -> None:
    drawn = draw(policy, torch.arange(8), 0, 0)
    assert torch.allclose(apply(images, drawn, policy), apply(images, drawn, ViewPolicy()), atol=2e-6)


def test_resized_crop_matches_kornia_and_grid_sample(images: torch.Tensor) -> None:
    kornia = pytest.importorskip("kornia")
    view = parameters(
        8,
        top=torch.rand(8) * 0.4,
        left=torch.rand(8) * 0.4,
        height=torch.rand(8) * 0.5 + 0.1,
        width=torch.rand(8) * 0.5 + 0.1,
    )
    mine = resized_crop(images, view)
    scale = torch.diag_embed(torch.stack((view.width, view.height), 1))
    shift = torch.stack((2 * view.left + view.width - 1, 2 * view.top + view.height - 1), 1)[:, :, None]
    grid = F.affine_grid(torch.cat((scale, shift), 2), list(images.shape), align_corners=False)
    assert torch.allclose(mine, F.grid_sample(images, grid, padding_mode="border", align_corners=False), atol=1e-5)
    # kornia takes the pixel centres of the first and last output pixels in the source
    first_x, first_y = 32 * view.left + 0.5 * view.width - 0.5, 32 * view.top + 0.5 * view.height - 0.5
    last_x, last_y = first_x + 31 * view.width, first_y + 31 * view.height
    corners = torch.stack(
        [torch.stack(p, 1) for p in ((first_x, first_y), (last_x, first_y), (last_x, last_y), (first_x, last_y))],
        1,
    )
    theirs = kornia.geometry.transform.crop_and_resize(
        images, corners, (32, 32), align_corners=True, padding_mode="border"
    )
    assert torch.allclose(mine, theirs, atol=1e-4)


def test_flip_matches_kornia(images: torch.Tensor) -> None:
    kornia = pytest.importorskip("kornia")
    flipped = resized_crop(images, parameters(8, flip=torch.ones(8, dtype=torch.bool)))
    assert torch.allclose(flipped, kornia.geometry.transform.hflip(images), atol=2e-6)


def test_each_colour_operation_matches_kornia(images: torch.Tensor) -> None:
    kornia = pytest.importorskip("kornia")
    factor = torch.linspace(0.2, 1.8, 8)
    turns = torch.linspace(-0.5, 0.5, 8)
    enhance = kornia.enhance
    brightness = enhance.adjust_brightness_accumulative(images, factor)
    assert torch.allclose(color(images, parameters(8, brightness=factor)), brightness, atol=1e-5)
    contrast = enhance.adjust_contrast_with_mean_subtraction(images, factor)
    assert torch.allclose(color(images, parameters(8, contrast=factor)), contrast, atol=1e-4)
    saturation = enhance.adjust_saturation_with_gray_subtraction(images, factor)
    assert torch.allclose(color(images, parameters(8, saturation=factor)), saturation, atol=1e-4)
    hue = enhance.adjust_hue(images, turns * 2 * torch.pi)
    assert torch.allclose(shift_hue(images, turns), hue, atol=1e-4)
    gray = kornia.color.rgb_to_grayscale(images)
    assert torch.allclose(luma(images), gray, atol=1e-5)


def test_alternating_views_are_the_image_and_its_mirror_image_whatever_the_seed(images: torch.Tensor) -> None:
    seeds = torch.arange(8)
    views = make_views(images, seeds=seeds, step=torch.full((8,), 3), views=3, policy=PAIR)
    assert torch.equal(views, torch.stack((images, images.flip(3), images), dim=1))
    assert not draw(PAIR, seeds, 3, 0).flip.any()
    assert draw(PAIR, seeds, 3, 1).flip.shape == (8,)
    cropped = dataclasses.replace(ViewPolicy(), alternate=True)
    assert draw(cropped, seeds, 0, torch.arange(8)).flip.tolist() == [False, True] * 4


def test_gradient_of_a_whole_view_matches_finite_differences() -> None:
    generator = torch.Generator().manual_seed(5)
    x = (0.2 + 0.6 * torch.rand(2, 3, 6, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    policy = ViewPolicy(brightness=0.2, contrast=0.3, saturation=0.3)
    seeds = torch.tensor([1, 2])

    def two_views(image: torch.Tensor) -> torch.Tensor:
        return make_views(image, seeds=seeds, step=0, views=2, policy=policy)

    assert torch.autograd.gradcheck(two_views, (x,), eps=1e-6, atol=1e-5)


def test_gradient_is_finite_on_grey_and_saturated_images() -> None:
    x = torch.cat((torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))).requires_grad_()
    views = make_views(x, seeds=torch.tensor([1, 2, 3]), step=0, views=3, policy=ViewPolicy())
    views.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_parameters_lie_in_the_policys_ranges() -> None:
    view = draw(ViewPolicy(), torch.arange(4000), 0, 0)
    area, ratio = view.height * view.width, view.width / view.height
    assert area.min() >= 0.079
    assert area.max() <= 1.0001
    assert ratio.min() >= 0.749
    assert ratio.max() <= 1.334
    assert (view.top + view.height).max() <= 1.0001
    assert (view.left + view.width).max() <= 1.0001
    assert abs(view.flip.float().mean() - 0.5) < 0.03
    assert abs(view.grayscale.float().mean() - 0.2) < 0.03
    for factor in (view.brightness, view.contrast, view.saturation):
        assert factor.min() >= 0.2
        assert factor.max() <= 1.8
    assert view.hue.abs().max() <= 0.2


def test_views_of_an_image_do_not_depend_on_its_batch(images: torch.Tensor) -> None:
    seeds, steps = torch.arange(8), torch.arange(8) % 3
    together = make_views(images, seeds=seeds, step=steps, views=2, policy=ViewPolicy())
    alone = make_views(images[5:6], seeds=seeds[5:6], step=2, views=2, policy=ViewPolicy())
    assert torch.allclose(alone[0], together[5], atol=1e-6)
    assert not torch.allclose(together[5, 0], together[5, 1], atol=1e-2)


@pytest.mark.parametrize(
    ("field", "value"), [("crop_area", (0.5, 0.2)), ("crop_area", (0.0, 1.0)), ("flip", 1.5), ("hue", 0.6)]
)
def test_policy_out_of_range_is_refused_with_its_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        ViewPolicy(**{field: value})  # type: ignore[arg-type]
