"""One step of many loops in one batch: the same as each loop alone."""

from collections.abc import Sequence

import torch

from tests.conftest import make_checkpoint, make_config, make_defended
from unperturb.models.attacks.pgd import cross_entropy
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.inference.continuous import (
    CrossEntropyAttack,
    ReverseAttackStage,
    Slots,
    Stage,
    features_of,
    step_together,
)

ATTACK = ProjectedGradient(direction="ascend", epsilon=8 / 255, step_size=2 / 255, steps=4, start="uniform")
MOMENTUM = ProjectedGradient(direction="descend", epsilon=8 / 255, step_size=2 / 255, steps=4, momentum=0.75, ramp=1e-3)


def begin(stage: Stage, x: torch.Tensor, seeds: torch.Tensor, labels: torch.Tensor) -> Slots:
    return Slots(x, stage.loop.begin(x, seeds), None, seeds, torch.zeros_like(seeds), labels)


def advance(classifier: torch.nn.Module, parts: Sequence[tuple[Stage, Slots]], *, steps: int) -> list[Slots]:
    states = [slots for _, slots in parts]
    for _ in range(steps):
        after = step_together(classifier, [(s, t) for (s, _), t in zip(parts, states, strict=True)])  # type: ignore[arg-type]
        states = [
            slots._replace(x=a.x, velocity=a.velocity, steps=slots.steps + 1)
            for slots, a in zip(states, after, strict=True)
        ]
    return states


def test_mixed_stages_give_what_each_loop_gives_alone(images: torch.Tensor) -> None:
    defended = make_defended(make_config(steps=4, views=2))
    other = make_defended(make_config(steps=4, views=3, epsilon=16 / 255))
    classifier = defended.classifier
    seeds, labels = torch.arange(8), torch.arange(8) % 3
    first = ReverseAttackStage(defended.purifier)  # type: ignore[arg-type]
    second = ReverseAttackStage(other.purifier)  # type: ignore[arg-type]
    second.purifier.classifier = classifier
    attack = CrossEntropyAttack(classifier, ATTACK)
    stages: list[tuple[Stage, slice]] = [(first, slice(0, 3)), (second, slice(3, 6)), (attack, slice(6, 8))]
    parts = [(stage, begin(stage, images[part], seeds[part], labels[part])) for stage, part in stages]
    with torch.no_grad():
        together = advance(classifier, parts, steps=4)
    alone = [
        first.purifier.descend(images[:3], seeds=seeds[:3]).image,
        second.purifier.descend(images[3:6], seeds=seeds[3:6]).image,
        ATTACK.run(images[6:], cross_entropy(classifier, labels[6:]), seeds=seeds[6:]).image,
    ]
    for slots, expected in zip(together[:2], alone, strict=False):
        assert torch.allclose(slots.x, expected, atol=1e-5)
    differing = (together[2].x - alone[2]).abs() > 1e-5  # plain signs: a gradient near 0 may fall on either side
    assert differing.float().mean() < 0.01


def test_slots_at_different_steps_and_with_momentum_keep_their_own_views(images: torch.Tensor) -> None:
    config = make_config(steps=4)
    defended = make_defended(type(config)(loop=MOMENTUM, views=2)).double()  # no rounding that steps would enlarge
    images = images.double()
    stage = ReverseAttackStage(defended.purifier)  # type: ignore[arg-type]
    seeds, none = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    early = begin(stage, images[:1], seeds[:1], none[:1])
    (early,) = advance(defended.classifier, [(stage, early)], steps=1)
    (both,) = advance(defended.classifier, [(stage, begin(stage, images[1:2], seeds[1:], none[1:]))], steps=1)
    (both,) = advance(defended.classifier, [(stage, both)], steps=1)
    assert early.velocity is not None
    assert both.velocity is not None
    mixed = Slots(*(torch.cat(pair) for pair in zip(early, both, strict=True) if pair[0] is not None))  # type: ignore[arg-type]
    # the first at step 1, the second at 2
    (after,) = advance(defended.classifier, [(stage, mixed)], steps=2)
    expected = stage.purifier.stopped_after(3).descend(images[:1], seeds=seeds[:1]).image
    assert torch.allclose(after.x[:1], expected, atol=1e-5)
    expected = stage.purifier.descend(images[1:2], seeds=seeds[1:]).image
    assert torch.allclose(after.x[1:], expected, atol=1e-5)


def test_nan_stays_in_its_slot(images: torch.Tensor) -> None:
    defended = make_defended(make_config(steps=3))
    stage, seeds = ReverseAttackStage(defended.purifier), torch.arange(4)  # type: ignore[arg-type]
    clean, broken = images[:4].clone(), images[:4].clone()
    broken[1], broken[3] = float("nan"), float("inf")
    results = [
        advance(defended.classifier, [(stage, begin(stage, x, seeds, seeds))], steps=3)[0].x for x in (clean, broken)
    ]
    assert not results[1][1].isfinite().all()
    assert torch.allclose(results[0][::2], results[1][::2], atol=1e-6)


def test_features_of_several_parts_are_those_of_each(images: torch.Tensor) -> None:
    classifier = make_checkpoint().classifier
    with torch.no_grad():
        first, second = features_of(classifier, [images[:3], images[3:]])
        assert torch.allclose(first, classifier.features(images[:3]), atol=1e-5)
        assert torch.allclose(second, classifier.features(images[3:]), atol=1e-5)
