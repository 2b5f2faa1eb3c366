"""Judge adversarial images: back in the ball, and the served answer to them; and put the units of a chunk together."""

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.scene import Scene, margin
from unperturb.benchmarks.robustness.units import Unit
from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Bool, Float


def judged(scene: Scene, points: Float[Tensor, "n 3 h w"], *, title: str) -> Unit:
    """Return the points back in the ball and [0, 1], and the served answer to them.

    Raises ConfigError naming the run where the scores are not finite.
    """
    points = scene.project(points)
    with torch.no_grad():
        logits = scene.logits(points).float()
    if not logits.isfinite().all():
        raise ConfigError(f"{title}: the defended classifier returns NaN or infinite scores")
    right = logits.argmax(1).eq(scene.labels)
    return Unit(points, torch.ones_like(right), right, margin(logits, scene.labels), 0, 0, 0.0)


def nothing(scene: Scene) -> Unit:
    """Return a unit of no attacked image."""
    none = torch.zeros(len(scene.x), dtype=torch.bool)
    return Unit(scene.x, none, none, torch.full((len(none),), float("inf")), 0, 0, 0.0)


def spread(unit: Unit, scene: Scene, rows: Bool[Tensor, " n"]) -> Unit:
    """Return the unit of some images as one of all."""
    whole = nothing(scene)
    points, attacked, right, margins = (value.clone().to(scene.x.device) for value in whole[:4])
    points[rows], attacked[rows], right[rows], margins[rows] = unit.points, unit.attacked, unit.right, unit.margins
    return unit._replace(points=points, attacked=attacked, right=right, margins=margins)


def joined(before: Unit, after: Unit) -> Unit:
    """Return two parts of an attack as one: what the second was run on is the second's."""
    on = after.attacked
    return Unit(
        torch.where(on.view(-1, 1, 1, 1), after.points, before.points),
        before.attacked | on,
        torch.where(on, after.right, before.right),
        torch.where(on, after.margins, before.margins),
        before.forward_passes + after.forward_passes,
        before.backward_passes + after.backward_passes,
        before.seconds + after.seconds,
    )


def hardest(seen: dict[str, Unit]) -> Tensor:
    """Return of every image the point of the smallest margin: nearest to being broken, or broken by most."""
    margins = torch.stack([unit.margins for unit in seen.values()])
    points = torch.stack([unit.points for unit in seen.values()])
    return points[margins.argmin(0), torch.arange(margins.shape[1])]
