"""What is named on the command line: a checkpoint, or a module and a purifier of one's own, and their values."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import make_checkpoint
from unperturb.benchmarks.robustness.code import modules_behind
from unperturb.benchmarks.robustness.identity import modules_of_defense
from unperturb.benchmarks.robustness.subjects import _values, defense_of, ready, subject_of
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.vote import Vote

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "robustbench_eval.py"


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
