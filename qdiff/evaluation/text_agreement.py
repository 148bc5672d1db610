"""Whether images show what their captions say, in the eyes of a classifier: the group, and the very thing.

The thing is recognised by its neighbours: among images whose captions are known, which is nearest in the classifier's
features? Distances are Mahalanobis', under the covariance of the known images' features: a difference counts by how
much such images differ in that direction, so that the few directions which tell groups apart do not drown those which
tell things of a group apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ddim.untrusted import open_safetensors, parse_json, reason
from qdiff.evaluation.features import Classifier, guesses, pooled_features
from qdiff.files import write_atomically

SMALLEST_VARIANCE = 1e-4  # of the largest one; below that, directions are taken to be as wide as that
ROWS_AT_ONCE = 500
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}  # of groups and things in a file


@dataclass(frozen=True)
class KnownImages:
    """Images whose captions are known, as a classifier sees them.

    Attributes:
        features: N x D float32, the classifier's.
        labels: N int64, their groups.
        bases: N int64, equal for variants of one thing, such as skin tones.
        captions: N different ones.
        classifier: SHA-256 of the file of its weights.
    """

    features: Tensor
    labels: Tensor
    bases: Tensor
    captions: tuple[str, ...]
    classifier: str

    def __post_init__(self) -> None:
        count = len(self.captions)
        if self.features.ndim != 2 or not len(self.features) == len(self.labels) == len(self.bases) == count:
            raise ValueError(f"{count} captions do not belong to features of shape {tuple(self.features.shape)}")
        if len(set(self.captions)) < count:
            raise ValueError("a caption is there twice: it would not say which image is meant")

    @classmethod
    def of(
        cls,
        classifier_file: str | Path,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        bases: Tensor,
        captions: Sequence[str],
    ) -> KnownImages:
        """Made from the images themselves, N x C x H x W uint8 or floats in [0, 1]."""
        features = pooled_features(classifier, images).half().float()  # as a file holds them
        return cls(features, labels, bases, tuple(captions), _digest(classifier_file))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: features in float16, captions in the header."""
        tensors = {
            "features": self.features.half().contiguous(),
            "labels": self.labels.to(torch.int16),
            "bases": self.bases.to(torch.int16),
        }
        about = {"captions": self.captions, "classifier_sha256": self.classifier}
        write_atomically(path, save(tensors, metadata={"about": json.dumps(about, ensure_ascii=False)}))

    @classmethod
    def load(cls, path: str | Path, classifier_file: str | Path) -> KnownImages:
        """Read what :meth:`save` wrote.

        Args:
            classifier_file: the one that will look at other images.

        Raises:
            ValueError: the file is missing or something else, or its features are of another classifier.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such file of known images")
        try:
            with open_safetensors(path) as file:
                about = parse_json((file.metadata() or {})["about"])
                if set(file.keys()) != {"features", "labels", "bases"}:
                    raise ValueError(f"it holds {len(file.keys())} tensors")
                features, labels, bases = (file.get_tensor(name) for name in ("features", "labels", "bases"))
            captions = about["captions"]
            if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
                raise ValueError("its captions are no list of texts")
            if features.dim() != 2 or not labels.shape == bases.shape == (len(features),):
                raise ValueError("features, labels and bases of unlike shapes")
            if not features.is_floating_point() or not {labels.dtype, bases.dtype} <= INTEGERS:
                raise ValueError("features, labels and bases of other types")
            known = cls(features.float(), labels.long(), bases.long(), tuple(captions), about["classifier_sha256"])
            if not bool(known.features.isfinite().all()):
                raise ValueError("features that are no numbers")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of known images: {reason(error)}") from None
        if _digest(classifier_file) != known.classifier:
            raise ValueError(f"{path}: its features are not those of {classifier_file} but of another classifier")
        return known

    @cached_property
    def index(self) -> dict[str, int]:
        """Caption -> its row."""
        return {caption: row for row, caption in enumerate(self.captions)}

    def rows(self, captions: Sequence[str]) -> Tensor:
        """Which of the known images the captions are of.

        Raises:
            ValueError: a caption of none of them.
        """
        if unknown := [caption for caption in captions if caption not in self.index]:
            raise ValueError(f"{len(unknown)} captions are of no known image, as {unknown[0]!r}")
        return torch.tensor([self.index[caption] for caption in captions], dtype=torch.int64)

    @cached_property
    def _whitened(self) -> tuple[Tensor, Tensor]:
        """A matrix D x D under which distances are Mahalanobis', and the known features times it."""
        values, vectors = torch.linalg.eigh(torch.cov(self.features.double().T))
        matrix = vectors / values.clamp(min=SMALLEST_VARIANCE * values[-1]).sqrt()
        return matrix, self.features.double() @ matrix

    def nearest(self, features: Tensor) -> Tensor:
        """For each of M x D features, the row of the known image that is nearest: M int64."""
        matrix, known = self._whitened
        parts = (features.cpu().double() @ matrix).split(ROWS_AT_ONCE)
        return torch.cat([torch.cdist(part, known).argmin(1) for part in parts])

    def in_turn(self, seed: int) -> list[str]:
        """Captions, the groups in turn and each group's in an order that the seed draws; small groups over again.

        The first M times as many as there are groups hold M of each, no caption twice unless its group has fewer.
        """
        draws = torch.Generator().manual_seed(seed)
        groups = [(self.labels == label).nonzero()[:, 0] for label in self.labels.unique()]
        orders = [group[torch.randperm(len(group), generator=draws)].tolist() for group in groups]
        rounds = max(map(len, orders))
        return [self.captions[order[number % len(order)]] for number in range(rounds) for order in orders]


@dataclass(frozen=True)
class Agreement:
    """Shares of images that show what their captions say.

    Attributes:
        count: of images.
        group: the classifier's guess is the caption's group.
        named: the nearest known image has the caption.
        base: the nearest known image has the caption, or is a variant of the same thing.
    """

    count: int
    group: float
    named: float
    base: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def agreement(
    classifier: Classifier, known: KnownImages, images: Tensor, captions: Sequence[str], batch_size: int = 500
) -> Agreement:
    """How far images agree with the captions that they were made of.

    Args:
        images: N x C x H x W, uint8 or floats in [0, 1].
        captions: N of them, each that of a known image.

    Raises:
        ValueError: not one caption for each image, no images, or a caption that is not known.
    """
    if len(images) != len(captions) or not len(images):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: one is needed for each image")
    known.rows(captions)  # before the work
    features, guessed = pooled_features(classifier, images, batch_size), guesses(classifier, images, batch_size)
    return agreement_of(known, features, guessed, captions)


def agreement_of(known: KnownImages, features: Tensor, guessed: Tensor, captions: Sequence[str]) -> Agreement:
    """The same, from what the classifier has found in the images.

    Args:
        features, guessed: N x D and N int64, its features and guesses.

    Raises:
        ValueError: as :func:`agreement`.
    """
    meant = known.rows(captions)
    found = known.nearest(features)

    def share(right: Tensor) -> float:
        return right.double().mean().item()

    return Agreement(
        count=len(features),
        group=share(guessed == known.labels[meant]),
        named=share(found == meant),
        base=share(known.bases[found] == known.bases[meant]),
    )


def _digest(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: the classifier cannot be read ({error.strerror})") from None
