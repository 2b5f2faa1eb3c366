"""The record of a run: a progress bar, a line of JSON an epoch, and scalars for TensorBoard."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from unperturb.models.files import write_whole

LOG = "log.jsonl"


class RunLog:
    """The log of a run's folder, opened once; a context manager.

    Its first `lines` lines stay: what follows is of epochs that the run takes anew, or of another run.
    """

    def __init__(self, out: Path, *, writes: bool, lines: int) -> None:
        self.out, self.writes = out, writes
        kept: list[bytes] = []
        if writes and (file := out / LOG).exists():
            kept = file.read_bytes().splitlines(keepends=True)[:lines]
            write_whole(file, b"".join(kept))
        self._board = _tensorboard(out, epoch=json.loads(kept[-1])["epoch"] + 1 if kept else 0) if writes else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, figures: dict[str, Any]) -> None:
        """Append an epoch's figures; numbers go to TensorBoard too."""
        if not self.writes:
            return
        with (self.out / LOG).open("a") as log:
            log.write(json.dumps(figures) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, float(value), int(figures["epoch"]))
            self._board.flush()


def show(bar: Any, sums: dict[str, Tensor], *, steps: int, images: int, spent_s: float, left: int) -> None:  # noqa: ANN401
    """Put the figures' means over `steps` steps, images a second and the run's minutes left on the progress bar.

    images: seen in those steps; left: steps to the end of the run.
    """
    speed = {"img/s": f"{images / spent_s:.0f}", "left": f"{left * spent_s / steps / 60:.0f} min"}
    bar.set_postfix({name: f"{float(value) / steps:.3f}" for name, value in sums.items()} | speed)


def _tensorboard(out: Path, *, epoch: int) -> Any:  # noqa: ANN401
    """Return TensorBoard's writer, or None where it is not installed; what it has from `epoch` on is shown no more."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=epoch)
