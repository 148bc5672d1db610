from __future__ import annotations

import numpy as np
import pytest
import torch

from ddim.noise import ImageNoise

SHAPE = (3, 8, 8)


def test_an_image_has_the_same_noise_in_any_batch():
    together = ImageNoise(7, range(6), SHAPE)
    like = torch.zeros(6, *SHAPE)
    for split in ([0, 1, 2], [5, 3]):
        part = ImageNoise(7, split, SHAPE)
        assert torch.equal(part.start(), together.start()[split])
        # Later draws first: nothing may depend on what was drawn before.
        for k in (4, 0):
            assert torch.equal(part.step(k, like[split]), together.step(k, like)[split])


def test_seeds_images_and_draws_all_differ():
    like = torch.zeros(2, *SHAPE)
    a, b = ImageNoise(0, [0, 1], SHAPE), ImageNoise(1, [0, 1], SHAPE)
    draws = torch.cat([a.start(), b.start(), a.step(0, like), a.step(1, like), b.step(0, like)])
    correlation = np.corrcoef(draws.flatten(1).numpy()) - np.eye(len(draws))
    assert abs(correlation).max() < 0.3


def test_draws_are_standard_normal():
    values = ImageNoise(3, range(400), SHAPE).start()
    assert float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float(values.var()) == pytest.approx(1, abs=0.02)
    assert float((values**4).mean()) == pytest.approx(3, abs=0.15)


def test_the_stream_is_pinned():
    """Samples of a seed must stay the same from release to release: the keyed generator's values, worked out afresh."""
    key = np.random.SeedSequence(42, spawn_key=(5, 3))
    expected = np.random.Generator(np.random.Philox(key)).standard_normal((1, *SHAPE), dtype=np.float32)
    got = ImageNoise(42, [5], SHAPE).step(2, torch.zeros(1, *SHAPE))
    assert np.array_equal(got.numpy(), expected)


def test_draws_follow_the_tensor_they_resemble():
    got = ImageNoise(0, [0], SHAPE).step(0, torch.zeros(1, *SHAPE, dtype=torch.float64))
    assert got.dtype == torch.float64


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="seed -1"):
        ImageNoise(-1, [0], SHAPE)
    with pytest.raises(ValueError, match="image numbers"):
        ImageNoise(0, [-2], SHAPE)
    with pytest.raises(ValueError, match=r"batch of shape \(2, 3, 8, 8\)"):
        ImageNoise(0, [0, 1], SHAPE).step(0, torch.zeros(1, *SHAPE))
