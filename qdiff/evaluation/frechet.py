"""Fréchet distance between two sets of feature vectors (Heusel et al. 2017, "GANs trained by a TTUR", equation 6)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ddim.untrusted import UntrustedFileError, open_npz, open_safetensors, read_npz_array, reason
from qdiff.files import atomic_file, write_atomically


@dataclass(frozen=True)
class FeatureStatistics:
    """The Gaussian that stands for a set of feature vectors.

    Attributes:
        mean: D values, float64, on the CPU.
        covariance: D x D, float64, unbiased (divided by count - 1).
        count: how many vectors it was taken from; 0 where a file does not say.
        name: what the set is.
        network: whose features they are, and which file of weights; empty where that is not known.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    name: str = ""
    network: str = ""

    def __post_init__(self) -> None:
        size = self.mean.numel()
        if self.mean.ndim != 1 or self.covariance.shape != (size, size):
            raise ValueError(
                f"mean of shape {tuple(self.mean.shape)} and covariance of shape {tuple(self.covariance.shape)} "
                "do not belong together; expected D and D x D"
            )

    @classmethod
    def from_features(cls, features: Tensor, name: str = "") -> FeatureStatistics:
        """Of N x D vectors that fit into memory; :class:`FeatureAccumulator` takes them in parts."""
        accumulator = FeatureAccumulator(features.shape[1])
        accumulator.add(features)
        return accumulator.result(name)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with count, name and network in its header; or an ``.npz`` of ``mu`` and ``sigma``,
        the form in common use, which says nothing more.
        """
        if Path(path).suffix == ".npz":
            with atomic_file(path) as file:
                np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy())
            return
        tensors = {"mean": self.mean.contiguous(), "covariance": self.covariance.contiguous()}
        header = {"name": self.name, "count": json.dumps(self.count)}
        header |= {"network": self.network} if self.network else {}
        write_atomically(path, save(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what :meth:`save` wrote, or an ``.npz`` of others with ``mu`` and ``sigma``.

        Raises:
            ValueError: the file is missing or is something else.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such file of feature statistics")
        if Path(path).suffix == ".npz":
            return cls._from_npz(path)
        try:
            with open_safetensors(path) as file:
                header = file.metadata() or {}
                if set(file.keys()) != {"mean", "covariance"}:
                    raise ValueError(f"it holds {len(file.keys())} tensors")
                moments = file.get_tensor("mean"), file.get_tensor("covariance")
                found = cls(*moments, int(header["count"]), header["name"], header.get("network", ""))
            if found.count < 2 or not all(bool(x.isfinite().all()) for x in moments):
                raise ValueError("numbers that no features have")
            return found
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a file of feature statistics: {reason(error)}") from None

    @classmethod
    def _from_npz(cls, path: str | Path) -> FeatureStatistics:
        try:
            mean, covariance = (torch.from_numpy(read_npz_array(path, x).astype(np.float64)) for x in ("mu", "sigma"))
        except UntrustedFileError as error:
            raise ValueError(f"{path}: not a file of feature statistics (mu and sigma): {error}") from None
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path}: its mu or sigma holds NaN or infinite values")
        return cls(mean, covariance, 0, str(path))


def holds_statistics(path: str | Path) -> bool:
    """Whether a file is one of feature statistics rather than of images. Reads names only."""
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with open_npz(path) as archive:
                return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
        if path.suffix == ".safetensors":
            with open_safetensors(path) as file:
                return {"mean", "covariance"} <= set(file.keys())
    except (OSError, UntrustedFileError):
        return False  # whoever reads it says what is the matter
    return False


class FeatureAccumulator:
    """Mean and covariance of vectors that come in parts.

    Keeps the sum of squares around the running mean rather than around 0, and merges each part into it (Chan, Golub
    and LeVeque 1983, equation 1.5): features far from 0 lose no digits.
    """

    def __init__(self, size: int):
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in N x D vectors of any float type, on any device.

        Raises:
            ValueError: vectors of another length, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {tuple(features.shape)}; expected N x {len(self.mean)}")
        features = features.to("cpu", torch.float64)
        if not features.isfinite().all():
            raise ValueError("features hold NaN or infinite values: the images they come from are broken")
        if len(features) == 0:
            return
        mean = features.mean(0)
        centred = features - mean
        self._join(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureAccumulator) -> None:
        """Take in what another one has seen."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        shift = mean - self.mean
        total = self.count + count
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def result(self, name: str = "", network: str = "") -> FeatureStatistics:
        """Statistics of everything added so far.

        Raises:
            ValueError: fewer than two vectors, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, there are {self.count}")
        return FeatureStatistics(self.mean.clone(), self.scatter / (self.count - 1), self.count, name, network)


def equal_mixture(parts: Sequence[FeatureStatistics], name: str = "") -> FeatureStatistics:
    """Of one vector from a part drawn at random, each with the same probability.

    The covariance is the mean of the parts' own, divided by their counts, and that of their means.

    Raises:
        ValueError: no part, or features of different lengths.
    """
    if not parts or len({part.mean.shape for part in parts}) > 1:
        raise ValueError(f"{len(parts)} parts cannot be mixed: at least one is needed, and features of one length")
    means = torch.stack([part.mean for part in parts])
    mean = means.mean(0)
    within = torch.stack([part.covariance * ((part.count - 1) / part.count) for part in parts]).mean(0)
    between = (means - mean).T @ (means - mean) / len(parts)
    return FeatureStatistics(mean, within + between, sum(part.count for part in parts), name)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)): the square, as the literature reports it.

    The trace of the square root equals the sum of the singular values of C_a^(1/2) C_b^(1/2). These are found without
    taking the root of small, noisy eigenvalues of a product, so covariances of low rank (fewer images than features)
    need no offset on the diagonal, and nothing becomes complex.

    Raises:
        ValueError: features of different lengths, or of networks that are known to differ.
    """
    if a.network and b.network and a.network != b.network:
        raise ValueError(
            f"features of different networks do not compare: {a.name or 'one set'} has those of {a.network}, "
            f"{b.name or 'the other'} those of {b.network}"
        )
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"cannot compare features of length {len(a.mean)} with features of length {len(b.mean)}")
    overlap = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(0.0, float(distance))  # equal sets come out a rounding error below 0


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
