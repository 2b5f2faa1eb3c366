"""Seeds of a run: functions of its seed, the epoch and the step alone, so that a resumed run draws the same."""

import torch
from torch import Tensor

from unperturb.models.shapes import Int

EPOCHS = 1000  # of one seed, before the next seed's begin
SEEDS = 2_000_000  # a run's seed is below; more would not leave 32 bits of 63 for the images


def order(images: int, *, seed: int, epoch: int, attempt: int = 0) -> Int[Tensor, " images"]:
    """Return the order of the training images in an epoch; `attempt` counts how often the run has gone back."""
    draw = torch.Generator().manual_seed(seed * 100_003 + epoch + attempt * 7_919_000_003)
    return torch.randperm(images, generator=draw)


def of_images(indices: Int[Tensor, " batch"], *, seed: int, epoch: int) -> Int[Tensor, " batch"]:
    """Return one seed per training image of `indices`: of its views, its random start, its noise."""
    return (seed * EPOCHS + epoch) * (1 << 32) + indices


def of_step(*, seed: int, epoch: int, step: int, stream: int = 0) -> torch.Generator:
    """Return a CPU generator for what a step draws once for its batch; `stream` keeps two uses in one step apart."""
    return torch.Generator().manual_seed((seed * EPOCHS + epoch) * 1_000_003 + step + stream * 15_485_863_000_003)
