"""DeACL (Zhang et al., ECCV 2022, arXiv 2207.10899): a robust student of a frozen, non-robust teacher.

    x_adv = the image moved so that cos(student, teacher(x)) falls
    loss  = -cos(student(x), teacher(x)) - γ · cos(student(x_adv), student(x)),  γ = 2

All three are the backbone's features; the student begins as the teacher.
"""

import copy

import torch
from torch import Tensor, nn

from unperturb.models.attacks.instance import away_from
from unperturb.models.attacks.pgd import evaluating
from unperturb.training.contrastive.contrast import Contrast, ContrastiveBatch, Loss
from unperturb.training.contrastive.encoder import Encoder

ATTACKED_WEIGHT = 2.0


class DeACL:
    """The method; see SimCLR."""

    def __init__(self, contrast: Contrast, encoder: Encoder) -> None:
        self.contrast, self.encoder = contrast, encoder
        self.model: nn.Module = encoder
        self.memory: nn.Module = copy.deepcopy(encoder).eval().requires_grad_(False)
        encoder.projector.requires_grad_(False)  # no part of the loss; it goes on as the teacher's

    def loss(self, batch: ContrastiveBatch) -> Loss:
        """Return the mean loss of a batch."""
        teacher, student = self.memory, self.encoder
        assert isinstance(teacher, Encoder)
        x = self.contrast.weakly(batch)
        with torch.no_grad():
            aims = teacher.features(x).float()
        with evaluating(student):
            objective = away_from(student.features, aims, distance="cos")
            attacked = self.contrast.attack.run(x, objective, seeds=batch.seeds).image
        clean, moved = student.features(torch.cat((x, attacked))).float().chunk(2)
        near, stable = _cosine(clean, aims), _cosine(moved, clean)
        return Loss(-near - ATTACKED_WEIGHT * stable, {"near": near.detach(), "stable": stable.detach()})


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(first, second, dim=1).mean()
