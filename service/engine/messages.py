"""Define the messages between the service's process and a worker's."""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unperturb.models.inference.captured import Execution
from unperturb.models.inference.folding import Precision
from unperturb.service.engine.cost import Cost


class Outcome(NamedTuple):
    """Hold one image's softmax scores after and before its stage, what the stage did, and timings in ms.

    For an image without a stage both scores are the same, and the fields of the stage None or empty. `steps` are those
    that it took, `losses` those before each on that step's views, and the one that ended it early; `loss_before` and
    `loss_after` are on new views where the preset draws them. `linf` is in pixel units of [0, 1]; `image` [3, size,
    size], in [0, 1], is there where it was asked for.
    """

    scores: NDArray[np.float32]
    unpurified_scores: NDArray[np.float32]
    image: NDArray[np.float32] | None = None
    steps: int = 0
    losses: tuple[float, ...] = ()
    loss_before: float | None = None
    loss_after: float | None = None
    linf: float | None = None
    queue_ms: float = 0.0
    purify_ms: float = 0.0
    classify_ms: float = 0.0


class WorkerConfig(NamedTuple):
    """Tell a worker how to run: the first message to it.

    device:  as torch names it; slots: images at a time
    threads: torch's on the CPU; alone: the same, once no other worker has done anything for a while (None: as many)
    precision: auto: the device's own, which only a process that uses it may ask
    upgrade: how steps are to run as soon as what that takes is made, beside serving; None: as at first
    """

    device: str
    slots: int
    threads: int
    execution: Execution
    precision: Precision | Literal["auto"]
    log_level: str
    log_format: str
    upgrade: Execution | None = None
    alone: int | None = None

    @property
    def numbers_of_threads(self) -> tuple[int, ...]:
        """Return every number of threads that it may have, that beside other workers last."""
        return (self.threads,) if self.alone in (None, self.threads) else (self.alone, self.threads)


class Load(NamedTuple):
    """Ask a worker to load the checkpoint whose weights have that digest, warm it up, and answer with Loaded."""

    model: int
    name: str
    digest: str


class Unload(NamedTuple):
    """Tell a worker that no more work comes for this model."""

    model: int


class Threads(NamedTuple):
    """Tell a worker how many threads of the CPU it has from now on."""

    number: int


class Work(NamedTuple):
    """Hold one image [3, size, size], uint8 or float32 in [0, 1], for a worker; `queued_at` is time.monotonic().

    gate: a first loss up to which it is left as it is; None: it is not
    """

    id: int
    model: int
    image: NDArray[Any]
    stage: str | None
    seed: int
    wants_image: bool
    queued_at: float
    gate: float | None = None


class Admit(NamedTuple):
    """Give a worker images at once, so that they begin together; those that find no slot begin when there is one."""

    works: tuple[Work, ...]


class Cancel(NamedTuple):
    """Tell a worker that nobody waits for these images any more."""

    ids: tuple[int, ...]


class Cancelled(NamedTuple):
    """Report, from a worker, that it does not work on these images any more, whose cancellation it has read."""

    ids: tuple[int, ...]


class LoadProgress(NamedTuple):
    """Report, from a worker, that one more piece of a model's warm-up is done, and of how many."""

    model: int
    done: int
    pieces: int


class Loaded(NamedTuple):
    """Report, from a worker, what images cost on its device, or why it cannot serve the model."""

    model: int
    cost: Cost
    refused: str | None = None


class Upgraded(NamedTuple):
    """Report, from a worker, that new images of a model take faster steps from now on, and what they cost."""

    model: int
    execution: Execution
    cost: Cost


class StepReport(NamedTuple):
    """Report, from a worker, a step: whose it was, its seconds, what has ended, and the device's memory in bytes.

    stepped: the ids of the images that took one
    pace:    its seconds in multiples of what the model's cost estimated
    """

    model: int
    stepped: tuple[int, ...]
    seconds: float
    pace: float | None
    ended: list[tuple[int, Outcome | Exception]]
    memory: int


class Failed(NamedTuple):
    """Report, from a worker, why it ends."""

    reason: str


ToWorker = Admit | Cancel | Threads | Load | Unload
FromWorker = StepReport | Cancelled | LoadProgress | Loaded | Upgraded | Failed
