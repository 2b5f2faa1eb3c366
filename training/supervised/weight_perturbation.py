"""Adversarial weight perturbation (Wu, Xia, Wang, NeurIPS 2020, eqs. 9 and 10): the loss at the worst weights nearby.

    v_l = γ · ‖w_l‖ · ∇_l / ‖∇_l‖  for each layer l, ∇ the gradient of the loss of the attacked batch at w

The weights are trained by the gradient at w + v, and stay w.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unperturb.models.attacks.pgd import Classify


def at_worst_weights(model: nn.Module, loss_of: Callable[[Classify], Tensor], *, gamma: float) -> Classify:
    """Return a forward pass of `model` at w + v; its gradient is that with respect to w.

    `loss_of` maps a forward pass to the mean loss of the attacked batch. Layers are weights with two sides or more;
    BatchNorm's statistics follow the pass at w + v alone.
    """
    layers = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and weight.ndim > 1}
    spared = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = loss_of(lambda x: functional_call(model, spared, (x,)))
    slopes = torch.autograd.grad(loss, list(layers.values()))
    moved = {
        name: weight + gamma * weight.detach().norm() * slope / slope.norm().clamp(min=1e-12)
        for (name, weight), slope in zip(layers.items(), slopes, strict=True)
    }
    return lambda x: functional_call(model, moved, (x,))
