"""Estimate what images cost a device, in seconds, and so what those in progress cost a newcomer."""

from typing import NamedTuple

from unperturb.service.engine.stages import passes, shape, step_passes

MIN_SLOPE = 0.01  # of a lone image's pass: timings are noisy, and work that costs nothing would have no bound


class Timing(NamedTuple):
    """Say how many seconds so many batches through the classifier took, with so many images forward in them."""

    batches: int
    passes: int
    seconds: float


class Cost(NamedTuple):
    """Estimate that a batch takes `per_batch_s` whatever its size, and `per_pass_s` more for each image forward in it.

    together: images of several stages share a batch
    """

    per_batch_s: float = 0.0
    per_pass_s: float = 0.0
    together: bool = True

    @classmethod
    def fit(cls, small: Timing, large: Timing, *, together: bool = True) -> "Cost":
        """Return the straight line through as many small batches and large ones."""
        more = large.passes - small.passes
        slope = (large.seconds - small.seconds) / more if more else small.seconds / small.passes
        alone = small.seconds / small.passes
        slope = min(max(slope, MIN_SLOPE * alone), alone)
        return cls((small.seconds - slope * small.passes) / small.batches, slope, together)

    def seconds(self, batches: int, passes: int) -> float:
        """Return the seconds of so much work."""
        return batches * self.per_batch_s + passes * self.per_pass_s

    def alone(self, stage: str | None) -> float:
        """Return the seconds of one image that has the device for itself."""
        return self.seconds(shape(stage)[0] + 1, passes(stage))

    def added_by_step(self, stage: str | None) -> float:
        """Return the seconds that one image adds to each step of a batch, its begin and end shared over its steps."""
        return self.per_pass_s * passes(stage) / max(1, shape(stage)[0])

    def added_by(self, other: str | None, stage: str | None, *, together: bool = True, turns: int = 0) -> float:
        """Return the seconds that an image in stage `other` adds to one in `stage`.

        They share each step until the first of them ends.

        together: they are of the same model, whose batches they may share
        turns:    steps for which the one in `stage` waits before it begins
        """
        (steps, rows), own_steps = shape(other), turns + max(1, shape(stage)[0])
        shared = passes(other) if steps <= own_steps else own_steps * step_passes(rows)
        shares = together and (self.together or other == stage)
        return self.seconds(0 if shares else min(steps, own_steps), shared)
