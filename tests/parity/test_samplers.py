"""Each sampler on a closed-form noise model, against the trajectories' ends stored in ``samplers``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.config import DiffusionConfig
from ddim.dpm_solver import dpm_solver_sample
from ddim.samplers import EpsilonModel, ddim_sample, ddpm_sample, steps_down
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps
from ldm.models.diffusion.ddim import final_alpha, latent_timesteps, sample_ddim
from ldm.models.diffusion.ddpm import make_betas as make_latent_betas
from ldm.models.diffusion.ddpm import schedule_buffers
from ldm.models.diffusion.plms import sample_plms
from ldm.models.diffusion.sampling import guided

from .conftest import golden_json, golden_tensors, parameters, relative_error

TOLERANCE = 1e-4
Check = Callable[[dict[str, Any], dict[str, Tensor]], None]


def epsilon(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x + 0.2 * torch.sin(t / 100).reshape(-1, 1, 1, 1)


def pixel_alpha_bar() -> Tensor:
    return alphas_cumprod(make_betas(DiffusionConfig("linear", 1e-4, 0.02, 1000)))


def latent_alpha_bar() -> Tensor:
    """The buffer of the latent models, with the schedule that the cases name."""
    return schedule_buffers(make_latent_betas(0.0015, 0.0195, 1000))["alphas_cumprod"]


def conditional_epsilon(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return epsilon(x, t) + 0.1 * cond.mean((1, 2)).reshape(-1, 1, 1, 1)


def guided_epsilon(scale: float, tensors: dict[str, Tensor]) -> EpsilonModel:
    return guided(conditional_epsilon, tensors["cond"], tensors["uncond"], scale)


def check_ddim(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    skip_type, steps, eta = re.fullmatch(r".*\.(\D+)(\d+)\.eta([\d.]+)", case["case"]).groups()
    times = sampling_timesteps(1000, int(steps), skip_type)
    assert times == case["timesteps"]
    got = ddim_sample(
        epsilon,
        tensors["x_T"],
        times,
        pixel_alpha_bar(),
        eta=float(eta),
        noise=lambda k, like: tensors["noise20"][k],
    )
    assert relative_error(got, tensors[f"{case['case']}.final"]) < TOLERANCE
    last_x0 = tensors.get(f"{case['case']}.x0_last")
    if last_x0 is not None:  # the step to alpha-bar 1 returns the predicted image itself
        assert relative_error(got, last_x0) < TOLERANCE


def check_ddpm(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    skip_type, steps = re.fullmatch(r".*\.(\D+)(\d+)", case["case"]).groups()
    times = sampling_timesteps(1000, int(steps), skip_type)
    assert times == case["timesteps"]
    noise = tensors["noise20"]
    got = ddpm_sample(epsilon, tensors["x_T"], times, pixel_alpha_bar(), noise=lambda k, like: noise[k])
    assert relative_error(got, tensors[f"{case['case']}.final"]) < TOLERANCE


def check_dpm(
    case: dict[str, Any], tensors: dict[str, Tensor], model: EpsilonModel, alpha_bar: Tensor, **solver: Any
) -> None:
    seen: list[float] = []
    steps = int(re.search(r"\.\D*(\d+)$", case["case"]).group(1))
    got = dpm_solver_sample(
        model, tensors["x_T"], alpha_bar, steps=steps, on_step=lambda k, t, x: seen.append(t), **solver
    )
    assert seen == pytest.approx(case["model_timesteps"], abs=1e-3)
    assert relative_error(got, tensors[f"{case['case']}.final"]) < TOLERANCE


def check_singlestep(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    order = int(re.match(r"dpm_singlestep(\d)", case["case"]).group(1))
    check_dpm(case, tensors, epsilon, pixel_alpha_bar(), method="singlestep", order=order)


def check_latent_dpm(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    scale = float(re.search(r"scale ([\d.]+)", case["what"]).group(1))
    check_dpm(case, tensors, guided_epsilon(scale, tensors), latent_alpha_bar(), method="multistep", order=2)


GUIDANCE_SCALE = 7.5  # of the guided DDIM and PLMS cases


def check_latent_ddim(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    steps, eta = re.fullmatch(r"ldm_ddim(?:_cfg)?\.(\d+)(?:\.eta([\d.]+))?", case["case"]).groups()
    model = guided_epsilon(GUIDANCE_SCALE, tensors) if "_cfg" in case["case"] else epsilon
    times, alpha_bar = latent_timesteps(1000, int(steps)), latent_alpha_bar()
    assert times == case.get("timesteps", times)
    down = steps_down(times, alpha_bar, final_alpha(alpha_bar))
    for key, got in (("alphas", [step.alpha for step in down]), ("alphas_prev", [step.alpha_next for step in down])):
        assert got[::-1] == pytest.approx(case.get(key, got[::-1]), rel=1e-6)
    got = sample_ddim(
        model, tensors["x_T"], times, alpha_bar, eta=float(eta or 0), noise=lambda k, like: tensors["noise20"][k]
    )
    assert relative_error(got, tensors[f"{case['case']}.final"]) < TOLERANCE


def check_plms(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    seen: list[float] = []
    times = latent_timesteps(1000, int(re.fullmatch(r"plms_cfg\.(\d+)", case["case"]).group(1)))
    assert times == case["timesteps"]
    got = sample_plms(
        guided_epsilon(GUIDANCE_SCALE, tensors),
        tensors["x_T"],
        times,
        latent_alpha_bar(),
        on_step=lambda k, t, x: seen.append(t),
    )
    assert seen == case["recorded_ts"]
    assert relative_error(got, tensors[f"{case['case']}.final"]) < TOLERANCE


CHECKS: dict[str, Check] = {
    "ddim_generalized": check_ddim,
    "ddpm_noisy": check_ddpm,
    "dpm_singlestep": check_singlestep,
    "ldm_ddim": check_latent_ddim,
    "ldm_dpm": check_latent_dpm,
    "plms": check_plms,
}


def cases() -> list[Any]:
    content = golden_json("samplers.json") or {"cases": []}
    return [pytest.param(case, id=case["case"]) for case in content["cases"]]


@pytest.mark.parametrize("case", parameters(cases(), "samplers.json"))
def test_sampler_matches(case: dict[str, Any]) -> None:
    family = next((name for name in CHECKS if case["case"].startswith(name)), None)
    assert family is not None, f"no check knows the case {case['case']}"
    CHECKS[family](case, golden_tensors("samplers.safetensors"))
