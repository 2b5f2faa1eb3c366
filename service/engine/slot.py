"""Hold an image in progress, and stack what several hold."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.inference.continuous import Stage
from unperturb.service.engine.messages import Outcome, Work


@dataclass(eq=False)
class Slot:
    """Hold an image in progress: as received and as it is, the steps done, and the loss before each."""

    work: Work
    stage: Stage | None
    x0: Tensor
    x: Tensor
    began_at: float
    label: int = 0
    anchor: Tensor | None = None
    step: int = 0
    velocity: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    halted: bool = False

    @property
    def loop(self) -> ProjectedGradient:
        """Return the loop of its stage, with its own gate."""
        assert self.stage is not None
        return self.stage.loop if self.work.gate is None else replace(self.stage.loop, gate=self.work.gate)

    @property
    def finished(self) -> bool:
        """Return whether its last step is done."""
        return self.stage is None or self.halted or self.step >= self.stage.loop.steps


class SlotResult(NamedTuple):
    """Say what came of an image that has left its slot."""

    id: int
    result: Outcome | Exception


def by_stage(slots: list[Slot]) -> list[tuple[Stage, list[Slot]]]:
    """Group the slots that have a stage with those of the same stage and state."""
    parts: dict[tuple[int, bool], tuple[Stage, list[Slot]]] = {}
    for slot in slots:
        if slot.stage is not None:
            key = id(slot.stage), slot.velocity is None
            parts.setdefault(key, (slot.stage, []))[1].append(slot)
    return list(parts.values())


def stack(slots: list[Slot], name: str) -> Tensor:
    """Return a batch of one tensor of each."""
    return torch.stack([getattr(slot, name) for slot in slots])


def stack_if_there(slots: list[Slot], name: str) -> Tensor | None:
    """Return the same, or None where they have none."""
    return None if getattr(slots[0], name) is None else stack(slots, name)
