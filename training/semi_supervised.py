"""S4L (Zhai, Oliver, Kolesnikov, Beyer, ICCV 2019, eq. 1): labels of some training images, self-supervision of all.

    loss = the classifier's loss on labelled images + w · the self-supervised loss on all of them

The self-supervised loss here is NT-Xent on a projector beside the last layer.
"""

import torch
from torch import Tensor, nn

from models.classifier import ImageClassifier
from models.contrastive import ProjectionHead, in_batch_negatives, info_nce
from models.views import make_views
from training.contrast import POLICY, embed_together
from training.encoder import Encoder
from training.supervised import SupervisedTask

TEMPERATURE, EMBEDDING_DIM = 0.5, 128


class SemiSupervisedTask:
    """The loop's task: `task` on labelled images, which are the first of its training images, and NT-Xent on all.

    `model` holds the classifier and its projector.
    """

    def __init__(self, task: SupervisedTask, classifier: ImageClassifier, *, labelled: int, weight: float) -> None:
        self.task, self.labelled, self.weight = task, labelled, weight
        self.images, self.memory = task.images, task.memory
        projector = ProjectionHead(
            feature_dim=classifier.feature_dim, hidden=classifier.feature_dim, embedding_dim=EMBEDDING_DIM
        ).to(task.train.images.device)
        self.model = Encoder(classifier, projector)

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of all images for the self-supervised loss, and as many labelled ones, if there are."""
        self.model.train()
        seed = self.task.config.seed * 1000 + epoch
        draw = torch.Generator().manual_seed(seed * 1_000_003 + int(indices[0]))
        rows = torch.randperm(self.labelled, generator=draw)[: len(indices)].to(indices.device)
        loss, figures = self.task.supervised(self.model.backbone, self.task.batch(rows, epoch), epoch)
        x = self.task.train.images[indices].float() / 255
        views = make_views(x, seeds=seed * (1 << 32) + indices, step=0, views=2, policy=POLICY)
        embeddings = embed_together(self.model, views)
        negatives, keep = in_batch_negatives(embeddings)
        own = info_nce(embeddings, negatives, temperature=TEMPERATURE, keep=keep).mean()
        return loss + self.weight * own, {**figures, "nt_xent": own.detach()}

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """The classifier's figures."""
        assert isinstance(averaged, Encoder)
        return self.task.validate(averaged.backbone)
