"""The restorer: its bounds and training, and the reverse attack's restored view."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import RESTORER, make_checkpoint, make_config
from tests.support.training import assert_lowered, read_log, run_arguments
from unperturb.models.attacks.pgd import Classify, pgd
from unperturb.models.checkpoints import store
from unperturb.models.contrastive.loss import info_nce
from unperturb.models.contrastive.views import make_views
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.restorer import Restorer, RestorerCard
from unperturb.models.purifiers.defended import defend, reverse_attack_of
from unperturb.models.purifiers.registry import build_purifier
from unperturb.models.purifiers.reverse_attack import MIRRORED, PRESETS, ReverseAttack, ReverseAttackConfig
from unperturb.training.__main__ import main

RESTORED = PRESETS["default"]


def config(*, steps: int = 3) -> ReverseAttackConfig:
    return dataclasses.replace(make_config(steps=steps), restored=1.0)


@pytest.mark.parametrize("factor", [0.125, 1.0, 12.5])
def test_restored_view_is_the_image_less_its_estimate_within_two_epsilon(factor: float, images: torch.Tensor) -> None:
    restorer = make_checkpoint().restorer
    assert restorer is not None
    estimate, epsilon = restorer(images), 8 / 255
    assert estimate.abs().max() < 1
    expected = images - (8 * factor * epsilon * estimate).clamp(-2 * epsilon, 2 * epsilon)
    assert torch.allclose(restorer.restored(images, factor=factor), expected.clamp(0, 1), atol=1e-6)


def test_loss_is_infonce_of_the_views_and_the_restored_one(images: torch.Tensor) -> None:
    made, seeds = make_checkpoint(), torch.arange(8)
    assert made.restorer is not None
    assert made.head is not None
    assert made.bank is not None
    purifier = reverse_attack_of(made, config())
    x = (images + 0.02).clamp(0, 1)
    views = make_views(x, seeds=seeds, step=1, views=2, policy=MIRRORED).unbind(1)
    shown = (*views, made.restorer.restored(images))  # of what was received, not of the iterate
    embeddings = torch.stack([made.head(made.classifier.features(view)) for view in shown], dim=1)
    expected = info_nce(embeddings, made.bank.embeddings, temperature=0.2)
    assert torch.allclose(purifier.objective(images, seeds)(x, 1), expected, atol=1e-5)


def test_steps_draw_an_image_towards_its_restored_view(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restorer, "restored", lambda _, x, *, factor=1.0: x.flip(0))  # another image, for once
    made = make_checkpoint()
    assert made.head is not None
    assert made.bank is not None
    before, aims = (made.head(made.classifier.features(x)) for x in (images, images.flip(0)))
    made.bank.embeddings.copy_(-F.normalize(aims.mean(0), dim=0))  # so that negatives do not pull elsewhere
    purified = defend(made, RESTORED).purify(images).image
    after = made.head(made.classifier.features(purified))
    assert F.cosine_similarity(after, aims).mean() > F.cosine_similarity(before, aims).mean() + 1e-4


def test_an_images_result_does_not_depend_on_its_batch(images: torch.Tensor) -> None:
    defended = defend(make_checkpoint(), RESTORED)
    together, alone = defended.purify(images, seed=0).image, defended.purify(images[5:6], seed=0).image
    assert torch.allclose(together[5], alone[0], atol=1e-4)


def test_unrolled_gradient_goes_through_the_restorer(images: torch.Tensor) -> None:
    """Against the same step written out: what the received image does by way of its restored view is not left out."""
    made = make_checkpoint()
    x0, seeds = images[:2].clone().requires_grad_(), torch.arange(2)
    once = config(steps=1)
    once = dataclasses.replace(
        once, loop=dataclasses.replace(once.loop, start="zero", norm="l2", epsilon=9.0, step_size=1.0)
    )
    purifier = reverse_attack_of(made, once)
    weights = torch.randn(2, 3, 32, 32)
    (found,) = torch.autograd.grad((purifier.descend(x0, seeds=seeds, unrolled=True).image * weights).sum(), x0)

    def by_hand(received: torch.Tensor) -> torch.Tensor:
        x = x0 * 1.0
        (slope,) = torch.autograd.grad(purifier.objective(received, seeds)(x, 0).sum(), x, create_graph=True)
        after = (x - slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
        return torch.autograd.grad((after * weights).sum(), x0)[0]

    expected, without = by_hand(x0), by_hand(x0.detach())
    through = (expected - without).norm()
    assert through > 1e-3 * expected.norm()
    assert (found - expected).norm() < 0.05 * through


def test_checkpoint_without_a_restorer_has_no_restored_view(images: torch.Tensor) -> None:
    plain, made = dataclasses.replace(RESTORED, restored=0.0), make_checkpoint()
    without = dataclasses.replace(made, card=dataclasses.replace(made.card, restorer=None), restorer=None)
    one, other = defend(without, RESTORED).purify(images), defend(made, plain).purify(images)
    assert torch.equal(one.image, other.image)
    assert not torch.equal(one.image, defend(made, RESTORED).purify(images).image)


def test_round_trip_and_refusals(tmp_path: Path, images: torch.Tensor) -> None:
    made = make_checkpoint()
    store.save(tmp_path / "one", made, half=False)
    loaded = store.load(tmp_path / "one")
    assert loaded.restorer is not None
    assert made.restorer is not None
    assert torch.equal(loaded.restorer(images), made.restorer(images))
    store.save(tmp_path / "other", dataclasses.replace(made, restorer=None))
    without = store.load(tmp_path / "other")  # as a readout's training leaves it: the restorer was another's
    assert without.restorer is None
    assert without.card.restorer is None
    store.write_card(tmp_path / "other", dataclasses.replace(without.card, restorer=RESTORER))
    with pytest.raises(CheckpointError, match=r"lacks restorer\."):
        store.load(tmp_path / "other")
    with pytest.raises(ConfigError, match="epsilon=8"):
        Restorer(RestorerCard(width=4, depth=2, epsilon=8.0))
    with pytest.raises(ConfigError, match="restored=-1"):
        build_purifier("reverse-attack:restored=-1", made)
    purifier = build_purifier("reverse-attack:transfer,restored=4", made)
    assert isinstance(purifier, ReverseAttack)
    assert (purifier.config.restored, purifier.policy) == (4, MIRRORED)


def test_training_finds_the_perturbation(image_folder: Path, tmp_path: Path) -> None:
    store.save(tmp_path / "base", make_checkpoint())
    out = tmp_path / "run"
    arguments = run_arguments(
        "restorer",
        image_folder,
        out,
        checkpoint=tmp_path / "base",
        epochs=12,
        batch_size=21,
        held_out=9,
        width=8,
        depth=2,
        attack_steps=3,
        epsilon="40/255",
        attack_step_size="20/255",
    )
    assert main(arguments) == 0
    assert_lowered(out, "held_out_error")
    assert read_log(out)[-1]["held_out_signs"] > 0.55
    made, before = store.load(out / "checkpoint"), store.load(tmp_path / "base")
    assert made.card.restorer == RestorerCard(width=8, depth=2, epsilon=40 / 255)
    assert made.card.restorer_training["attack_steps"] == 3
    for name, value in before.classifier.state_dict().items():
        assert torch.equal(value, made.classifier.state_dict()[name])


def test_images_are_attacked_once_the_run_has_something_to_train(
    image_folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[bool] = []

    def noted(classifier: Classify, x: torch.Tensor, labels: torch.Tensor, **settings: Any) -> torch.Tensor:
        attacked.append(torch.is_autocast_enabled("cpu"))
        return pgd(classifier, x, labels, **settings)

    monkeypatch.setattr("unperturb.training.purifier.restorer.pgd", noted)
    small = {"held_out": 9, "width": 4, "depth": 1, "attack_steps": 1, "precision": "bfloat16"}
    arguments = run_arguments("restorer", image_folder, tmp_path / "run", checkpoint=tiny_folder, **small)
    assert main([*arguments, "--batch-size", "100"]) == 2
    assert attacked == []
    assert main([*arguments, "--batch-size", "20", "--epochs", "1"]) == 0
    assert attacked == [False, False]  # training images and held-out ones, in float32
    assert main([*arguments, "--batch-size", "20", "--epochs", "1"]) == 0  # finished already
    assert main([*arguments, "--batch-size", "20", "--epochs", "1", "--lr", "1"]) == 2  # not this run's state
    assert len(attacked) == 2


@pytest.mark.parametrize("bad", [["--attack-steps", "0"], ["--width", "0"]], ids=lambda b: b[0])
def test_bad_argument_is_refused(
    bad: list[str], image_folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments("restorer", image_folder, tmp_path / "run", checkpoint=tiny_folder)
    assert main([*arguments, *bad]) == 2
    assert bad[0].strip("-").replace("-", "_") in capsys.readouterr().err
