"""The harness as a library: any module, any purifier, from a folder of somebody's own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unperturb.benchmarks as benchmarks
from tests.conftest import make_checkpoint
from tests.support import broken_defenses
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.code import modules_behind
from unperturb.benchmarks.robustness.foreign import AnyPurifier
from unperturb.benchmarks.robustness.identity import modules_of_defense
from unperturb.benchmarks.robustness.subjects import _values, defense_of, ready, subject_of
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError, DataError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.vote import Vote

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "robustbench_eval.py"
TINY = replace(
    BUDGETS["fast"],
    apgd_steps=3,
    targets=1,
    autoattack_steps=2,
    autoattack_queries=5,
    eot=1,
    lambdas=(1.0,),
    unrolled_steps=2,
    adaptive_steps=2,
)


class Blur(nn.Module):
    """A module from images to images."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 3, 1, 1)


class Levels:
    """As ART's preprocessors are: called on arrays, with an estimate of the gradient."""

    def __init__(self, levels: int = 16) -> None:
        self.levels = levels

    def __call__(self, x: Any, y: Any = None) -> tuple[Any, Any]:
        assert isinstance(x, np.ndarray)
        return np.round(x * self.levels) / self.levels, y

    def estimate_gradient(self, x: Any, grad: Any) -> Any:
        assert isinstance(grad, np.ndarray)
        return grad


class Differentiating(Levels):
    """As ART's PyTorch preprocessors are: the estimate is autograd's, taken inside."""

    def estimate_gradient(self, x: Any, grad: Any) -> Any:
        inside = torch.tensor(x, requires_grad=True)
        (inside * 2).backward(torch.tensor(grad))
        assert inside.grad is not None
        return inside.grad.numpy()


class Steps:
    """The protocol in full: steps, an objective, and being stopped."""

    def __init__(self, steps: int = 2) -> None:
        self.steps = steps

    def objective(self, x: Tensor, seeds: Tensor) -> Any:
        return lambda iterate, step: iterate.square().mean((1, 2, 3))

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x * 0.995
        return x

    def stopped_after(self, steps: int) -> "Steps":
        return Steps(steps)


@pytest.fixture(scope="module")
def net() -> ImageClassifier:
    return broken_defenses.natural_classifier(steps=60)


def plain(net: ImageClassifier) -> nn.Module:
    """The same network as nobody's module: images to scores."""
    return nn.Sequential(_Scores(net))


class _Scores(nn.Module):
    def __init__(self, net: ImageClassifier) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x)
        return scores


def quick(net: nn.Module, purifier: Any, *, n: int = 12, **more: Any) -> Any:
    images, labels, *_ = broken_defenses.evaluation_set(n)
    attacks = "apgd-ce,transfer,bpda-apgd-ce,intermediate,bpda-contrastive"
    arguments: dict[str, Any] = {"attacks": attacks, "budget": TINY, **more}
    return benchmarks.evaluate(net, images, labels, purifier=purifier, chunk=n, **arguments)


def test_module_of_ones_own_is_evaluated_alone_and_behind_each_kind_of_purifier(net: ImageClassifier) -> None:
    report = quick(plain(net), {"blur": Blur(), "levels": Levels(), "steps": Steps()})
    rows = {record["results"]["purifier_spec"]: record["results"] for record in report.records}
    assert list(rows) == ["none", "blur", "levels", "steps"]
    assert all(set(rows[name]["could_not_run"]) == {"intermediate", "bpda-contrastive"} for name in ("blur", "levels"))
    assert rows["steps"]["could_not_run"] == {}
    assert {"intermediate", "bpda-contrastive"} <= rows["steps"]["outcomes"].keys()
    for name in ("blur", "levels", "steps"):
        assert rows[name]["figures"]["gain"]["n"] == 12
        assert rows[name]["bare_outcomes"] == rows["none"]["outcomes"]
    assert "blur" in report.to_markdown()
    json.dumps(report.records)


@pytest.mark.parametrize("attack", ["apgd-ce", "bpda-apgd-ce", "intermediate", "bpda-contrastive"])
def test_purifier_of_ones_own_that_hides_nothing_is_broken_by_each_adaptive_attack(
    net: ImageClassifier, attack: str
) -> None:
    budget = replace(TINY, lambdas=(0.001,))  # its objective is no obstacle, and left to cross-entropy
    report = quick(plain(net), Steps(), attacks=attack, budget=budget)
    found = report.records[1]["results"]["figures"]["attacks"][attack]
    assert found["attacked"] == 12
    assert found["broken"] > 6


def test_estimated_gradient_takes_the_place_of_none(net: ImageClassifier) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    purifier = AnyPurifier(net, Levels())
    x = images.clone().requires_grad_()
    found = purifier.descend(x, seeds=torch.arange(2), unrolled=True).image
    assert torch.allclose(found, (images * 16).round() / 16)
    (gradient,) = torch.autograd.grad((found * images).sum(), x)
    assert torch.equal(gradient, images)
    found = AnyPurifier(net, Differentiating()).descend(x, seeds=torch.arange(2), unrolled=True).image
    (gradient,) = torch.autograd.grad((found * images).sum(), x)
    assert torch.equal(gradient, 2 * images)


def test_stored_units_are_used_again_and_another_purifier_leaves_those_of_the_bare_row(
    net: ImageClassifier, tmp_path: Path
) -> None:
    quick(net, Levels(16), store=tmp_path)
    before = set(tmp_path.rglob("*.npz"))
    quick(net, Levels(16), store=tmp_path)
    assert set(tmp_path.rglob("*.npz")) == before
    quick(net, Levels(8), store=tmp_path)
    names = {file.name.split("-0000")[0] for file in set(tmp_path.rglob("*.npz")) - before}
    assert names == {"clean", "apgd-ce", "transfer", "transfer-further", "bpda-apgd-ce", "apgd-ce-x2", "apgd-ce-x4"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": torch.full((2, 3, 32, 32), 255.0)}, "divide 8-bit"),
        ({"images": torch.zeros(2, 32, 32, 3)}, "floats"),
        ({"images": torch.zeros(2, 3, 32, 16)}, "32 x 16 pixels: square"),
        ({"images": torch.zeros(2, 3, 16, 16)}, "for images of 32 x 32; these are 16 x 16"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"int64 \[2\]"),
        ({"labels": torch.tensor([0, 9])}, "4 classes"),
        ({"epsilon": 8}, "8/255"),
        ({"attacks": "magic"}, "magic"),
        ({"purifier": object()}, "is no purifier"),
        ({"purifier": {"none": Blur()}}, "another name"),
        ({"classes": ("a", "b")}, "4 scores, for 2 classes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_named_before_any_attack(net: ImageClassifier, change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"images": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64)}
    images, labels = (change.get(name, value) for name, value in given.items())
    more = {name: value for name, value in change.items() if name not in given}
    with pytest.raises((ConfigError, DataError), match=says):
        benchmarks.evaluate(net, images, labels, budget="fast", **more)


def test_checkpoints_size_and_classes_and_a_modules_size_are_its_own() -> None:
    checkpoint, linear = make_checkpoint(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    with pytest.raises(ConfigError, match="tiny is for images of 32 x 32"):
        subject_of(checkpoint, name="tiny", classes=None, image_size=16)
    with pytest.raises(ConfigError, match="its own classes, blue"):
        subject_of(checkpoint, name="tiny", classes=("a", "b", "c"), image_size=32)
    with pytest.raises(ConfigError, match=r"linear takes no float32 images \[1, 3, 32, 32\]"):
        subject_of(linear, name="linear", classes=None, image_size=32)
    assert subject_of(linear, name="linear", classes=None, image_size=16).classifier.num_classes == 3


PURIFIER = """
import torch


class Smooth:
    def __init__(self, strength=0.5):
        self.strength = strength

    def purify(self, x, seeds):
        blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return x + self.strength * (blurred - x)
"""
MODEL = """
import torch


def make():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 5, 4), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(196, 3)]
    return torch.nn.Sequential(*layers)
"""


def test_purifier_and_model_in_a_folder_of_ones_own_run_through_every_attack_that_applies(
    image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_defense.py").write_text(PURIFIER)
    (tmp_path / "my_model.py").write_text(MODEL)
    command = [sys.executable, str(SCRIPT), "--model", "my_model:make", "--purifier", "my_defense:Smooth:strength=0.3"]
    command += ["--dataset", "colours", "--data", str(image_folder), "--n-examples", "6", "--budget", "fast"]
    command += ["--device", "cpu", "--out", "out", "--cache", "cache", "--chunk", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").glob("*.json")
    found = json.loads(file.read_text())["results"]
    applies = ["noise", "apgd-ce", "apgd-ce-twice", "transfer", "bpda-apgd-ce", "bpda-apgd-dlr", "batchmate"]
    assert list(found["outcomes"]) == ["clean", *applies, "defended-autoattack", "rays", "transfer-further"]
    assert set(found["could_not_run"]) == {"intermediate", "bpda-contrastive"}
    assert found["purifier"]["strength"] == 0.3
    assert [found["digests"][name] is None for name in ("classifier", "defense", "generator")] == [False, False, True]
    assert set(found["code"]) == {"classifier", "defense"}
    assert str(tmp_path) not in file.read_text()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("strength=0.3,times=2", {"strength": 0.3, "times": 2}),
        ("clip_values=(0,1),mode=reflect,on=True", {"clip_values": (0, 1), "mode": "reflect", "on": True}),
        ("epsilon=8/255,mode=a/b", {"epsilon": 8 / 255, "mode": "a / b"}),
    ],
)
def test_values_of_a_purifier_are_pythons_own(text: str, values: dict[str, Any]) -> None:
    assert _values(text) == values


@pytest.mark.parametrize("text", ["strength", "=3", "a=1,b", "a=(1", "a=1)(b=2"])
def test_what_is_not_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        _values(text)


class InPlace:
    """Writes into what it is given."""

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        with torch.no_grad():
            return x.mul_(0.5).add_(0.25)


class OutOfPlace:
    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        return x * 0.5 + 0.25


def test_purifier_that_writes_in_place_changes_nobody_elses_images(net: ImageClassifier) -> None:
    images, labels, *_ = broken_defenses.evaluation_set(12)
    before = images.clone()
    report = benchmarks.evaluate(
        net, images, labels, purifier={"in": InPlace(), "out": OutOfPlace()}, attacks="bpda-apgd-ce", budget="fast"
    )
    assert torch.equal(images, before)
    rows = {record["results"]["purifier_spec"]: record["results"] for record in report.records}
    assert rows["in"]["outcomes"] == rows["out"]["outcomes"]
    assert rows["in"]["bare_outcomes"] == rows["none"]["outcomes"]


class Private:
    """Keeps what it does where only it looks."""

    def __init__(self, scale: float, shift: float = 0.0) -> None:
        self._scales, self._layer = {"scale": [scale]}, nn.Linear(1, 1)
        self._layer.bias.data.fill_(shift)

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        return (x * self._scales["scale"][0] + self._layer.bias.detach()).clamp(0, 1)


@pytest.mark.parametrize("other", [Private(-3.0), Private(1.0, shift=0.8)], ids=["a private dict", "a net in it"])
def test_two_purifiers_that_differ_in_something_private_are_not_taken_for_each_other(
    net: ImageClassifier, other: Private
) -> None:
    report = quick(net, {"one": Private(1.0), "other": other}, attacks="noise")
    _, one, two = (record["results"]["figures"]["clean"]["accuracy"] for record in report.records)
    assert one > 0.5 > two


def test_vote_stands_behind_a_purifier_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "voted_defense.py").write_text(PURIFIER + "\n\ndef own_vote(vote=3):\n    return Smooth(vote / 10)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    subject = make_checkpoint()
    behind = defense_of("voted_defense:Smooth:strength=0.3,vote=-1/0+1/1,mirrored=no", subject)
    assert behind.vote == Vote(shifts=((-1, 0), (1, 1)), mirrored=False)
    assert defense_of("voted_defense:Smooth:vote=none", subject).vote is None
    own = defense_of("voted_defense:own_vote:vote=7", subject)  # a value of its own of that name
    assert (own.vote, own.purifier.purifier.strength) == (None, 0.7)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="maybe"):
        defense_of("voted_defense:Smooth:vote=2,mirrored=maybe", subject)


class Noisy(nn.Module):
    """It draws from torch, and from NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.1 * torch.randn_like(x) + 0.1 * float(np.random.rand())).clamp(0, 1)


def test_module_that_draws_gives_an_image_the_same_whatever_is_beside_it(net: ImageClassifier) -> None:
    purifier = AnyPurifier(net, Noisy())
    x, seeds = torch.rand(4, 3, 32, 32), torch.tensor([3, 4, 5, 6])
    state = repr(np.random.get_state())
    whole = purifier.descend(x, seeds=seeds).image
    assert torch.equal(whole[2:3], purifier.descend(x[2:3], seeds=seeds[2:3]).image)
    assert not torch.equal(whole, purifier.descend(x, seeds=seeds + 1).image)
    assert repr(np.random.get_state()) == state


class Nearly:
    """Its differentiable form answers otherwise than itself; a network of its own lies deep inside."""

    def __init__(self) -> None:
        self.parts = [{"of": nn.Dropout(0.5)}]

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        found: Tensor = self.parts[0]["of"](x.detach())
        return (found * 8).round() / 8

    def unrolled(self, x: Tensor, seeds: Tensor) -> Tensor:
        return 0.5 * x


def test_full_gradient_attack_sees_what_is_served_with_the_slope_of_the_differentiable_form(
    net: ImageClassifier,
) -> None:
    purifier = AnyPurifier(net, Nearly())
    x, seeds = torch.rand(2, 3, 32, 32).requires_grad_(), torch.arange(2)
    found = purifier.descend(x, seeds=seeds, unrolled=True).image
    assert torch.allclose(found, purifier.descend(x, seeds=seeds).image)  # no dropout either
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(slope, torch.full_like(x, 0.5))


class Rounded:
    """Autograd gives it a gradient, which is zero."""

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        return (x * 7).round() / 7


class Drawn:
    """It draws by the seeds, and gives no gradient."""

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        return (x + (seeds % 7).view(-1, 1, 1, 1) / 100).clamp(0, 1).detach()


def test_random_purifier_without_a_gradient_is_attacked_by_its_expectation_too(net: ImageClassifier) -> None:
    report = quick(net, Drawn(), n=4, attacks="apgd-ce-fresh", budget="fast")
    assert "apgd-ce-fresh" in report.records[1]["results"]["outcomes"]


class Detached:
    """No gradient comes through it; it takes one of its own."""

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        inside = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((inside - 0.5).square().sum(), inside)
        return (x - 0.01 * slope).detach()


class OnArrays:
    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        return torch.from_numpy(np.round(x.numpy() * 32) / 32)


@pytest.mark.parametrize("purifier", [Detached(), OnArrays(), Rounded()], ids=["detached", "NumPy", "zero"])
def test_purifier_without_a_gradient_is_attacked_by_all_and_its_row_says_so(
    net: ImageClassifier, purifier: Detached | OnArrays | Rounded
) -> None:
    report = quick(net, purifier, n=4, attacks="autoattack,batchmate,defended-autoattack", budget="fast")
    found = report.records[1]["results"]
    assert "no gradient comes through" in found["figures"]["weaker"][0]
    assert "no gradient comes through" in report.to_markdown()
    assert {"batchmate", "defended-autoattack"} <= found["outcomes"].keys()


def test_gain_over_a_classifier_that_was_attacked_with_more_is_not_called_help(net: ImageClassifier) -> None:
    text = quick(net, OutOfPlace(), attacks="autoattack,noise").to_markdown()
    assert "not judged" in text
    assert "≲" in text
    assert "helps" not in text


def test_callers_model_and_threads_are_left_as_they_were(net: ImageClassifier) -> None:
    model, threads = nn.Sequential(_Scores(net)).train(), torch.get_num_threads()
    for parameter in model.parameters():
        parameter.requires_grad_()
    quick(model, Blur(), attacks="noise")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.get_num_threads() == threads
    net.requires_grad_(False)


class Dropping(nn.Module):
    """Draws from torch's own generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) > 0.2)


def test_module_that_draws_from_torchs_generator_is_judged_the_same_twice(net: ImageClassifier) -> None:
    torch.manual_seed(1)
    first = quick(net, Dropping(), attacks="noise").records[1]["results"]["outcomes"]
    torch.manual_seed(2)
    assert quick(net, Dropping(), attacks="noise").records[1]["results"]["outcomes"] == first


def test_probabilities_are_refused(net: ImageClassifier) -> None:
    with pytest.raises(ConfigError, match="before the softmax"):
        quick(nn.Sequential(_Scores(net), nn.Softmax(1)), None)


def test_batch_norm_of_another_kind_keeps_what_it_does() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class Net(ImageClassifier):
        def __init__(self) -> None:
            super().__init__(feature_dim=4, num_classes=3, image_size=8)
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), Activated(4), nn.Linear(4, 3)

        def features(self, x: Tensor) -> Tensor:
            features: Tensor = self.norm(self.conv(x)).mean((2, 3))
            return features

        def logits(self, features: Tensor) -> Tensor:
            scores: Tensor = self.last(features)
            return scores

    model, x = Net().eval(), torch.rand(4, 3, 8, 8)
    subject = subject_of(model, name="net", classes=None, image_size=8)
    assert torch.allclose(ready(subject, torch.device("cpu")).classifier(x), model(x), atol=1e-4)


@pytest.mark.parametrize("name", ["small", "default"])
def test_code_of_a_purifier_is_no_part_of_what_the_bare_classifiers_work_is_found_by(name: str) -> None:
    subject = ready(store.load(name), torch.device("cpu"))
    edited = "unperturb.models.purifiers.reverse_attack"

    def behind(spec: str) -> set[str]:
        return {one for module in modules_of_defense(defense_of(spec, subject)) for one in modules_behind(module)}

    assert edited in behind("reverse-attack")
    assert edited not in behind("none") | behind("vote")
