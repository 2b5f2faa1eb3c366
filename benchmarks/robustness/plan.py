"""What is done to every model and defense of a run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.budgets import Budget
from unperturb.benchmarks.robustness.surrogate import Surrogate
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.models.networks.generator import NoiseGenerator


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what is done to every model and purifier.

    shard: (number from 0, count): every count-th chunk of `chunk` images, from the number on
    panel: images that the record shows
    generator, surrogate: the noise generator and the other classifier, for the attacks of these names
    """

    threat: Threat
    budget: Budget
    attacks: tuple[str, ...]
    seed: int = 0
    chunk: int = 128
    shard: tuple[int, int] = (0, 1)
    panel: int = 6
    generator: NoiseGenerator | None = None
    surrogate: Surrogate | None = None

    def chunks(self, n: int) -> list[Tensor]:
        """Return the image numbers of every chunk of this shard."""
        return list(torch.arange(n).split(self.chunk))[self.shard[0] :: self.shard[1]]
