"""Small classifiers whose pooled features stand in for Inception's in a Fréchet distance, one for each data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ddim.pretrained import describe_differences
from ddim.untrusted import UntrustedFileError, open_safetensors
from qdiff.evaluation.frechet import FeatureAccumulator, FeatureStatistics, equal_mixture
from qdiff.files import write_atomically

Layers = tuple[tuple[int, int, int], ...]
"""(channels in, channels out, stride) of each convolution."""


class Classifier(nn.Module):
    """Convolutions with batch norm and ReLU, a mean over positions, one linear layer.

    Takes what the diffusion models are trained on: images scaled to [-1, 1]. Always in eval mode when it comes from
    :meth:`load`.

    Attributes:
        layers, classes: of each data set's classifier.
    """

    layers: ClassVar[Layers]
    classes: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU())
                for before, after, stride in self.layers
            )
        )
        self.head = nn.Linear(self.layers[-1][1], self.classes)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read weights, of any float type, from a safetensors file and compute with them in float32.

        Raises:
            ValueError: the file is missing, damaged, or holds another network.
        """
        path = _existing(path)
        model = cls()
        try:
            with open_safetensors(path) as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if differences := describe_differences(weights, model.state_dict()):  # batch norm would take less
                raise UntrustedFileError("; ".join(differences))
            model.load_state_dict(weights)
            if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
                raise UntrustedFileError("NaN or infinite weights")
        except UntrustedFileError as error:
            raise ValueError(f"{path}: not the weights of a {cls.__name__}: {error}") from None
        return model.eval().requires_grad_(False).to(device)

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.layers[0][0]

    @property
    def feature_size(self) -> int:
        """D, the length of a feature vector."""
        return self.head.in_features

    def features(self, x: Tensor) -> Tensor:
        """N x C x H x W in [-1, 1] -> N x D."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W in [-1, 1] -> N class scores each."""
        return self.head(self.features(x))


class FashionClassifier(Classifier):
    """Of Fashion-MNIST: grey images, ten classes, 128 features."""

    layers = ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
    classes = 10


class EmojiClassifier(Classifier):
    """Of the emoji of :mod:`ldm.data.emoji`: colour images, nine classes, 128 features."""

    layers = ((3, 24, 1), (24, 48, 2), (48, 96, 2), (96, 128, 2), (128, 128, 1))
    classes = 9


NETWORKS: dict[str, type[Classifier]] = {"fashion_mnist": FashionClassifier, "emoji64": EmojiClassifier}


def load_classifier(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """Whichever classifier a file holds: its header says which, and without a word it is Fashion-MNIST's.

    Raises:
        ValueError: as :meth:`Classifier.load`, or a network that this version does not know.
    """
    path = _existing(path)
    try:
        with open_safetensors(path) as file:
            name = (file.metadata() or {}).get("network", "fashion_mnist")
    except UntrustedFileError as error:
        raise ValueError(f"{path}: not the weights of a classifier: {error}") from None
    if name not in NETWORKS:
        raise ValueError(f"{path}: holds the network {name[:80]!r}; known are {', '.join(NETWORKS)}")
    return NETWORKS[name].load(path, device)


def save_classifier(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write weights, matrices and convolutions in float16. Biases and the variances of batch norm are few and stay.

    Args:
        about: header of the file; ``network`` in it names the classifier for :func:`load_classifier`.
    """
    rounded = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in weights.items()}
    write_atomically(path, save(rounded, metadata=dict(about)))


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such classifier file")
    return path


def model_input(classifier: Classifier, images: Tensor) -> Tensor:
    """Images, floats in [0, 1] or bytes, as floats in [-1, 1] on the classifier's device.

    Raises:
        ValueError: images of another shape.
    """
    if images.ndim != 4 or images.shape[1] != classifier.channels:
        expected = f"N x {classifier.channels} x H x W"
        raise ValueError(f"images of shape {tuple(images.shape)}; the classifier takes {expected}")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return (2 * images - 1).to(classifier.head.weight.device)


def _batches(classifier: Classifier, images: Tensor, size: int) -> Iterator[Tensor]:
    return (model_input(classifier, batch) for batch in images.split(size))


@torch.no_grad()
def pooled_features(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features of images: N x C x H x W, float in [0, 1] or uint8 -> N x D on the CPU.

    Raises:
        ValueError: images of another shape.
    """
    rows = [classifier.features(batch).cpu() for batch in _batches(classifier, images, batch_size)]
    return torch.cat(rows) if rows else torch.empty(0, classifier.feature_size)


@torch.no_grad()
def guesses(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """The class with the highest score, of each image: N int64, on the CPU."""
    return torch.cat([classifier(batch).argmax(1).cpu() for batch in _batches(classifier, images, batch_size)])


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of images whose highest score is at their label."""
    return float((guesses(classifier, images, batch_size) == labels.cpu()).double().mean())


def image_statistics(classifier: Classifier, images: Tensor, name: str, batch_size: int = 500) -> FeatureStatistics:
    """Mean and covariance of the features of a set of images, as :func:`pooled_features` takes them.

    Args:
        name: what the set is, for files and messages.
    """
    accumulator = FeatureAccumulator(classifier.feature_size)
    for part in images.split(20 * batch_size):
        accumulator.add(pooled_features(classifier, part, batch_size))
    return accumulator.result(name)


def balanced_statistics(
    classifier: Classifier, images: Tensor, labels: Tensor, name: str, batch_size: int = 500
) -> FeatureStatistics:
    """The same with every class weighing equally, however many images it has.

    That is what a model is compared with that is asked for all classes equally often.

    Raises:
        ValueError: a class of which there are fewer than two images.
    """
    return equal_mixture(
        [image_statistics(classifier, images[labels == label], "", batch_size) for label in labels.unique()], name
    )
