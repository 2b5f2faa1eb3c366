"""Attacks that see scores or labels only, end to end: Square (pyautoattack's) and RayS."""

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.autoattack import run_part
from unperturb.benchmarks.robustness.attacks.scene import Scene

RADIUS_TOLERANCE = 1e-3  # of RayS's binary search, in pixel units of [0, 1]


def square(scene: Scene) -> Tensor:
    """Square Attack (Andriushchenko et al., ECCV 2020), margin loss, as in AutoAttack."""
    return run_part(
        "square",
        scene.logits,
        scene.x,
        scene.labels,
        classes=scene.classifier.num_classes,
        threat=scene.threat,
        steps=0,
        queries=scene.budget.square_queries,
        seed=int(scene.seeds[0]),
    )


def rays(scene: Scene) -> Tensor:
    """RayS (Chen & Gu, KDD 2020, algorithm 3): label-only search over sign directions, coarse blocks first.

    Every image has the same block flipped at the same time; a flip is kept where the decision boundary is nearer
    along it. Queries count per image; images that are inside the ball are done.
    """
    x, budget = scene.x, scene.budget.rays_queries
    count, size = len(x), x[0].numel()
    direction = torch.ones(count, size, device=x.device)
    radius = torch.full((count,), float("inf"), device=x.device)
    queries = torch.zeros(count, dtype=torch.long, device=x.device)
    _try(scene, direction, radius, queries, direction.clone(), torch.arange(count, device=x.device))
    level, block = 0, 0
    while True:
        active = ((radius > scene.threat.epsilon) & (queries < budget)).nonzero()[:, 0]
        if not len(active):
            break
        first, last = block * size // 2**level, (block + 1) * size // 2**level
        flipped = direction[active].clone()
        flipped[:, first:last] *= -1
        _try(scene, direction, radius, queries, flipped, active)
        block += 1
        if block == 2**level:
            level, block = (level + 1 if 2 ** (level + 1) <= size else 0), 0  # after single pixels, from the top
    return scene.project(x + _ray(scene, direction, radius.clamp(max=_reach(scene))))


def _try(scene: Scene, direction: Tensor, radius: Tensor, queries: Tensor, candidate: Tensor, rows: Tensor) -> None:
    """Take the candidate directions of `rows` whose boundary is nearer than the best, and find how near (in place)."""
    best = radius[rows].clamp(max=_reach(scene))

    def broken(which: Tensor, radii: Tensor) -> Tensor:
        part = scene.select(rows[which])
        queries[rows[which]] += 1
        return ~part.right((part.x + _ray(part, candidate[which], radii)).clamp(0, 1))

    nearer = broken(torch.arange(len(rows), device=rows.device), best).nonzero()[:, 0]
    low, high = torch.zeros_like(best), best
    searching = nearer
    while len(searching):
        middle = (low[searching] + high[searching]) / 2
        inside = broken(searching, middle)
        high[searching] = torch.where(inside, middle, high[searching])
        low[searching] = torch.where(inside, low[searching], middle)
        searching = searching[(high - low)[searching] > RADIUS_TOLERANCE]
    radius[rows[nearer]] = high[nearer]
    direction[rows[nearer]] = candidate[nearer]


def _reach(scene: Scene) -> float:
    """A radius beyond which no ray of [0, 1]^d leads anywhere new."""
    return 1.0 if scene.threat.norm == "linf" else float(scene.x[0].numel()) ** 0.5


def _ray(scene: Scene, direction: Tensor, radius: Tensor) -> Tensor:
    """The move along a sign vector whose norm in the threat's sense is `radius`."""
    scale = 1.0 if scene.threat.norm == "linf" else direction.shape[1] ** -0.5
    return (direction * (radius * scale)[:, None]).view_as(scene.x)
