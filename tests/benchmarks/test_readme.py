"""What README.md, docs/ and the other pages say: their tables, commands, code, files and links."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from tests.support.serving import wait_until_ready
from unperturb.benchmarks.reporting import tables
from unperturb.benchmarks.robustness.attacks.scene import Scene
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.checkpoints import store
from unperturb.models.networks.imported import ALLOW
from unperturb.models.purifiers import registry
from unperturb.models.purifiers.defended import DefendedClassifier
from unperturb.service.cli import app
from unperturb.service.http.app import create_app
from unperturb.service.settings import Settings
from unperturb.training.__main__ import COMMANDS
from unperturb.training.supervised.adversarial import SupervisedBatch, smoothed

ROOT = Path(__file__).parents[2]
PAGES = tables.pages()
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
FOLDERS = "service|models|benchmarks|training|tests|docs|deploy"


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(program: str, *, language: str = "sh") -> list[list[str]]:
    """The arguments of every call of `program` in the pages' blocks, each once."""
    found = "\n".join(block for text in TEXTS.values() for block in blocks(language, text))
    lines = dict.fromkeys(found.replace("\\\n", " ").splitlines())
    return [shlex.split(line, comments=True)[len(program.split()) :] for line in lines if line.startswith(program)]


TRAINING = [*commands("unperturb train"), *commands("unperturb train", language="text")]
OTHERS = [arguments for arguments in commands("unperturb") if arguments[0] != "train"]


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return tables.all_tables()


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_those_of_the_result_files(page: str, made: dict[str, str]) -> None:
    assert tables.render(TEXTS[page], made) == TEXTS[page]


def test_every_table_has_a_page(made: dict[str, str]) -> None:
    assert set(made) == {name for text in TEXTS.values() for name in tables.places(text)}


def test_settings_table_has_every_setting(made: dict[str, str]) -> None:
    named = re.findall(r"^\| `UNPERTURB_(\w+)` \| .+ \| .+ \|$", made["settings"], re.MULTILINE)
    assert [name.lower() for name in named] == list(Settings.model_fields)


def test_the_readme_is_a_page() -> None:
    assert TEXTS["README.md"].count("\n") <= 160


def test_curl_example_shows_what_the_service_answers() -> None:
    (block,) = (block for text in TEXTS.values() for block in blocks("console", text))
    shown = json.loads(block.partition("\n")[2])
    with TestClient(create_app(Settings(device="cpu", threads=1, max_batch=2))) as client:
        wait_until_ready(client)
        sample = (ROOT / "service" / "assets" / "sample.png").read_bytes()
        answer = client.post("/classify?top_k=2", files={"image": sample}).json()
    assert shown["model"] == answer["model"]
    assert shown["input"] == answer["input"]
    assert [p["label"] for p in shown["predictions"]] == [p["label"] for p in answer["predictions"]]
    for ours, theirs in zip(shown["predictions"], answer["predictions"], strict=True):
        assert abs(ours["score"] - theirs["score"]) < 0.01
    assert shown["purification"].keys() == answer["purification"].keys()
    assert shown["timings_ms"].keys() == answer["timings_ms"].keys()


@pytest.mark.parametrize("arguments", OTHERS, ids=" ".join)
def test_command_line_examples_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "service").symlink_to(ROOT / "service")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("arguments", TRAINING, ids=" ".join)
def test_training_examples_have_options_that_exist(arguments: list[str]) -> None:
    config, _ = COMMANDS[arguments[0]]
    names = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config)}
    assert {a for a in arguments if a.startswith("--")} <= names


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if blocks("python", text)])
def test_python_examples_run(page: str) -> None:
    torch.manual_seed(0)
    names = {"__name__": page}  # a block goes on from those before it
    for block in blocks("python", TEXTS[page]):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_it_names_exist(page: str) -> None:
    for path in re.findall(rf"[` ]((?:{FOLDERS})/[\w./-]+\w)", TEXTS[page]):
        if path not in EXAMPLES:
            assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page]):
        assert (ROOT / page).parent.joinpath(path).is_file(), path


REFUSED = [
    [cell.strip() for cell in row.strip("| ").split(" | ")]
    for row in TEXTS["docs/importing.md"].partition("## What is refused")[2].splitlines()[4:]
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_refusal_is_one_that_the_test_named_beside_it_looks_for(place: int) -> None:
    _, answer, _ = REFUSED[place]
    named = next(test for *_, test in reversed(REFUSED[: place + 1]) if test != "same").strip("`")
    file, _, function = named.partition("::")
    source = (ROOT / file).read_text().replace("{ALLOW}", ALLOW)
    assert f"def {function}(" in source
    strings = re.findall(r'"([^"\n]+)"', source)
    looked_for = {part.strip() for text in strings for part in re.split(r"\.\*|\|", text.replace("\\", ""))}
    assert [part for part in looked_for if len(part) >= 7 and re.search("[ =]", part) and part in answer], answer


@pytest.mark.parametrize("page", TEXTS)
def test_tests_that_it_names_exist(page: str) -> None:
    for file, function in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXTS[page]):
        assert not function or f"def {function}(" in (ROOT / file).read_text(), function


EXAMPLES = ("models/purifiers/sharpen.py", "benchmarks/load.py")  # what a newcomer writes; where a script was


def recipe(number: int) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(blocks("python", TEXTS["CONTRIBUTING.md"])[number], "CONTRIBUTING.md", "exec"), names)
    return names


def test_recipe_of_a_purifier_works_from_its_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    names = recipe(0)
    monkeypatch.setitem(registry.REGISTRY, "sharpen", registry._rival(names["Sharpen"], "sharpen", names["LOOP"]))
    purifier = registry.build_purifier("sharpen:steps=2", store.load("small"))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    purified = purifier(images, seeds=torch.arange(2))
    assert purified.trace.losses.shape == (2, 2)
    assert (purified.trace.loss_after < purified.trace.loss_before).all()


def test_recipe_of_an_attack_stays_in_the_ball() -> None:
    classifier = store.load("small").classifier
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scene = Scene(
        x=images,
        labels=torch.zeros(2, dtype=torch.int64),
        defended=DefendedClassifier(classifier, registry.build_purifier("none", store.load("small"))),
        threat=Threat(norm="linf", epsilon=8 / 255),
        budget=BUDGETS["fast"],
        seeds=torch.arange(2),
    )
    attacked = recipe(1)["brighter"](scene)
    assert (attacked - images).abs().max() <= 8 / 255 + 1e-6
    assert attacked.max() <= 1


def test_recipe_of_a_training_method_has_a_gradient() -> None:
    method, classifier = recipe(2)["noise"], store.load("small").classifier.requires_grad_(True)
    batch = SupervisedBatch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2), torch.arange(2))
    attack = ProjectedGradient(direction="ascend", epsilon=8 / 255, step_size=2 / 255, steps=1)
    crafted = method.craft(classifier, batch, attack)
    method.loss(classifier, batch, crafted, smoothed(batch.labels, 0.1), 1.0).loss.backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
