"""Another classifier, which an attacker has in place of the judged one."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.scene import Scene
from unperturb.benchmarks.robustness.counting import CountingClassifier
from unperturb.benchmarks.robustness.identity import Identity
from unperturb.benchmarks.robustness.subjects import defense_of, described_model, ready
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.purifiers.defended import DefendedClassifier


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A bare classifier that is not judged, and counts its passes.

    places:    int64 [classes], the place of each of the judged classifier's classes among its own
    described: what a record says of it
    """

    defended: DefendedClassifier
    counting: CountingClassifier
    places: Tensor
    described: dict[str, Any]
    identity: Identity

    @property
    def title(self) -> str:
        """Return what a plan calls it."""
        return f"surrogate {self.described['spec']}"

    def scene(self, scene: Scene) -> Scene:
        """Return the same images before it."""
        return replace(scene, defended=self.defended, labels=self.places[scene.labels], known=None)


def surrogate_of(judged: Checkpoint, other: Checkpoint, *, name: str, device: torch.device, seed: int) -> Surrogate:
    """Return a checkpoint as the surrogate of the judged one, ready on the device.

    Classes are matched by name; it may have more. Raises ConfigError where it lacks one, or takes images of another
    size.
    """
    side, its_side = judged.classifier.image_size, other.classifier.image_size
    if its_side != side:
        raise ConfigError(
            f"the surrogate {name} is for images of {its_side} x {its_side}, {judged.card.id} for {side} x {side}"
        )
    places = torch.tensor(_places(judged.card.classes, other.card.classes, name), device=device)
    subject = ready(other, device)
    defended = defense_of(None, subject)
    assert isinstance(subject.classifier, CountingClassifier)
    identity = Identity(defended, None, seed=seed)
    return Surrogate(defended, subject.classifier, places, described_model(subject, name), identity)


def _places(classes: tuple[str, ...], its: tuple[str, ...], name: str) -> list[int]:
    if classes == its:  # also where two of them have one name
        return list(range(len(its)))
    for wanted in classes:
        if classes.count(wanted) != 1 or its.count(wanted) != 1:
            found = ", ".join(its[:10])
            raise ConfigError(
                f"the surrogate {name} has to know every class by its name, and {wanted!r} is not one of it alone: "
                f"its {len(its)} classes are {found}"
            )
    return [its.index(wanted) for wanted in classes]
