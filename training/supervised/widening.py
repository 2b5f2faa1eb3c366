"""Net2WiderNet (Chen, Goodfellow, Shlens, ICLR 2016, arXiv 1511.05641): a wider network that computes the same.

Every channel stands k times, and what reads it shares its weight among the copies, by shares that sum to 1:

    W'[o + rO, i + sI] = a · W[o, i],  Σ_s a = 1,  E a² = 1/k

Shares are drawn for each copy of each output, so that the copies part as soon as they are trained (in the paper equal
shares and a little noise), and with the scale that fresh weights of that width would have.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.networks.registry import WIDENED, build


def widen(
    model: ImageClassifier, architecture: Architecture, factor: int, *, seed: int
) -> tuple[ImageClassifier, Architecture]:
    """Return `model` with `factor` times its channels and the same logits, and the architecture of that.

    Raises ConfigError for an architecture without a width, and for a width whose channels are not a whole number.
    """
    if architecture.name != WIDENED:
        raise ConfigError(f"widen={factor}: of {WIDENED} alone, whose width is a choice, not {architecture.name!r}")
    wide = replace(architecture, width=architecture.width * factor)
    device = next(model.parameters()).device
    widened, draw = build(wide).to(device), torch.Generator().manual_seed(seed)
    narrow = dict(model.named_parameters())
    layers = {name: module for name, module in model.named_modules() if not isinstance(module, nn.BatchNorm2d)}
    state = model.state_dict()
    stems = [one.get_parameter("stem.weight").shape[0] for one in (model, widened)]
    if stems[1] != factor * stems[0]:
        raise ConfigError(
            f"widen={factor}: width={architecture.width} has {stems[0]} channels, that times {factor} {stems[1]}"
        )
    for name, target in widened.state_dict().items():
        value = state[name]
        if name in narrow and isinstance(layers.get(name.rpartition(".")[0]), nn.Conv2d | nn.Linear):
            value = _weight(value, target.shape, draw)
        elif value.shape != target.shape:  # what BatchNorm has of each channel
            value = value.repeat(factor)
        target.copy_(value)
    return widened, wide


def _weight(weight: Tensor, shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Return a weight [out, in, ...] or bias [out] as that of the wide layer, whose shape is given."""
    weight = weight.repeat(shape[0] // weight.shape[0], *[1] * (weight.ndim - 1))
    if weight.shape == shape:
        return weight
    inputs, copies, rest = weight.shape[1], shape[1] // weight.shape[1], [1] * (weight.ndim - 2)
    noise = torch.randn(len(weight), copies, inputs, generator=draw) * copies**-0.5
    shares: Tensor = (1 / copies + noise - noise.mean(1, keepdim=True)).flatten(1).to(weight.device)
    return weight.repeat(1, copies, *rest) * shares.view(*shares.shape, *rest)
