"""Every script of benchmarks/ from the command line: what is refused, and how."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from unperturb.benchmarks.command import BenchmarkConfig, run_command

BAD = {
    "robustbench_eval": ["--n-examples", "0"],
    "assess": ["default", "--data", "x", "--images", "-1"],
    "training_speed": ["--data", "x", "--before", "HEAD", "--rounds", "0"],
    "papers.run": ["--seeds", "0"],
    "purifier.picture": ["--data", "x", "--n", "0"],
    "purifier.preset_sweep": ["--data", "x", "--n", "0"],
    "purifier.purification": ["--data", "x", "--steps", "0"],
    "purifier.purify_speed": ["--blocks", "0"],
    "purifier.worst_case_sweep": ["--data", "x", "--iterations", "0"],
    "purifier.samples": ["--data", "x", "--n", "-1"],
    "serving.bulk_memory": ["--n", "0"],
    "serving.faults": ["--files", "0"],
    "serving.http_cost": ["--turns", "0"],
    "serving.request_cpu": ["--turns", "0"],
    "serving.load": ["--seconds", "0"],
    "serving.shares": ["--rounds", "0"],
    "serving.side_by_side": ["--rounds", "0"],
    "serving.dashboard_queries": ["--seconds", "1"],
}


def module(name: str) -> Any:
    return import_module(f"unperturb.benchmarks.{name}")


def test_every_script_is_here() -> None:
    root = Path(module("command").__file__).parent
    found = {
        ".".join(file.relative_to(root).with_suffix("").parts)
        for file in root.rglob("*.py")
        if "run_command(" in file.read_text() and file.name != "command.py"
    }
    assert found == set(BAD)


@pytest.mark.parametrize("name", BAD)
def test_help_ends_well_and_an_unknown_option_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--help"], 0), ([*BAD[name], "--surprise", "1"], 2)):
        with pytest.raises(SystemExit) as stopped:
            module(name).main(arguments)
        assert stopped.value.code == status
    said = capsys.readouterr()
    assert module(name).SCRIPT in said.out
    assert "surprise" in said.err


@pytest.mark.parametrize(("name", "arguments"), BAD.items(), ids=list(BAD))
def test_bad_value_is_one_line_that_quotes_it(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert module(name).main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    option, value = arguments[-2:]
    assert line.startswith(f"{module(name).SCRIPT}: ")
    assert f"{option.removeprefix('--').replace('-', '_')}={value}" in line


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "nowhere"), 2, "nowhere: No such file or directory; look"),
        (OSError(28, "No space left on device"), 2, "No space left on device; free"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(config: BenchmarkConfig) -> None:
        raise error

    assert run_command(BenchmarkConfig, measure, script="script.py", arguments=[]) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"script.py: {said}")


def test_folder_in_a_files_place_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module("serving.load").main(["--out", str(tmp_path)]) == 2
    assert f"out={tmp_path} is a folder; name a file, such as {tmp_path / 'load.json'}" in capsys.readouterr().err


def test_plot_and_tables_that_cannot_be_made_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, payload: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    curves, tables = module("reporting.learning_curves"), module("reporting.tables")
    monkeypatch.setattr(curves, "LOGS", tmp_path)
    assert curves.main() == 2
    assert capsys.readouterr().err == f"learning_curves.py: {tmp_path} holds no log (*.jsonl) of a training run\n"
    page = tmp_path / "page.md"
    page.write_text("")
    monkeypatch.setattr(tables, "pages", lambda: [page])
    monkeypatch.setattr(tables, "all_tables", dict)
    monkeypatch.setattr(tables, "write_whole", full)
    assert tables.main([]) == 2
    assert capsys.readouterr().err == f"tables.py: {page}: No space left on device; free some space\n"
    monkeypatch.setattr(tables, "all_tables", lambda: {"speed": "a table"})
    assert tables.main([]) == 2
    assert capsys.readouterr().err == "tables.py: no page has a place for speed\n"
