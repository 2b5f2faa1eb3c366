import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import make_checkpoint, make_config
from tests.support.training import classifier_arguments
from unperturb.benchmarks.purifier import points, preset_sweep, purification, purify_speed, worst_case_sweep
from unperturb.benchmarks.purifier.published_procedure import PublishedProcedure
from unperturb.benchmarks.reporting import purifier_tables, results, speed_tables
from unperturb.models.checkpoints import store
from unperturb.models.inference.folding import prepared
from unperturb.models.pixels import Preprocessing
from unperturb.models.purifiers import registry
from unperturb.models.purifiers.defended import presets_of
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.models.purifiers.vote import Vote
from unperturb.training import data
from unperturb.training.__main__ import main as train


def test_gain_is_the_paired_difference_with_its_interval() -> None:
    after, before = [True, True, False, True], [True, False, False, False]
    found = results.gain(after, before)
    assert found["mean"] == 0.5
    gained, lost = 2.5 / 6, 0.5 / 6  # Agresti and Min 2005
    half = 1.959963984540054 * ((gained + lost - (gained - lost) ** 2) / 6) ** 0.5
    assert found["interval"] == pytest.approx([gained - lost - half, gained - lost + half])


def test_four_pairs_that_all_differ_one_way_are_no_proof() -> None:
    assert results.gain([True] * 1000, [False] * 4 + [True] * 996)["interval"][0] < 0
    assert results.gain([True] * 1000, [False] * 8 + [True] * 992)["interval"][0] > 0


def test_gain_of_means_is_the_normal_interval() -> None:
    difference = torch.tensor([0.5, 0.0, -0.25])
    found = results.gain([0.5, 0.0, 0.25], [0.0, 0.0, 0.5])
    half = 1.959963984540054 * difference.std().item() / 3**0.5
    assert found["interval"] == pytest.approx([difference.mean().item() - half, difference.mean().item() + half])


def test_purification_figures_come_from_the_checkpoint_and_are_written_whole(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "checkpoint", tmp_path / "out.json"
    store.save(folder, make_checkpoint())
    presets = dict.fromkeys(PRESETS, PRESETS["default"])  # 40 steps are for no test
    monkeypatch.setattr(purification, "PRESETS", presets)
    arguments = [
        "--data",
        str(image_folder),
        "--checkpoint",
        str(folder),
        "--n",
        "12",
        "--adaptive-n",
        "6",
        "--steps",
        "2",
        "--timed",
        "4",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--cache",
        str(tmp_path),
        "--write-card",
    ]
    assert purification.main(arguments) == 0
    record = json.loads(out.read_text())
    assert record["schema_version"] == results.SCHEMA_VERSION
    assert record["config"]["seed"] == 0
    accuracy = record["results"]["accuracy"]
    assert set(accuracy) == {"classifier", *presets_of(make_checkpoint().card)}
    for cells in accuracy.values():
        for name in ("clean", "attacked", "noise"):
            low, high = cells[name]["interval"]
            assert cells[name]["n"] == 12
            assert low <= cells[name]["accuracy"] <= high
    assert accuracy["default"]["clean"] == accuracy["published"]["clean"]  # the same parameters, images and seed
    assert accuracy["default"]["adaptive_bpda"]["n"] == 6
    timed = record["results"]["time"]
    assert timed["times_faster_than_published_procedure"]["default"] > 0
    assert store.load(folder).card.figures["purification"] == accuracy
    for table in (purifier_tables.purification_table(record), purifier_tables.time_table(record)):
        assert table.count("\n") >= 4
    assert purification.main([*arguments, "--presets", "default,vote"]) == 0
    few = json.loads(out.read_text())["results"]
    assert list(few["accuracy"]) == ["classifier", "default", "vote"]
    assert "published" not in few["time"]["ms_per_image"]


def test_sweep_measures_on_images_that_training_kept_back(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(classifier_arguments(image_folder, tmp_path / "run", "--epochs", "1")) == 0
    made, tiny = store.load(tmp_path / "run" / "checkpoint"), make_checkpoint()
    assert made.classifier.feature_dim == tiny.classifier.feature_dim
    card = dataclasses.replace(made.card, head=tiny.card.head, restorer=tiny.card.restorer)
    whole = dataclasses.replace(tiny, card=card, classifier=made.classifier)
    store.save(tmp_path / "head", whole)
    few = dict(list(preset_sweep.candidates().items())[:2])
    monkeypatch.setattr(preset_sweep, "candidates", lambda: few)
    out = tmp_path / "sweep.json"
    arguments = [
        "--data",
        str(image_folder),
        "--checkpoint",
        str(tmp_path / "head"),
        "--device",
        "cpu",
        "--out",
        str(out),
        "--cache",
        str(tmp_path),
    ]
    assert preset_sweep.main(arguments) == 0
    record = json.loads(out.read_text())
    assert record["results"]["rows"]["base"]["clean"]["n"] == 9  # what the run held out
    assert purifier_tables.sweep_table(record).count("\n") == 4
    monkeypatch.setattr(preset_sweep, "restored_candidates", lambda: {"default": PRESETS["default"]})
    assert preset_sweep.main([*arguments, "--restored"]) == 0
    rows = json.loads(out.read_text())["results"]["rows"]
    assert rows.keys() == {"no purifier", "restored view itself", "default"}
    assert rows["restored view itself"]["attacked"]["n"] == 9
    judged_by_their_worst_case(arguments, out, monkeypatch)
    store.save(tmp_path / "head", dataclasses.replace(whole, restorer=None))
    assert preset_sweep.main([*arguments, "--restored"]) == 2
    assert "has no purifier; train one: unperturb train purifier" in capsys.readouterr().err


def test_purified_images_are_judged_by_the_whole_defense_its_vote_among_it(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    defended = registry.build_defense("vote:shifts=4", make_checkpoint())
    monkeypatch.setattr(Vote, "scores", lambda vote, classifier, x: -classifier(x))
    labels = (-defended.classifier(images)).argmax(1)
    rows = points.purify_all(defended, images, labels, seed=0, batch=4, name="vote")
    assert rows.correct == [True] * len(images)


def judged_by_their_worst_case(arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {title: worst_case_sweep.STEPS[title] for title in ("the vote alone", "1 soft step of 2/255")}
    monkeypatch.setitem(worst_case_sweep.SWEEPS, "steps", few)
    given = [*arguments, "--sweep", "steps", "--iterations", "2", "--store", str(out.parent / "units")]
    assert worst_case_sweep.main(given) == 0
    record = json.loads(out.read_text())
    rows = record["results"]["rows"]
    assert rows.keys() == {"none", *few}
    for title in few:
        assert rows[title]["worst"]["accuracy"] <= rows[title]["clean"]["accuracy"]
        difference = rows[title]["worst"]["accuracy"] - rows["none"]["worst"]["accuracy"]
        assert rows[title]["worst"]["gain"]["mean"] == pytest.approx(difference)
        assert rows[title]["worst"]["gain"]["n"] == rows["none"]["clean"]["n"] == 9
    table = purifier_tables.worst_case_sweep_table(record).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == ["no purifier", *few]
    unknown = {title: worst_case_sweep.TRANSFER[title] for title in ("the vote alone", "1 sign step of 6/255, vote")}
    monkeypatch.setitem(worst_case_sweep.SWEEPS, "transfer", unknown)
    assert worst_case_sweep.main(["transfer" if word == "steps" else word for word in given]) == 0
    record = json.loads(out.read_text())
    table = purifier_tables.worst_case_sweep_table(record).splitlines()
    assert {line.count("|") for line in table} == {5}  # no column of a worst case that was not looked for
    for title in unknown:
        row = record["results"]["rows"][title]
        assert row["transfer"]["accuracy"] == row["worst"]["accuracy"]


SWEPT = [spec for candidates in worst_case_sweep.SWEEPS.values() for spec in candidates.values()]


@pytest.mark.parametrize("spec", SWEPT)
def test_every_candidate_of_the_sweeps_can_be_built(spec: str) -> None:
    defended = registry.build_defense(spec, make_checkpoint())
    loop = defended.purifier.loop
    assert (loop.steps == 0) == (not spec.startswith("reverse-attack"))
    if spec not in worst_case_sweep.TRANSFER.values():
        assert loop.steps * loop.step_size <= loop.epsilon + 1e-9


@pytest.mark.parametrize(
    "bad",
    [
        ["--n", "0"],
        ["--timed", "1"],
        ["--checkpoint", "no/such"],
        ["--data", "nowhere"],
        ["--presets", "default,restorer"],  # which it has not
        ["--presets", "vote"],  # not without --adaptive-n 0
    ],
)
def test_bad_argument_is_refused(bad: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "nowhere", "--checkpoint", str(tiny_folder), "--device", "cpu", *bad]
    assert purification.main(arguments) == 2
    assert bad[1] in capsys.readouterr().err


def test_published_procedure_depends_on_the_batchmates_as_the_reverse_attack_does_not(images: torch.Tensor) -> None:
    procedure = PublishedProcedure(make_checkpoint(), steps=3, epsilon=8 / 255)
    torch.manual_seed(0)
    first = procedure(images[:4])
    torch.manual_seed(0)
    other = procedure(torch.cat((images[:1], images[5:])))
    assert ((first - images[:4]).abs() <= 8 / 255 + 1e-6).all()
    assert not torch.allclose(first[0], other[0])


def test_speed_of_every_way_is_measured_beside_the_published_procedure(
    tiny_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purify_speed, "PRESETS", {name: PRESETS["default"] for name in ("default", "published")})
    monkeypatch.setitem(purify_speed.MATRIX, "cpu", 64)
    out = tmp_path / "speed.json"
    arguments = [
        "--checkpoint",
        str(tiny_folder),
        "--batch",
        "1",
        "--batch",
        "3",
        "--steps",
        "2",
        "--views",
        "3",
        "--blocks",
        "2",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert purify_speed.main(arguments) == 0
    found = json.loads(out.read_text())["results"]
    assert found["batches"].keys() == {"1", "3"}
    for cells in found["batches"].values():
        assert cells.keys() == {"published procedure", "eager", "preset default", "preset published"}
        assert cells["preset default"]["way"] == "eager"
        assert cells["published procedure"]["times_published_procedure"] == 1
        assert len(cells["eager"]["seconds"]) == 2
    three = found["batches"]["3"]["eager"]
    assert three["passes_per_s"] == pytest.approx(three["images_per_s"] * 2 * 3)
    # of one step of one view: forward and the input's gradient, which is as much again
    loaded = store.load(tiny_folder)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loaded.classifier.features(torch.rand(1, 3, 32, 32))
    per_pass = three["flop_per_s"] / three["passes_per_s"]
    assert 1.7 < per_pass / counter.get_total_flops() < 2.4
    record = json.loads(out.read_text())
    table = speed_tables.speed_table(record)
    assert table.splitlines()[2].startswith("| published procedure | 2 x 3 |")
    assert f"{three['images_per_s']:.1f}/s, {three['times_published_procedure']:.1f}x" in table


def test_speed_of_an_architecture_is_measured_from_a_single_image_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purify_speed, "PRESETS", {name: make_config(steps=1) for name in ("default", "published")})
    monkeypatch.setitem(purify_speed.MATRIX, "cpu", 64)
    out = tmp_path / "speed.json"
    arguments = [
        "--arch",
        "wide_resnet_10_1",
        "--batch",
        "1",
        "--steps",
        "2",
        "--blocks",
        "1",
        "--device",
        "cpu",
        "--precision",
        "bfloat16",
        "--out",
        str(out),
    ]
    assert purify_speed.main(arguments) == 0
    assert json.loads(out.read_text())["results"]["batches"]["1"].keys() >= {"published procedure", "eager, bfloat16"}
    config = purify_speed.SpeedConfig(arch="wide_resnet_10_1", device="cpu")
    made = purify_speed.subject(config)
    assert made.head is not None
    assert not any(module.training for part in (made.classifier, made.head) for module in part.modules())


def test_random_weights_whose_speed_is_measured_are_those_of_the_seed() -> None:
    weights = [
        purify_speed.subject(purify_speed.SpeedConfig(arch="wide_resnet_10_1", seed=seed, device="cpu")).bank
        for seed in (0, 0, 1)
    ]
    one, same, other = (bank.embeddings for bank in weights if bank is not None)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_ways_are_compared_by_label(tiny_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    settings = {"checkpoint": str(tiny_folder), "data": str(image_folder), "n": 10, "steps": 2, "cache": tmp_path}
    config = purify_speed.SpeedConfig(device="cpu", **settings)  # type: ignore[arg-type]
    ways = purify_speed.Ways(config, store.load(tiny_folder))
    ways.add("captured", "float32", prepared(store.load(tiny_folder)), "captured")
    dataset = data.load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    found = purify_speed.agreement(config, ways, dataset)["captured"]
    assert found == {"n": 10, "same_label": 1.0, "largest_margin_of_the_differing": None}
    ways.ways["captured"].ready.classifier.get_submodule("linear").weight.data.neg_()  # type: ignore[operator]
    found = purify_speed.agreement(config, ways, dataset)["captured"]
    assert found["same_label"] < 1
    assert found["largest_margin_of_the_differing"] > 0


@pytest.mark.parametrize(
    "bad", [["--batch", "0"], ["--views", "1"], ["--checkpoint", "no/such"], ["--data", "nowhere"]]
)
def test_bad_argument_of_the_speed_is_refused(
    bad: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert purify_speed.main(["--checkpoint", str(tiny_folder), "--device", "cpu", *bad]) == 2
    assert bad[0].strip("-") in capsys.readouterr().err
