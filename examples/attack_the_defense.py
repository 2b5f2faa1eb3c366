"""Attack the defended classifier, through every step of its purifier, with an attack of a third party's library.

python examples/attack_the_defense.py [IMAGES.npz with x uint8 [n, 3, h, w] and y]

pyautoattack comes with RobustBench; ART, Foolbox and torchattacks take the same module.
"""

import sys

import numpy as np
import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor

import unperturb

EPSILON, ITERATIONS, PRESET = 8 / 255, 10, "default"


def main(file: str = "") -> None:
    """Print how many images withstand, bare and defended; the worst case of an image is over all its attacks."""
    checkpoint = unperturb.load("default")
    defended = unperturb.defend(checkpoint, preset=PRESET, gradient="full")
    if file:
        stored = np.load(file)
        x, y = torch.from_numpy(stored["x"]).float() / 255, torch.from_numpy(stored["y"]).long()
    else:  # no data at hand: images of noise, with the labels that the classifier gives them
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        y = checkpoint.classifier(x).argmax(1)

    for name, model in (("bare", checkpoint.classifier), ("defended", defended)):
        attack = APGDAttack(model, norm="Linf", eps=EPSILON, n_iter=ITERATIONS, device="cpu")
        attacked: Tensor = attack.perturb(x, y)
        right = model(attacked).argmax(1).eq(y)
        print(f"{name:>8}: {int(right.sum())} of {len(y)} withstand {ITERATIONS} steps of APGD-CE at {EPSILON:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
