"""A purifier of one's own under every attack of the harness that applies, beside the bare classifier.

python examples/own_purifier.py [FOLDER for what has been computed]
"""

import sys

import torch
from torch import Tensor

import unperturb
from unperturb.benchmarks import evaluate


class Smoother:
    """One step that makes an image smoother: an object with `purify` is all that it takes."""

    def __init__(self, strength: float = 0.3) -> None:
        self.strength = strength

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return the images [n, 3, h, w], each drawn towards its own 3 x 3 mean."""
        mean = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return x + self.strength * (mean - x)


def main(store: str | None = None) -> None:
    """Attack the shipped classifier behind the smoother, on noise: no figure of anything, but the whole way."""
    checkpoint = unperturb.load("default")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = checkpoint.classifier(images).argmax(1)
    report = evaluate(checkpoint, images, labels, purifier=Smoother(), attacks="fast", budget="fast", store=store)
    print(report.to_markdown())


if __name__ == "__main__":
    main(*sys.argv[1:])
