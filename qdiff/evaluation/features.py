"""A small Fashion-MNIST classifier whose pooled features stand in for Inception's in a Fréchet distance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qdiff.evaluation.frechet import FeatureAccumulator, FeatureStatistics

LAYERS = ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
"""(channels in, channels out, stride) of each convolution."""

CLASSES = 10
FEATURES = LAYERS[-1][1]


class FashionClassifier(nn.Module):
    """Five convolutions with batch norm and ReLU, a mean over positions, one linear layer.

    Takes what the diffusion models are trained on: grey images scaled to [-1, 1]. Always in eval mode when it comes
    from :meth:`load`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU())
                for before, after, stride in LAYERS
            )
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> FashionClassifier:
        """Read weights, of any float type, from a safetensors file and compute with them in float32.

        Raises:
            ValueError: the file is missing, damaged, or holds another network.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such classifier file")
        model = cls()
        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path}: not the weights of a {cls.__name__}: {error}") from None
        return model.eval().requires_grad_(False).to(device)

    def features(self, x: Tensor) -> Tensor:
        """N x 1 x H x W in [-1, 1] -> N x 128."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """N x 1 x H x W in [-1, 1] -> N x 10 class scores."""
        return self.head(self.features(x))


def _batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Batches as float in [-1, 1], from floats in [0, 1] or bytes."""
    if images.ndim != 4 or images.shape[1] != LAYERS[0][0]:
        raise ValueError(f"images of shape {tuple(images.shape)}; the classifier takes N x 1 x H x W")
    for batch in images.split(size):
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
        yield 2 * batch - 1


@torch.no_grad()
def pooled_features(classifier: FashionClassifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features of images on the classifier's device: N x 1 x H x W, float in [0, 1] or uint8 -> N x 128 on the CPU.

    Raises:
        ValueError: images of another shape.
    """
    device = classifier.head.weight.device
    rows = [classifier.features(batch.to(device)).cpu() for batch in _batches(images, batch_size)]
    return torch.cat(rows) if rows else torch.empty(0, FEATURES)


@torch.no_grad()
def accuracy(classifier: FashionClassifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of images whose highest score is at their label."""
    device = classifier.head.weight.device
    guesses = [classifier(batch.to(device)).argmax(1).cpu() for batch in _batches(images, batch_size)]
    return float((torch.cat(guesses) == labels.cpu()).double().mean())


def image_statistics(
    classifier: FashionClassifier, images: Tensor, name: str, batch_size: int = 500
) -> FeatureStatistics:
    """Mean and covariance of the features of a set of images, as :func:`pooled_features` takes them.

    Args:
        name: what the set is, for files and messages.
    """
    accumulator = FeatureAccumulator(FEATURES)
    for part in images.split(20 * batch_size):
        accumulator.add(pooled_features(classifier, part, batch_size))
    return accumulator.result(name)
