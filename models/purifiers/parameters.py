"""The parameters of a preset, as JSON: what figures on a card are said to be of."""

import json
from dataclasses import asdict
from typing import Any

from unperturb.models.purifiers.reverse_attack import ReverseAttackConfig


def parameters(config: ReverseAttackConfig) -> dict[str, Any]:
    """Return the parameters as JSON has them: lists in place of tuples."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return found
