"""Encoders of conditions: what cross-attention in the UNet attends to (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ClassEmbedder(nn.Module):
    """A learned vector for each class, one token wide. The last class stands for "no condition".

    Args:
        embed_dim: width of the vectors.
        n_classes: how many there are, the unconditional one included.
        key: under which name a batch holds its class numbers.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class"):
        super().__init__()
        self.n_classes, self.key = n_classes, key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """N class numbers, under ``key`` -> N x 1 x embed_dim.

        Raises:
            ValueError: no such key, or a number that is not a class.
        """
        if self.key not in batch:
            raise ValueError(f"the batch has no '{self.key}', only {', '.join(batch) or 'nothing'}")
        classes = batch[self.key]
        if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) >= self.n_classes):
            raise ValueError(f"class numbers must lie between 0 and {self.n_classes - 1}: {classes.tolist()}")
        return self.embedding(classes.to(self.embedding.weight.device))[:, None]

    def unconditional(self, count: int) -> Tensor:
        """The embedding of "no condition", ``count`` times: count x 1 x embed_dim."""
        return self({self.key: torch.full((count,), self.n_classes - 1)})
