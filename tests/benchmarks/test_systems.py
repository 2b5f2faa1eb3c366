"""The runner of the systems: every arm at a tiny scale, resumed, and the README's table of it."""

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch

from tests.conftest import SMALL, make_checkpoint
from tests.support.records import in_order, record, write
from unperturb.benchmarks.papers import measures
from unperturb.benchmarks.papers import plan as systems_plan
from unperturb.benchmarks.papers import run as systems
from unperturb.benchmarks.papers import table as systems_table
from unperturb.benchmarks.papers.measures import MEASURES, Subject
from unperturb.benchmarks.papers.plan import SCALES, Scale, arms
from unperturb.models.accuracy import correct
from unperturb.models.checkpoints import store
from unperturb.models.networks.generator import load as load_generator
from unperturb.models.options import parse
from unperturb.models.pixels import Preprocessing
from unperturb.training import data
from unperturb.training.__main__ import COMMANDS
from unperturb.training.__main__ import main as training
from unperturb.training.data import DataSet, Split

NO = torch.zeros(0, dtype=torch.int64)

NET = {"arch": "wide_resnet_10_1", "epochs": "2", "batch-size": "21", "held-out": "9"}
TINY = Scale(
    contrast={**NET, "hidden": "16", "embedding-dim": "8", "attack-steps": "1", "bank-size": "30"},
    fine_tuning={"epochs": "1"},
    readout={"epochs": "2", "batch-size": "21", "held-out": "9"},
    knn={"neighbours": "9"},
    false_negatives={"false-negatives-from": "0"},
    supervised=NET,
    overfitting={**NET, "epochs": "4", "method": "pgd", "attack-steps": "1"},
    labels={"arch": "wide_resnet_10_1", "batch-size": "6", "held-out": "9", "labelled": "0.34", "method": "natural"},
    generator={"epochs": "1", "batch-size": "21", "held-out": "9", "width": "8"},
    frozen={**NET, "epochs": "1"},
    fine_tuned={"epochs": "2", "batch-size": "21", "held-out": "9", "lr": "0.05"},
    head={
        "classifier": "default",
        "epochs": "1",
        "batch-size": "21",
        "held-out": "9",
        "attack-steps": "1",
        "bank-size": "30",
    },
    harness={"n-examples": "4", "budget": "fast"},
    test_images=18,
)


def arguments(data: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--data",
        str(data),
        "--transfer-data",
        str(data),
        "--out",
        str(folder / "results"),
        "--device",
        "cpu",
        "--runs",
        str(folder / "runs"),
        "--seeds",
        "1",
        *more,
    ]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "small", TINY)
    monkeypatch.setattr(systems.Campaign, "_threads", lambda _: 1)  # not all cores: other tests run beside it


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains without a process of its own, which would be mostly its imports."""

    def run(command: list[str], *, stdout: TextIO, stderr: TextIO, **_: Any) -> subprocess.CompletedProcess[str]:
        program, arguments = command[:3], command[3:]
        assert program == [sys.executable, "-m", "unperturb.training"]
        with redirect_stdout(stdout), redirect_stderr(stderr):
            return subprocess.CompletedProcess(command, training(arguments))

    monkeypatch.setattr(systems, "subprocess", SimpleNamespace(run=run))


def results_of(folder: Path) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text()) for file in (folder / "results" / "small").glob("*.json")}


@pytest.mark.usefixtures("tiny")
def test_arms_are_trained_measured_and_written_after_what_they_need(image_folder: Path, tmp_path: Path) -> None:
    wanted = ("--arm", "simclr-linear", "--arm", "simclr-instance")
    assert systems.main(arguments(image_folder, tmp_path, *wanted)) == 0
    found = results_of(tmp_path)
    assert found.keys() == {"simclr", "simclr-linear", "simclr-instance"}
    one = found["simclr-linear"]["results"]
    assert list(one["options"]) == ["simclr", "simclr-linear"]
    assert one["seeds"]["0"]["figures"]["radii"]["clean"]["n"] == 18
    assert one["seeds"]["0"]["training"]["epochs"] == 2
    instance = found["simclr-instance"]["results"]["seeds"]["0"]["figures"]["instance"]
    assert instance.keys() == {"clean", "noise", "sim", "mse", "l1", "cos"}
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.usefixtures("tiny", "in_process")
def test_finished_seed_is_not_run_again_and_other_options_are(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = arguments(image_folder, tmp_path, "--arm", "natural-knn")
    assert systems.main(wanted) == 0
    assert "natural, seed 0: training" in capsys.readouterr().out
    before = results_of(tmp_path)
    assert systems.main(wanted) == 0
    assert capsys.readouterr().out == ""
    assert results_of(tmp_path) == before
    monkeypatch.setitem(SCALES, "small", Scale(**{**vars(TINY), "knn": {"bank": "40", "neighbours": "9"}}))
    assert systems.main(wanted) == 0
    said = capsys.readouterr().out
    assert "natural-knn, seed 0: training" in said
    assert "natural, seed 0: training" not in said  # its own options are as they were
    assert results_of(tmp_path)["natural-knn"]["results"]["options"]["natural-knn"]["bank"] == "40"


@pytest.mark.usefixtures("tiny", "in_process")
def test_generator_of_an_imported_network_is_measured_beside_noise_in_that_networks_pictures(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_checkpoint(head=False, architecture=replace(SMALL, image_size=16))
    known = replace(base.card, classes=("cat", "dog", "hamster"))
    store.save(tmp_path / "base", replace(base, card=known))
    wanted = arguments(image_folder, tmp_path, "--arm", "imported")
    assert systems.main(wanted) == 2
    assert "give --imported" in capsys.readouterr().err
    assert systems.main([*wanted, "--imported", str(tmp_path / "base")]) == 0
    found = results_of(tmp_path)
    assert found.keys() == {"imported", "imported-generator"}
    (run,) = (tmp_path / "runs" / "small").glob("imported-generator-*/0")
    (tuned,) = (tmp_path / "runs" / "small").glob("imported-[!g]*/0/checkpoint")
    tuned_card = store.read_card(tuned)
    assert tuned_card.pictures == Preprocessing(size=16)
    assert tuned_card.training["classifier_sha256"] == store.read_card(tmp_path / "base").weights_sha256
    whole = found["imported-generator"]["results"]
    assert whole["options"]["imported"]["imported_sha256"] == tuned_card.training["classifier_sha256"]
    figures = whole["seeds"]["0"]["figures"]["generator"]
    assert figures["classifier_unchanged"] is True
    assert {name: figures[name]["n"] for name in ("clean", "noise", "uniform", "generator")} == dict.fromkeys(
        ("clean", "noise", "uniform", "generator"), 18
    )
    test = data.load(str(image_folder), Preprocessing(size=16), cache=tmp_path).test
    x, labels = test.images.float() / 255, test.labels
    attacked = load_generator(run / "generator")[0](x)
    classifier = store.load(tuned).classifier
    right = [correct(classifier, seen, labels) for seen in (x, attacked)]
    assert [figures[name]["accuracy"] for name in ("clean", "generator")] == [sum(one) / 18 for one in right]
    lost = figures["less_than"]["clean"]
    assert abs(lost["mean"] - (sum(right[1]) - sum(right[0])) / 18) < 1e-9
    assert lost["interval"][0] < lost["mean"] < lost["interval"][1]
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.usefixtures("tiny", "in_process")
def test_failed_training_is_said_with_its_reason(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "small", Scale(**{**vars(TINY), "supervised": {**NET, "batch-size": "1000"}}))
    assert systems.main(arguments(image_folder, tmp_path, "--arm", "natural")) == 2
    assert "batch_size=1000 is over" in capsys.readouterr().err


def test_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert systems.main(["--arm", "magic"]) == 2
    assert "magic" in capsys.readouterr().err


@pytest.mark.parametrize("scale", SCALES)
def test_every_option_of_the_plan_is_one_of_its_command(scale: str) -> None:
    for name, arm in arms(SCALES[scale]).items():
        if not arm.command:
            continue
        options = {**arm.options, "data": "x", "out": "x"}
        if arm.needs is not None:
            options[systems.NAMES_IT.get(arm.command, "encoder")] = "x"
        words = [word for key, value in options.items() for word in ([f"--{key}", value] if value else [f"--{key}"])]
        parse(COMMANDS[arm.command][0], words, program=name)  # which ends the program at an option that is not known


def test_arms_that_are_compared_share_their_schedule() -> None:
    known = arms(SCALES["small"])
    for one, other, differing in (
        ("simclr", "rocl", {"method"}),
        ("simclr", "moco", {"method"}),
        ("simclr-labels", "simclr-top", {"false-negatives"}),
        ("silu", "relu", {"activation"}),
        ("silu", "self-adaptive", {"self-adaptive-from"}),
        ("head-plain", "head-robust", {"adversarial"}),
    ):
        a, b = known[one].options, known[other].options
        assert {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} == differing


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_arm_runs_and_every_system_has_its_row(
    image_folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = Scale(**{**vars(TINY), "head": {**TINY.head, "classifier": str(tiny_folder)}})
    monkeypatch.setitem(SCALES, "small", scale)
    more = ("--jobs", "2", "--imported", str(tiny_folder))
    assert systems.main(arguments(image_folder, tmp_path, *more)) == 0
    assert results_of(tmp_path).keys() == systems_plan.arms(scale).keys()
    table = systems_table.systems_table(tmp_path / "results" / "small")
    assert "not run yet" not in table
    assert len(table.splitlines()) == 2 + len(systems_table.ROWS)


@pytest.mark.usefixtures("tiny")
def test_head_is_known_by_the_weights_before_it_and_by_the_attacks_on_it(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint()
    first = store.save(tmp_path / "base", base)
    head = {**TINY.head, "classifier": str(tmp_path / "base")}
    monkeypatch.setitem(SCALES, "small", Scale(**{**vars(TINY), "head": head}))
    wanted = arguments(image_folder, tmp_path, "--arm", "head-plain")
    campaign = systems.Campaign(parse(systems.PapersConfig, wanted, program="run"))
    campaign._record("head-plain", 0, {"figures": {"harness": {}}})
    trained = campaign.folder("head-plain", 0)
    assert campaign.known("head-plain", 0)
    assert results_of(tmp_path)["head-plain"]["results"]["options"]["head-plain"]["classifier_sha256"] == (
        first.weights_sha256
    )
    with monkeypatch.context() as change:
        change.setattr(systems, "HARNESS_ATTACKS", "noise")
        assert not campaign.known("head-plain", 0)
    for parameter in base.classifier.parameters():
        parameter.data.mul_(2)
    store.save(tmp_path / "base", base)  # as `default` became another network
    assert not campaign.known("head-plain", 0)
    assert campaign.folder("head-plain", 0) != trained


def test_attack_on_what_others_left_has_neither_a_figure_of_its_own_nor_a_place_in_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_by = {"clean": 1, "autoattack": 0, "transfer": 1, "apgd-ce": 0, "bpda-contrastive": 1}
    file = write(tmp_path, "run", record(in_order(broken_by, 4)))
    monkeypatch.setattr(measures, "run_all", lambda config: [file])
    nothing = DataSet("none", *(2 * (Split(torch.zeros(0, 3, 8, 8).byte(), NO),)), (), "")
    run = tmp_path / "head" / "0"
    measured = MEASURES["harness"](Subject(run, run, None, nothing, "cifar10", TINY, torch.device("cpu")))
    assert measured.keys() == {"clean", "autoattack", "transfer", "apgd-ce", "worst_case", "gain", "outcomes"}
    assert measured["worst_case"]["accuracy"] == 0.25
    found = systems_table.Found(tmp_path / "nothing")
    for arm in ("head-plain", "head-robust"):
        found.arms[arm] = {"seeds": {"0": {"figures": {"harness": measured}}}}
    row = systems_table._head(found)
    assert "transfer 50.0 / 50.0, worst case 25.0 / 25.0" in row.measured
    assert "contrastive" not in row.measured + row.shows
    assert row.measured.endswith("; the bare classifier under AutoAttack on the same images 75.0")
    assert row.shows.endswith("over the bare classifier, worst case, with the robust / the plain head -50.0 / -50.0")


def write_log(folder: Path, robust: list[float]) -> None:
    folder.mkdir(parents=True)
    lines = [{"epoch": i + 1, "held_out_pgd_accuracy": value, "seconds": 60.0} for i, value in enumerate(robust)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_overfitting_is_the_best_less_the_last_of_a_smoothed_curve(tmp_path: Path) -> None:
    write_log(tmp_path / "run", [0.1, 0.2, 0.3, 0.4, 0.2, 0.1, 0.0])
    device, nothing = torch.device("cpu"), DataSet("none", *(2 * (Split(torch.zeros(0, 3, 8, 8).byte(), NO),)), (), "")
    subject = Subject(tmp_path, tmp_path / "run", None, nothing, "x", TINY, device)
    found = MEASURES["overfitting"](subject)
    assert abs(found["best"] - 0.3) < 1e-9  # the mean of three epochs
    assert found["best_epoch"] == 4 or found["best_epoch"] == 5
    assert abs(found["gap"] - (0.3 - 0.1)) < 1e-9


class Figures(dict[str, Any]):
    """Any figure that a row asks for: an accuracy that grows with the seed, and with the arm's place in the plan."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __missing__(self, key: str) -> Any:
        nested = key in ("training", "less_than") or key.startswith("bank")
        paired = {"mean": -self.value, "interval": [-0.9, -0.1]}
        return Figures(self.value) if nested else {"accuracy": self.value, "n": 7, **paired}

    def __contains__(self, key: object) -> bool:
        return True


def test_every_system_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = arms(SCALES["small"])
    found = systems_table.Found(tmp_path)
    for place, (name, arm) in enumerate(plan.items()):
        chain, needed = {name: {"command": arm.command, **arm.options}}, arm.needs
        while needed is not None:
            chain = {needed: {"command": plan[needed].command, **plan[needed].options}, **chain}
            needed = plan[needed].needs
        seeds = {
            str(seed): {
                "training": {"seconds": 120.0},
                "figures": {measure: Figures(0.01 * place + 0.001 * seed) for measure in arm.measures},
            }
            for seed in range(arm.seeds)
        }
        found.arms[name] = {"options": chain, "seeds": seeds}
        found.machine[name] = {"device": "cpu", "cpu_threads": 1, "name": ""}
    monkeypatch.setattr(systems_table, "Found", lambda folder: found)
    rows = systems_table.systems_table(tmp_path).splitlines()[2:]
    assert len(rows) == len(systems_table.ROWS)
    assert not [row for row in rows if "not run yet" in row]
    assert all(row.count("|") == 5 for row in rows)
    (row,) = [row for row in rows if row.startswith("| RoCL")]
    assert "3 seeds; 5,000 images, 20 epochs, 2 min; 1 CPU thread" in row
    assert "the direction, not the size" in row
    (row,) = [row for row in rows if row.startswith("| the same on a network")]
    place = list(plan).index("imported-generator")
    assert f"by image (n = 7): -{place}.0 (-90.0 to -10.0)" in row  # the least of five
    for name, commits in {"silu": "aab", "simclr": "aaa", "moco": ("a", "a", "a+changes")}.items():
        for record_of_seed, commit in zip(found.arms[name]["seeds"].values(), commits, strict=True):
            record_of_seed["commit"] = commit
    below = systems_table.systems_table(tmp_path).splitlines()[-1]
    assert below.startswith("Of these arms the seeds were run at several commits")
    assert below.endswith(": `moco`, `silu`.")
    del found.arms["relu"]
    (row,) = [row for row in systems_table.systems_table(tmp_path).splitlines() if "smooth" in row]
    assert row == "| smooth activations | not run yet: relu | | |"


@pytest.mark.parametrize(
    ("first", "second", "least", "expected"),
    [
        ({0: 0.4, 1: 0.41, 2: 0.42}, {0: 0.2, 1: 0.21, 2: 0.21}, 15.0, "shown"),
        ({0: 0.4, 1: 0.41, 2: 0.42}, {0: 0.2, 1: 0.21, 2: 0.21}, 30.0, "the direction, not the size"),
        ({0: 0.5, 1: 0.3, 2: 0.4}, {0: 0.3, 1: 0.35, 2: 0.35}, 0.0, "**not shown**: within the noise"),
        ({0: 0.1, 1: 0.11, 2: 0.1}, {0: 0.3, 1: 0.31, 2: 0.31}, 0.0, "**not shown**: the reverse"),
        ({0: 0.4, 2: 0.42}, {0: 0.2, 1: 0.9, 2: 0.21}, 15.0, "not judged on 2 seeds"),
    ],
)
def test_verdict_asks_for_three_seeds_and_a_difference_above_their_noise(
    first: dict[int, float], second: dict[int, float], least: float, expected: str
) -> None:
    assert systems_table.verdict(systems_table.gain(first, second), least=least) == expected


def test_gain_is_scipys_paired_t_interval() -> None:
    from scipy.stats import ttest_rel

    first, second = {0: 0.4, 1: 0.45, 2: 0.47, 3: 0.4}, {0: 0.2, 1: 0.21, 2: 0.3, 3: 0.22}
    found = systems_table.gain(first, second)
    low, high = ttest_rel([*first.values()], [*second.values()]).confidence_interval(0.95)
    assert abs(found.mean - found.half - 100 * low) < 1e-9
    assert abs(found.mean + found.half - 100 * high) < 1e-9
