"""The state that a run keeps in its folder to go on from: after each epoch, and every few minutes within one.

state.pt           where the run is: weights, average, optimizer, memory, place, figures so far
best.pt            the same after the best epoch, where a run that collapses goes back to
ema.safetensors    the averaged weights as float16: small enough to go on from elsewhere, by --resume-from
"""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from unperturb.models.errors import ConfigError
from unperturb.models.files import write_whole

STATE, BEST, AVERAGED = "state.pt", "best.pt", "ema.safetensors"
FORMAT = 5


@dataclass
class Progress:
    """The place of a run: `epoch` epochs and `step` steps of the next, with the figures' sums and seconds of that.

    attempt: how often the run has gone back; best: number, score and figures of the best epoch, if there is one;
    lines: of the log, one an epoch and attempt.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    attempt: int = 0
    best: dict[str, Any] | None = None
    lines: int = 0


def save(file: Path, config: dict[str, Any], parts: dict[str, Any], progress: Progress, device: torch.device) -> None:
    """Write a state whole: a crash leaves the old one or the new one."""
    content = {
        "format": FORMAT,
        "config": config,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "progress": vars(progress),
        "random": torch.get_rng_state(),
        "random_of_device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(file, buffer.getvalue())


def load(file: Path, config: dict[str, Any], parts: dict[str, Any], device: torch.device) -> Progress:
    """Load a state into `parts`; raise ConfigError where it is of another configuration or layout."""
    remedy = "use another --out, or --no-resume to begin again"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler raises nearly every kind of exception on damaged files
        raise ConfigError(f"{file} is damaged, and no state to go on from; {remedy}") from error
    if content.get("format") != FORMAT:
        raise ConfigError(f"{file} was written by another version of this program; {remedy}")
    theirs = content["config"]
    if differing := sorted(k for k in config.keys() | theirs.keys() if config.get(k) != theirs.get(k)):
        raise ConfigError(f"{file} is of a run with other {', '.join(differing)}; {remedy}")
    try:
        for name, part in parts.items():
            part.load_state_dict(content["parts"][name])
    except RuntimeError as error:  # it names the keys and shapes
        raise ConfigError(f"{file} does not fit what is trained ({error}); {remedy}") from error
    torch.set_rng_state(content["random"])
    if device.type == "cuda" and content["random_of_device"] is not None:
        torch.cuda.set_rng_state(content["random_of_device"], device)
    progress = Progress(**content["progress"])
    progress.sums = {name: value.to(device) for name, value in progress.sums.items()}
    return progress


def export(file: Path, model: nn.Module, *, epoch: int) -> None:
    """Write averaged weights as float16, with the number of epochs behind them."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        half = value.half() if value.is_floating_point() else value
        tensors[name] = (half if bool(half.isfinite().all()) else value).contiguous()  # some are beyond float16's range
    write_whole(file, save_tensors(tensors, metadata={"epoch": str(epoch)}))


def exported_epoch(file: Path) -> int | None:
    """Return the number of epochs behind exported weights; None where there is no such file."""
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as opened:
        return int(opened.metadata()["epoch"])


def take_over(file: Path, models: tuple[nn.Module, ...]) -> None:
    """Load exported weights into each model; raise ConfigError where they cannot be read or do not fit."""
    try:
        tensors = load_tensors(file.read_bytes())
        for model in models:
            model.load_state_dict(tensors)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"resume_from={file} cannot be read: {error}") from error
    except RuntimeError as error:  # load_state_dict names the keys and shapes
        raise ConfigError(f"resume_from={file} does not fit what is trained: {error}") from error


def digest(file: Path | None) -> str | None:
    """Return the SHA-256 of a file, if there is one to be read."""
    try:
        return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
