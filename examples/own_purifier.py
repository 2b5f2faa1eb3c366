"""A purifier of one's own under the harness's attacks: steps that lower an image's total variation.

python examples/own_purifier.py [FOLDER for the results]
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import unperturb
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.benchmarks.robustness.evaluation import Evaluation, Plan
from unperturb.models.attacks.projected_gradient import Objective, ProjectedGradient
from unperturb.models.purifiers.base import Purifier


class Smoother(Purifier):
    """The one loop with an objective of its own; everything else, its gradient too, is the base class's."""

    def objective(self, x: Tensor, seeds: Tensor) -> Objective:
        """Return the total variation of each iterate [batch]; an image's loss depends on that image alone."""
        return lambda iterate, _: torch.stack([iterate.diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3)]).sum(0)


def main(out: Path = Path("results")) -> None:
    """Attack the shipped classifier behind the smoother, on noise; load_images (robustness/data.py) reads real ones."""
    checkpoint = unperturb.load("default")
    loop = ProjectedGradient(direction="descend", epsilon=4 / 255, step_size=2 / 255, steps=2, ramp=1e-3)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = EvaluationSet(images, checkpoint.classifier(images).argmax(1), "noise", "none")
    plan = Plan(
        dataset="noise",
        threat=Threat(norm="linf", epsilon=8 / 255),
        budget=replace(BUDGETS["fast"], apgd_steps=3),
        attacks=("noise", "bpda-apgd-ce", "unrolled"),
        chunk=4,
    )
    evaluation = Evaluation(
        checkpoint, lambda it: Smoother(it.classifier, loop), data, plan, folder=out, device=torch.device("cpu")
    )
    figures = evaluation.run()["figures"]
    for name, attack in figures["attacks"].items():
        print(f"{name:>14}: {attack['accuracy']:.0%} of {attack['n']} withstand")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
