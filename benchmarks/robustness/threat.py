"""The ball that an adversarial image stays in."""

from dataclasses import dataclass
from typing import Literal

from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.errors import ConfigError

NORMS: dict[str, Literal["linf", "l2"]] = {"Linf": "linf", "L2": "l2"}
EPSILON = {"Linf": 8 / 255, "L2": 0.5}  # of the leaderboards of CIFAR-10


@dataclass(frozen=True, kw_only=True)
class Threat:
    """The ball that an adversarial image stays in; epsilon in pixel units of [0, 1]."""

    norm: Literal["linf", "l2"]
    epsilon: float

    def __post_init__(self) -> None:
        """Raise ConfigError for 8 where 8/255 is meant."""
        top = 1.0 if self.norm == "linf" else 8.0
        if not 0 < self.epsilon < top:
            raise ConfigError(
                f"epsilon={self.epsilon:g} is not in (0, {top:g}): it is in pixel units of [0, 1], as in 8/255"
            )

    def ball(self, **loop: object) -> ProjectedGradient:
        """The ball as the one loop knows it: `begin` draws a start in it, `project` returns to it."""
        fields = {"step_size": 0.0, "steps": 0, **loop}
        return ProjectedGradient(direction="ascend", epsilon=self.epsilon, norm=self.norm, **fields)  # type: ignore[arg-type]
