"""Sampling for scores, on models whose samples are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ddim.config import PixelConfig, config_from_dict
from ddim.noise import ImageNoise
from ddim.samplers import ddim_sample
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps
from ddim.transforms import to_images
from qdiff.evaluation.sampling import sample_images

CONFIG = config_from_dict(
    {
        "data": {"dataset": "FashionMNIST", "image_size": 8, "channels": 1, "rescaled": True},
        "model": {
            "in_channels": 1,
            "out_ch": 1,
            "ch": 32,
            "ch_mult": [1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
        "diffusion": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
    }
)
Model = Callable[[Tensor, Tensor], Tensor]


def single_image_model(value: float, config: PixelConfig = CONFIG) -> Model:
    """Predicts the noise around one grey image exactly (Song et al. 2021, equation 4): every sample is that image."""
    alpha_bar = alphas_cumprod(make_betas(config.diffusion)).float()

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar.to(x.device)[t.long()].reshape(-1, 1, 1, 1)
        return (x - a.sqrt() * value) / (1 - a).sqrt()

    return model


class Layer(nn.Module):
    """Mixes pixels and timestep; remembers the mode and the sizes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.sizes: list[int] = []
        self.modes: set[bool] = set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.modes.add(self.training)
        return torch.tanh(self.conv(x) + t.reshape(-1, 1, 1, 1) / 1000)


def test_an_exact_model_gives_the_exact_image() -> None:
    images = sample_images(single_image_model(0.5), CONFIG, count=5, batch_size=2, timesteps=10, seed=1)
    torch.testing.assert_close(images, torch.full((5, 1, 8, 8), 0.75), atol=1e-4, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_images_do_not_depend_on_the_batch_size(eta: float) -> None:
    torch.manual_seed(0)
    model = Layer()
    options = {"count": 5, "timesteps": 4, "seed": 3, "eta": eta}
    one, two = (sample_images(model, CONFIG, batch_size=size, **options) for size in (5, 2))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert (one[0] - one[1]).abs().max() > 1e-2  # the model leaves something of the noise
    other = sample_images(model, CONFIG, batch_size=5, **(options | {"seed": 4}))
    assert (one - other).abs().max() > 1e-2


def test_is_plain_ddim_from_the_noise_of_each_image() -> None:
    torch.manual_seed(0)
    model = Layer()
    got = sample_images(model, CONFIG, count=3, batch_size=8, timesteps=6, skip_type="uniform", seed=5)
    x = ImageNoise(5, range(3), (1, 8, 8)).start()
    times = sampling_timesteps(1000, 6, "uniform")
    expected = to_images(ddim_sample(model, x, times, alphas_cumprod(make_betas(CONFIG.diffusion))), CONFIG.data)
    torch.testing.assert_close(got, expected)


def test_given_starting_noise_replaces_the_seed() -> None:
    torch.manual_seed(0)
    model = Layer()
    start = ImageNoise(9, range(4), (1, 8, 8)).start()
    options = {"count": 4, "batch_size": 3, "timesteps": 3}
    got = sample_images(model, CONFIG, seed=0, start=start, **options)
    torch.testing.assert_close(got, sample_images(model, CONFIG, seed=9, **options))


def test_what_was_borrowed_is_given_back() -> None:
    model = Layer().train()
    model.conv.eval()
    torch.backends.cudnn.allow_tf32 = True
    brought: list[int] = []
    sample_images(model, CONFIG, count=5, batch_size=2, timesteps=1, allow_tf32=False, on_batch=brought.append)
    assert model.training
    assert not model.conv.training
    assert model.modes == {False}
    assert torch.backends.cudnn.allow_tf32
    assert brought == model.sizes == [2, 2, 1]


def test_wrong_arguments_are_refused() -> None:
    model = single_image_model(0.0)
    with pytest.raises(ValueError, match="at least 1"):
        sample_images(model, CONFIG, count=0, batch_size=2)
    with pytest.raises(ValueError, match="start has shape"):
        sample_images(model, CONFIG, count=2, batch_size=2, start=torch.zeros(3, 1, 8, 8))
    with pytest.raises(ValueError, match="needs a GPU"):
        sample_images(model, CONFIG, count=2, batch_size=2, cuda_graph=True)
