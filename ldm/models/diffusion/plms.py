"""PLMS, pseudo linear multistep sampling (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on
Manifolds", arXiv 2202.09778): DDIM's deterministic step, taken with a noise estimate that looks back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ddim.samplers import EpsilonModel, OnStep, ddim_step, steps_down, timestep_batch
from ldm.models.diffusion.ddim import final_alpha

# Adams-Bashforth: weights of the estimates, newest first, by how many there are (the last row is the paper's eq. 12).
LOOK_BACK = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@torch.no_grad()
def sample_plms(
    model: EpsilonModel,
    x: Tensor,
    timesteps: Sequence[int],
    alpha_bar: Tensor,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents from starting noise; deterministic, ends at timestep 0.

    The first step, which has nothing to look back on, is tried out and averaged with the estimate at its end, so the
    model is called once more than there are timesteps.

    Args:
        model: predicts the noise in its input.
        x: starting noise, N x C x H x W.
        timesteps: as :func:`ldm.models.diffusion.ddim.latent_timesteps` gives them; visited from the last.
        alpha_bar: T cumulative products.
        on_step: sees the input at each timestep beforehand, but not the second call of the first step.

    Raises:
        ValueError: no timesteps, or timesteps outside the schedule.
    """
    steps = steps_down(timesteps, alpha_bar, final_alpha(alpha_bar))
    estimates: deque[Tensor] = deque(maxlen=4)  # newest first
    for step in steps:
        if on_step is not None:
            on_step(step.k, step.t, x)
        eps = model(x, timestep_batch(step.t, x))
        estimates.appendleft(eps)
        if len(estimates) == 1:
            following = steps[min(1, len(steps) - 1)]  # a single step has no next timestep but its own
            at_end = model(ddim_step(x, eps, step), timestep_batch(following.t, x))
            eps = (eps + at_end) / 2
        else:
            weights = LOOK_BACK[len(estimates)]
            eps = reduce(add, (weight * estimate for weight, estimate in zip(weights, estimates, strict=True)))
        x = ddim_step(x, eps, step)
    return x
