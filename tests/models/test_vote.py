from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import make_checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.purifiers.base import NoPurifier
from unperturb.models.purifiers.defended import DefendedClassifier, defend
from unperturb.models.purifiers.registry import build_defense
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttack
from unperturb.models.purifiers.vote import Vote, parse_shifts


@pytest.mark.parametrize("shift", [(2, 2), (-2, -2), (3, 0), (0, -1), (-1, 2)])
def test_view_is_the_crop_of_the_zero_padded_image(images: Tensor, shift: tuple[int, int]) -> None:
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    down, right = shift
    crop = padded[:, :, 4 - down : 36 - down, 4 - right : 36 - right]
    views = Vote(shifts=(shift,)).views(images).numpy()
    assert np.array_equal(views[:, 0], crop)
    assert np.array_equal(views[:, 1], crop[..., ::-1])


def test_scores_are_the_mean_of_the_logits_over_the_views_and_each_image_has_its_own(images: Tensor) -> None:
    classifier, vote = make_checkpoint().classifier, Vote(shifts=((0, 0), (1, -2)))
    assert len(vote) == 4
    views = vote.views(images)
    expected = np.mean([classifier(views[:, place]).detach().numpy() for place in range(4)], axis=0)
    found = vote.scores(classifier, images)
    assert np.allclose(found.detach().numpy(), expected, atol=1e-5)
    assert torch.allclose(vote.scores(classifier, images[3:4]), found[3:4], atol=1e-5)


def test_vote_carries_the_full_gradient_to_the_image(images: Tensor) -> None:
    defended = build_defense("vote:shifts=1,mirrored=no", make_checkpoint())
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(defended(x)[:, 0].sum(), x)
    step = 1e-2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    change = (defended(images + step) - defended(images - step))[:, 0].sum() / 2
    assert float(change) == pytest.approx(float((gradient * step).sum()), rel=0.05)


def test_specification_names_a_vote_alone_or_behind_a_purifier() -> None:
    checkpoint = make_checkpoint()
    alone = build_defense("vote", checkpoint)
    assert isinstance(alone.purifier, NoPurifier)
    assert alone.vote == Vote()
    both = build_defense("reverse-attack:steps=2,vote=0/0+1/1,mirrored=no", checkpoint)
    assert isinstance(both.purifier, ReverseAttack)
    assert both.purifier.loop.steps == 2
    assert both.vote == Vote(shifts=((0, 0), (1, 1)), mirrored=False)
    assert build_defense("reverse-attack:published", checkpoint).vote is None


def test_presets_own_vote_is_left_out_by_name_and_scaled_to_the_images() -> None:
    checkpoint = make_checkpoint()
    assert build_defense("reverse-attack:default", checkpoint).vote == Vote()
    assert build_defense("reverse-attack:default,vote=none", checkpoint).vote is None
    assert build_defense("reverse-attack:default,vote=1", checkpoint).vote == Vote(shifts=((-1, -1), (1, 1)))
    own = Vote(shifts=((0, 1),), mirrored=False)
    carded = replace(checkpoint, card=replace(checkpoint.card, vote=own))
    assert defend(carded, PRESETS["default"]).vote == own
    assert build_defense("vote", carded).vote == own
    assert build_defense("vote:mirrored=yes", carded).vote == Vote(shifts=own.shifts)
    assert build_defense("vote:shifts=1", carded).vote == Vote(shifts=((-1, -1), (1, 1)))
    assert defend(carded, PRESETS["published"]).vote is None
    architecture = replace(checkpoint.card.architecture, image_size=224)
    assert build_defense(
        "vote", replace(checkpoint, card=replace(checkpoint.card, architecture=architecture))
    ).vote == (Vote(shifts=((-14, -14), (14, 14))))
    assert Vote(shifts=((0, 0), (-2, 1))).scaled(224).shifts == ((0, 0), (-14, 7))
    assert Vote(shifts=((2, 2),)).scaled(1056).shifts == ((66, 66),)
    with pytest.raises(ConfigError, match="34 views; at most 32"):
        Vote(shifts=tuple((number, 0) for number in range(17)))
    assert Vote(shifts=((-2, -2), (1, 1))).scaled(8).shifts == ((-1, -1), (1, 1))
    assert build_defense("vote:shifts=15/-15", checkpoint).vote == Vote(shifts=((15, -15),))


def test_preset_without_steps_needs_no_head_and_changes_no_image(images: Tensor) -> None:
    bare = make_checkpoint(head=False)
    defended = defend(bare, PRESETS["vote"])
    found = defended.classify(images)
    assert torch.equal(found.image, images)
    assert torch.equal(found.logits, Vote().scores(bare.classifier, images))
    assert isinstance(build_defense("reverse-attack:vote", bare).purifier, NoPurifier)


def test_vote_is_kept_with_another_gradient_and_fewer_steps(images: Tensor) -> None:
    defended = build_defense("reverse-attack:steps=3,vote=1", make_checkpoint())
    opened = defended.attacked_by("full", steps=1)
    assert (opened.gradient, opened.purifier.loop.steps, opened.vote) == ("full", 1, defended.vote)
    same = DefendedClassifier(defended.classifier, defended.purifier, vote=defended.vote)
    assert torch.equal(same(images), defended(images))


@pytest.mark.parametrize(
    ("text", "shifts"),
    [("2", ((-2, -2), (2, 2))), ("0", ((0, 0),)), ("-1/3", ((-1, 3),)), ("0/0+2/-2", ((0, 0), (2, -2)))],
)
def test_shifts_are_read_as_they_are_spelled(text: str, shifts: tuple[tuple[int, int], ...]) -> None:
    assert parse_shifts(text) == shifts
    assert parse_shifts(Vote(shifts=shifts).spelled()) == shifts


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("vote:shifts=two", "two"),
        ("vote:shifts=\u00b2", "neither pixels"),
        (f"vote:shifts={'9' * 5000}", "neither pixels"),
        ("vote:shifts=16", "under half the side of the images, 32 pixels"),
        ("reverse-attack:vote=0/-16+1/1", "under half the side of the images, 32 pixels"),
        ("vote:shifts=1/1+1/1", "twice"),
        ("vote:shifts=1025", "1024"),
        ("vote:mirrored=maybe", "maybe"),
        ("vote:steps=2", "steps"),
        ("vote:published", "published"),
        ("reverse-attack:vote=x", "x"),
        ("ballot", "vote"),
    ],
)
def test_bad_vote_is_refused_by_name(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_defense(spec, make_checkpoint())
