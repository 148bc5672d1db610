"""The oracle: images drawn from a Gaussian, whose exact noise predictor and exact DDIM flow have closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ddim.config import DiffusionConfig
from ddim.dpm_solver import NoiseSchedule, dpm_solver_sample, single_step_orders
from ddim.samplers import ddim_sample, ddpm_sample
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps

ALPHA_BAR = alphas_cumprod(make_betas(DiffusionConfig()))
STD = 0.5  # of the images


def gaussian_model(schedule: NoiseSchedule, std: float = STD):
    """E[eps | x] for images of that standard deviation: sigma x / (alpha^2 std^2 + sigma^2)."""

    def model(x, t):
        node = schedule.node(float(t[0]))
        return x * node.sigma / (node.alpha**2 * std**2 + node.sigma**2)

    return model


MODEL = gaussian_model(NoiseSchedule(ALPHA_BAR))


def exact_flow(x, alpha_bar_end: float):
    """The probability-flow ODE keeps x over its marginal standard deviation."""
    std_at = lambda a: math.sqrt(a * STD**2 + 1 - a)  # noqa: E731
    return x * std_at(alpha_bar_end) / std_at(float(ALPHA_BAR[-1]))


def start(seed: int = 0):
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def test_ddim_converges_to_the_exact_flow():
    x = start()
    times = sampling_timesteps(1000, 1000)
    assert relative(ddim_sample(MODEL, x, times, ALPHA_BAR), exact_flow(x, 1.0)) < 5e-3


def test_a_perfect_predictor_is_inverted_in_one_step():
    image, noise = start(1), start(2)
    a = float(ALPHA_BAR[700])
    got = ddim_sample(lambda x, t: noise, math.sqrt(a) * image + math.sqrt(1 - a) * noise, [700], ALPHA_BAR)
    torch.testing.assert_close(got, image)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_keeps_the_variance_of_the_data(eta):
    generator = torch.Generator().manual_seed(3)
    draw = lambda k, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    x = torch.randn(20000, 1, 1, 1, generator=generator, dtype=torch.float64)
    got = ddim_sample(MODEL, x, sampling_timesteps(1000, 250), ALPHA_BAR, eta=eta, noise=draw)
    assert float(got.std()) == pytest.approx(STD, rel=0.03)


def test_ddpm_samples_have_the_variance_of_the_data():
    generator = torch.Generator().manual_seed(4)
    draw = lambda k, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    x = torch.randn(20000, 1, 1, 1, generator=generator, dtype=torch.float64)
    model = gaussian_model(NoiseSchedule(ALPHA_BAR), std=0.2)  # five deviations fit into the clamp
    got = ddpm_sample(model, x, sampling_timesteps(1000, 500), ALPHA_BAR, noise=draw)
    assert float(got.std()) == pytest.approx(0.2, rel=0.05)


def test_ddpm_clamps_the_predicted_image():
    far = torch.full((1, 1, 2, 2), 50.0)
    got = ddpm_sample(lambda x, t: torch.zeros_like(x), far, [0], ALPHA_BAR, noise=lambda k, x: torch.zeros_like(x))
    assert float(got.max()) == pytest.approx(1.0, abs=1e-5)


def test_ddpm_asks_for_no_noise_at_timestep_zero():
    asked = []

    def draw(k, like):
        asked.append(k)
        return torch.zeros_like(like)

    ddpm_sample(MODEL, start(), [0, 0, 100, 200], ALPHA_BAR, noise=draw)
    assert asked == [0, 1]


def test_deterministic_ddim_never_asks_for_noise():
    def draw(k, like):
        raise AssertionError("eta is 0")

    ddim_sample(MODEL, start(), [0, 500], ALPHA_BAR, noise=draw)


def test_on_step_sees_the_input_of_every_model_call():
    calls, seen = [], []

    def model(x, t):
        calls.append((t.tolist(), x.clone()))
        return MODEL(x, t)

    hook = lambda k, t, x: seen.append((k, t, x.clone()))  # noqa: E731
    for run in (
        lambda: ddim_sample(model, start(), [0, 300, 900], ALPHA_BAR, on_step=hook),
        lambda: ddpm_sample(
            model, start(), [0, 9], ALPHA_BAR, noise=lambda k, like: torch.ones_like(like), on_step=hook
        ),
        lambda: dpm_solver_sample(model, start(), ALPHA_BAR, steps=7, order=3, method="singlestep", on_step=hook),
        lambda: dpm_solver_sample(model, start(), ALPHA_BAR, steps=5, order=2, on_step=hook),
    ):
        calls.clear()
        seen.clear()
        run()
        assert [k for k, _, _ in seen] == list(range(len(calls)))
        for (_, t, x), (model_t, model_x) in zip(seen, calls, strict=True):
            assert model_t == pytest.approx([t] * 4)
            assert torch.equal(x, model_x)


def test_samplers_need_no_gradient_memory():
    weight = torch.ones((), requires_grad=True)
    assert not ddim_sample(lambda x, t: weight * x, start(), [0, 500], ALPHA_BAR).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": []}, "empty"),
        ({"timesteps": [5, 3]}, "ascending"),
        ({"timesteps": [0, 1000]}, "between 0 and 999"),
        ({"eta": -0.1}, "must not be negative"),
        ({"eta": 1.0}, "pass noise="),
    ],
)
def test_wrong_arguments_of_ddim(arguments, message):
    with pytest.raises(ValueError, match=message):
        ddim_sample(MODEL, start(), arguments.pop("timesteps", [0, 1]), ALPHA_BAR, **arguments)


def exact_end(x):
    return exact_flow(x, float(ALPHA_BAR[0]))


@pytest.mark.parametrize("method", ["singlestep", "multistep"])
@pytest.mark.parametrize("skip_type", ["time_uniform", "time_quadratic", "logSNR"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_converges_to_the_exact_flow(method, skip_type, order):
    x = start()
    solve = lambda n: dpm_solver_sample(  # noqa: E731
        MODEL, x, ALPHA_BAR, steps=n, order=order, method=method, skip_type=skip_type
    )
    coarse, fine = (relative(solve(n), exact_end(x)) for n in (30, 240))
    assert fine < (0.02 if order == 1 else 0.005)
    assert fine < coarse / 5


@pytest.mark.parametrize("method", ["singlestep", "multistep"])
def test_each_order_converges_at_its_rate(method):
    """Even steps in lambda, where the interpolation has no kink: error ~ h^order."""

    # alpha^2 = 1 / (1 + e^(-2 lambda)), lambda linear in t from 4 to -4, finely sampled.
    alpha_bar = torch.sigmoid(2 * torch.linspace(4, -4, 100001, dtype=torch.float64))
    model = gaussian_model(NoiseSchedule(alpha_bar))
    x = start()
    std_at = lambda a: math.sqrt(a * STD**2 + 1 - a)  # noqa: E731
    exact = x * std_at(float(alpha_bar[0])) / std_at(float(alpha_bar[-1]))
    for order in (1, 2, 3):
        errors = [
            relative(
                dpm_solver_sample(model, x, alpha_bar, steps=n, order=order, method=method, skip_type="logSNR"), exact
            )
            for n in (24, 96)
        ]
        assert math.log(errors[0] / errors[1], 4) > order - 0.35, (order, errors)


def test_order_one_is_ddim():
    """The solver ends at timestep 0, where DDIM takes one more step, to the image itself."""
    x = start()
    at_zero = dpm_solver_sample(MODEL, x, ALPHA_BAR, steps=999, order=1)
    expected = ddim_sample(MODEL, x, list(range(1000)), ALPHA_BAR)
    assert relative(gaussian_last_step(at_zero, float(ALPHA_BAR[0])), expected) < 1e-9


def gaussian_last_step(x, a: float):
    """From timestep 0 to the image with the model's own prediction."""
    eps = MODEL(x, torch.zeros(1))
    return (x - math.sqrt(1 - a) * eps) / math.sqrt(a)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", range(1, 25))
def test_singlestep_spends_exactly_the_steps_asked_for(order, steps):
    assert sum(single_step_orders(steps, order)) == steps
    assert max(single_step_orders(steps, order)) <= order
    calls = []
    dpm_solver_sample(
        MODEL,
        start(),
        ALPHA_BAR,
        steps=steps,
        order=order,
        method="singlestep",
        on_step=lambda k, t, x: calls.append(t),
    )
    assert len(calls) == steps


def test_lambda_is_inverted():
    schedule = NoiseSchedule(ALPHA_BAR)
    for t in (0.0, 0.5, 123.456, 998.9, 999.0):
        assert schedule.time_of(schedule.node(t).lam) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "fast"}, "method 'fast' is not one of singlestep, multistep"),
        ({"skip_type": "quad"}, "skip_type 'quad' is not one of"),
        ({"order": 4}, "order 4"),
        ({"steps": 0}, "steps 0 must lie between 1 and 1000"),
    ],
)
def test_wrong_arguments_of_the_solver(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpm_solver_sample(MODEL, start(), ALPHA_BAR, **{"steps": 10, **arguments})


def test_ddim_ends_where_it_is_told_to():
    """One exact step of a perfect predictor: image and noise in the proportions of the level it ends at."""
    image, noise = start(1), start(2)

    def at(level):
        return math.sqrt(level) * image + math.sqrt(1 - level) * noise

    got = ddim_sample(lambda x, t: noise, at(float(ALPHA_BAR[700])), [700], ALPHA_BAR, alpha_final=0.9)
    torch.testing.assert_close(got, at(0.9))


def test_ancestral_sampling_with_the_smaller_variance_loses_a_little():
    """Section 3.2: beta is right for standard normal data, the posterior's variance for a single image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 200, 200, generator=generator, dtype=torch.float64)
    got = ddpm_sample(
        MODEL,
        x,
        range(1000),
        ALPHA_BAR,
        noise=lambda k, like: torch.randn(like.shape, generator=generator, dtype=like.dtype),
        variance="fixedsmall",
        clip=False,
    )
    assert float(got.std()) / STD == pytest.approx(0.99, abs=0.006)


def test_unknown_variance_is_named():
    with pytest.raises(ValueError, match="'learned' is not one of fixedlarge, fixedsmall"):
        ddpm_sample(MODEL, start(), [0], ALPHA_BAR, noise=lambda k, like: like, variance="learned")
