"""What every classifier of this project offers: `features`, then `logits`."""

from torch import Tensor, nn

from unperturb.models.shapes import Float


class ImageClassifier(nn.Module):
    """An image classifier with its normalisation inside; images are float in [0, 1]."""

    def __init__(self, *, feature_dim: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.image_size = image_size

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Pooled penultimate activations; every subclass gives its own."""
        raise TypeError(f"{type(self).__name__} does not define features()")

    def logits(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Class scores from `features`; every subclass gives its own."""
        raise TypeError(f"{type(self).__name__} does not define logits()")

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores of images in [0, 1]."""
        return self.logits(self.features(x))
