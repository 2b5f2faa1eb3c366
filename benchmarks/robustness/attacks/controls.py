"""Run the controls, which are no attack on the image: noise of the same size, and hostile neighbours in the batch."""

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.scene import Scene, cross_entropy_loss
from unperturb.models import philox
from unperturb.models.shapes import Float, Int

NOISE_STREAM, MATE_STREAM = 0x4015E, 0x3A7E


def signs(
    x: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"], *, epsilon: float
) -> Float[Tensor, "batch 3 h w"]:
    """The images under random signs of size epsilon, in [0, 1]."""
    draws = philox.uniform(seeds, 0, NOISE_STREAM, x[0].numel()).view_as(x)
    return (x + epsilon * (draws - 0.5).sign()).clamp(0, 1)


def noise(scene: Scene) -> Tensor:
    """The control: random signs of size epsilon (L-infinity), or a Gaussian direction of length epsilon (L2)."""
    if scene.threat.norm == "linf":
        return signs(scene.x, scene.seeds, epsilon=scene.threat.epsilon)
    direction = philox.gaussian(scene.seeds, 0, NOISE_STREAM, scene.x[0].numel()).view_as(scene.x)
    length = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return scene.project(scene.x + scene.threat.epsilon * direction / length)


def batchmate(scene: Scene) -> tuple[Tensor, Tensor]:
    """The attacker owns the other images of the batch: which victims, themselves unchanged, are misclassified.

    The mates begin as random images and climb the victim's cross-entropy through the full gradient; a defense without
    a gradient towards them is left with the random ones. Returns the unchanged images, and the mask of broken ones.
    """
    mates, shape = scene.budget.mates, scene.x.shape[1:]
    broken = []
    for row in range(len(scene.x)):
        victim = scene.select(torch.tensor([row], device=scene.x.device))
        seeds = victim.seeds * (1 << 12) + torch.arange(mates, device=scene.x.device)
        owned = philox.uniform(seeds, 0, MATE_STREAM, shape.numel()).view(mates, *shape)
        fallen = _victim_falls(victim, owned)
        for _ in range(scene.budget.mate_steps):
            if fallen:
                break
            owned = owned.detach().requires_grad_()
            logits = victim.opened().logits(torch.cat((victim.x, owned)))
            if not logits.requires_grad:
                break  # there is no gradient to follow
            loss = cross_entropy_loss(logits[:1], victim.labels)
            (gradient,) = torch.autograd.grad(loss.sum(), owned)
            if not gradient.any():
                break  # the victim's answer does not depend on them
            owned = (owned + 0.1 * gradient.sign()).clamp(0, 1).detach()
            fallen = _victim_falls(victim, owned)
        broken.append(fallen)
    return scene.x, torch.tensor(broken, device=scene.x.device)


def _victim_falls(victim: Scene, mates: Tensor) -> bool:
    with torch.no_grad():
        logits = victim.logits(torch.cat((victim.x, mates.detach())))
    return bool(logits[0].argmax() != victim.labels[0])
