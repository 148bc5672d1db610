"""Randomness that belongs to the image, not to the batch.

Image i of seed s starts from the same noise and gets the same draw at step k whatever the batch size, the number of
processes, the device, or which images were sampled before: every draw has a counter-based generator of its own, keyed
by (s, i, draw), so nothing has to be replayed when a run is continued in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_START = 0  # draw number of the starting noise; step k is draw k + 1


class ImageNoise:
    """Starting noise and per-step draws of some images of one seed.

    Args:
        seed: of the whole run, not negative.
        indices: which images the batch holds, in its order.
        shape: of one image, C x H x W.
        device: where the draws are handed out; they are made on the CPU.
        starts: the images whose starting noise is taken, where that is not their own.

    Raises:
        ValueError: a negative seed or index.

    Making one costs nothing: generators come into being when a draw is asked for.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str | None = None,
        *,
        starts: Sequence[int] | None = None,
    ):
        if seed < 0:
            raise ValueError(f"seed {seed} must not be negative")
        if any(index < 0 for index in indices):
            raise ValueError(f"image numbers must not be negative: {min(indices)}")
        self.seed, self.indices, self.shape, self.device = seed, list(indices), tuple(shape), device
        self.starts = self.indices if starts is None else list(starts)
        if len(self.starts) != len(self.indices):
            raise ValueError(f"{len(self.starts)} starts for {len(self.indices)} images")

    def start(self) -> Tensor:
        """Standard normal starting noise: N x C x H x W float32."""
        return self._draw(self.starts, _START).to(self.device)

    def step(self, k: int, like: Tensor) -> Tensor:
        """Standard normal draw of the k-th step made, with the shape, device and type of ``like``.

        Raises:
            ValueError: ``like`` is a batch of another size or of other images than this object was made for.
        """
        expected = (len(self.indices), *self.shape)
        if tuple(like.shape) != expected:
            raise ValueError(f"noise was made for a batch of shape {expected}, asked for {tuple(like.shape)}")
        return self._draw(self.indices, k + 1).to(like)

    def _draw(self, indices: Sequence[int], number: int) -> Tensor:
        draws = np.empty((len(indices), *self.shape), dtype=np.float32)
        for row, index in zip(draws, indices, strict=True):
            key = np.random.SeedSequence(self.seed, spawn_key=(index, number))
            np.random.Generator(np.random.Philox(key)).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(draws)
