"""A classifier that counts its passes, and flags of what makes a defense hard to judge."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.defended import DefendedClassifier, seeds_of
from unperturb.models.shapes import Float, Int


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


@contextmanager
def gradient_calls() -> Iterator[list[str]]:
    """Yield the names of autograd's entry points that are called inside the block."""
    calls: list[str] = []
    originals: dict[str, Callable[..., Any]] = {"grad": torch.autograd.grad, "backward": torch.autograd.backward}

    def recorded(name: str) -> Any:  # noqa: ANN401
        def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            calls.append(name)
            return originals[name](*arguments, **named)

        return call

    try:
        for name in originals:
            setattr(torch.autograd, name, recorded(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)


def suspicion_flags(
    defended: DefendedClassifier, x: Float[Tensor, "batch 3 h w"], labels: Int[Tensor, " batch"], *, seed: int
) -> dict[str, Any]:
    """Return what AutoAttack's checks look for (its flags_doc.md), of the defense as an ordinary caller sees it.

    randomised: scores move by more than 1e-4 (of unit L2 length) between seeds
    zero_gradients: images whose cross-entropy has no gradient when automatic differentiation goes through the purifier
    optimisation_loop: autograd is called inside a forward pass
    """
    with torch.no_grad(), gradient_calls() as calls:
        scores = [torch.nn.functional.normalize(defended(x, seed=seed + draw), dim=1) for draw in range(3)]
    spread = max(float((one - scores[0]).norm(dim=1).max()) for one in scores[1:])
    inside = x.detach().clone().requires_grad_()
    purified = defended.purifier.descend(inside, seeds=seeds_of(seed, x)).image
    loss = torch.nn.functional.cross_entropy(defended.scores(purified), labels, reduction="sum")
    zero = len(x)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, inside, allow_unused=True)
        zero = len(x) if gradient is None else int((gradient.flatten(1).abs().sum(1) == 0).sum())
    return {
        "randomised": spread > 1e-4,
        "zero_gradients": zero,
        "of_images": len(x),
        "optimisation_loop": bool(calls),
    }
