"""The vote: the mean of the class scores over a few fixed views of an image (test-time ensembling).

Views are shifts with zero padding, as in training, each beside its mirror image (Pérez et al., "Enhancing adversarial
robustness via test-time transformation ensembling", ICCV workshops 2021). Nothing is drawn and nothing optimised: the
voted classifier is one more differentiable classifier.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Float

MOST_PIXELS = 1024  # of a shift
MOST_VIEWS = 32
SIDE = 32  # of the images that the presets' shifts are for


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The views: each shift (down, right) in pixels, and where `mirrored` its mirror image."""

    shifts: tuple[tuple[int, int], ...] = ((-2, -2), (2, 2))
    mirrored: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError where there is no view, one twice, or a shift that leaves little of an image."""
        if not self.shifts:
            raise ConfigError("shifts: a vote needs at least one view")
        if len(self) > MOST_VIEWS:
            raise ConfigError(f"shifts={self.spelled()}: {len(self)} views; at most {MOST_VIEWS}")
        if len(set(self.shifts)) < len(self.shifts):
            raise ConfigError(f"shifts={self.spelled()}: a view stands there twice")
        if any(abs(pixels) > MOST_PIXELS for shift in self.shifts for pixels in shift):
            raise ConfigError(f"shifts={self.spelled()}: at most {MOST_PIXELS} pixels")

    def fitting(self, side: int) -> "Vote":
        """Return the vote; raise ConfigError where a shift leaves no more than half of an image of that side."""
        if any(2 * abs(pixels) >= side for shift in self.shifts for pixels in shift):
            raise ConfigError(
                f"shifts={self.spelled()}: under half the side of the images, {side} pixels, is what a view may move"
            )
        return self

    def scaled(self, side: int) -> "Vote":
        """Return the views for images of that side in place of SIDE: shifts in proportion, of at least one pixel."""

        def pixels(at_side: int) -> int:
            size = min(MOST_PIXELS, max(1, round(abs(at_side) * side / SIDE)))
            return size if at_side > 0 else -size if at_side < 0 else 0

        shifts = dict.fromkeys((pixels(down), pixels(right)) for down, right in self.shifts)
        return Vote(shifts=tuple(shifts), mirrored=self.mirrored)

    def __len__(self) -> int:
        """Return the number of views."""
        return len(self.shifts) * (2 if self.mirrored else 1)

    def spelled(self) -> str:
        """Return the shifts as a specification has them: `-2/-2+2/2`."""
        return "+".join(f"{down}/{right}" for down, right in self.shifts)

    def views(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch views 3 h w"]:
        """Return every view of each image, the shifted ones first."""
        shifted = [_shifted(x, down, right) for down, right in self.shifts]
        return torch.stack(shifted + [view.flip(3) for view in shifted] * self.mirrored, dim=1)

    def mean(self, logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "batch classes"]:
        """Return the mean over the views of each image, whose rows follow one another."""
        return logits.view(-1, len(self), logits.shape[1]).mean(1)

    def scores(self, classifier: nn.Module, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        """Return the mean of the classifier's scores over the views of each image."""
        return self.mean(classifier(self.views(x).flatten(0, 1)))


def parse_shifts(text: str) -> tuple[tuple[int, int], ...]:
    """Return the shifts of `-2/-2+2/2`; a number alone, as `2`, is that diagonal pair, and `0` the image as it is.

    Raises ConfigError for another form.
    """
    try:
        if text.isdecimal():
            pixels = int(text)
            return ((-pixels, -pixels), (pixels, pixels)) if pixels else ((0, 0),)
        pairs = [part.partition("/") for part in text.split("+")]
        return tuple((int(down), int(right)) for down, _, right in pairs)
    except ValueError:
        raise ConfigError(f"shifts={text!r} is neither pixels, as in 2, nor down/right+…, as in -2/-2+2/2") from None


def _shifted(x: Tensor, down: int, right: int) -> Tensor:
    """Return the images moved by whole pixels, zeros where nothing was."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    return padded[..., max(-down, 0) : max(-down, 0) + height, max(-right, 0) : max(-right, 0) + width]
