"""Images made on another classifier: where they lie, what they count for, and that nothing else changes by them."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unperturb.benchmarks as benchmarks
from tests.conftest import CLASSES, make_checkpoint
from tests.support import broken_defenses
from tests.support.harness import arguments, records
from tests.support.scenes import LinearClassifier
from unperturb.benchmarks import robustbench_eval
from unperturb.benchmarks.reporting import report
from unperturb.benchmarks.reporting.columns import notes
from unperturb.benchmarks.reporting.rows import load_runs, measured_row
from unperturb.benchmarks.robustness import attacks
from unperturb.benchmarks.robustness.attacks.scene import Scene
from unperturb.benchmarks.robustness.attacks.surrogate import made
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.figures import joined
from unperturb.benchmarks.robustness.surrogate import Surrogate, surrogate_of
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.benchmarks.robustness.units import Unit, Units
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.purifiers.base import NoPurifier
from unperturb.models.purifiers.defended import DefendedClassifier

N, LINF = 24, Threat(norm="linf", epsilon=8 / 255)
BUDGET = replace(BUDGETS["fast"], apgd_steps=3, restarts=2)


class Blur(nn.Module):
    """A purifier: the mean of nine pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 3, 1, 1)


@pytest.fixture(scope="module")
def judged() -> ImageClassifier:
    return broken_defenses.natural_classifier(steps=60)


@pytest.fixture(scope="module")
def other() -> ImageClassifier:
    return broken_defenses.natural_classifier(steps=100)


def evaluated(net: nn.Module, **more: Any) -> dict[str, Any]:
    """The results of the rows `none` and `blur`, by name."""
    images, labels, *_ = broken_defenses.evaluation_set(N)
    given: dict[str, Any] = {"purifier": {"blur": Blur()}, "attacks": "surrogate", "budget": BUDGET, "chunk": 12}
    found = benchmarks.evaluate(net, images, labels, **{**given, **more})
    return {run["results"]["purifier_spec"]: run["results"] for run in found.records}


def scene_of(classifier: ImageClassifier, x: Tensor, labels: Tensor, **more: Any) -> Scene:
    defended = DefendedClassifier(classifier, NoPurifier(classifier))
    given: dict[str, Any] = {"threat": LINF, "budget": BUDGET, "seeds": torch.arange(len(x))}
    return Scene(defended=defended, x=x, labels=labels, **{**given, **more})


def test_images_are_at_the_highest_loss_of_the_surrogate_also_where_it_was_wrong_before() -> None:
    weight = torch.randn(2, 192)
    images = 0.2 + 0.6 * torch.rand(16, 3, 8, 8)
    labels = (images.flatten(1) @ weight.T).argmax(1)
    labels[:8] = 1 - labels[:8]  # it has these wrong
    points = made(scene_of(LinearClassifier(weight), images, labels))
    away = (weight[1 - labels] - weight[labels]).view_as(images)
    assert torch.allclose(points, images + 8 / 255 * away.sign(), atol=1e-6)


def test_of_several_starts_the_one_of_the_highest_loss_is_kept(other: ImageClassifier) -> None:
    images, labels, *_ = broken_defenses.evaluation_set(N)

    def losses(restarts: int) -> Tensor:
        scene = scene_of(other, images, labels, budget=replace(BUDGET, apgd_steps=1, restarts=restarts))
        return nn.functional.cross_entropy(other(made(scene)), labels, reduction="none")

    assert (losses(4) >= losses(1)).all()
    assert (losses(4) > losses(1)).any()


def test_row_says_what_the_surrogates_images_do_to_the_bare_classifier_and_to_the_defense(
    judged: ImageClassifier, other: ImageClassifier
) -> None:
    images, labels, *_ = broken_defenses.evaluation_set(N)
    rows = evaluated(judged, surrogate=other)
    points = made(scene_of(other, images, labels))
    defenses: dict[str, Callable[[Tensor], Tensor]] = {"none": judged, "blur": lambda x: judged(Blur()(x))}
    withstands = {
        name: [bool(both) for both in answer(images).argmax(1).eq(labels) & answer(points).argmax(1).eq(labels)]
        for name, answer in defenses.items()
    }
    for name, row in rows.items():
        figure = row["figures"]["surrogate"]
        assert [bool(value) for value in row["outcomes"]["surrogate"]] == withstands[name]
        assert figure["accuracy"]["accuracy"] == pytest.approx(sum(withstands[name]) / N)
        assert figure["of"] == row["surrogates"]
        assert [one["spec"] for one in figure["of"]] == ["surrogate"]
        assert row["passes_per_image"]["surrogate"]["backward"] == 0  # nothing is asked of who is judged
        assert row["passes_per_image"]["surrogate-images"] == {"forward": 11, "backward": 8}
    assert rows["none"]["figures"]["surrogate"]["gain"] is None
    figure = rows["blur"]["figures"]["surrogate"]
    assert figure["bare"] == rows["none"]["figures"]["surrogate"]["accuracy"]
    difference = sum(withstands["blur"]) - sum(withstands["none"])
    assert difference != 0
    assert figure["gain"]["mean"] == pytest.approx(difference / N)
    assert figure["gain"]["interval"][0] < figure["gain"]["mean"] < figure["gain"]["interval"][1]


def test_what_the_surrogates_images_break_counts_in_both_worst_cases(
    judged: ImageClassifier, other: ImageClassifier
) -> None:
    rows = evaluated(judged, surrogate=other, attacks="noise")  # which breaks hardly an image
    for row in rows.values():
        assert row["figures"]["worst_case_over"] == ["noise", "surrogate"]
        broken = row["figures"]["attacks"]["surrogate"]["broken"]
        left = row["figures"]["attacks"]["noise"]["left"]["accuracy"]
        assert broken > 0
        assert row["figures"]["worst_case"]["accuracy"] < left
    figures = rows["blur"]["figures"]
    assert figures["bare"]["worst_case"] == rows["none"]["figures"]["worst_case"]
    assert figures["bare"]["over"] == ["noise", "surrogate"]


def test_without_a_surrogate_nothing_changes_and_with_one_only_its_own_units_are_new(
    judged: ImageClassifier, other: ImageClassifier, tmp_path: Path
) -> None:
    def stored() -> set[str]:
        return {file.name for file in tmp_path.rglob("*.npz")}

    without = evaluated(judged, attacks="noise,apgd-ce", store=tmp_path)
    assert all("surrogates" not in row and "surrogate" not in row["figures"] for row in without.values())
    before = stored()
    with_it = evaluated(judged, attacks="noise,apgd-ce", store=tmp_path, surrogate=other)
    for name, row in with_it.items():
        assert {key: row["outcomes"][key] for key in without[name]["outcomes"]} == without[name]["outcomes"]
        assert without[name].keys() == row.keys() - {"surrogates"}
    new = stored() - before
    assert not before - stored()
    kinds = [name.partition("-0000")[0] for name in new]
    own = [kind for kind in kinds if not kind.startswith("apgd-ce-x")]  # run on what the surrogate's images have left
    assert sorted(own) == ["surrogate"] * 4 + ["surrogate-images"] * 2  # two chunks, and two rows that share the images
    evaluated(judged, attacks="surrogate", store=tmp_path, surrogate=broken_defenses.natural_classifier(steps=80))
    assert sorted(name.partition("-0000")[0] for name in stored() - before - new) == sorted(own)


def test_run_that_is_stopped_goes_on_with_the_same_images(
    judged: ImageClassifier, other: ImageClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = evaluated(judged, surrogate=other)
    get = Units.get

    def stopping(self: Units, name: str, chunk: int, identity: dict[str, Any], compute: Callable[[], Unit]) -> Unit:
        unit = get(self, name, chunk, identity, compute)
        if stops and name == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        return unit

    monkeypatch.setattr(Units, "get", stopping)
    stops = ["surrogate-images", "surrogate", "surrogate-images"]
    while stops:
        with pytest.raises(KeyboardInterrupt):
            evaluated(judged, surrogate=other, store=tmp_path)
    again = evaluated(judged, surrogate=other, store=tmp_path)
    for name, row in undisturbed.items():
        assert again[name]["outcomes"] == row["outcomes"]
        assert again[name]["figures"] == row["figures"]
        assert again[name]["passes_per_image"] == row["passes_per_image"]
    assert len(list(tmp_path.rglob("surrogate-images-*.npz"))) == 2


def made_as(checkpoint: Checkpoint, *, classes: tuple[str, ...]) -> Checkpoint:
    return replace(checkpoint, card=replace(checkpoint.card, classes=classes))


def surrogate(judged: Checkpoint, other: Checkpoint) -> Surrogate:
    return surrogate_of(judged, other, name="other", device=torch.device("cpu"), seed=0)


def test_classes_are_matched_by_name(images: Tensor) -> None:
    checkpoint, labels = make_checkpoint(head=False), torch.arange(8) % 3
    order, turned = [2, 0, 1], copy.deepcopy(checkpoint)
    for name, values in turned.classifier.named_parameters():
        if len(values) == len(CLASSES) and values.ndim <= 2 and "conv" not in name:
            values.data = values.data[order]
    assert torch.allclose(turned.classifier(images), checkpoint.classifier(images)[:, order])
    turned = made_as(turned, classes=tuple(CLASSES[place] for place in order))
    scene = scene_of(checkpoint.classifier, images, labels)
    own, mapped = (made(surrogate(checkpoint, one).scene(scene)) for one in (checkpoint, turned))
    assert (own - mapped).abs().mean() < 1e-3
    assert surrogate(checkpoint, turned).scene(scene).labels.tolist() == [order.index(label) for label in labels]
    unmapped = made_as(turned, classes=CLASSES)
    assert (own - made(surrogate(checkpoint, unmapped).scene(scene))).abs().mean() > 1e-2


@pytest.mark.parametrize("classes", [("blue", "green", "yellow"), ("blue", "red", "red")], ids=["another", "twice"])
def test_surrogate_that_does_not_know_every_class_by_its_name_is_refused(classes: tuple[str, ...]) -> None:
    checkpoint = make_checkpoint(head=False)
    with pytest.raises(ConfigError, match="the surrogate other has to know every class by its name"):
        surrogate(checkpoint, made_as(checkpoint, classes=classes))


class Scores(nn.Module):
    """Somebody's module: images of a side to three scores, or to their softmax."""

    def __init__(self, *, side: int = 32, softmax: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 3), *([nn.Softmax(1)] if softmax else []))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"surrogate": Scores(side=16)}, r"surrogate takes no float32 images \[1, 3, 32, 32\]"),
        ({"surrogate": Scores(softmax=True)}, "surrogate surrogate: the classifier returns probabilities"),
        ({"surrogate": made_as(make_checkpoint(), classes=("a", "b", "c"))}, "'blue' is not one of it alone"),
        ({"attacks": "surrogate"}, "--surrogate CHECKPOINT"),
        ({"surrogate": broken_defenses.SmallNet()}, "4 scores, for 3 classes"),
    ],
    ids=["size", "probabilities", "classes", "none", "fewer classes"],
)
def test_what_can_be_no_surrogate_is_refused_before_any_attack(
    more: dict[str, Any], says: str, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Units, "get", None)
    given: dict[str, Any] = {"attacks": "noise", "budget": "fast", **more}
    with pytest.raises(ConfigError, match=says):
        benchmarks.evaluate(make_checkpoint(), images, torch.arange(8) % 3, **given)


def command(model: Path, data: Path, out: Path, *more: str) -> int:
    """Run the command line on eight images of three colours; return its status."""
    return robustbench_eval.main(arguments(model, data, out, *more))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier of the same classes and other weights."""
    checkpoint = make_checkpoint(head=False)
    checkpoint.classifier.requires_grad_(False)
    for values in checkpoint.classifier.parameters():
        values.data += 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
    folder = tmp_path_factory.mktemp("other")
    store.save(folder, replace(checkpoint, card=replace(checkpoint.card, id="other")))
    return folder


QUICK = ("--attacks", "noise,apgd-ce", "--purifier", "none", "--purifier", "vote:shifts=1")


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, image_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a surrogate."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    more = (*QUICK, "--surrogate", str(other_folder))
    assert command(tiny_folder, image_folder, folder, *more) == 0
    return folder


def test_record_of_the_command_line_names_the_surrogate_and_no_place(whole: Path, other_folder: Path) -> None:
    found = records(whole)
    assert len(found) == 2
    card = store.read_card(other_folder)
    for name, record in found.items():
        (described,) = record["results"]["figures"]["surrogate"]["of"]
        assert (described["spec"], described["weights_sha256"]) == (
            f"other-{card.weights_sha256[:8]}",
            card.weights_sha256,
        )
        assert record["config"]["surrogate"] == described["spec"]
        assert str(other_folder) not in json.dumps(record)
        settings: dict[str, Any] = {
            key: (value,) if key in ("model", "purifier") else value for key, value in record["config"].items()
        }
        config = robustbench_eval.EvaluationConfig(**settings, data=Path())
        purifier = record["config"]["purifier"]
        assert robustbench_eval.result_name(config, config._plan(None), record["results"], purifier) == name


def test_plan_counts_the_images_and_the_record_without_a_surrogate_is_as_it_was(
    whole: Path, tiny_folder: Path, image_folder: Path, other_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    more: tuple[str, ...] = ("--attacks", "noise", "--purifier", "none")
    assert command(tiny_folder, image_folder, tmp_path / "out", *more) == 0
    assert "surrogate" not in capsys.readouterr().out
    (record,) = records(tmp_path / "out").values()
    assert "surrogate" not in json.dumps(record)
    more += ("--surrogate", str(other_folder))
    assert command(tiny_folder, image_folder, tmp_path / "out", *more) == 0
    planned = capsys.readouterr().out.splitlines()
    (line,) = (line for line in planned if "its images" in line)
    assert line.startswith("surrogate other-")
    assert line.split()[4:7] == ["11", "0", "1"]  # of the budget `fast`: 10 steps from one start
    assert any("none" in line and line.split()[3:7] == ["surrogate", "0", "0", "1"] for line in planned)
    assert len(records(tmp_path / "out")) == 2  # under a name of its own


@pytest.mark.parametrize("threat", ["Linf", "noise"])
def test_surrogate_that_does_not_fit_is_refused_on_the_command_line(
    threat: str, tiny_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = Architecture(name="wide_resnet_10_1", num_classes=3, image_size=64)
    store.save(tmp_path / "large", make_checkpoint(head=False, architecture=architecture))
    more = (*QUICK, "--surrogate", str(tmp_path / "large"), "--threat-model", threat)
    assert command(tiny_folder, image_folder, tmp_path / "out", *more) == 2
    says = {"Linf": "is for images of 64 x 64, tiny for 32 x 32", "noise": "it attacks in a ball, not under noise"}
    assert says[threat] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_merge_to_the_whole_and_a_run_of_the_attack_alone_joins_its_row(
    whole: Path, tiny_folder: Path, image_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    surrogate = ("--surrogate", str(other_folder))
    for shard in ("1/2", "2/2"):
        more = (*QUICK, *surrogate, "--shard", shard)
        assert command(tiny_folder, image_folder, tmp_path / "parts", *more) == 0
    for chosen in (QUICK, ("--attacks", "surrogate", *QUICK[2:], *surrogate)):
        assert command(tiny_folder, image_folder, tmp_path / "apart", *chosen) == 0
    expected = [run["results"]["figures"]["surrogate"] for run in load_runs(whole)]
    for folder in ("parts", "apart"):
        assert [run["results"]["figures"]["surrogate"] for run in load_runs(tmp_path / folder)] == expected
    worst = [[run["results"]["figures"]["worst_case"] for run in load_runs(at)] for at in (whole, tmp_path / "apart")]
    assert worst[0] == worst[1]


def test_row_of_two_surrogates_names_both(whole: Path) -> None:
    one = load_runs(whole)[1]["results"]
    two = {**one, "surrogates": [{**one["surrogates"][0], "spec": "second"}]}
    names = [found["spec"] for found in joined([one, two, one])["figures"]["surrogate"]["of"]]
    assert names == [one["surrogates"][0]["spec"], "second"]


def test_report_says_what_the_surrogates_images_do(whole: Path, tmp_path: Path) -> None:
    assert report.main([str(whole), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for run in load_runs(whole):
        (sentence,) = (note for note in notes(measured_row(run)) if note.startswith("of the images made on other-"))
        assert sentence in text
        figure = run["results"]["figures"]["surrogate"]
        assert f"{100 * figure['accuracy']['accuracy']:.1f}% withstand" in sentence
        assert (f"bare {100 * (figure['bare'] or figure['accuracy'])['accuracy']:.1f}%" in sentence) == bool(
            figure["gain"]
        )
        assert run["results"]["figures"]["signs"]["transfer_beyond_gradient"]["n"] == 8


def test_surrogate_goes_with_every_choice_of_attacks() -> None:
    for text in ("all", "fast", "noise", "surrogate"):
        chosen = attacks.chosen(text, with_surrogate=True)
        assert chosen[-1] == "surrogate"
        assert text == "surrogate" or chosen[:-1] == attacks.chosen(text)
