import errno
from pathlib import Path

import pytest

from tests.conftest import make_checkpoint
from tests.support.training import classifier_arguments
from unperturb.models import command
from unperturb.models.checkpoints import store
from unperturb.models.errors import DataError
from unperturb.models.files import write_whole
from unperturb.training.__main__ import main
from unperturb.training.state import STATE


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (DataError("no images"), 2, "prog: no images\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            2,
            "prog: a/b: No space left on device; free some space\n",
        ),
        (OSError(errno.EROFS, "Read-only file system", "a"), 2, "prog: a: Read-only file system; look at its"),
        (
            OSError(errno.EADDRINUSE, "Address already in use"),
            2,
            "prog: Address already in use; something listens there",
        ),
        (
            OSError(errno.EIO, "Input/output error", "a"),
            2,
            "prog: a: Input/output error; its disk or file system fails",
        ),
        (KeyboardInterrupt(), 130, "\nprog: interrupted; the same command goes on\n"),
    ],
    ids=["refused", "disk full", "read-only", "port in use", "broken disk", "Ctrl-C"],
)
def test_what_stops_a_command_is_one_line_with_the_remedy(
    raised: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise raised

    assert command.run("prog", fails, interrupted="the same command goes on") == status
    assert capsys.readouterr().err.startswith(said)
    assert command.run("prog", lambda: None) == 0
    assert command.run("prog", lambda: 3) == 3


def test_file_that_cannot_be_written_leaves_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, payload: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_whole(tmp_path / "card.json", b"x")
    assert raised.value.filename == str(tmp_path / "card.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["a file", "below a file", "a broken state"])
def test_training_into_what_is_no_folder_of_a_run_is_one_line(
    kind: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    if kind == "a broken state":
        out.mkdir()
        (out / STATE).write_bytes(b"torn")
    else:
        out.write_text("x")
    place = out / "deeper" if kind == "below a file" else out
    arguments = classifier_arguments(image_folder, place, "--epochs", "1", "--method", "natural")
    arguments[arguments.index("--cache") + 1] = str(tmp_path / "cache")
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(out) in said
    assert ("no state to go on from" if kind == "a broken state" else "a file stands where a folder is needed") in said


def test_checkpoint_into_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def saved() -> None:
        store.save(tmp_path / "file", make_checkpoint())

    (tmp_path / "file").write_text("x")
    assert command.run("prog", saved) == 2
    assert "a file stands where a folder is needed" in capsys.readouterr().err
