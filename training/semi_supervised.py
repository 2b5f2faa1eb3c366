"""S4L (Zhai, Oliver, Kolesnikov, Beyer, ICCV 2019, eq. 1): labels of some training images, self-supervision of all.

    loss = the classifier's loss on labelled images + w · the self-supervised loss on all of them

The self-supervised loss here is NT-Xent on a projector beside the last layer.
"""

import torch
from torch import Tensor, nn

from models.classifier import ImageClassifier
from models.contrastive import ProjectionHead, in_batch_negatives, info_nce
from models.views import make_views
from training import data
from training.classifier import ClassifierConfig, ClassifierTask
from training.contrast import POLICY, embed_together
from training.encoder import Encoder
from training.world import World

TEMPERATURE, EMBEDDING_DIM = 0.5, 128


class SemiSupervisedTask(ClassifierTask):
    """The loop's task; `model` holds the classifier and its projector. `labelled` are the first rows of `train`."""

    def __init__(
        self, config: ClassifierConfig, model: ImageClassifier, train: data.Split, held: data.Split, here: World,
        *, labelled: int,
    ) -> None:  # fmt: skip
        super().__init__(config, model, train, held, here)
        projector = ProjectionHead(
            feature_dim=model.feature_dim, hidden=model.feature_dim, embedding_dim=EMBEDDING_DIM
        ).to(here.device)
        self.model, self.labelled = Encoder(model, projector), labelled

    def classifier_of(self, model: nn.Module) -> nn.Module:
        """The backbone with its last layer."""
        assert isinstance(model, Encoder)
        return model.backbone

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of all images for the self-supervised loss, and as many labelled ones, drawn with replacement."""
        assert isinstance(self.model, Encoder)
        self.model.train()
        draw = torch.Generator().manual_seed((self.config.seed * 1000 + epoch) * 1_000_003 + step)
        rows = torch.randint(self.labelled, (len(indices),), generator=draw).to(indices.device)
        loss, figures = self.supervised(self.model.backbone, self.batch(rows, epoch), epoch)
        seeds = (self.config.seed * 1000 + epoch) * (1 << 32) + indices
        x = self.train.images[indices].float() / 255
        embeddings = embed_together(self.model, make_views(x, seeds=seeds, step=0, views=2, policy=POLICY))
        negatives, keep = in_batch_negatives(embeddings)
        own = info_nce(embeddings, negatives, temperature=TEMPERATURE, keep=keep).mean()
        return loss + self.config.self_supervised_weight * own, {**figures, "nt_xent": own.detach()}
