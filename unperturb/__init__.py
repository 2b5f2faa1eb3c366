"""Test-time defense of image classifiers: a reverse attack before the classifier, served, trained and measured.

    import unperturb

    checkpoint = unperturb.load("default")
    model = unperturb.defend(checkpoint)            # images [n, 3, h, w] in [0, 1] -> logits [n, classes]
    purified, trace = unperturb.purify(checkpoint, images)

The names of `__all__` are the public API: they keep their meaning from one release to the next. Nothing heavy is
imported before it is used.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import torch
    from torch import Tensor

    from unperturb.models.checkpoints.card import Card
    from unperturb.models.checkpoints.store import Checkpoint
    from unperturb.models.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        UnperturbError,
        WeightsUnavailableError,
    )
    from unperturb.models.purifiers.base import Purified
    from unperturb.models.purifiers.defended import DefendedClassifier, Gradient

_WHERE = {
    "Card": "unperturb.models.checkpoints.card",
    "Checkpoint": "unperturb.models.checkpoints.store",
    "CheckpointError": "unperturb.models.errors",
    "ConfigError": "unperturb.models.errors",
    "DataError": "unperturb.models.errors",
    "DefendedClassifier": "unperturb.models.purifiers.defended",
    "Purified": "unperturb.models.purifiers.base",
    "UnperturbError": "unperturb.models.errors",
    "WeightsUnavailableError": "unperturb.models.errors",
}

__all__ = [
    "Card",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DefendedClassifier",
    "Purified",
    "UnperturbError",
    "WeightsUnavailableError",
    "__version__",
    "defend",
    "load",
    "presets",
    "purify",
]


def load(name_or_folder: "str | os.PathLike[str]", *, device: "str | torch.device" = "cpu") -> "Checkpoint":
    """Load a shipped checkpoint by name ("default"), or a checkpoint's folder.

    Returns the classifier, its purifier's parts and the card, float32, frozen, in eval mode, on `device`. No code from
    the folder is run. On a GPU PyTorch's TF32 is switched off, for the whole process: float32 is float32. Raises
    CheckpointError naming the file and its fault, ConfigError for a device that is not there.
    """
    from unperturb.models.checkpoints import store

    return store.load(name_or_folder, device=device)


def presets() -> tuple[str, ...]:
    """Return the names of the purifier's presets, the default first."""
    from unperturb.models.purifiers.reverse_attack import PRESETS

    return tuple(PRESETS)


def defend(
    checkpoint: "Checkpoint", *, preset: str = "default", seed: int = 0, gradient: "Gradient" = "full"
) -> "DefendedClassifier":
    """Return the classifier behind its purifier as one module: what the service answers, and what an attack is given.

    `model(images)` maps floats in [0, 1] [batch, 3, height, width] of the card's image size to logits
    [batch, classes], which are those of the service for the same preset and seed. The module stays in eval mode, and no
    image's result depends on the others.

    gradient: what a backward pass sees of the purifier: "full", every step of it (double backward: about 20 forward
        passes a step); "bpda", the identity (Athalye et al. 2018); "none": the scores carry no gradient.

    Raises ConfigError for an unknown preset or gradient, CheckpointError where there is no head to purify with.
    """
    from unperturb.models.purifiers.defended import defend as behind
    from unperturb.models.purifiers.reverse_attack import preset as configuration

    return behind(checkpoint, configuration(preset), seed=seed, gradient=gradient)


def purify(checkpoint: "Checkpoint", images: "Tensor", *, preset: str = "default", seed: int = 0) -> "Purified":
    """Purify images, floats in [0, 1] [batch, 3, height, width] of the card's image size.

    Returns the purified images, within the preset's epsilon of the received ones and in [0, 1], and the trace of their
    losses and distances; neither carries a gradient. Raises ConfigError for an unknown preset or values outside [0, 1],
    CheckpointError where the checkpoint has no head.
    """
    from unperturb.models.errors import ConfigError
    from unperturb.models.purifiers.defended import require_images

    require_images(images, checkpoint.classifier)
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):  # NaN is refused too
        low, high = float(images.min()), float(images.max())
        raise ConfigError(f"images from {low:g} to {high:g}: pixels are needed in [0, 1]; divide 8-bit ones by 255")
    return defend(checkpoint, preset=preset, gradient="none").purify(images, seed=seed)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public class or error, or the version, when it is asked for."""
    if name == "__version__":
        return metadata.version("unperturb")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'unperturb' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
