"""The record of a run, as TensorBoard shows it and as a run that goes on finds it."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from tests.support.training import classifier_arguments
from unperturb.training.__main__ import main
from unperturb.training.log import LOG, RunLog


class Board:
    """Stands for TensorBoard's writer."""

    opened: ClassVar[list["Board"]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purged_from, self.epochs, self.closed = folder, purge_step, set[int](), False
        self.opened.append(self)

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        self.epochs.add(epoch)

    def flush(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Board]:
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(Board, "opened", [])
    return Board.opened


def test_tensorboard_is_opened_once_and_closed(image_folder: Path, tmp_path: Path, opened: list[Board]) -> None:
    assert main(classifier_arguments(image_folder, tmp_path / "run", "--epochs", "3")) == 0
    (only,) = opened
    assert only.epochs == {1, 2, 3}
    assert only.closed
    assert only.folder == str(tmp_path / "run" / "tensorboard")
    assert only.purged_from == 0


def test_epochs_that_are_taken_anew_are_shown_once(tmp_path: Path, opened: list[Board]) -> None:
    (tmp_path / LOG).write_text("".join(json.dumps({"epoch": epoch}) + "\n" for epoch in (5, 6, 7)))
    with RunLog(tmp_path, writes=True, lines=2) as log:
        log.write({"epoch": 7, "loss": 1.0})
    assert [board.purged_from for board in opened] == [7]
    assert [json.loads(line)["epoch"] for line in (tmp_path / LOG).read_text().splitlines()] == [5, 6, 7]
