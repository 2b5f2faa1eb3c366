"""Keep what has been computed so far: one file per attack and chunk of images, so a killed run goes on where it was."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unperturb.models.files import write_whole


class Unit(NamedTuple):
    """One attack on one chunk: the points [n, 3, h, w], which images were attacked, which of those are classified
    right, by what margin (the label's logit less the largest other; infinite where not attacked), and what it took.
    """

    points: Tensor
    attacked: Tensor
    right: Tensor
    margins: Tensor
    forward_passes: int
    backward_passes: int
    seconds: float


class Units:
    """A folder of units; the identity of each says everything that its values depend on."""

    def __init__(self, root: Path) -> None:
        self.folder = root / ".units"

    def get(self, name: str, chunk: int, identity: dict[str, Any], compute: Callable[[], Unit]) -> Unit:
        """Return the stored unit, or the computed one, which is then stored."""
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        file = self.folder / f"{name}-{chunk:05d}-{key}.npz"
        if file.exists():
            return _read(file)
        unit = compute()
        tensors = {key: value.cpu() for key, value in unit._asdict().items() if isinstance(value, Tensor)}
        unit = unit._replace(**tensors)  # type: ignore[arg-type]
        buffer = io.BytesIO()
        arrays = {key: value.numpy() for key, value in tensors.items()}
        rest = {key: value for key, value in unit._asdict().items() if key not in arrays}
        np.savez(buffer, rest=np.array(json.dumps(rest)), **arrays)  # type: ignore[arg-type]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, buffer.getvalue())
        return unit


def digest_of_tensors(*tensors: Tensor | None) -> str:
    """Return the SHA-256 over tensors' values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"-" if tensor is None else tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path) -> Unit:
    with np.load(file, allow_pickle=False) as stored:
        fields: dict[str, Any] = {key: torch.from_numpy(stored[key]) for key in stored.files if key != "rest"}
        return Unit(**fields, **json.loads(str(stored["rest"])))
