from __future__ import annotations

import pytest
import torch

from qdiff.evaluation.image_metrics import output_error, psnr


def test_psnr_of_known_noise() -> None:
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 0.5
    shift = torch.tensor([0.1, 0.01, 0.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    torch.testing.assert_close(psnr(images, images + shift), torch.tensor([20.0, 40.0, float("inf")]).double())


def test_psnr_of_gaussian_noise_is_minus_its_level() -> None:
    clean = torch.zeros(4, 3, 64, 64)
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert psnr(clean, noisy).mean().item() == pytest.approx(26.02, abs=0.1)  # -20 log10 0.05


def test_output_error_is_taken_group_by_group() -> None:
    full = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.1, 1.1, 0.8, 0.8, 1.0, 1.0]).reshape(6, 1, 1, 1)
    error = output_error(full * scale, full, rows_per_group=2)
    torch.testing.assert_close(error, torch.tensor([0.01, 0.04, 0.0]).double(), rtol=1e-5, atol=1e-9)


def test_output_error_of_a_group_weighs_rows_by_their_energy() -> None:
    full = torch.tensor([[3.0], [1.0]])
    assert output_error(torch.tensor([[3.0], [2.0]]), full).tolist() == [pytest.approx(0.1)]


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        psnr(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match="cannot be cut into groups of 4"):
        output_error(torch.ones(6, 1), torch.ones(6, 1), rows_per_group=4)
