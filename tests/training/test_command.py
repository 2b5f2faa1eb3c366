import dataclasses
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from unperturb.models.errors import ConfigError
from unperturb.training.__main__ import COMMANDS


def with_option(name: str) -> list[str]:
    """The methods that have an option."""
    return [key for key, (kind, _) in COMMANDS.items() if name in {field.name for field in dataclasses.fields(kind)}]


def configure(command: str, **options: object) -> None:
    """Make a method's configuration, before anything is read."""
    kind = COMMANDS[command][0]
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    kind(**{name: Path("x") if name == "out" else "x" for name in required}, **options)


@pytest.mark.parametrize("command", with_option("epsilon"))
@pytest.mark.parametrize("epsilon", [8.0, -0.1, float("nan")])
def test_radius_in_other_units_is_refused_with_the_remedy(command: str, epsilon: float) -> None:
    with pytest.raises(ConfigError, match=f"epsilon={epsilon}.* in pixel units of .* as 8/255"):
        configure(command, epsilon=epsilon)


@pytest.mark.parametrize("command", with_option("held_out"))
def test_too_few_held_out_images_are_refused(command: str) -> None:
    with pytest.raises(ConfigError, match="held_out=0 must be at least 1"):
        configure(command, held_out=0)
    if command in ("pretrain", "head"):  # one image has no other as its negative
        with pytest.raises(ConfigError, match="held_out=1 must be at least 2"):
            configure(command, held_out=1)


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
