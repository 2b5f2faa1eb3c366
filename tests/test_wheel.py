"""The wheel, installed outside the checkout: one name, and every command works in a folder with names like ours."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.support.serving import in_process

ROOT = Path(__file__).parents[1]
SOURCES = ("models", "training", "service", "benchmarks", "unperturb")
JUNK = ("models", "training", "service", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building leaves files beside them."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "source"
    for name in SOURCES:
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", place]
    subprocess.run([*map(str, build), str(copy)], check=True)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are those of the tests, without the checkout."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        "\n".join(site.getsitepackages())
    )  # hooks in .pth files there do not run
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", packages]
    subprocess.run([*map(str, install), str(wheel)], check=True)
    return place / "bin" / "python"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that has folders of our names, which no command may import."""
    for name in JUNK:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the junk {name} was imported')\n")
    return tmp_path


def run(python: Path, folder: Path, *command: str, **more: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_adds_one_name_and_has_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"unperturb"}
    for wanted in (
        "unperturb/py.typed",
        "unperturb/models/pretrained/default/model.safetensors",
        "unperturb/service/assets/page/page.js",
        "unperturb/service/http/routes/classify.py",
        "unperturb/training/supervised/n_fgsm.py",
        "unperturb/benchmarks/reporting/leaderboard.csv",
        "unperturb/benchmarks/robustness/attacks/apgd.py",
    ):
        assert wanted in names, wanted
    assert not [name for name in names if "benchmarks/results/" in name or "__pycache__" in name]


BETWEEN = "\n---\n"
COMMANDS = f"""
import sys
from pathlib import Path

import unperturb

print(unperturb.__file__)

from unperturb.service.cli import main

sample = Path(unperturb.__file__).parent / "service" / "assets" / "sample.png"
for command in (["classify", str(sample)], ["demo", "--out", "demo.png"], ["train", "classifier", "--help"]):
    print(end={BETWEEN!r}, flush=True)  # `train` becomes another program
    sys.argv = ["unperturb", *command]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""  # in one process: half of what a command takes is importing torch


def test_commands_work_in_a_folder_with_names_like_ours(installed: Path, elsewhere: Path) -> None:
    where, classified, _, usage = run(installed, elsewhere, "-c", COMMANDS).split(BETWEEN)
    assert str(installed.parents[1]) in where
    assert "unpurified" in classified
    assert (elsewhere / "demo.png").stat().st_size > 1000
    assert "--data" in usage


def test_training_works_there(installed: Path, elsewhere: Path, image_folder: Path) -> None:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "unperturb.training", "classifier"]
    command = [*start, "--data", str(image_folder), "--out", "run", "--cache", "cache"]
    small = ["--arch", "wide_resnet_10_1", "--epochs", "1", "--batch-size", "12", "--held-out", "9", "--device", "cpu"]
    run(installed, elsewhere, *command, *small, "--attack-steps", "1")
    assert (elsewhere / "run" / "checkpoint" / "card.json").exists()


@pytest.fixture
def server(installed: Path, elsewhere: Path) -> Iterator[str]:
    with in_process("default", elsewhere / "log", {"PYTHONPATH": ""}, python=installed, folder=elsewhere) as running:
        yield running.url


def test_service_with_its_workers_and_decoders_works_there(server: str, installed: Path) -> None:
    sample = next(installed.parents[1].glob("lib/python*/site-packages/unperturb/service/assets/sample.png"))
    with urlopen(
        Request(f"{server}/classify", sample.read_bytes(), {"content-type": "image/png"}), timeout=60
    ) as answer:
        assert b"predictions" in answer.read()


@pytest.mark.slow
def test_ray_data_works_there(installed: Path, elsewhere: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'unperturb[ray]'")
    sample = next(installed.parents[1].glob("lib/python*/site-packages/unperturb/service/assets/sample.png"))
    (elsewhere / "images").mkdir()
    shutil.copy(sample, elsewhere / "images" / "a.png")
    cli = ("-c", "import sys; from unperturb.service.cli import main; sys.argv[0] = 'unperturb'; main()")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    said = run(installed, elsewhere, *cli, "purify", "images", "--out", "out", "--ray", "--device", "cpu", **quiet)
    assert "1 images, 0 failed" in said
