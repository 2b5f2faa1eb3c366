"""S4L (Zhai, Oliver, Kolesnikov, Beyer, ICCV 2019, eq. 1): labels of some training images, self-supervision of all.

    loss = the classifier's loss on labelled images + w · the self-supervised loss on all of them

The self-supervised loss here is NT-Xent on a projector beside the last layer.
"""

import torch
from torch import Tensor, nn

from unperturb.models.contrastive.loss import info_nce
from unperturb.models.contrastive.views import make_views
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.head import ProjectionHead
from unperturb.training import seeds
from unperturb.training.contrastive.contrast import POLICY, embed_together
from unperturb.training.contrastive.encoder import Encoder
from unperturb.training.contrastive.false_negatives import FalseNegativeConfig, Negatives
from unperturb.training.supervised.base import SupervisedTask
from unperturb.training.world import World

TEMPERATURE, EMBEDDING_DIM = 0.5, 128


class SemiSupervisedTask:
    """The loop's task: `task` on labelled images, which are the first of its training images, and NT-Xent on all.

    `model` holds the classifier and its projector, `memory` the task's and the detector of false negatives.
    """

    def __init__(
        self,
        task: SupervisedTask,
        classifier: ImageClassifier,
        config: FalseNegativeConfig,
        here: World,
        *,
        labelled: int,
        weight: float,
    ) -> None:
        self.task, self.labelled, self.weight, self.images = task, labelled, weight, task.images
        self.negatives = Negatives(config, task.images, here)
        self.memory = nn.ModuleDict({"task": task.memory, "false_negatives": self.negatives.detector})
        projector = ProjectionHead(
            feature_dim=classifier.feature_dim, hidden=classifier.feature_dim, embedding_dim=EMBEDDING_DIM
        ).to(task.train.images.device)
        self.model = Encoder(classifier, projector)

    def loss(self, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the self-supervised loss of a batch of all images, and that of as many labelled ones, if there are."""
        self.model.train()
        seed = self.task.config.seed
        draw = seeds.of_step(seed=seed, epoch=epoch, step=step, stream=1)
        rows = torch.randperm(self.labelled, generator=draw)[: len(indices)].to(indices.device)
        loss, figures = self.task.supervised(self.model.backbone, self.task.batch(rows, epoch, step), epoch)
        x = self.task.train.images[indices].float() / 255
        own = seeds.of_images(indices, seed=seed, epoch=epoch)
        views = make_views(x, seeds=own, step=0, views=2, policy=POLICY)
        embeddings = embed_together(self.model, views)
        found, negatives = self.negatives.found(embeddings, self.task.train.labels[indices], indices, epoch)
        own = info_nce(embeddings, negatives, temperature=TEMPERATURE, keep=found.keep).mean()
        figures |= {"nt_xent": own.detach(), **self.negatives.figures(found)}
        return loss + self.weight * own, figures

    def validate(self, averaged: nn.Module) -> dict[str, int | float]:
        """Return the classifier's figures."""
        assert isinstance(averaged, Encoder)
        return self.task.validate(averaged.backbone)
