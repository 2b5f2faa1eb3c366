import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "command",
    [["-m", "unperturb.training"], ["-c", "from unperturb.service.cli import main; main()", "train"]],
    ids=["python -m unperturb.training", "unperturb train"],
)
def test_train_names_itself_as_the_user_calls_it(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, *command, "head", "--epochs", "x"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("unperturb train head: error:")
