"""Folded, bfloat16, captured and compiled steps against the eager float32 loop."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from tests.conftest import make_checkpoint, make_config
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.contrastive.loss import NegativePolicy
from unperturb.models.errors import ConfigError
from unperturb.models.inference.captured import CapturedStep, Stepper, bucket
from unperturb.models.inference.continuous import CrossEntropyAttack, ReverseAttackStage, Slots, Stage, step_together
from unperturb.models.inference.folding import BFloat16Backbone, folded, prepared
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.registry import build
from unperturb.models.purifiers.defended import reverse_attack_of
from unperturb.models.purifiers.reverse_attack import ReverseAttackConfig

CPU = torch.device("cpu")
# A padded batch may be convolved by another kernel, whose last bits the ramp multiplies by up to 1,000 (older torch).
SAME = 1e-5 if torch.__version__ >= "2.12" else 1e-4
MOMENTUM = ProjectedGradient(
    direction="descend", epsilon=8 / 255, step_size=2 / 255, steps=4, momentum=0.75, start="uniform", ramp=1e-3
)
CONFIGS = {
    "plain": make_config(steps=4),
    "restored": dataclasses.replace(make_config(steps=4), restored=8.0),
    "momentum": ReverseAttackConfig(loop=MOMENTUM, views=3),
    "subset": ReverseAttackConfig(loop=MOMENTUM, views=2, negatives=NegativePolicy(kind="subset", count=5)),
    "quantile": ReverseAttackConfig(loop=MOMENTUM, views=2, negatives=NegativePolicy(kind="quantile", fraction=0.2)),
}


def stage_of(loaded: Checkpoint, config: ReverseAttackConfig) -> ReverseAttackStage:
    return ReverseAttackStage(reverse_attack_of(loaded, config))


def trained(classifier: nn.Module) -> None:
    """Batch norms as training leaves them."""
    generator = torch.Generator().manual_seed(2)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


@pytest.mark.parametrize("name", ["wide_resnet_16_1", "preact_resnet18", "resnet18", "efficientnet_b0"])
def test_folded_classifier_computes_the_same_with_fewer_layers(name: str) -> None:
    torch.manual_seed(1)
    classifier = build(Architecture(name=name, num_classes=3, image_size=32))
    trained(classifier)
    ready = folded(classifier)
    counts = [sum(isinstance(part, nn.BatchNorm2d) for part in one.modules()) for one in (ready, classifier)]
    assert counts[0] <= counts[1] // 2 + 1
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ready(x), classifier(x), rtol=1e-4, atol=1e-4 * float(classifier(x).abs().max()))


def test_convolution_that_is_read_twice_keeps_its_batch_norm(images: torch.Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.convolution(x)
            return made + self.norm(made)  # type: ignore[no-any-return]

    classifier = make_checkpoint().classifier
    classifier.blocks = nn.Sequential(Twice(), *classifier.blocks)  # type: ignore[misc]
    trained(classifier.eval())
    ready = folded(classifier)
    assert isinstance(ready.get_submodule("blocks.0.norm"), nn.BatchNorm2d)
    with torch.no_grad():
        assert torch.allclose(ready(images), classifier(images), atol=1e-5)


def test_bfloat16_rounds_features_whose_gradient_is_asked_for_and_no_others(images: torch.Tensor) -> None:
    classifier = make_checkpoint().classifier
    backbone = BFloat16Backbone(classifier)
    exact = classifier.features(images)
    near = backbone.features(images.clone().requires_grad_())
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.03 * exact.abs().max()
    assert torch.equal(backbone.features(images), exact)
    with torch.no_grad():
        assert torch.equal(backbone(images.clone().requires_grad_()), classifier(images))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_prepared_checkpoint_purifies_alike(precision: str, images: torch.Tensor) -> None:
    loaded = make_checkpoint()
    before = copy.deepcopy(loaded.classifier.state_dict())
    ready = prepared(loaded, precision=precision)  # type: ignore[arg-type]
    assert not any(weight.requires_grad for weight in ready.classifier.parameters())
    seeds = torch.arange(8)
    exact, near = (reverse_attack_of(one, make_config(steps=3))(images, seeds=seeds) for one in (loaded, ready))
    assert torch.allclose(exact.trace.losses, near.trace.losses, rtol=1e-4 if precision == "float32" else 0.05)
    assert (near.trace.loss_after < near.trace.loss_before).float().mean() >= 0.5
    assert all(torch.equal(value, before[name]) for name, value in loaded.classifier.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_captured_steps_are_those_of_the_loop(name: str, images: torch.Tensor) -> None:
    loaded, seeds = make_checkpoint(), torch.arange(5)
    stage = stage_of(loaded, CONFIGS[name])
    expected = stage.purifier.descend(images[:5], seeds=seeds)
    for execution in ("eager", "captured"):
        found = Stepper(loaded.classifier, CPU, execution=execution).descend(stage, images[:5], seeds=seeds)
        assert torch.allclose(found.image, expected.image, atol=SAME)
        assert torch.allclose(found.losses, expected.losses, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "momentum"])
def test_traced_step_is_the_eager_one(name: str, images: torch.Tensor) -> None:
    loaded, seeds = make_checkpoint(), torch.arange(4)
    stage = stage_of(loaded, CONFIGS[name])
    captured = CapturedStep(loaded.classifier, stage, 4, device=CPU, compiled=True, backend="eager")
    none = torch.zeros_like(seeds)
    captured.load(Slots(images[:4], stage.loop.begin(images[:4], seeds), None, seeds, none, none))
    steps = [tuple(part.clone() for part in captured.replay() if part is not None) for _ in range(4)]
    expected = stage.purifier.descend(images[:4], seeds=seeds)
    assert torch.allclose(torch.stack([losses for *_, losses in steps]), expected.losses, atol=1e-4)
    assert torch.allclose(steps[-1][0], expected.image, atol=1e-5)


def test_images_loaded_later_see_nothing_of_the_earlier(images: torch.Tensor) -> None:
    loaded = make_checkpoint()
    stage = stage_of(loaded, CONFIGS["momentum"])
    stepper = Stepper(loaded.classifier, CPU, execution="captured")
    broken = images[4:8].clone()
    broken[1], broken[3] = float("nan"), float("inf")
    first = stepper.descend(stage, broken, seeds=torch.arange(4))
    again = stepper.descend(stage, images[:3], seeds=torch.arange(3))
    captured = stepper.captured(stage, 4)
    assert all(part is None or part[3].isfinite().all() for part in captured._state)
    alone = Stepper(loaded.classifier, CPU, execution="captured").descend(stage, images[:3], seeds=torch.arange(3))
    assert torch.equal(again.image, alone.image)
    assert not first.image.isfinite().all()


def test_stage_that_ends_images_early_is_refused_in_one_go(images: torch.Tensor) -> None:
    loaded = make_checkpoint()
    loop = dataclasses.replace(MOMENTUM, settle=1)
    stage = stage_of(loaded, ReverseAttackConfig(loop=loop, views=2))
    with pytest.raises(ConfigError, match="settle"):
        Stepper(loaded.classifier, CPU, execution="eager").descend(stage, images, seeds=torch.arange(8))


def test_stepper_steps_parts_of_several_stages(images: torch.Tensor) -> None:
    loaded = make_checkpoint()
    attack = dataclasses.replace(MOMENTUM, direction="ascend", momentum=0.0)
    stages: list[Stage] = [stage_of(loaded, CONFIGS["plain"]), CrossEntropyAttack(loaded.classifier, attack)]
    numbers = torch.arange(3)
    parts = [
        (stage, Slots(x, stage.loop.begin(x, numbers), None, numbers, numbers, numbers % 3))
        for stage, x in zip(stages, (images[:3], images[3:6]), strict=True)
    ]
    expected = step_together(loaded.classifier, parts)
    for execution in ("eager", "captured"):
        found = Stepper(loaded.classifier, CPU, execution=execution).step(parts)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one.x, other.x, atol=1e-5)
            assert torch.allclose(one.losses, other.losses, atol=1e-5)


def test_compiled_steps_without_a_compiler_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler"):
        Stepper(make_checkpoint().classifier, CPU, execution="compiled")
    Stepper(make_checkpoint().classifier, CPU, execution="captured")


def test_on_a_cpu_no_graph_has_a_quarter_of_its_places_empty(images: torch.Tensor) -> None:
    loaded = prepared(make_checkpoint())
    stepper = Stepper(loaded.classifier, CPU, execution="captured")
    assert [stepper.sizes(count) for count in (1, 4, 5, 7, 9, 11, 13, 16)] == [
        [1],
        [4],
        [4, 1],
        [8],
        [8, 1],
        [8, 2, 1],
        [16],
        [16],
    ]
    assert Stepper(loaded.classifier, torch.device("cuda"), execution="captured").sizes(9) == [16]
    assert Stepper(loaded.classifier, CPU, execution="eager").sizes(9) == [9]
    stage, number = stage_of(loaded, CONFIGS["restored"]), torch.arange(5)
    slots = Slots(images[:5], images[:5].roll(1, 3), None, number, number % 3, number, stage.anchor(images[:5]))
    (expected,) = step_together(loaded.classifier, [(stage, slots)])
    (found,) = stepper.step([(stage, slots)])
    assert torch.allclose(found.x, expected.x, atol=1e-5)
    assert torch.allclose(found.losses, expected.losses, atol=1e-5)
    assert found.velocity is None


def test_bucket_is_the_next_power_of_two() -> None:
    assert [bucket(count) for count in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
