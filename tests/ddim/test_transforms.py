from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim.config import DataConfig
from ddim.transforms import to_images, to_model


def config(**options: bool) -> DataConfig:
    return DataConfig("CIFAR10", 32, 3, **{"rescaled": False, **options})


LEVELS = torch.arange(256).float().reshape(1, 1, 16, 16) / 255


def test_rescaled_is_minus_one_to_one():
    assert to_model(torch.tensor([0.0, 0.5, 1.0]), config(rescaled=True)).tolist() == [-1, 0, 1]


def test_logit_of_a_half_and_of_the_ends():
    got = to_model(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), config(logit_transform=True))
    assert got.tolist() == pytest.approx([-13.8155, 0, 13.8155], abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"rescaled": True}, {"logit_transform": True}])
def test_every_grey_level_survives_the_round_trip(options):
    back = to_images(to_model(LEVELS, config(**options)), config(**options))
    torch.testing.assert_close(back, LEVELS, atol=1e-6, rtol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_uniform_dequantization_stays_in_its_grey_level(seed, rescaled):
    chosen = config(uniform_dequantization=True, rescaled=rescaled)
    levels = (LEVELS.double() * 255).round()
    x = to_model(levels / 255, chosen, torch.Generator().manual_seed(seed))
    back = to_images(x, chosen)
    assert torch.equal((back * 256 + 1e-10).floor().clamp(max=255), levels)


def test_gaussian_dequantization_adds_a_hundredth():
    chosen = config(gaussian_dequantization=True)
    noise = to_model(torch.zeros(100000), chosen, torch.Generator().manual_seed(0))
    assert float(noise.std()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("option", ["uniform_dequantization", "gaussian_dequantization"])
def test_the_generator_decides_the_dequantization(option):
    chosen = config(**{option: True})
    first, again, other = (to_model(LEVELS, chosen, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(deadline=None)
@given(st.floats(-100, 100))
def test_images_are_clamped(value):
    for options in ({}, {"rescaled": True}, {"logit_transform": True}):
        assert 0 <= float(to_images(torch.tensor([value]), config(**options))) <= 1


def test_two_ranges_at_once_are_refused():
    for transform in (to_model, to_images):
        with pytest.raises(ValueError, match="exclude each other"):
            transform(LEVELS, config(rescaled=True, logit_transform=True))
