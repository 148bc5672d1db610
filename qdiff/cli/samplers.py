"""What samplers of all kinds of models have in common, and a progress bar for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.samplers import OnStep
from qdiff.inference import NoiseModel


class Sampler(Protocol):
    """Samples by number: the same number gives the same sample in any batch.

    Attributes:
        device: where it works.
        n_steps: calls of the noise model in a trajectory.
        rows_per_image: rows of the network's batch that an image takes; two with classifier-free guidance.
        image_shape: C x H x W of the network's input.
        context_shape: L x D of the context of a row, where the network takes one.
    """

    device: torch.device
    n_steps: int
    rows_per_image: int
    image_shape: tuple[int, int, int]
    context_shape: tuple[int, int] | None

    def __call__(self, model: NoiseModel, indices: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        """Samples ``indices`` of the seed, N x C x H x W: images, or latents."""
        ...

    def reseeded(self, seed: int) -> Sampler:
        """A sampler of the same settings, of other noise."""
        ...

    def conditions(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings of the samples' conditions and of none, each N x L x D; only where there is a context shape."""
        ...

    def facts(self) -> dict[str, Any]:
        """What decides the samples beside the network and its config, as plain values; once the model is loaded."""
        ...


def image_bar(total: int, done: int = 0, *, hidden: bool = False) -> tqdm[Any]:
    """Progress in images; it moves on within a batch too, by fractions of them. Of none there is none."""
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    options: dict[str, Any] = {
        "unit": " images",
        "desc": "sampling",
        "bar_format": layout,
        "smoothing": 0.05,
        "disable": hidden or not total,
    }
    return tqdm(total=total, initial=done, **options)


def with_bar(sampler: Sampler, model: NoiseModel, bar: tqdm[Any]) -> Callable[..., Tensor]:
    """The sampler for one model, (indices, on_step=None) -> samples, moving a bar at each model call."""

    def sample(indices: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        def both(k: int, t: float, x: Tensor) -> None:
            assert bar.total is not None  # image_bar() knows it
            bar.update(min(len(indices) / sampler.n_steps, bar.total - bar.n))  # rounding must not pass the end
            if on_step is not None:
                on_step(k, t, x)

        return sampler(model, indices, both)

    return sample
