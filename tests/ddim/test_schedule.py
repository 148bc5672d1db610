from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim.config import DiffusionConfig
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps


def betas_of(schedule: str, count: int = 1000) -> list[float]:
    return make_betas(DiffusionConfig(schedule, 1e-4, 0.02, count)).tolist()


@pytest.mark.parametrize(
    ("schedule", "value"),
    [
        ("linear", lambda f: 1e-4 + f * (0.02 - 1e-4)),
        ("quad", lambda f: (math.sqrt(1e-4) + f * (math.sqrt(0.02) - math.sqrt(1e-4))) ** 2),
        ("const", lambda f: 0.02),
        ("jsd", lambda f: 1 / (1000 - 999 * f)),
        ("sigmoid", lambda f: 1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * f))),
    ],
)
def test_betas_have_their_closed_form(schedule, value):
    betas = betas_of(schedule)
    assert len(betas) == 1000
    for t in (0, 1, 333, 998, 999):
        assert betas[t] == pytest.approx(value(t / 999), rel=1e-6)


def test_betas_are_float32_and_products_float64():
    betas = make_betas(DiffusionConfig())
    assert betas.dtype == torch.float32
    assert alphas_cumprod(betas).dtype == torch.float64


def test_alphas_cumprod_is_the_running_product():
    betas = make_betas(DiffusionConfig(num_diffusion_timesteps=10))
    assert alphas_cumprod(betas).tolist() == pytest.approx(
        [math.prod(1 - b for b in betas.tolist()[: t + 1]) for t in range(10)], rel=1e-14
    )


def test_unknown_schedule_and_impossible_betas_are_refused():
    with pytest.raises(ValueError, match="'cosine' is not one of linear"):
        make_betas(DiffusionConfig("cosine"))
    with pytest.raises(ValueError, match="must lie above 0"):
        make_betas(DiffusionConfig("linear", -0.1, 0.02))


@settings(deadline=None)
@given(st.integers(1, 1000), st.sampled_from(["uniform", "quad"]))
def test_timesteps_ascend_from_zero_within_the_schedule(steps, skip_type):
    times = sampling_timesteps(1000, steps, skip_type)
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] < 1000
    assert len(times) >= steps


def test_uniform_keeps_a_whole_stride_and_so_may_visit_more():
    assert sampling_timesteps(1000, 4) == [0, 250, 500, 750]
    assert len(sampling_timesteps(1000, 30)) == 31
    assert sampling_timesteps(1000, 7)[1] == 142
    assert sampling_timesteps(1000, 600) == list(range(1000))


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_steps_outside_the_schedule_are_named(steps):
    with pytest.raises(ValueError, match=f"timesteps {steps} must lie between 1 and 1000"):
        sampling_timesteps(1000, steps)


def test_unknown_skip_type_names_the_allowed_ones():
    with pytest.raises(ValueError, match="'cubic' is not one of uniform, quad"):
        sampling_timesteps(1000, 10, "cubic")
