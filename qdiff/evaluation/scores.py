"""Scores of a set of images, from the features that a network finds in them: one part in memory at a time.

Fréchet distance needs running sums only. The other scores need every image's features, which stay in memory: 8 KiB an
image for Inception's, and 4 KiB for its class scores. Several processes (``torchrun``) take parts in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from qdiff.evaluation.errors import EvaluationError
from qdiff.evaluation.features import Classifier, model_input
from qdiff.evaluation.fidelity import identity, import_torch_fidelity
from qdiff.evaluation.frechet import FeatureAccumulator, FeatureStatistics
from qdiff.evaluation.image_sets import ImageSet
from qdiff.workers import WORKERS


class FeatureNetwork(Protocol):
    """What images are seen with.

    Attributes:
        name: says which network, with which weights.
        channels: of the images it takes.
    """

    name: str
    channels: int

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """N x C x H x W -> ``features`` N x D and, where the network has classes, ``logits`` N x K; on the CPU."""
        ...


class BundledNetwork:
    """A small classifier as a :class:`FeatureNetwork`."""

    def __init__(self, classifier: Classifier, path: Any):
        self.classifier, self.channels = classifier, classifier.channels
        self.name = identity(type(classifier).__name__, path)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features = self.classifier.features(model_input(self.classifier, images))
        return {"features": features.cpu(), "logits": self.classifier.head(features).cpu()}


@dataclass(frozen=True)
class SeenImages:
    """What is kept of a set of images.

    Attributes:
        statistics: of its features.
        features, logits: N x D and N x K in the order of the images, where they were to be kept.
    """

    statistics: FeatureStatistics
    features: Tensor | None = None
    logits: Tensor | None = None


def over_parts(
    images: ImageSet, batch_size: int, work: Callable[[int, Tensor], Any], name: str = ""
) -> list[Any] | None:
    """What ``work`` makes of each part of the images, in their order.

    Of several processes each takes every n-th part, and the first gathers what they made; the others get None.

    Args:
        work: gets the number of the part's first image, and the part, n x C x H x W.
    """
    starts = range(0, len(images), batch_size)[WORKERS.rank :: WORKERS.count]
    parts = images.parts(batch_size, WORKERS.rank, WORKERS.count)
    made = {}
    with tqdm(total=len(images), unit=" images", desc=name or str(images.path), disable=WORKERS.rank > 0) as bar:
        for start, part in zip(starts, parts, strict=True):
            made[start] = work(start, part)
            bar.update(min(len(part) * WORKERS.count, len(images) - int(bar.n)))
    everyone = WORKERS.collected(made)
    if everyone is None:
        return None
    everything = {start: found for one in everyone for start, found in one.items()}
    return [everything[start] for start in sorted(everything)]


def see(
    network: FeatureNetwork, images: ImageSet, *, batch_size: int, keep: Sequence[str] = (), name: str = ""
) -> SeenImages | None:
    """Show all images to a network; shared between processes as in :func:`over_parts`.

    Args:
        keep: ``features``, ``logits`` or both: of which every image's are kept.

    Raises:
        EvaluationError: images that the network cannot see, or fewer than two.
    """
    sums: list[FeatureAccumulator] = []

    def work(start: int, part: Tensor) -> dict[str, Tensor]:
        found = network(part)
        if not sums:
            sums.append(FeatureAccumulator(found["features"].shape[1]))
        try:
            sums[0].add(found["features"])
        except ValueError as error:
            raise EvaluationError(f"{images.path}: {error}") from None
        return {key: found[key] for key in keep}

    if len(images) < 2:
        raise EvaluationError(f"{images.path}: {len(images)} images; a distribution needs at least 2")
    kept = over_parts(images, batch_size, work, name)
    everyone = WORKERS.collected(sums)
    if kept is None or everyone is None:
        return None
    total, *others = (one for several in everyone for one in several)
    for other in others:
        total.merge(other)
    columns = {key: torch.cat([part[key] for part in kept]) for key in keep}
    return SeenImages(total.result(name or str(images.path), network.name), **columns)


@dataclass(frozen=True)
class ScoreOptions:
    """Torch-fidelity's, with its defaults.

    Attributes:
        splits: of the Inception Score; subsets, subset_size: of KID; neighbours: of precision and recall.
        seed: of the order of images in the splits, and of KID's subsets.
    """

    splits: int = 10
    subsets: int = 100
    subset_size: int = 1000
    neighbours: int = 3
    seed: int = 2020


def inception_score(logits: Tensor, options: ScoreOptions) -> dict[str, float]:
    """Salimans et al. 2016: exp of the mean KL divergence of an image's classes from those of all, over the splits."""
    if len(logits) < options.splits:
        raise EvaluationError(f"{len(logits)} images cannot be cut into --isc_splits {options.splits}; take fewer")
    import_torch_fidelity()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, options.splits, shuffle=True, rng_seed=options.seed)
    return {"mean": found[KEY_METRIC_ISC_MEAN], "std": found[KEY_METRIC_ISC_STD]}


def kernel_distance(features: Tensor, reference: Tensor, options: ScoreOptions) -> dict[str, float]:
    """Bińkowski et al. 2018: squared maximum mean discrepancy under a cubic kernel, unbiased, over random subsets."""
    fewer = min(len(features), len(reference))
    if fewer < options.subset_size:
        raise EvaluationError(
            f"KID takes subsets of {options.subset_size} images, and a set has {fewer}; lower --kid_subset_size"
        )
    import_torch_fidelity()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        features,
        reference,
        kid_subsets=options.subsets,
        kid_subset_size=options.subset_size,
        rng_seed=options.seed,
        verbose=False,
    )
    return {"mean": found[KEY_METRIC_KID_MEAN], "std": found[KEY_METRIC_KID_STD]}


def precision_recall(features: Tensor, reference: Tensor, options: ScoreOptions) -> dict[str, float]:
    """Kynkäänniemi et al. 2019: shares of images within reach of the other set, by the k-th nearest neighbour."""
    fewer = min(len(features), len(reference))
    if fewer <= options.neighbours:
        raise EvaluationError(f"precision and recall need more than {options.neighbours} images in a set, not {fewer}")
    import_torch_fidelity()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # In parts: a table of all distances would be 20 GB for twice 50 000 images.
    found = prc_features_to_metric(
        features, reference, prc_neighborhood=options.neighbours, save_cpu_ram=True, verbose=False
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}
