"""A classifier that counts its passes."""

from torch import Tensor

from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.shapes import Float


class CountingClassifier(ImageClassifier):
    """The same classifier; `forward_passes` and `backward_passes` count images."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__(
            feature_dim=classifier.feature_dim, num_classes=classifier.num_classes, image_size=classifier.image_size
        )
        self.counted = classifier
        self.forward_passes, self.backward_passes = 0, 0
        self.train(classifier.training)

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the classifier's features, counted."""
        features = self.counted.features(x)
        self.forward_passes += len(x)
        if features.requires_grad:
            features.register_hook(self._count_backward)
        return features

    def logits(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the classifier's logits."""
        return self.counted.logits(features)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_passes += len(gradient)
