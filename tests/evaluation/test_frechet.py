"""Fréchet distances with closed forms, and statistics against torch.cov."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qdiff.evaluation.frechet import FeatureAccumulator, FeatureStatistics, frechet_distance


def gaussian(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    return FeatureStatistics(mean.double(), covariance.double(), count=1000)


def samples(count: int = 500, size: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mix + torch.arange(size)


def test_diagonal_gaussians() -> None:
    a = gaussian(torch.tensor([1.0, 2.0, 3.0]), torch.diag(torch.tensor([4.0, 9.0, 0.0])))
    b = gaussian(torch.tensor([1.0, 0.0, 6.0]), torch.diag(torch.tensor([1.0, 25.0, 16.0])))
    # (2 - 0)^2 + (3 - 6)^2 + (2 - 1)^2 + (3 - 5)^2 + (0 - 4)^2
    assert frechet_distance(a, b) == pytest.approx(4 + 9 + 1 + 4 + 16, rel=1e-12)


def test_covariances_that_do_not_commute() -> None:
    """For 2 x 2 matrices Tr(M^(1/2)) = (Tr M + 2 det(M)^(1/2))^(1/2)."""
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(a.trace() + b.trace()) - 2 * root
    zero = torch.zeros(2)
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected, rel=1e-12)


def test_a_set_has_no_distance_to_itself_and_the_order_does_not_matter() -> None:
    a, b = (FeatureStatistics.from_features(samples(seed=seed)) for seed in (0, 1))
    assert frechet_distance(a, a) < 1e-10
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1


def test_fewer_samples_than_features() -> None:
    few = FeatureStatistics.from_features(samples(count=5, size=40))
    moved = FeatureStatistics.from_features(samples(count=5, size=40) + 2)
    assert frechet_distance(few, few) < 1e-6
    assert frechet_distance(few, moved) == pytest.approx(40 * 4, rel=1e-9)


def test_features_of_another_length_are_refused() -> None:
    a, b = (FeatureStatistics.from_features(samples(size=size)) for size in (4, 5))
    with pytest.raises(ValueError, match="length 4 with features of length 5"):
        frechet_distance(a, b)


@pytest.mark.parametrize("offset", [0.0, 1e7])
@pytest.mark.parametrize("parts", [[500], [1, 499], [100, 0, 250, 150]])
def test_streaming_equals_one_batch(parts: list[int], offset: float) -> None:
    features = samples() + offset
    accumulator = FeatureAccumulator(features.shape[1])
    for part in features.split(parts):
        accumulator.add(part)
    result = accumulator.result("set")
    assert (result.count, result.name) == (500, "set")
    torch.testing.assert_close(result.mean, features.mean(0), rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(result.covariance, torch.cov((features - offset).T), rtol=1e-6, atol=1e-7)


def test_the_accumulator_refuses_what_has_no_statistics() -> None:
    accumulator = FeatureAccumulator(3)
    with pytest.raises(ValueError, match="expected N x 3"):
        accumulator.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        accumulator.add(torch.full((2, 3), float("nan")))
    accumulator.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="there are 1"):
        accumulator.result()


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    before = FeatureStatistics.from_features(samples(), "a set of Gaussian é")
    before.save(tmp_path / "s.safetensors")
    after = FeatureStatistics.load(tmp_path / "s.safetensors")
    assert (after.count, after.name) == (before.count, before.name)
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.covariance, before.covariance)


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        FeatureStatistics.load(tmp_path / "missing")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(ValueError, match="not a file of feature statistics"):
        FeatureStatistics.load(tmp_path / "text")
    with pytest.raises(ValueError, match="do not belong together"):
        FeatureStatistics(torch.zeros(3), torch.zeros(2, 2), 10)
