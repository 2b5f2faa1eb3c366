"""A job is one image on its way through the engine; an outcome is what comes back."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from models.shapes import Float, UInt8
from service.loaded import LoadedModel


class Outcome(NamedTuple):
    """One image's softmax scores after and before its stage, what the stage did, and timings in ms.

    For a job without a stage `scores` and `unpurified_scores` are the same, and the fields of the stage None or empty.
    `losses` are those before each step on that step's views; `loss_before` and `loss_after` are on views that no step
    used. `linf` is in pixel units of [0, 1]; `image` is there where the job asked for it.
    """

    scores: Float[Tensor, " classes"]
    unpurified_scores: Float[Tensor, " classes"]
    image: Float[Tensor, "3 size size"] | None = None
    losses: tuple[float, ...] = ()
    loss_before: float | None = None
    loss_after: float | None = None
    linf: float | None = None
    queue_ms: float = 0.0
    purify_ms: float = 0.0
    classify_ms: float = 0.0


@dataclass(eq=False)
class Job:
    """One image for one model; `stage` is a preset's name, ATTACK, or None to classify it as it is.

    `deadline` is on time.monotonic's clock; `answer` is called with the outcome or the error, from a worker's thread.
    `gone` says that nobody waits for it any more.
    """

    model: LoadedModel
    image: UInt8[Tensor, "3 size size"] | Float[Tensor, "3 size size"]
    stage: str | None
    seed: int
    deadline: float
    answer: Callable[[Outcome | Exception], None]
    wants_image: bool = False
    queued_at: float = field(default_factory=time.perf_counter)
    gone: bool = False
    passes_left: int = 0

    def __post_init__(self) -> None:
        self.passes_left = self.model.passes(self.stage)

    @property
    def over(self) -> bool:
        """Whether no more work should be spent on it."""
        return self.gone or time.monotonic() >= self.deadline

    @property
    def seconds_left(self) -> float:
        """Estimated seconds of one device's time until its outcome, in full batches."""
        return self.passes_left * self.model.seconds_per_pass

    def pixels(self, device: torch.device) -> Float[Tensor, "3 size size"]:
        """The image on `device`, in [0, 1]."""
        image = self.image.to(device)
        return image.float() / 255 if image.dtype == torch.uint8 else image
