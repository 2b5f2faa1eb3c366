"""The registry of architectures: a name and a few choices -> an ImageClassifier with its normalisation inside."""

import re
from collections.abc import Callable

import torch
from torch import nn

from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import NATIVE, Architecture, ImageClassifier
from unperturb.models.networks.imported import build_imported, is_imported
from unperturb.models.networks.residual import PreActResNet
from unperturb.models.networks.robustbench import PREFIX, load_robustbench

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
WIDENED = "preact_resnet18"  # the architecture whose width is a choice of its own
TORCHVISION = ("efficientnet_b0", "resnet18", "resnet50")
NAMES = (
    WIDENED,
    "wide_resnet_<depth>_<width>",
    *TORCHVISION,
    "robustbench:<Name>[:<dataset>:<threat>]",
)


def build(architecture: Architecture, *, pretrained: bool = False, weights: bool = True) -> ImageClassifier:
    """Return a classifier in eval mode, channels last, with fresh weights.

    With `pretrained`, torchvision's ImageNet weights (and a fresh last layer where the number of classes differs).
    A `robustbench:` name comes with its weights, unless `weights` is False: the caller then brings its own.
    Raises ConfigError for an unknown name or activation, WeightsUnavailableError for weights that cannot be had.
    """
    name = architecture.name
    if architecture.width != 1 and (name != WIDENED or not 1 / 8 <= architecture.width <= 8):
        raise ConfigError(f"width={architecture.width}: from 1/8 to 8, and of {WIDENED} alone, not {name!r}")
    if architecture.activation not in (NATIVE, *ACTIVATIONS):
        raise ConfigError(f"activation={architecture.activation!r} is not one of {NATIVE}, {', '.join(ACTIVATIONS)}")
    activation = None if architecture.activation == NATIVE else ACTIVATIONS[architecture.activation]
    if architecture.num_classes < 2 or architecture.image_size < 8:
        raise ConfigError(
            f"num_classes={architecture.num_classes} must be at least 2, "
            f"image_size={architecture.image_size} at least 8"
        )
    if name.startswith(PREFIX):
        if activation is not None:
            raise ConfigError(f"activation={architecture.activation!r}: {name} comes with its own; use {NATIVE}")
        return load_robustbench(name, image_size=architecture.image_size, weights=weights)
    if is_imported(name):
        if activation is not None or pretrained:
            raise ConfigError(f"{name} comes with its own activation and weights")
        model: ImageClassifier = build_imported(architecture)
    elif name in TORCHVISION:
        from unperturb.models.networks.torchvision import build_torchvision  # only who asks for it pays its import

        model = build_torchvision(architecture, activation=activation, pretrained=pretrained)
    elif pretrained:
        raise ConfigError(f"pretrained weights exist for {', '.join(TORCHVISION)} only, not for {name!r}")
    else:
        model = _build_residual(architecture, (activation or nn.ReLU)())
    return model.eval().to(memory_format=torch.channels_last)


def _build_residual(architecture: Architecture, activation: nn.Module) -> PreActResNet:
    wide = re.fullmatch(r"wide_resnet_([0-9]{1,4})_([0-9]{1,4})", architecture.name)
    if architecture.name == WIDENED:
        stem = round(64 * architecture.width)
        widths: tuple[int, ...] = (stem, 2 * stem, 4 * stem, 8 * stem)
        blocks = 2
    elif wide:
        depth, width = int(wide[1]), int(wide[2])
        if not 10 <= depth <= 202 or (depth - 4) % 6 or not 1 <= width <= 16:  # a card could ask for any memory
            raise ConfigError(f"{architecture.name!r}: the depth is 6n + 4 (10, 16, 22 … 202), the width 1 to 16")
        widths = (16 * width, 32 * width, 64 * width)
        blocks, stem = (depth - 4) // 6, 16
    else:
        raise ConfigError(f"architecture {architecture.name!r} is not one of {', '.join(NAMES)}")
    return PreActResNet(
        widths=widths,
        blocks=blocks,
        stem=stem,
        num_classes=architecture.num_classes,
        image_size=architecture.image_size,
        activation=activation,
        mean=architecture.mean,
        std=architecture.std,
    )
