"""torchvision's classifiers for larger images, as ImageClassifiers."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torchvision import models as zoo

from unperturb.models.cache import cache_folder
from unperturb.models.errors import WeightsUnavailableError
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.shapes import Float


class TorchvisionClassifier(ImageClassifier):
    """A network of torchvision's without its last layer, that layer, and the normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: Architecture, body: nn.Module, linear: nn.Linear, dropout: float) -> None:
        super().__init__(
            feature_dim=linear.in_features,
            num_classes=linear.out_features,
            image_size=architecture.image_size,
        )
        self.register_buffer("mean", torch.tensor(architecture.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(architecture.std).view(1, 3, 1, 1))
        self.linear: nn.Module = linear
        self.body, self.dropout = body, nn.Dropout(dropout)

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return pooled activations before the last linear layer; `x` in [0, 1]."""
        return cast(Tensor, self.body((x - self.mean) / self.std))

    def logits(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the last linear layer's class scores (after dropout in training, where the network has one)."""
        return cast(Tensor, self.linear(self.dropout(features)))


def build_torchvision(
    architecture: Architecture, *, activation: Callable[[], nn.Module] | None, pretrained: bool
) -> TorchvisionClassifier:
    """Return the network by name; `activation` replaces its own where given.

    With `pretrained`, torchvision's ImageNet weights, and a fresh last layer where the number of classes differs.
    Raises WeightsUnavailableError where they are not in the cache and cannot be downloaded.
    """
    network: nn.Module = zoo.get_model(architecture.name, weights=None)
    if pretrained:
        weights = zoo.get_model_weights(architecture.name).DEFAULT
        folder = cache_folder("torchvision") / "checkpoints"
        try:
            network.load_state_dict(weights.get_state_dict(model_dir=str(folder), progress=False, check_hash=True))
        except (OSError, RuntimeError) as error:
            raise WeightsUnavailableError(
                f"torchvision's weights {weights} could not be fetched ({error}); without a network, place the file of "
                f"{weights.url} in {folder}"
            ) from error
    dropout = 0.0
    if isinstance(network, zoo.EfficientNet):
        linear, dropout = cast(nn.Linear, network.classifier[1]), cast(nn.Dropout, network.classifier[0]).p
        network.classifier = nn.Sequential()
    else:
        linear = cast(nn.Linear, network.fc)
        network.fc = nn.Sequential()
    if linear.out_features != architecture.num_classes:
        linear = nn.Linear(linear.in_features, architecture.num_classes)
    if activation is not None:
        _replace_activations(network, activation)
    return TorchvisionClassifier(architecture, network, linear, dropout)


def _replace_activations(network: nn.Module, activation: Callable[[], nn.Module]) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.ReLU | nn.SiLU):
            setattr(network, name, activation())
        else:
            _replace_activations(child, activation)
