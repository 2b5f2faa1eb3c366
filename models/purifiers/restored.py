"""What a checkpoint's purifier makes of an image, or its restorer, is what is classified.

No steps, no loss, nothing random: one more network in front of the classifier.
"""

import torch

from unperturb.models.attacks.projected_gradient import Descent, Objective, ProjectedGradient
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.restorer import Restorer
from unperturb.models.purifiers.base import Purifier, lacking
from unperturb.models.shapes import Float, Int


class Restored(Purifier):
    """Takes off what the restorer does, `times` times over, within 2 epsilon; an autoencoder draws the image, once."""

    def __init__(self, classifier: ImageClassifier, restorer: Restorer, *, times: float = 1.0) -> None:
        if not 0 <= times < float("inf"):
            raise ConfigError(f"times={times} must be a number of at least 0")
        loop = ProjectedGradient(direction="descend", epsilon=restorer.card.reach(times), step_size=0.0, steps=0)
        super().__init__(classifier, loop)
        self.restorer, self.times = restorer.eval(), times

    def objective(self, x: Float[torch.Tensor, "batch 3 h w"], seeds: Int[torch.Tensor, " batch"]) -> Objective:
        """Return an objective of zero: there is no loss."""
        return lambda iterate, _: iterate.new_zeros(len(iterate))

    def descend(
        self, x: Float[torch.Tensor, "batch 3 h w"], *, seeds: Int[torch.Tensor, " batch"], unrolled: bool = False
    ) -> Descent:
        """Return the restored images; with `unrolled`, with their gradient."""
        with torch.set_grad_enabled(unrolled and torch.is_grad_enabled()):
            return Descent(self.restorer.restored(x, factor=self.times), x.new_zeros((0, len(x))))


def restored_of(checkpoint: Checkpoint, *, times: float = 1.0) -> Restored:
    """Return the purifier of a checkpoint; raise CheckpointError where it has neither purifier nor restorer."""
    network = checkpoint.purifier or checkpoint.restorer
    if network is None:
        raise CheckpointError(lacking("purifier", f"checkpoint {checkpoint.card.id!r}"))
    return Restored(checkpoint.classifier, network, times=times)
