import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-m", "unperturb.training"], id="python -m unperturb.training"),
        pytest.param(
            ["-c", "from unperturb.service.cli import main; main()", "train"],
            id="unperturb train",
            marks=pytest.mark.skipif(find_spec("typer") is None, reason="the command line needs typer"),
        ),
    ],
)
def test_train_names_itself_as_the_user_calls_it(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, *command, "head", "--epochs", "x"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("unperturb train head: error:")
