"""The one loop: projected gradient steps on an image, up or down an objective (Madry et al. 2018, eq. 2.3).

An attack, an adversarial training step and the reverse attack differ in the objective that they hand in.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unperturb.models import philox
from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Bool, Float, Int

# Maps images [batch, 3, h, w] and the step's number to one loss per image [batch]. Image i's loss must depend on
# image i alone: the gradient of the sum is then every image's own gradient.
Objective = Callable[[Tensor, int], Tensor]

# A sign step turns the last bit of a gradient near 0 into a whole step; the ramp keeps an image's result the same
# whatever batch it is computed in.
RAMP = 1e-3

START_STREAM = 0x5EED  # the Philox stream of random starts; views use streams from 0 up


class Descent(NamedTuple):
    """The last iterate [batch, 3, h, w] and the objective before each step [steps, batch]: NaN where none was taken."""

    image: Tensor
    losses: Tensor


class LoopState(NamedTuple):
    """Between two steps: the iterate, the velocity, the losses so far [steps, batch], and who goes on (None: all)."""

    x: Tensor
    velocity: Tensor | None
    losses: Tensor
    going: Tensor | None

    def among(self, mask: Tensor) -> "LoopState":
        """Return the state of the images of the mask alone."""
        velocity = None if self.velocity is None else self.velocity[mask]
        return LoopState(self.x[mask], velocity, self.losses[:, mask], mask[mask])


def require_pixel_units(epsilon: float) -> None:
    """Raise ConfigError for an L-infinity radius that is none in pixel units of [0, 1]."""
    if not 0 <= epsilon <= 1:
        raise ConfigError(f"epsilon={epsilon!r} is not within 0 and 1; give it in pixel units of [0, 1], as 8/255")


@dataclass(frozen=True, kw_only=True)
class ProjectedGradient:
    """The loop's parameters; epsilon and step_size in pixel units of [0, 1].

    norm:      "linf" (sign steps, box) or "l2" (unit-gradient steps, ball)
    momentum:  0 for plain steps; otherwise velocity = momentum * velocity + gradient / |gradient|_1
               (Dong et al. 2018, eq. 6)
    start:     "zero" (the image itself) or "uniform" (seeded, in the ball)
    step:      a linf step is the gradient's "sign", or "soft": gradient / (|gradient| + the image's mean of that)
    ramp:      a sign step is the gradient's sign where its size is above `ramp` times the image's mean size, and
               linear below: with ramp > 0 the step is a continuous function of the gradient
    gate:      descending, an image whose first loss is at most this stays as it was received (None: no image does)
    settle:    an image stops when the mean of its last `settle` losses is no better than that of the `settle` before
               (0: never)
    """

    direction: Literal["ascend", "descend"]
    epsilon: float
    step_size: float
    steps: int
    norm: Literal["linf", "l2"] = "linf"
    start: Literal["zero", "uniform"] = "zero"
    momentum: float = 0.0
    step: Literal["sign", "soft"] = "sign"
    ramp: float = 0.0
    gate: float | None = None
    settle: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if self.gate is not None and (self.direction != "descend" or not math.isfinite(self.gate)):
            raise ConfigError(f"gate={self.gate!r} with direction={self.direction!r}: a finite loss, of a descent")
        for name, allowed in (
            ("direction", ("ascend", "descend")),
            ("norm", ("linf", "l2")),
            ("start", ("zero", "uniform")),
            ("step", ("sign", "soft")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.step == "soft" and self.norm == "l2":
            raise ConfigError("step='soft' is of norm='linf'; an l2 step has the gradient's own direction")
        for name in ("epsilon", "step_size", "momentum", "ramp"):
            value = getattr(self, name)
            if not (0 <= value < float("inf")):
                raise ConfigError(f"{name}={value!r} is not a finite number of at least 0")
        if self.norm == "linf":
            require_pixel_units(self.epsilon)
        for name in ("steps", "settle"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is below 0")

    @property
    def halts(self) -> bool:
        """Return whether an image may end before the last step."""
        return self.gate is not None or self.settle > 0

    def goes_on(self, losses: Float[Tensor, "steps batch"]) -> Bool[Tensor, " batch"]:
        """Return which images take the step whose loss is the last one."""
        on = torch.ones_like(losses[-1], dtype=torch.bool)
        if self.gate is not None:
            on &= losses[0] > self.gate
        if self.settle and len(losses) >= 2 * self.settle:
            before, after = losses[-2 * self.settle :].unflatten(0, (2, self.settle)).mean(1)
            on &= after < before if self.direction == "descend" else after > before
        return on

    def begin(self, x0: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Float[Tensor, "batch 3 h w"]:
        """Return the first iterate: the image, or a seeded uniform point of the ball around it, in [0, 1]."""
        if self.start == "zero":
            return x0.clone()
        noise = philox.uniform(seeds, 0, START_STREAM, x0[0].numel() + 1)
        inside, radius = noise[:, 1:].view_as(x0).to(x0.dtype) * 2 - 1, noise[:, :1, None, None].to(x0.dtype)
        if self.norm == "l2":  # a direction, then a radius; uniform over radii rather than over volume
            inside = inside / _l2(inside) * radius
        return (x0 + self.epsilon * inside).clamp(0, 1)

    def project(
        self, x: Float[Tensor, "batch 3 h w"], x0: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch 3 h w"]:
        """Return the nearest point of the ball around x0, then of [0, 1]."""
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x, x0 - self.epsilon), x0 + self.epsilon).clamp(0, 1)
        delta = x - x0
        return (x0 + delta * (self.epsilon / _l2(delta)).clamp(max=1)).clamp(0, 1)

    def advance(
        self,
        x: Float[Tensor, "batch 3 h w"],
        x0: Float[Tensor, "batch 3 h w"],
        gradient: Float[Tensor, "batch 3 h w"],
        velocity: Float[Tensor, "batch 3 h w"] | None,
        *,
        smooth_backward: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Take one step from `x` along `gradient`; return the next iterate and velocity (None without momentum)."""
        if self.momentum:
            scaled = gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
            velocity = scaled if velocity is None else self.momentum * velocity + scaled
            gradient = velocity
        if self.norm == "l2":
            move = gradient / _l2(gradient)
        elif self.step == "soft":
            move = _soft(gradient, gradient)
        else:
            move = _sign(gradient, self.ramp)
            move = _with_slope(move, gradient) if smooth_backward else move
        sign = 1.0 if self.direction == "ascend" else -1.0
        return self.project(x + sign * self.step_size * move, x0), velocity

    def run(
        self,
        x0: Float[Tensor, "batch 3 h w"],
        objective: Objective,
        *,
        seeds: Int[Tensor, " batch"],
        unrolled: bool = False,
        objective_of: Callable[[Tensor], Objective] | None = None,
    ) -> Descent:
        """Take all steps from `x0` (in [0, 1]); works under a caller's no_grad or inference_mode.

        With `unrolled`, the result carries gradients with respect to `x0` through every step (second derivatives of
        the objective) and, given `objective_of`, through the objective that it makes of the received images; a sign's
        backward is then that of a soft sign, since its own is zero everywhere. Otherwise the result is detached, and
        only the image's gradient is computed.
        """
        if unrolled:
            if not torch.is_grad_enabled():
                raise ConfigError("unrolled=True needs gradients, but the caller has switched them off")
            objective_of = objective_of or (lambda _: objective)
            if self.steps == 1 and not self.halts and x0.requires_grad:
                return self._one_step(x0, objective_of(x0), seeds)
            return Descent(*_Unrolled.apply(x0, self, objective_of, seeds))
        with torch.inference_mode(False), torch.enable_grad():
            if x0.is_inference():
                x0, seeds = x0.clone(), seeds.clone()
            *_, last = self.steps_from(x0.detach(), objective, seeds)
        return Descent(last.x, last.losses)

    def _one_step(self, x0: Tensor, objective: Objective, seeds: Tensor) -> Descent:
        """Take the only step with its gradient kept: a fifth faster than computing it again on the way back."""
        x = self.begin(x0, seeds)
        loss = objective(x, 0)
        (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        after, _ = self.advance(x, x0, gradient, None, smooth_backward=True)
        return Descent(after, loss.detach()[None])

    def steps_from(
        self,
        x0: Float[Tensor, "batch 3 h w"],
        objective: Objective,
        seeds: Int[Tensor, " batch"],
        *,
        state: LoopState | None = None,
        steps: int | None = None,
    ) -> Iterator[LoopState]:
        """Yield the state at the start, or that given, and after every step: `steps` of them, or all that are left."""
        if state is None:
            state = LoopState(self.begin(x0, seeds), None, x0.new_zeros((0, len(x0))), None)
        yield state
        first = len(state.losses)
        for step in range(first, self.steps if steps is None else min(first + steps, self.steps)):
            x = state.x.detach().requires_grad_()
            loss = objective(x, step)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            after, velocity = self.advance(x.detach(), x0, gradient, state.velocity)
            losses, going = torch.cat((state.losses, loss.detach()[None])), None
            if self.halts:
                if state.going is not None:
                    losses[-1].masked_fill_(~state.going, float("nan"))
                going = self.goes_on(losses)  # a NaN is no better: who has stopped stays
                after = _where(going, after, x.detach() if step else x0)
            state = LoopState(after, velocity, losses, going)
            yield state

    def stopped_after(self, steps: int) -> "ProjectedGradient":
        """Return the same loop with at most `steps` steps."""
        return replace(self, steps=min(steps, self.steps))


class _Unrolled(torch.autograd.Function):
    """The loop with a gradient through every step; only the iterates are kept, and each step is computed again on the
    way back, so that the memory is one step's.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x0: Tensor,
        loop: ProjectedGradient,
        objective_of: Callable[[Tensor], Objective],
        seeds: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            states = list(loop.steps_from(x0.detach(), objective_of(x0.detach()), seeds))
        ctx.x0, ctx.loop, ctx.objective_of, ctx.seeds = x0.detach(), loop, objective_of, seeds
        ctx.states, last = states, states[-1]
        ctx.mark_non_differentiable(last.losses)
        return last.x.clone(), last.losses

    @staticmethod
    def backward(ctx: Any, to_image: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        loop: ProjectedGradient = ctx.loop
        to_x0, to_velocity = torch.zeros_like(ctx.x0), None
        with torch.enable_grad():
            x0 = ctx.x0.requires_grad_()
            objective = ctx.objective_of(x0)
            for step in reversed(range(loop.steps)):
                x, velocity, _, _ = ctx.states[step]
                inputs = [x.detach().requires_grad_(), x0]
                if velocity is not None:
                    inputs.append(velocity.detach().requires_grad_())
                    velocity = inputs[2]
                loss = objective(inputs[0], step)
                (gradient,) = torch.autograd.grad(loss.sum(), inputs[0], create_graph=True)
                after, after_velocity = loop.advance(inputs[0], x0, gradient, velocity, smooth_backward=True)
                if (going := ctx.states[step + 1].going) is not None:
                    after = _where(going, after, inputs[0] if step else x0)
                outputs, flowing = [after], [to_image]
                if after_velocity is not None and to_velocity is not None:
                    outputs, flowing = [after, after_velocity], [to_image, to_velocity]
                to_image, through, *rest = torch.autograd.grad(outputs, inputs, flowing, allow_unused=True)
                to_x0 = to_x0 if through is None else to_x0 + through
                to_velocity = rest[0] if rest else None
            (through,) = torch.autograd.grad(loop.begin(x0, ctx.seeds), x0, to_image)
        return to_x0 + through, None, None, None


def _where(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return `one` for the images of the mask, `other` for the rest."""
    return torch.where(mask[:, None, None, None], one, other)


def _l2(delta: Tensor) -> Tensor:
    """Return the L2 norm per image [batch, 1, 1, 1], kept off zero."""
    return delta.flatten(1).square().sum(1).clamp(min=1e-24).sqrt().view(-1, 1, 1, 1)


def _sign(gradient: Tensor, ramp: float) -> Tensor:
    """Return the sign, linear where |gradient| is under `ramp` times its mean."""
    if not ramp:
        return gradient.sign()
    mean = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
    return (gradient / (ramp * mean)).clamp(-1, 1)


def _with_slope(move: Tensor, gradient: Tensor) -> Tensor:
    """Return `move`, with the derivative of gradient / (|gradient| + its mean), which has a slope everywhere."""
    soft = _soft(gradient, gradient.detach())
    return soft + (move - soft).detach()


def _soft(gradient: Tensor, scale: Tensor) -> Tensor:
    """Return gradient / (|gradient| + the image's mean of |scale|)."""
    return gradient / (gradient.abs() + scale.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30))
