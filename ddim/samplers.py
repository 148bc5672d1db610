"""DDIM and DDPM sampling as pure functions of a noise-predicting callable.

Nothing here draws random numbers or looks at a device: noise comes from the caller, coefficients are Python floats
worked out in float64 before the loop, so that the loop never waits for an accelerator.

Symbols: T training steps, ``alpha_bar[t]`` the cumulative product called alpha_t in the DDIM paper, eps the model's
noise estimate, x0 the image it implies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EpsilonModel = Callable[[Tensor, Tensor], Tensor]
"""(x: N,C,H,W; t: N float32) -> eps like x."""

StepNoise = Callable[[int, Tensor], Tensor]
"""(number k of the step made, counted from 0 at the largest timestep; a tensor to resemble) -> standard normal draw."""

OnStep = Callable[[int, float, Tensor], None]
"""(number k of the model call, its timestep, its input x), called before the model is."""


VARIANCES = ("fixedlarge", "fixedsmall")


class Step(NamedTuple):
    """One step from timestep ``t`` down to the next one visited, with alpha-bar at both ends."""

    k: int
    t: int
    alpha: float
    alpha_next: float


def steps_down(timesteps: Sequence[int], alpha_bar: Tensor, alpha_final: float = 1.0) -> list[Step]:
    """The steps of a sampler, largest timestep first.

    Args:
        timesteps: ascending, each an index into ``alpha_bar``.
        alpha_bar: T cumulative products.
        alpha_final: alpha-bar where the last step ends; 1 is the image itself.

    Raises:
        ValueError: no timesteps, or timesteps that do not ascend within 0 ... T - 1.
    """
    _check(timesteps, alpha_bar)
    levels = [alpha_final, *alpha_bar.double()[list(timesteps)].tolist()]
    indices = enumerate(reversed(range(len(timesteps))))
    return [Step(k, timesteps[index], levels[index + 1], levels[index]) for k, index in indices]


def ddim_step(x: Tensor, eps: Tensor, step: Step, sigma: float = 0.0) -> Tensor:
    """Where one DDIM step leads, before its draw of standard deviation ``sigma`` is added (equations 9 and 12)."""
    x0 = (x - math.sqrt(1 - step.alpha) * eps) / math.sqrt(step.alpha)  # predicted image, eq. 9
    towards_x = math.sqrt(max(1 - step.alpha_next - sigma**2, 0.0))  # rounding must not make it imaginary
    return math.sqrt(step.alpha_next) * x0 + towards_x * eps  # eq. 12


def timestep_batch(t: float, like: Tensor) -> Tensor:
    """The same timestep for each image of a batch: N float32 values on the device of ``like``."""
    return torch.full((like.shape[0],), float(t), device=like.device)


def _check(timesteps: Sequence[int], alpha_bar: Tensor) -> None:
    if len(timesteps) == 0:
        raise ValueError("timesteps is empty; sampling needs at least one")
    if any(later < earlier for earlier, later in itertools.pairwise(timesteps)):
        raise ValueError("timesteps must be ascending, as sampling_timesteps gives them")
    if timesteps[0] < 0 or timesteps[-1] >= len(alpha_bar):
        raise ValueError(
            f"timesteps {timesteps[0]} to {timesteps[-1]} must lie between 0 and {len(alpha_bar) - 1}, "
            f"the schedule's {len(alpha_bar)} steps"
        )


@torch.no_grad()
def ddim_sample(
    model: EpsilonModel,
    x: Tensor,
    timesteps: Sequence[int],
    alpha_bar: Tensor,
    *,
    eta: float = 0.0,
    alpha_final: float = 1.0,
    noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generalized DDIM sampling (Song et al. 2021, equations 12 and 16).

    Args:
        model: predicts the noise in its input.
        x: starting noise, N x C x H x W.
        timesteps: ascending, as :func:`ddim.schedule.sampling_timesteps` gives them; visited from the last.
        alpha_bar: T values of :func:`ddim.schedule.alphas_cumprod`.
        eta: 0 is deterministic, 1 has the variance of DDPM's posterior.
        alpha_final: alpha-bar where the last step ends. The pixel models end at the image itself, 1; the latent ones
            at timestep 0.
        noise: gives the draw of each step; needed when ``eta`` is above 0, else never called.
        on_step: sees the input of each model call beforehand.

    Returns:
        The samples, like ``x``, in the range the model was trained on.
    """
    steps = steps_down(timesteps, alpha_bar, alpha_final)
    if eta < 0:
        raise ValueError(f"eta {eta} must not be negative")
    if eta > 0 and noise is None:
        raise ValueError(f"eta {eta} adds noise at every step; pass noise=, for example ImageNoise(...).step")
    for step in steps:
        if on_step is not None:
            on_step(step.k, step.t, x)
        eps = model(x, timestep_batch(step.t, x))
        sigma = eta * math.sqrt((1 - step.alpha_next) / (1 - step.alpha) * (1 - step.alpha / step.alpha_next))  # eq. 16
        x = ddim_step(x, eps, step, sigma)
        if noise is not None and eta > 0:
            x = x + sigma * noise(step.k, x)
    return x


@torch.no_grad()
def ddpm_sample(
    model: EpsilonModel,
    x: Tensor,
    timesteps: Sequence[int],
    alpha_bar: Tensor,
    *,
    noise: StepNoise,
    variance: str = "fixedlarge",
    clip: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, equations 6 and 7) over the visited timesteps.

    The step from timestep 0 adds no noise. Arguments not named here, and the result, are those of :func:`ddim_sample`.

    Args:
        noise: asked at every step but those from timestep 0.
        variance: of each draw. ``fixedlarge`` is beta, that of the forward step it undoes; ``fixedsmall`` is that of
            the posterior, equation 7 (section 3.2 compares the two).
        clip: clamp the predicted image to [-1, 1].

    Raises:
        ValueError: an unknown ``variance``, or timesteps as in :func:`steps_down`.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r} is not one of {', '.join(VARIANCES)}")
    for step in steps_down(timesteps, alpha_bar):
        if on_step is not None:
            on_step(step.k, step.t, x)
        eps = model(x, timestep_batch(step.t, x))
        x0 = (x - math.sqrt(1 - step.alpha) * eps) / math.sqrt(step.alpha)
        if clip:
            x0 = x0.clamp(-1, 1)
        beta = 1 - step.alpha / step.alpha_next  # of the whole stretch between the two visited timesteps
        remaining = (1 - step.alpha_next) / (1 - step.alpha)
        weight_x0 = math.sqrt(step.alpha_next) * beta / (1 - step.alpha)  # eq. 7
        x = weight_x0 * x0 + math.sqrt(1 - beta) * remaining * x
        if step.t > 0:
            x = x + math.sqrt(beta if variance == "fixedlarge" else beta * remaining) * noise(step.k, x)
    return x
