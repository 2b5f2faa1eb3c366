import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.conftest import CLASSES
from tests.support.harness import arguments, records
from unperturb.benchmarks import robustbench_eval
from unperturb.benchmarks.reporting import report
from unperturb.benchmarks.reporting.results import FOLDER
from unperturb.benchmarks.reporting.rows import load_runs, published_rows
from unperturb.benchmarks.robustness.data import load_images
from unperturb.benchmarks.robustness.evaluation import Evaluation
from unperturb.benchmarks.robustness.workers import share
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import DataError, UnperturbError
from unperturb.models.networks import generator
from unperturb.models.networks.benchmark_classes import wordnet_ids
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.generator import GeneratorCard, NoiseGenerator
from unperturb.models.networks.registry import build
from unperturb.models.pixels import Preprocessing

SCRIPT = Path(robustbench_eval.__file__)


QUICK = ("--attacks", "noise,apgd-ce,bpda-apgd-ce", "--purifier", "none", "--purifier", "reverse-attack:steps=2")


class QuickRun(NamedTuple):
    folder: Path
    said: str


@pytest.fixture(scope="module")
def quick_run(tiny_folder: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    """The run of QUICK, whole and by one process."""
    folder = tmp_path_factory.mktemp("quick") / "out"
    with redirect_stdout(io.StringIO()) as said:
        assert robustbench_eval.main(arguments(tiny_folder, image_folder, folder, *QUICK)) == 0
    return QuickRun(folder, said.getvalue())


def test_each_model_and_purifier_is_one_result_file_with_what_made_it(quick_run: QuickRun, tiny_folder: Path) -> None:
    found = records(quick_run.folder)
    assert len(found) == 2
    assert "at most" in quick_run.said
    assert quick_run.said.count("worst case") == 2
    for record in found.values():
        results = record["results"]
        assert record["config"]["seed"] == 0
        data = {"dataset": "colours", "source": "folder", "sha256": results["data"]["sha256"], "own": True}
        assert results["data"] == data
        assert results["classes"] == list(CLASSES)
        for name, attack in results["figures"]["attacks"].items():
            outcomes = results["outcomes"][name]
            assert (attack["attacked"], attack["broken"]) == (8 - outcomes.count(None), outcomes.count(0))
            cell = attack["left"]
            assert cell["n"] == 8
            assert cell["interval"][0] <= cell["accuracy"] <= cell["interval"][1]
        assert results["indices"] == list(range(8))
        assert len(results["panel"]) == 4
    none, purified = (
        next(record for name, record in found.items() if kind in name)["results"] for kind in ("_none_", "_reverse")
    )
    assert none["figures"]["gain"] is None
    assert purified["bare_outcomes"] == none["outcomes"]
    assert purified["figures"]["gain"]["n"] == 8
    assert str(quick_run.folder.parent) not in json.dumps(found)
    assert str(tiny_folder) not in json.dumps(found)


def test_label_free_attacks_and_a_generator_are_run_by_name(
    tiny_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = GeneratorCard(id="g", epsilon=8 / 255, width=8, classifier_sha256=("", ""))
    generator.save(tmp_path / "g", NoiseGenerator(width=8, epsilon=8 / 255), card)
    named = ("--attacks", "instance-cos,instance-sim,generator", "--purifier", "reverse-attack:steps=2")
    with_it = arguments(tiny_folder, image_folder, tmp_path / "out", *named, "--generator", str(tmp_path / "g"))
    assert robustbench_eval.main(with_it) == 0
    (record,) = records(tmp_path / "out").values()
    assert {"instance-cos", "instance-sim", "generator"} <= record["results"]["outcomes"].keys()
    assert str(tmp_path) not in json.dumps(record)
    assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "out", *named)) == 2
    assert "--generator FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("times", "attacks"),
    [
        (1, "noise,apgd-ce,bpda-apgd-ce,intermediate"),
        pytest.param(
            10, "noise,apgd-ce,bpda-apgd-ce,bpda-apgd-dlr,intermediate,apgd-t,rays", marks=pytest.mark.slow, id="often"
        ),
    ],
)
def test_killed_at_random_moments_it_ends_with_the_same_files(
    tiny_folder: Path, image_folder: Path, tmp_path: Path, times: int, attacks: str
) -> None:
    more = ("--attacks", attacks, "--purifier", "reverse-attack")
    assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "undisturbed", *more)) == 0
    command = [sys.executable, str(SCRIPT), *arguments(tiny_folder, image_folder, tmp_path / "killed", *more)]
    chance, kills = random.Random(0), 0
    while kills < times:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "killed").rglob("*.npz")))
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:  # a kill counts once there is something to lose
            if len(list((tmp_path / "killed").rglob("*.npz"))) > before:
                break
            time.sleep(0.05)
        time.sleep(chance.random() * 0.3)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= times / 2
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert records(tmp_path / "killed") == records(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (["--epsilon", "8"], "8/255"),
        (["--model", "no/such"], "no/such"),
        (["--purifier", "bleach"], "bleach"),
        (["--purifier", "reverse-attack:speed=9"], "speed"),
        (["--purifier", "hedge:steps=many"], "steps"),
        (["--attacks", "magic"], "magic"),
        (["--n-examples", "99"], "99"),
        (["--n-examples", "0"], "n_examples"),
        (["--data", "nowhere"], "nowhere"),
        (["--shard", "4/3"], "4/3"),
        (["--device", "abacus"], "abacus"),
        (["--epsilon", "1"], "8/255"),
        (["--dataset", "cifar100", "--model", "robustbench:Wong2020Fast:cifar10:Linf"], "another data set"),
        (["--dataset", "cifar10"], "classes are blue, green, red, cifar10's 10 airplane"),
        (["--dataset", "cifar100"], "classes are blue, green, red, cifar100's 100 apple"),
        (["--model", "no_such_module:factory"], "no_such_module"),
        (["--model", "collections:OrderedDict"], "not a torch.nn.Module"),
        (["--purifier", "no_such_module:Class"], "no_such_module"),
        (["--purifier", "collections:NoSuchClass"], "NoSuchClass"),
        (["--purifier", "collections:OrderedDict"], "is no purifier"),
        (["--purifier", "fractions:Fraction:bad=1"], "bad"),
        (["--purifier", "vote:shifts=far"], "far"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "cuda:0", "--workers", "2"], "workers=2"),
        (["--workers", "0"], "workers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_argument_is_refused_before_any_compute(
    bad: list[str], says: str, tiny_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "out", *bad)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_are_merged_by_the_report(
    quick_run: QuickRun, tiny_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    for shard in ("1/2", "2/2"):
        more = (*QUICK, "--shard", shard)
        assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "parts", *more)) == 0
    whole, parts = load_runs(quick_run.folder), load_runs(tmp_path / "parts")
    assert [run["results"]["figures"] for run in whole] == [run["results"]["figures"] for run in parts]
    next((tmp_path / "parts").glob("*.shard-2-of-2.json")).unlink()
    with pytest.raises(DataError, match="shard"):
        load_runs(tmp_path / "parts")


def test_workers_share_a_run(
    quick_run: QuickRun, tiny_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    monkeypatch.setattr(Evaluation, "_run", lambda *_: computed.append("by the parent"))
    assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "two", *QUICK, "--workers", "2")) == 0
    assert not computed
    one, two = load_runs(quick_run.folder), load_runs(tmp_path / "two")
    assert [run["results"]["figures"] for run in one] == [run["results"]["figures"] for run in two]
    assert len(list((tmp_path / "two").glob("*.json"))) == len(two)


def _failing(settings: str, number: int) -> None:
    if number:
        raise OSError(settings)
    time.sleep(600)


def test_failed_worker_ends_the_others_and_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnperturbError, match="a worker ended with status 1"):
        share(_failing, "no space left", 2)
    assert "no space left" in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_processes_of_torchrun_are_shards(
    tiny_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--attacks", "noise", "--purifier", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "out", *more)) == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")  # two chunks leave the third process nothing to do
    assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "out", *more)) == 0
    (run,) = load_runs(tmp_path / "out")
    assert run["results"]["indices"] == list(range(8))


def test_report_is_whole_and_marks_published_rows(
    quick_run: QuickRun,
    tiny_folder: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(quick_run.folder, tmp_path / "out")  # of 8/255
    more = (*QUICK, "--epsilon", "4/255")
    assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "out", *more)) == 0
    assert report.main([str(tmp_path / "out"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("| measured") == 4
    assert "Bartoldson2024" not in text  # images of one's own stand beside no published figure
    page = (tmp_path / "report" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert page.count("data:image/png") >= 5
    assert (tmp_path / "report" / "accuracy-against-perturbation-size.png").is_file()
    assert report.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2
    assert "nothing" in capsys.readouterr().err


def name_of(described: dict[str, Any], **settings: Any) -> str:
    config = robustbench_eval.EvaluationConfig(**settings)
    plan = config._plan(None)
    if settings.get("generator"):
        plan = replace(plan, generator=NoiseGenerator(width=8, epsilon=float(str(settings["generator"]))))
    return robustbench_eval.result_name(config, plan, described, "none")


def test_what_changes_outcomes_changes_a_files_name() -> None:
    def of_data(own: bool, sha256: str) -> dict[str, Any]:
        return {"model": {"spec": "tiny"}, "data": {"own": own, "sha256": sha256}}

    usual = name_of(of_data(False, "one"))
    assert usual == "tiny_none_cifar10_Linf-8of255_n1000_standard_seed0.json" == name_of(of_data(False, "other"))
    assert name_of(of_data(False, "one"), threat_model="L2") == "tiny_none_cifar10_L2-0.5_n1000_standard_seed0.json"
    generated = {"attacks": "generator"}
    names = [
        usual,
        name_of(of_data(True, "one")),
        name_of(of_data(True, "other")),
        name_of(of_data(False, "one"), chunk=64),
        name_of(of_data(False, "one"), image_size=64),
        *(name_of(of_data(False, "one"), **generated, generator=Path(epsilon)) for epsilon in ("0.1", "0.2")),
    ]
    assert len(set(names)) == len(names)
    one, other = (name_of(of_data(True, "one"), chunk=64, shard=shard) for shard in ("1/2", "2/2"))
    assert one.partition(".shard-")[0] == other.partition(".shard-")[0]


RECORDS = [  # but one that is older than `transfer-further`, which its attacks now bring with them
    file for file in sorted((FOLDER / "robustness").glob("*.json")) if "280359addcb4" not in file.name
]


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_files_that_are_there_keep_their_names(file: Path) -> None:
    made = json.loads(file.read_text())
    settings = {**made["config"], "model": (made["config"]["model"],), "purifier": (made["config"]["purifier"],)}
    config = robustbench_eval.EvaluationConfig(**settings)
    name = robustbench_eval.result_name(config, config._plan(None), made["results"], made["config"]["purifier"])
    assert name == file.name


def test_published_rows_are_those_of_the_same_threat() -> None:
    assert {row.measured for row in published_rows(("cifar10", "Linf", 8 / 255))} == {False}
    assert not published_rows(("cifar10", "Linf", 2 / 255))
    assert len(published_rows(("imagenet", "Linf", 4 / 255))) > 5
    assert len(published_rows(("cifar10", "L2", 0.5))) > 5


def test_imagenet_images_and_class_order_work_end_to_end(tmp_path: Path) -> None:
    ids = wordnet_ids()
    assert ids[0] == "n01440764"  # tench
    assert ids[207] == "n02099601"  # golden retriever
    torch.manual_seed(0)
    architecture = Architecture(name="resnet18", num_classes=1000, image_size=224)
    subject = Checkpoint(
        Card(id="random", architecture=architecture, classes=ids, data={}, training={"by": "nobody"}),
        build(architecture),
    )
    store.save(tmp_path / "model", subject)
    folder = tmp_path / "val"
    generator = np.random.default_rng(0)
    from PIL import Image

    for name in (ids[207], ids[3]):  # a partial folder: a class is its WordNet id's, not its rank among folders
        (folder / name).mkdir(parents=True)
        Image.fromarray(generator.integers(0, 255, (240, 300, 3), dtype=np.uint8)).save(folder / name / "a.png")
    data = load_images("imagenet", folder, n=2, how=Preprocessing(size=224), classes=ids, cache=tmp_path / "cache")
    assert sorted(data.labels.tolist()) == [3, 207]
    more = [
        "--model",
        str(tmp_path / "model"),
        "--dataset",
        "imagenet",
        "--epsilon",
        "4/255",
        "--data",
        str(folder),
        "--n-examples",
        "2",
        "--budget",
        "fast",
        "--attacks",
        "noise,bpda-apgd-ce",
        "--purifier",
        "hedge:steps=1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
    ]
    assert robustbench_eval.main(more) == 0
    (record,) = records(tmp_path / "out").values()
    assert record["results"]["figures"]["worst_case"]["n"] == 2
