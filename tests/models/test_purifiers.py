import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import make_checkpoint
from unperturb.models.contrastive.loss import NEGATIVES, NegativePolicy
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.restorer import Restorer, RestorerCard
from unperturb.models.purifiers.base import NoPurifier, Purifier
from unperturb.models.purifiers.defended import DefendedClassifier
from unperturb.models.purifiers.registry import REGISTRY, build_purifier
from unperturb.models.purifiers.restored import Restored
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttack
from unperturb.models.purifiers.rivals import AntiAdversary, Hedge

SEEDS = torch.arange(8)


def test_anti_adversary_takes_two_sign_steps_of_point_15_towards_its_own_prediction(images: Tensor) -> None:
    classifier = make_checkpoint().classifier
    predicted = classifier(images).argmax(1)
    z = images
    for _ in range(2):  # Alfarra et al. 2022, section 3: descend the loss with the predicted class
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(z), predicted, reduction="sum"), z)
        z = (z - 0.15 * gradient.sign()).clamp(0, 1)
    purified = AntiAdversary(classifier)(images, seeds=SEEDS)
    assert ((purified.image - z).abs() < 1e-5).float().mean() > 0.99  # but where a gradient is next to nothing (RAMP)
    assert (purified.trace.loss_after <= purified.trace.loss_before).float().mean() > 0.5


def test_hedge_raises_the_sum_of_all_classes_cross_entropies_in_its_ball(images: Tensor) -> None:
    classifier = make_checkpoint().classifier
    hedge = Hedge(classifier)
    value = hedge.objective(images, SEEDS)(images, 0)
    each = [F.cross_entropy(classifier(images), torch.full((8,), label), reduction="none") for label in range(3)]
    assert torch.allclose(value, torch.stack(each).sum(0), atol=1e-5)
    uniform = torch.full((8, 3), 1 / 3)
    kl = F.kl_div(classifier(images).log_softmax(1), uniform, reduction="none").sum(1)
    assert torch.allclose(value, 3 * (kl + torch.log(torch.tensor(3.0))), atol=1e-4)  # the form of the authors' code
    purified = hedge(images, seeds=SEEDS)
    assert (purified.trace.linf <= 8 / 255 + 1e-6).all()
    assert len(purified.trace.losses) == 20
    assert (purified.trace.loss_after > purified.trace.loss_before).all()


def test_restorer_gives_the_restored_view(images: Tensor) -> None:
    subject = make_checkpoint()
    assert subject.restorer is not None
    purified = build_purifier("restorer:times=3", subject)(images, seeds=SEEDS)
    assert torch.equal(purified.image, subject.restorer.restored(images, factor=3.0))
    assert (purified.trace.linf <= 16 / 255 + 1e-6).all()
    with pytest.raises(CheckpointError, match="has no purifier; train one"):
        build_purifier("restorer", dataclasses.replace(subject, restorer=None))
    with pytest.raises(ConfigError, match="times=-1"):
        build_purifier("restorer:times=-1", subject)
    with pytest.raises(ConfigError, match="times='1e400' is not a number"):
        build_purifier("restorer:times=1e400", subject)


@pytest.mark.parametrize(
    ("card", "times", "reach"),
    [
        (RestorerCard(width=4, depth=2, epsilon=6 / 255), 1.0, 12 / 255),
        (RestorerCard(width=4, depth=2, epsilon=6 / 255, times=2.0), 0.1, 1.2 / 255),
        (RestorerCard(width=8, depth=1, epsilon=0.1, times=1.0, kind="autoencoder"), 1.0, 1.0),
    ],
    ids=["residual", "little of it", "autoencoder"],
)
def test_restored_image_is_within_the_reach_that_it_promises(
    images: Tensor, card: RestorerCard, times: float, reach: float
) -> None:
    torch.manual_seed(3)
    network = Restorer(card).requires_grad_(False)
    torch.nn.init.constant_(network.layers[-1].get_parameter("bias"), 9.0)  # all that it can do
    purifier = Restored(make_checkpoint().classifier, network, times=times)
    assert purifier.loop.epsilon == card.reach(times) == pytest.approx(reach)
    moved = purifier(images, seeds=SEEDS).trace.linf
    assert (moved <= reach + 1e-6).all()
    assert moved.max() > 0.9 * reach
    with torch.autocast("cpu"):
        assert (purifier(images, seeds=SEEDS).trace.linf <= reach + 1e-6).all()


@pytest.mark.parametrize("times", [0.1, 2.0])
def test_autoencoder_draws_an_image_once(times: float) -> None:
    network = Restorer(RestorerCard(width=8, depth=1, epsilon=1.0, times=1.0, kind="autoencoder"))
    with pytest.raises(ConfigError, match=f"times={times}: an autoencoder"):
        Restored(make_checkpoint().classifier, network, times=times)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_purifier_answers_alike_alone_and_in_a_batch_and_leaves_nothing_behind(images: Tensor, name: str) -> None:
    subject = make_checkpoint()
    purifier = build_purifier(name, subject)
    before = {key: value.clone() for key, value in purifier.state_dict().items()}
    with torch.inference_mode():
        together = purifier(images, seeds=SEEDS).image
        alone = purifier(images[2:3], seeds=SEEDS[2:3]).image
    assert (together[2:3] - alone).abs().mean() < 1e-3
    assert together.min() >= 0
    assert together.max() <= 1
    assert all(torch.equal(value, before[key]) for key, value in purifier.state_dict().items())
    assert all(parameter.grad is None for parameter in purifier.parameters())


@pytest.mark.parametrize("name", ["reverse-attack:steps=2", "anti-adversary", "hedge:steps=2", "restorer"])
def test_every_purifier_can_be_differentiated_from_outside(images: Tensor, name: str) -> None:
    subject = make_checkpoint()
    defended = DefendedClassifier(subject.classifier, build_purifier(name, subject), gradient="full")
    x = images[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(defended(x).square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_no_purifier_gives_the_classifier_and_its_gradient(images: Tensor) -> None:
    classifier = make_checkpoint().classifier
    defended = DefendedClassifier(classifier, NoPurifier(classifier))
    x = images.clone().requires_grad_()
    (through,) = torch.autograd.grad(defended(x)[:, 0].sum(), x)
    (straight,) = torch.autograd.grad(classifier(x)[:, 0].sum(), x)
    assert torch.equal(through, straight)
    assert torch.equal(defended(images), classifier(images))


def test_stopped_after_gives_the_iterate_and_leaves_the_purifier_as_it_was(images: Tensor) -> None:
    hedge = Hedge(make_checkpoint().classifier)
    shorter = hedge.stopped_after(3)
    assert shorter.loop.steps == 3
    assert hedge.loop.steps == 20
    first = hedge.descend(images, seeds=SEEDS).losses
    assert torch.allclose(shorter.descend(images, seeds=SEEDS).losses, first[:3])
    assert hedge.stopped_after(99).loop.steps == 20


@pytest.mark.parametrize(
    ("spec", "kind", "changed"),
    [
        ("none", NoPurifier, {"steps": 0}),
        ("reverse-attack", ReverseAttack, {"steps": PRESETS["default"].loop.steps}),
        ("reverse-attack:published", ReverseAttack, {"steps": 40, "start": "uniform"}),
        ("reverse-attack:published,steps=3,epsilon=4/255", ReverseAttack, {"steps": 3, "epsilon": 4 / 255}),
        ("anti-adversary:step_size=0.1", AntiAdversary, {"steps": 2, "step_size": 0.1}),
        ("hedge:steps=5", Hedge, {"steps": 5, "epsilon": 8 / 255}),
    ],
)
def test_spec_names_a_purifier_and_its_parameters(spec: str, kind: type[Purifier], changed: dict[str, object]) -> None:
    purifier = build_purifier(spec, make_checkpoint())
    assert type(purifier) is kind
    assert {key: dataclasses.asdict(purifier.loop)[key] for key in changed} == pytest.approx(changed)


def test_reverse_attack_takes_views_and_temperature() -> None:
    with pytest.raises(ConfigError, match="views=4: default has an image and its mirror image"):
        build_purifier("reverse-attack:views=4", make_checkpoint())
    purifier = build_purifier("reverse-attack:transfer,views=4,temperature=0.5", make_checkpoint())
    assert isinstance(purifier, ReverseAttack)
    assert (purifier.config.views, purifier.config.temperature) == (4, 0.5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("bleach", "bleach"),
        ("none:steps=1", "steps"),
        ("hedge:transfer", "transfer"),
        ("hedge:views=2", "views"),
        ("hedge:steps=1.5", "whole number"),
        ("hedge:epsilon=x", "epsilon"),
        ("reverse-attack:swift", "swift"),
        ("reverse-attack:views=1", "views=1"),
        ("hedge:epsilon=-1", "epsilon"),
    ],
)
def test_bad_spec_is_refused_with_its_part(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_purifier(spec, make_checkpoint())


def test_reverse_attack_without_a_head_is_refused_with_the_remedy() -> None:
    with pytest.raises(CheckpointError, match="unperturb train head"):
        build_purifier("reverse-attack", make_checkpoint(head=False))


def test_reverse_attack_takes_a_policy_of_negatives() -> None:
    purifier = build_purifier("reverse-attack:negatives=quantile,fraction=0.2", make_checkpoint())
    assert isinstance(purifier, ReverseAttack)
    assert purifier.config.negatives == NegativePolicy(kind="quantile", fraction=0.2)
    assert purifier.thresholds is not None
    with pytest.raises(ConfigError, match="count=0"):
        build_purifier("reverse-attack:negatives=subset", make_checkpoint())
    assert "labels" not in NEGATIVES  # an oracle is nothing to purify with
