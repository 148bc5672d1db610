from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ddim.config import ConfigError
from ldm.models.diffusion.ddpm import make_betas, schedule_buffers

from .conftest import build


def test_schedule_in_closed_form() -> None:
    betas = make_betas(0.0015, 0.0195, 1000)
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas.numpy(), np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2, rtol=1e-12)
    buffers = schedule_buffers(betas)
    assert {values.dtype for values in buffers.values()} == {torch.float32}
    b = {name: values.double().numpy() for name, values in buffers.items()}
    np.testing.assert_allclose(b["alphas_cumprod"], np.cumprod(1 - betas.numpy()), rtol=1e-6)
    assert b["alphas_cumprod_prev"][0] == 1
    # x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, solved for x0 with the stored roots
    np.testing.assert_allclose(b["sqrt_recip_alphas_cumprod"] * b["sqrt_alphas_cumprod"], np.ones(1000), rtol=1e-5)
    np.testing.assert_allclose(
        b["sqrt_recipm1_alphas_cumprod"],
        b["sqrt_recip_alphas_cumprod"] * b["sqrt_one_minus_alphas_cumprod"],
        rtol=1e-4,
    )
    # The posterior of a Gaussian chain: precisions add up.
    forward = (1 - b["betas"][1:]) / b["betas"][1:] + 1 / (1 - b["alphas_cumprod_prev"][1:])
    np.testing.assert_allclose(b["posterior_variance"][1:], 1 / forward, rtol=1e-4)
    assert b["posterior_variance"][0] == 0
    assert b["posterior_log_variance_clipped"][0] == pytest.approx(np.log(1e-20))
    # Without noise x_t = sqrt(abar_t) x0 leads to sqrt(abar_t-1) x0.
    np.testing.assert_allclose(
        b["posterior_mean_coef1"] + b["posterior_mean_coef2"] * b["sqrt_alphas_cumprod"],
        np.sqrt(b["alphas_cumprod_prev"]),
        rtol=1e-5,
    )


def test_latents_are_scaled_on_the_way_in_and_out(config: dict[str, Any]) -> None:
    plain = build(config)
    config["params"]["scale_factor"] = 0.25
    scaled = build(config)
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(scaled.encode(image), 0.25 * plain.encode(image))
    latent = plain.encode(image)
    torch.testing.assert_close(scaled.decode(0.25 * latent), plain.decode(latent))
    noise = torch.randn_like(latent)
    posterior = plain.first_stage_model.encode(image)
    torch.testing.assert_close(plain.encode(image, noise), posterior.sample(noise))
    assert plain.latent_shape == tuple(latent.shape[1:])


def test_the_factor_is_stored_only_where_it_was_measured(config: dict[str, Any]) -> None:
    assert "scale_factor" not in build(config).state_dict()
    config["params"]["scale_by_std"] = True
    assert build(config).state_dict()["scale_factor"].shape == ()


def test_classes_are_conditions(class_config: dict[str, Any]) -> None:
    model = build(class_config)
    cond = model.get_learned_conditioning({"class_label": torch.tensor([3, 10])})
    assert cond.shape == (2, 1, 4)
    assert torch.equal(cond[1:], model.cond_stage_model.unconditional(1))
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([5, 7])
    assert torch.equal(model.apply_model(x, t, cond), model.model.diffusion_model(x, t, context=cond))
    with pytest.raises(ValueError, match="needs a condition"):
        model.apply_model(x, t)
    with pytest.raises(ValueError, match="between 0 and 10"):
        model.get_learned_conditioning({"class_label": torch.tensor([11])})
    with pytest.raises(ValueError, match="no 'class_label'"):
        model.get_learned_conditioning({"class": torch.tensor([1])})


def test_unconditional_models_take_no_condition(config: dict[str, Any]) -> None:
    config["params"]["conditioning_key"] = "crossattn"  # as some published configs say beside __is_unconditional__
    model = build(config)
    assert not model.conditional
    with pytest.raises(ValueError, match="takes no condition"):
        model.apply_model(torch.zeros(1, 2, 4, 4), torch.zeros(1), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="encodes no conditions"):
        model.get_learned_conditioning({})


def test_the_first_stage_can_encode_the_condition(config: dict[str, Any]) -> None:
    config["params"] |= {"cond_stage_config": "__is_first_stage__", "conditioning_key": "concat"}
    config["params"]["unet_config"]["params"]["channels"] = 4
    model = build(config)
    image = torch.randn(1, 3, 8, 8)
    cond = model.get_learned_conditioning(image)
    assert torch.equal(cond, model.first_stage_model.encode(image).mean)
    x, t = torch.randn(1, 2, 4, 4), torch.tensor([5])
    assert torch.equal(model.apply_model(x, t, cond), model.model.diffusion_model(torch.cat([x, cond], 1), t))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parametrization": "eps"}, "'parametrization'"),
        ({"parameterization": "x0"}, "parameterization 'x0'"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine'"),
        ({"conditioning_key": "adm"}, "conditioning_key 'adm'"),
        ({"cond_stage_config": {"target": "torch.nn.Identity"}}, "needs conditioning_key"),
        ({"first_stage_config": {"target": "torch.nn.Identity"}}, "'torch.nn.Identity' is not a first stage"),
    ],
)
def test_unsupported_keywords_are_named(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    config["params"] |= change
    with pytest.raises(ConfigError, match=message):
        build(config)
