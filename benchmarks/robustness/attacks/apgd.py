"""Auto-PGD (Croce & Hein, "Reliable evaluation of adversarial robustness", ICML 2020, algorithm 1).

Gradient ascent with momentum .75 that starts with steps of 2ε and halves them, per image, whenever progress stalls,
going back to the best point so far.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.scene import AttackObjective, Judged, Scene
from unperturb.models.shapes import Bool, Float, Int

MOMENTUM, PROGRESS = 0.75, 0.75  # α and ρ of the paper


@dataclass
class _State:
    """One row per image that is still attacked."""

    rows: Tensor
    x: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    step: Tensor
    rises: Tensor
    step_was: Tensor
    best_was: Tensor

    def keep(self, mask: Bool[Tensor, " batch"]) -> None:
        """Drop the rows outside `mask`."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name)[mask])


def checkpoints(steps: int) -> list[int]:
    """The steps at which the step size may be halved (section 3, p_j)."""
    places: list[int] = []
    last, current = 0.0, 0.22
    while current <= 1 and len(places) < steps:
        places.append(math.ceil(current * steps - 1e-9))
        last, current = current, current + max(current - last - 0.03, 0.06)
    return places


def apgd(
    scene: Scene, objective: AttackObjective, *, steps: int, start: Float[Tensor, "batch 3 h w"]
) -> Float[Tensor, "batch 3 h w"]:
    """The first point of each image that the objective calls broken, otherwise the one of the highest loss."""
    found = start.clone()
    state = _begin(scene, objective, start, found)
    marks, last_mark = set(checkpoints(steps)), 0
    for done in range(1, steps + 1):
        if not len(state.rows):
            break
        x0 = scene.x[state.rows]
        ahead = _step(scene, state.x, state.gradient, state.step, x0)
        mixed = state.x + MOMENTUM * (ahead - state.x) + (1 - MOMENTUM) * (state.x - state.previous)
        state.previous, state.x = state.x, scene.threat.ball().project(ahead if done == 1 else mixed, x0)
        judged, state.gradient = _evaluate(objective, state.x, state.rows)
        state.rises += (judged.losses > state.loss).long()
        state.loss = judged.losses
        better = judged.losses > state.best_loss
        state.best_loss = torch.where(better, judged.losses, state.best_loss)
        state.best = _where(better, state.x, state.best)
        state.best_gradient = _where(better, state.gradient, state.best_gradient)
        found[state.rows] = state.best
        if judged.broken is not None and judged.broken.any():
            found[state.rows[judged.broken]] = state.x[judged.broken]
            state.keep(~judged.broken)
        if done in marks:
            _maybe_halve(state, since=done - last_mark)
            last_mark = done
    return found


def _begin(scene: Scene, objective: AttackObjective, start: Tensor, found: Tensor) -> _State:
    rows = torch.arange(len(start), device=start.device)
    judged, gradient = _evaluate(objective, start, rows)
    step = torch.full_like(judged.losses, 2 * scene.threat.epsilon)
    state = _State(
        rows=rows,
        x=start,
        previous=start,
        gradient=gradient,
        loss=judged.losses,
        best=start,
        best_loss=judged.losses,
        best_gradient=gradient,
        step=step,
        rises=torch.zeros_like(rows),
        step_was=step,
        best_was=judged.losses,
    )
    if judged.broken is not None:
        found[judged.broken] = start[judged.broken]
        state.keep(~judged.broken)
    return state


def _evaluate(objective: AttackObjective, x: Tensor, rows: Int[Tensor, " some"]) -> tuple[Judged, Tensor]:
    """The objective and its gradient; zeros where the defense gives none."""
    x = x.detach().requires_grad_()
    judged = objective(x, rows)
    gradient = torch.zeros_like(x)
    if judged.losses.requires_grad:
        (gradient,) = torch.autograd.grad(judged.losses.sum(), x)
    return Judged(judged.losses.detach(), judged.broken), gradient


def _step(scene: Scene, x: Tensor, gradient: Tensor, size: Tensor, x0: Tensor) -> Tensor:
    ball = scene.threat.ball(step_size=1.0)
    direction = (
        gradient.sign()
        if ball.norm == "linf"
        else gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    )
    return ball.project(x + size.view(-1, 1, 1, 1) * direction, x0)


def _maybe_halve(state: _State, *, since: int) -> None:
    """Halve where under ρ of the steps since the last mark rose, or neither step size nor best moved (section 3)."""
    stalled = (state.rises < PROGRESS * since) | ((state.step_was == state.step) & (state.best_was == state.best_loss))
    state.step_was, state.best_was = state.step, state.best_loss
    state.step = torch.where(stalled, state.step / 2, state.step)
    state.x = _where(stalled, state.best, state.x)
    state.gradient = _where(stalled, state.best_gradient, state.gradient)
    state.loss = torch.where(stalled, state.best_loss, state.loss)
    state.rises = torch.zeros_like(state.rises)


def _where(mask: Bool[Tensor, " batch"], yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), yes, no)
