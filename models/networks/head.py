"""The projection head: a classifier's features -> embeddings; and the bank of negatives that they are compared with."""

import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Float, Int


class ProjectionHead(nn.Module):
    """Linear, BatchNorm, ReLU, Linear; embeddings of unit length (Mao et al., ICCV 2021, section 4)."""

    def __init__(self, *, feature_dim: int, hidden: int, embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(feature_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, embedding_dim),
        )

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Return the embeddings of features, each of unit length."""
        return F.normalize(self.layers(features), dim=1)


class NegativesBank(nn.Module):
    """Embeddings of training images, each of unit length, and those images' labels."""

    embeddings: Tensor
    labels: Tensor

    def __init__(self, embeddings: Float[Tensor, "bank dim"], labels: Int[Tensor, " bank"]) -> None:
        super().__init__()
        if len(embeddings) != len(labels) or len(labels) < 1:
            raise ConfigError(f"a bank of {len(embeddings)} embeddings with {len(labels)} labels")
        self.register_buffer("embeddings", F.normalize(embeddings.float(), dim=1))
        self.register_buffer("labels", labels)
