from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.noise import ImageNoise
from ldm.models.diffusion.ddim import latent_timesteps, sample_ddim
from ldm.models.diffusion.ddpm import LatentDiffusion, make_betas, schedule_buffers
from ldm.models.diffusion.plms import sample_plms
from ldm.models.diffusion.sampling import METHODS, guided, sample_latents

from .conftest import build


def test_timesteps_stay_inside_the_schedule() -> None:
    assert latent_timesteps(1000, 4) == [1, 251, 501, 751]
    assert latent_timesteps(1000, 400) == list(range(1, 1000, 2))
    assert latent_timesteps(1000, 1000) == list(range(1, 1000))
    with pytest.raises(ValueError, match="1001"):
        latent_timesteps(1000, 1001)


def noise_of(model: LatentDiffusion, images: list[int]) -> ImageNoise:
    return ImageNoise(3, images, model.latent_shape)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_is_the_same_in_any_batch(class_config: dict[str, Any], method: str) -> None:
    class_config["params"]["timesteps"] = 100
    model = build(class_config)
    cond = model.get_learned_conditioning({"class_label": torch.tensor([1, 4, 7])})
    uncond = model.cond_stage_model.unconditional(3)
    options: dict[str, Any] = {"method": method, "steps": 10, "eta": 1.0, "scale": 2.0}
    together = sample_latents(model, noise_of(model, [0, 1, 2]), cond=cond, uncond=uncond, **options)
    alone = sample_latents(model, noise_of(model, [2]), cond=cond[2:], uncond=uncond[2:], **options)
    torch.testing.assert_close(alone, together[2:], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(together).all()
    assert not torch.allclose(together[0], together[1])


def test_every_recorded_step_is_what_the_model_was_given(config: dict[str, Any]) -> None:
    config["params"]["timesteps"] = 100
    model = build(config)
    for method, expected in {"ddim": [91, 1], "plms": [91, 1], "dpm": [99, 9.9], "ddpm": [99, 0]}.items():
        seen: list[float] = []
        sample_latents(
            model, noise_of(model, [0]), method=method, steps=10, on_step=lambda k, t, x, seen=seen: seen.append(t)
        )
        assert [seen[0], seen[-1]] == pytest.approx(expected)
        assert len(seen) == (100 if method == "ddpm" else 10)


@pytest.mark.parametrize("clip", [True, False])
def test_ancestral_sampling_follows_the_stored_posterior(config: dict[str, Any], clip: bool) -> None:
    config["params"] |= {"timesteps": 50, "clip_denoised": clip}
    model = build(config)
    noise = noise_of(model, [0, 1])
    x = noise.start()
    for k, t in enumerate(reversed(range(50))):
        eps = model.apply_model(x, torch.full((2,), float(t)))
        x0 = model.sqrt_recip_alphas_cumprod[t] * x - model.sqrt_recipm1_alphas_cumprod[t] * eps
        if clip:
            x0 = x0.clamp(-1, 1)
        mean = model.posterior_mean_coef1[t] * x0 + model.posterior_mean_coef2[t] * x
        x = mean + model.posterior_variance[t].sqrt() * noise.step(k, x)
    got = sample_latents(model, noise, method="ddpm")
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-4)


def test_plms_is_nearer_to_the_exact_solution_than_ddim() -> None:
    """For data of one normal distribution the best noise estimate and the path of the ODE are known."""
    alpha_bar = schedule_buffers(make_betas(0.0015, 0.0195, 1000))["alphas_cumprod"].double()
    data_variance = 0.25

    def variance(t: int) -> Tensor:
        return alpha_bar[t] * data_variance + 1 - alpha_bar[t]

    def model(x: Tensor, t: Tensor) -> Tensor:
        index = int(t[0])
        return x * (1 - alpha_bar[index]).sqrt() / variance(index)

    times, x = latent_timesteps(1000, 50), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = float((variance(0) / variance(times[-1])).sqrt())
    plms = abs(float(sample_plms(model, x, times, alpha_bar)) - exact)
    ddim = abs(float(sample_ddim(model, x, times, alpha_bar)) - exact)
    assert plms < ddim / 3


def test_plms_with_one_step_asks_twice_at_its_only_timestep() -> None:
    asked: list[float] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return torch.zeros_like(x)

    alpha_bar = torch.tensor([0.9, 0.5], dtype=torch.float64)
    got = sample_plms(model, torch.ones(1, 1, 2, 2), [1], alpha_bar)
    assert asked == [1, 1]
    torch.testing.assert_close(got, torch.full_like(got, math.sqrt(0.9 / 0.5)))


def test_guidance_in_one_batch() -> None:
    calls: list[int] = []

    def model(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        calls.append(len(x))
        return x + t.reshape(-1, 1, 1, 1) + cond.mean((1, 2)).reshape(-1, 1, 1, 1)

    x, t = torch.randn(2, 1, 2, 2), torch.tensor([1.0, 1.0])
    cond, uncond = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    got = guided(model, cond, uncond, 3.0)(x, t)
    assert calls == [4]
    torch.testing.assert_close(got, 3 * model(x, t, cond) - 2 * model(x, t, uncond))
    calls.clear()
    assert torch.equal(guided(model, cond, uncond, 1.0)(x, t), model(x, t, cond))
    assert calls == [2, 2]
    with pytest.raises(ValueError, match="needs both"):
        guided(model, cond, None, 3.0)
    with pytest.raises(ValueError, match="have the shape"):
        guided(model, cond, uncond[:1], 3.0)


def test_unknown_methods_are_named(config: dict[str, Any]) -> None:
    model = build(config)
    with pytest.raises(ValueError, match="'euler' is not one of ddim, ddpm, plms, dpm"):
        sample_latents(model, noise_of(model, [0]), method="euler")
