"""Attacks by APGD through the defense: each one objective (Croce et al., "Evaluating the adversarial robustness of
adaptive test-time defenses", ICML 2022, section 3).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.apgd import apgd
from unperturb.benchmarks.robustness.attacks.scene import (
    AttackObjective,
    Judged,
    Scene,
    clearly_wrong,
    cross_entropy_loss,
    dlr_loss,
)
from unperturb.models.purifiers.defended import seeds_of
from unperturb.models.shapes import Float

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [batch, classes], labels [batch] -> [batch]
FRESH = 1 << 40  # seeds from here up are drawn anew for every query; no request is served with one by default


def apgd_ce(scene: Scene) -> Tensor:
    """Cross-entropy of the defense, its full gradient, from random points alone: what else breaks an image is compared
    with this.
    """
    return _restarted(scene, [_opened(scene, cross_entropy_loss)], steps=scene.budget.apgd_steps, warm=False)


def apgd_ce_twice(scene: Scene) -> Tensor:
    """The same with twice the iterations, from other points."""
    steps = 2 * scene.budget.apgd_steps
    return _restarted(scene, [_opened(scene, cross_entropy_loss)], steps=steps, warm=False, first=1)


def apgd_t(scene: Scene) -> Tensor:
    """The targeted DLR loss of the defense, its full gradient, towards each of the likeliest other classes in turn."""
    opened = scene.opened()
    return _restarted(scene, _targeted(opened, as_served=not scene.is_cut), steps=scene.budget.apgd_steps)


def bpda_apgd_ce(scene: Scene) -> Tensor:
    """Cross-entropy of the defense as served; its purifier's backward is the identity (BPDA, Athalye et al. 2018)."""
    return _restarted(scene, [_through(scene, cross_entropy_loss)], steps=scene.budget.apgd_steps)


def bpda_apgd_dlr(scene: Scene) -> Tensor:
    """The targeted DLR loss by BPDA; untargeted under 4 classes."""
    return _restarted(scene, _targeted(scene), steps=scene.budget.apgd_steps)


def bpda_apgd_ce_fresh(scene: Scene) -> Tensor:
    """Cross-entropy, every gradient the mean over seeds that no query had before."""
    return _restarted(scene, [_expected(scene, cross_entropy_loss)], steps=scene.budget.adaptive_steps)


def bpda_apgd_dlr_fresh(scene: Scene) -> Tensor:
    """The DLR loss, every gradient the mean over seeds that no query had before."""
    return _restarted(scene, [_expected(scene, dlr_loss)], steps=scene.budget.adaptive_steps)


def apgd_ce_fresh(scene: Scene) -> Tensor:
    """Cross-entropy, every gradient the mean of the full ones over seeds that no query had before."""
    return _restarted(scene, [_expected(scene.opened(), cross_entropy_loss)], steps=scene.budget.adaptive_steps)


def bpda_contrastive(scene: Scene) -> Tensor:
    """Cross-entropy plus λ times what leaves the purifier nothing to do: its own objective, already met."""
    purifier = scene.defended.purifier
    sign = -1.0 if purifier.loop.direction == "descend" else 1.0
    plain = _through(scene, cross_entropy_loss)

    def objective(weight: float) -> AttackObjective:
        def value(x: Tensor, rows: Tensor) -> Judged:
            judged = plain(x, rows)
            own = purifier.objective(x, seeds_of(scene.served_seed, x))(x, 0)
            return Judged(judged.losses + sign * weight * own, judged.broken)

        return value

    objectives = [objective(weight) for weight in scene.budget.lambdas]
    return _restarted(scene, objectives, steps=scene.budget.adaptive_steps)


def intermediate(scene: Scene) -> Tensor:
    """The purifier's iterate after a quarter, half and all of its steps (at least one), attacked by BPDA."""
    steps = scene.defended.purifier.loop.steps
    objectives = []
    for stop in sorted({max(1, steps // 4), max(1, steps // 2), steps}):
        shorter = scene.defended.attacked_by("bpda", steps=stop)
        objectives.append(_through(scene.against(shorter), cross_entropy_loss, as_served=stop == steps))
    return _restarted(scene, objectives, steps=scene.budget.adaptive_steps)


def _restarted(
    scene: Scene, objectives: Iterable[AttackObjective], *, steps: int, warm: bool = True, first: int = 0
) -> Float[Tensor, "batch 3 h w"]:
    """Every objective from every start, on the images that nothing before has broken; the last point where none has.

    With `warm` the first start is the static classifier's adversarial image where one is known; the others are random,
    numbered from `first`.
    """
    found = scene.x.clone()
    left = torch.arange(len(found), device=found.device)
    for number, objective in enumerate(objectives, first):
        for restart in range(scene.budget.restarts):
            if not len(left):
                return found
            part = scene.select(left)
            seeds = part.seeds * (1 << 12) + number * (1 << 6) + restart
            start = scene.threat.ball(start="uniform").begin(part.x, seeds)
            if warm and restart == 0 and part.known is not None:
                broken_statically = (part.known != part.x).flatten(1).any(1).view(-1, 1, 1, 1)
                start = torch.where(broken_statically, part.known, start)
            points = apgd(part, _of_rows(objective, left), steps=steps, start=start)
            found[left] = part.project(points)
            left = left[part.right(found[left])]
    return found


def _of_rows(objective: AttackObjective, left: Tensor) -> AttackObjective:
    """The objective of the whole scene, for a part of it."""
    return lambda x, rows: objective(x, left[rows])


def _expected(scene: Scene, loss: Loss) -> AttackObjective:
    """The expectation of `loss` over fresh seeds (EOT, Athalye et al. 2018), one draw's graph at a time."""
    drawn = iter(range(1 << 30))

    def value(x: Tensor, rows: Tensor) -> Judged:
        mean, slope = torch.zeros(len(x), device=x.device), torch.zeros_like(x)
        for _ in range(scene.budget.eot):
            seeds = FRESH + scene.seeds[rows] * (1 << 20) + next(drawn)
            losses = loss(scene.logits(x, seed=seeds), scene.labels[rows]) / scene.budget.eot
            slope += torch.autograd.grad(losses.sum(), x)[0]
            mean += losses.detach()
        linear = (x * slope).flatten(1).sum(1)
        return Judged(mean + linear - linear.detach(), None)  # the mean's value, with the mean's gradient

    return value


def _opened(scene: Scene, loss: Loss) -> AttackObjective:
    """`loss` of the scene's defense with its full gradient."""
    return _through(scene.opened(), loss, as_served=not scene.is_cut)


def _through(scene: Scene, loss: Loss, *, as_served: bool = True) -> AttackObjective:
    """`loss` of the scene's defense; `as_served` says whether its answers are those that count."""

    def value(x: Tensor, rows: Tensor) -> Judged:
        logits, labels = scene.logits(x), scene.labels[rows]
        return Judged(loss(logits, labels), clearly_wrong(logits, labels) if as_served else None)

    return value


def _targeted(scene: Scene, *, as_served: bool = True) -> list[AttackObjective]:
    """The targeted DLR loss towards each of the likeliest other classes; untargeted under 4 classes."""
    classes = scene.classifier.num_classes
    if classes < 4:
        return [_through(scene, dlr_loss, as_served=as_served)]
    with torch.no_grad():
        ranked = scene.logits(scene.x).scatter(1, scene.labels[:, None], float("-inf")).argsort(1, descending=True)
    places = range(min(scene.budget.targets, classes - 1))
    return [_towards(scene, ranked[:, place], as_served=as_served) for place in places]


def _towards(scene: Scene, targets: Tensor, *, as_served: bool) -> AttackObjective:
    """The targeted DLR loss of the scene's defense."""

    def value(x: Tensor, rows: Tensor) -> Judged:
        logits, labels = scene.logits(x), scene.labels[rows]
        losses = dlr_loss(logits, labels, targets[rows])
        return Judged(losses, clearly_wrong(logits, labels) if as_served else None)

    return value
