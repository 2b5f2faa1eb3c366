"""pyautoattack's own driver on a saved classifier and images: what the harness's parts have to agree with."""

import sys
from pathlib import Path

import torch
from pyautoattack import AutoAttack

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    classifier, images, labels, epsilon = torch.load(folder / "in.pt", weights_only=False)
    attack = AutoAttack(classifier, norm="Linf", eps=epsilon, seed=3, version="standard", device="cpu")
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = classifier.num_classes - 1
    attack.square.n_queries = 200
    points, _ = attack.run_standard_evaluation(images, labels, batch_size=8)
    torch.save(points, folder / "out.pt")
