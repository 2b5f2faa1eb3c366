"""What somebody else's models and purifiers may do that would make a figure wrong without an error."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unperturb.benchmarks as benchmarks
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.foreign import AnyClassifier, AnyPurifier
from unperturb.benchmarks.robustness.subjects import subject_of
from unperturb.models.attacks.projected_gradient import Descent, Objective, ProjectedGradient
from unperturb.models.errors import ConfigError, DataError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import Purifier

SIDE, CLASSES = 8, 4
TINY = replace(BUDGETS["fast"], apgd_steps=3, adaptive_steps=2, eot=2, autoattack_steps=2, autoattack_queries=5)
pytestmark = pytest.mark.usefixtures("one_thread")


class Hers(nn.Module):
    """A small network, and what she does around it."""

    def __init__(self, around: Callable[[nn.Module, Tensor], Any] = lambda net, x: net(x), *, classes: int = 4) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, classes)]
        self.net, self.around = nn.Sequential(*layers), around

    def forward(self, x: Tensor) -> Any:
        return self.around(self.net, x)


class With:
    """A purifier that is one function of images and seeds."""

    def __init__(self, call: Callable[[Tensor, Tensor], Any]) -> None:
        self.call = call

    def purify(self, x: Tensor, seeds: Tensor) -> Any:
        return self.call(x, seeds)


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def judged(model: nn.Module, purifier: Any = None, *, n: int = 4, **more: Any) -> Any:
    x = images(n)
    labels = model.eval()(x.clone()).argmax(1)
    return benchmarks.evaluate(model, x, labels, purifier=purifier, **{"attacks": "apgd-ce", "budget": TINY, **more})


def around(net: nn.Module) -> ImageClassifier:
    return AnyClassifier(net, num_classes=CLASSES, image_size=SIDE)


def test_model_that_normalises_in_place_is_attacked_as_one_that_does_not_and_leaves_the_images() -> None:
    inside, outside = Hers(lambda net, x: net(x.sub_(0.5).div_(0.25))), Hers(lambda net, x: net((x - 0.5) / 0.25))
    outside.load_state_dict(inside.state_dict())
    x = images()
    labels = outside(x).argmax(1)
    before = x.clone()
    given: dict[str, Any] = {"attacks": "apgd-ce,noise", "budget": TINY}
    one, other = (benchmarks.evaluate(model, x, labels, **given).records[0]["results"] for model in (inside, outside))
    assert torch.equal(x, before)
    assert one["outcomes"] == other["outcomes"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Hers(lambda net, x: net(x.detach())), "no gradient passes .* a purifier before it"),
        (Hers(lambda net, x: net(nn.functional.dropout(x, 0.3))), "depend on the images beside it, or on chance"),
        (Hers(lambda net, x: net(x - x.mean((0, 2, 3), keepdim=True))), "depend on the images beside it"),
        (Hers(lambda net, x: net(x).squeeze()), r"answers images \[1, 3, 8, 8\] with \[4\]"),
        (Hers(classes=1), "one score an image"),
        (Hers().half(), "float32 images"),
        (Hers(lambda net, x: (_ for _ in ()).throw(AssertionError("height 8, not 224"))), "her network .* height 8"),
        (torch.relu, "not a torch.nn.Module"),
    ],
    ids=["detached", "dropout", "batch statistics", "squeezed", "one score", "float16", "raises", "function"],
)
def test_model_whose_figures_would_mean_nothing_is_refused(model: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"her network.*{says}" if not says.startswith("her") else says):
        subject_of(model, name="her network", classes=None, image_size=SIDE)


def test_number_that_a_model_has_as_its_classes_is_no_names() -> None:
    model = Hers()
    model.classes = CLASSES  # type: ignore[assignment]
    assert subject_of(model, name="hers", classes=None, image_size=SIDE).card.classes == ("0", "1", "2", "3")


def test_arrays_are_refused_by_what_they_are() -> None:
    x, labels = images(), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(DataError, match="labels are a ndarray"):
        benchmarks.evaluate(Hers(), x, labels.numpy())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images are a ndarray"):
        benchmarks.evaluate(Hers(), x.numpy(), labels)  # type: ignore[arg-type]


def seldom(x: Tensor, seeds: Tensor) -> Tensor:
    """Draws from torch's generator, and does something for three seeds in ten."""
    return x.flip(3) if float(torch.rand(())) < 0.3 else x


@pytest.mark.parametrize(
    "call",
    [
        seldom,
        lambda x, seeds: x + 0.2 * random.random(),
        lambda x, seeds: x + 0.2 * float(np.random.rand()),
        lambda x, seeds: x + 0.2 * torch.rand_like(x),
    ],
    ids=["seldom", "random", "NumPy", "torch"],
)
@pytest.mark.parametrize("as_module", [False, True], ids=["object", "module"])
def test_purifier_that_draws_by_itself_is_drawn_for_each_image_by_its_seed(
    call: Callable[[Tensor, Tensor], Tensor], as_module: bool
) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x, x)

    purifier = AnyPurifier(around(Hers()), Module() if as_module else With(call))
    x, seeds, state = images(40), torch.arange(40), random.getstate()
    whole = purifier.descend(x, seeds=seeds).image
    assert purifier.draws
    assert not purifier.mixes
    torch.manual_seed(5)
    assert torch.equal(whole[7:8], purifier.descend(x[7:8], seeds=seeds[7:8]).image)
    assert not torch.equal(whole, purifier.descend(x, seeds=seeds + 40).image)
    assert random.getstate() == state


def test_purifier_that_draws_seldom_is_attacked_by_its_expectation_too() -> None:
    by_seed = With(lambda x, seeds: torch.where((seeds % 4 == 3).view(-1, 1, 1, 1), x.flip(3), x))
    budget = replace(TINY, adaptive_steps=1, eot=1)
    given: dict[str, Any] = {"attacks": "bpda-apgd-ce-fresh", "budget": budget, "n": 8}
    report = judged(Hers(), {"drawn": With(seldom), "by seed": by_seed}, **given)
    for record in report.records[1:]:
        assert "bpda-apgd-ce-fresh" in record["results"]["outcomes"]


@pytest.mark.parametrize(
    ("purifier", "says"),
    [
        (With(lambda x, seeds: int("x")), r"With fails on random images \[2, .*ValueError"),
        (With, "TypeError: .*missing"),
        (With(lambda x, seeds: x if len(x) > 1 else x[0]), r"makes \[3, 8, 8\]"),
    ],
    ids=["raises", "a class", "one image"],
)
def test_purifier_that_fails_is_named_before_any_attack(purifier: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AnyPurifier(around(Hers()), purifier)


def test_row_of_a_purifier_that_mixes_images_says_so() -> None:
    mixing, own = With(lambda x, seeds: x - 0.5 * x.mean(0)), With(lambda x, seeds: 0.9 * x)
    _, one, other = judged(Hers(), {"mixing": mixing, "own": own}).records
    assert "depends on the images beside it" in one["results"]["notes"][0]
    assert other["results"]["notes"] == []


def test_callers_purifier_and_what_it_holds_are_left_as_they_were() -> None:
    class Learning(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.layer, self.held = nn.Conv2d(3, 3, 1), [model]
            self.layer.bias.requires_grad_(False)  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            assert not self.layer.training
            moved: Tensor = self.layer(x)
            return x + 0 * moved

    model = Hers()
    purifier = Learning(model)
    report = judged(model, purifier.train())
    assert len(report.records) == 2
    model.train()
    judged(Hers(), purifier)
    assert purifier.training
    assert purifier.layer.training
    assert model.training
    assert all(weight.requires_grad for weight in (purifier.layer.weight, *model.parameters()))
    assert not purifier.layer.bias.requires_grad  # type: ignore[union-attr]


class Detached(Purifier):
    """A purifier of this project's own kind that forgets what it was asked to unroll."""

    def objective(self, x: Tensor, seeds: Tensor) -> Objective:
        return lambda iterate, _: iterate.new_zeros(len(iterate))

    def descend(self, x: Tensor, *, seeds: Tensor, unrolled: bool = False) -> Descent:
        return Descent(0.9 * x.detach(), x.new_zeros((0, len(x))))


def test_row_of_a_purifier_of_the_projects_kind_without_a_gradient_says_so() -> None:
    loop = ProjectedGradient(direction="descend", epsilon=1.0, step_size=0.0, steps=0)
    found = judged(Hers(), Detached(around(Hers()), loop)).records[1]["results"]
    assert "no gradient comes through" in found["figures"]["weaker"][0]
