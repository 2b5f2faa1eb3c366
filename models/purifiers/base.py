"""Every purifier: the one loop on an objective of its own, in front of a classifier that it never changes."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unperturb.models.attacks.projected_gradient import Descent, Objective, ProjectedGradient
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.shapes import Float, Int

COMPACT_EVERY = 5  # steps


def lacking(part: str, of: str) -> str:
    """Return what to say of a checkpoint without a "head" or a "purifier", and what trains one."""
    trainer = "head --classifier" if part == "head" else "purifier --checkpoint"
    return f"{of} has no {part}; train one: unperturb train {trainer} CHECKPOINT --data DIR --out OUT"


class Trace(NamedTuple):
    """The loss before each step on that step's views (NaN after an image's last), and before and after all of them: on
    views that no step used where they are drawn, and else, as in the preset `default`, on the very views that the steps
    optimised; the distance |z - x0|∞ and |z - x0|₂ in pixel units of [0, 1].
    """

    losses: Float[Tensor, "steps batch"]
    loss_before: Float[Tensor, " batch"]
    loss_after: Float[Tensor, " batch"]
    linf: Float[Tensor, " batch"]
    l2: Float[Tensor, " batch"]


class Purified(NamedTuple):
    """The purified image and its trace."""

    image: Float[Tensor, "batch 3 h w"]
    trace: Trace


class Purifier(nn.Module):
    """Base of every purifier; always in eval mode, since BatchNorm in training mode would tie an image to its batch."""

    def __init__(self, classifier: ImageClassifier, loop: ProjectedGradient) -> None:
        super().__init__()
        self.classifier, self.loop = classifier, loop
        self.train(False)

    def train(self, mode: bool = True) -> "Purifier":
        """Stay in eval mode."""
        super().train(False)
        return self

    @property
    def has_steps(self) -> bool:
        """Return whether it can be stopped between steps."""
        return self.loop.steps > 0

    @property
    def has_objective(self) -> bool:
        """Return whether it lowers or raises something that an attacker could meet for it."""
        return self.loop.steps > 0

    def objective(self, x: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Objective:
        """Return what the loop descends or ascends for the received images `x`; every subclass gives its own."""
        raise TypeError(f"{type(self).__name__} does not define objective()")

    def descend(
        self, x: Float[Tensor, "batch 3 h w"], *, seeds: Int[Tensor, " batch"], unrolled: bool = False
    ) -> Descent:
        """Take the steps alone, each image in [0, 1] with its own seed; see ProjectedGradient.run for `unrolled`."""
        if unrolled:
            return self.loop.run(
                x,
                self.objective(x, seeds),
                seeds=seeds,
                unrolled=True,
                objective_of=lambda received: self.objective(received, seeds),
            )
        if self.loop.halts:
            return self._descend_those_left(x, seeds)
        with torch.inference_mode(False):
            x, seeds = x.detach().clone(), seeds.clone()
            return self.loop.run(x, self.objective(x, seeds), seeds=seeds)

    def _descend_those_left(self, x: Tensor, seeds: Tensor) -> Descent:
        """Take the same steps, without the images that have ended: after the first step, and then after every few."""
        with torch.inference_mode(False), torch.enable_grad():
            x0, seeds = x.detach().clone(), seeds.clone()
            image, losses = x0.clone(), x0.new_full((self.loop.steps, len(x0)), float("nan"))
            left, state = torch.arange(len(x0), device=x0.device), None
            while state is None or (len(left) and len(state.losses) < self.loop.steps):
                part = x0[left], self.objective(x0[left], seeds[left]), seeds[left]
                *_, state = self.loop.steps_from(*part, state=state, steps=COMPACT_EVERY if state else 1)
                image[left], losses[: len(state.losses), left] = state.x, state.losses
                if state.going is not None:
                    left, state = left[state.going], state.among(state.going)
        return Descent(image, losses)

    def forward(self, x: Float[Tensor, "batch 3 h w"], *, seeds: Int[Tensor, " batch"]) -> Purified:
        """Purify images in [0, 1], each with its own seed, and say what happened."""
        descent = self.descend(x, seeds=seeds)
        with torch.no_grad():
            objective = self.objective(x, seeds)
            distance = (descent.image - x).flatten(1)
            trace = Trace(
                losses=descent.losses,
                loss_before=objective(x, self.loop.steps),
                loss_after=objective(descent.image, self.loop.steps),
                linf=distance.abs().amax(1),
                l2=distance.norm(dim=1),
            )
        return Purified(descent.image, trace)

    def stopped_after(self, steps: int) -> "Purifier":
        """Return the same purifier, sharing its weights, that stops after `steps` steps."""
        shorter = copy.copy(self)
        shorter.loop = self.loop.stopped_after(steps)
        return shorter


class NoPurifier(Purifier):
    """The classifier alone, as one more purifier: it changes nothing."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__(classifier, ProjectedGradient(direction="descend", epsilon=0.0, step_size=0.0, steps=0))

    def objective(self, x: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Objective:
        """Return an objective of zero: there is nothing to lower."""
        return lambda iterate, _: iterate.new_zeros(len(iterate))

    def descend(
        self, x: Float[Tensor, "batch 3 h w"], *, seeds: Int[Tensor, " batch"], unrolled: bool = False
    ) -> Descent:
        """Return the images as they are, with the gradient of the identity."""
        return Descent(x, x.new_zeros((0, len(x))))
