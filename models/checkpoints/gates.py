"""The gates on a checkpoint's card: the first losses up to which a preset leaves an image as it is."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.models.errors import CheckpointError

if TYPE_CHECKING:
    from unperturb.models.checkpoints.store import Card

GATE_SEED = 0  # of the views that a gate is measured on: the service's own seed


def gate_of(card: "Card", preset: str) -> float:
    """The first loss up to which that preset leaves an image as it is, on views of GATE_SEED.

    CheckpointError where none was measured, or with other weights.
    """
    gate = card.gates.get(preset)
    if gate is None or gate.get("weights_sha256") != card.weights_sha256:
        raise CheckpointError(
            f"checkpoint {card.id!r} has no gate for the preset {preset!r}{' and these weights' * (gate is not None)}; "
            "measure one: python -m training gate --checkpoint … --data …"
        )
    return float(gate["loss"])


def check_gates(gates: Any, file: Path) -> None:  # noqa: ANN401
    """CheckpointError where a card's gates are not what `training gate` writes."""
    for preset, gate in gates.items() if isinstance(gates, dict) else [("gates", None)]:
        loss = gate.get("loss") if isinstance(gate, dict) else None
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            raise CheckpointError(f"{file}: the gate of {preset!r} has no finite loss")
