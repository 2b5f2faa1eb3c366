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

ROOT = Path(__file__).resolve().parents[2]  # holds models/ and benchmarks/


class Unit(NamedTuple):
    """One attack on one chunk: the points [n, 3, h, w], which of them are classified right, by what margin (the
    label's logit less the largest other), what AutoAttack noted, and what it took.
    """

    points: Tensor
    right: Tensor
    margins: Tensor
    notes: list[str]
    forward_passes: int
    backward_passes: int
    seconds: float


class Units:
    """A folder of units; `identity` says everything that their values depend on."""

    def __init__(self, root: Path, identity: dict[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.folder = root / ".units" / hashlib.sha256(text.encode()).hexdigest()[:24]

    def get(self, name: str, chunk: int, compute: Callable[[], Unit]) -> Unit:
        """Return the stored unit, or the computed one, which is then stored."""
        file = self.folder / f"{name}-{chunk:05d}.npz"
        if file.exists():
            return _read(file)
        unit = compute()
        unit = unit._replace(points=unit.points.cpu(), right=unit.right.cpu(), margins=unit.margins.cpu())
        buffer = io.BytesIO()
        arrays = {key: value.numpy() for key, value in unit._asdict().items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in unit._asdict().items() if key not in arrays}
        np.savez(buffer, rest=np.array(json.dumps(rest)), **arrays)  # type: ignore[arg-type]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, buffer.getvalue())
        return unit


def _read(file: Path) -> Unit:
    with np.load(file, allow_pickle=False) as stored:
        fields: dict[str, Any] = {key: torch.from_numpy(stored[key]) for key in stored.files if key != "rest"}
        return Unit(**fields, **json.loads(str(stored["rest"])))


def code_digest(root: Path = ROOT) -> str:
    """Return the SHA-256 over the code that computes a unit: a stored one is not taken for that of other code."""
    digest = hashlib.sha256()
    for file in sorted((*root.glob("models/**/*.py"), *root.glob("benchmarks/robustness/**/*.py"))):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
