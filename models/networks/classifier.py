"""The interface of every classifier: an architecture, and a module with `features` and `logits`."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Float

NATIVE = "native"  # the activation that the architecture was published with
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that `build` needs, as a checkpoint's card stores it.

    image_size: side in pixels of the images it takes; mean, std: per channel, for pixels in [0, 1];
    width: factor on the channels of preact_resnet18 (a wide ResNet has its own in its name);
    options: what a library builds an imported network from, beside its name.
    """

    name: str
    num_classes: int
    image_size: int = 32
    activation: str = NATIVE
    mean: tuple[float, float, float] = CIFAR10_MEAN
    std: tuple[float, float, float] = CIFAR10_STD
    width: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ConfigError for a mean or standard deviation that no pixels in [0, 1] have."""
        if not all(0 <= value <= 1 for value in self.mean):
            raise ConfigError(f"mean={self.mean} must be within 0 and 1: it is of pixels in [0, 1]")
        if not all(0 < value <= 1 for value in self.std):
            raise ConfigError(f"std={self.std} must be above 0 and at most 1: it is of pixels in [0, 1]")


class ImageClassifier(nn.Module):
    """An image classifier with its normalisation inside; images are float in [0, 1]."""

    def __init__(self, *, feature_dim: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.image_size = image_size

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return pooled penultimate activations; every subclass gives its own."""
        raise TypeError(f"{type(self).__name__} does not define features()")

    def logits(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return class scores from `features`; every subclass gives its own."""
        raise TypeError(f"{type(self).__name__} does not define logits()")

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return class scores of images in [0, 1]."""
        return self.logits(self.features(x))
