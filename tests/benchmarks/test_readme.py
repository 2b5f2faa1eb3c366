"""What the README says: its tables, its commands, its code."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from tests.support.serving import wait_until_ready
from unperturb.benchmarks.reporting import tables as readme
from unperturb.service.cli import app
from unperturb.service.http.app import create_app
from unperturb.service.settings import Settings
from unperturb.training.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[len(program.split()) :] for line in lines if line.startswith(program)]


def test_tables_are_those_of_the_result_files() -> None:
    assert readme.render(README) == README


def test_curl_example_shows_what_the_service_answers() -> None:
    (block,) = blocks("console")
    shown = json.loads(block.partition("\n")[2])
    with TestClient(create_app(Settings(device="cpu", threads=1, max_batch=2))) as client:
        wait_until_ready(client)
        sample = (ROOT / "service" / "assets" / "sample.png").read_bytes()
        answer = client.post("/classify?top_k=3", files={"image": sample}).json()
    assert shown["model"] == answer["model"]
    assert shown["input"] == answer["input"]
    assert [p["label"] for p in shown["predictions"]] == [p["label"] for p in answer["predictions"]]
    for ours, theirs in zip(shown["predictions"], answer["predictions"], strict=True):
        assert abs(ours["score"] - theirs["score"]) < 0.01
    assert shown["purification"].keys() == answer["purification"].keys()
    assert shown["timings_ms"].keys() == answer["timings_ms"].keys()


@pytest.mark.parametrize("arguments", commands("unperturb"), ids=" ".join)
def test_command_line_examples_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "service").symlink_to(ROOT / "service")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("arguments", commands("python -m training"), ids=" ".join)
def test_training_examples_have_options_that_exist(arguments: list[str]) -> None:
    config, _ = COMMANDS[arguments[0]]
    names = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config)}
    assert {a for a in arguments if a.startswith("--")} <= names


def test_python_examples_run() -> None:
    torch.manual_seed(0)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_files_that_it_names_exist() -> None:
    for path in re.findall(r"`((?:service|models|benchmarks|training)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path
