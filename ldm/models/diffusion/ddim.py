"""DDIM on latents: :func:`ddim.samplers.ddim_sample` with the timesteps and the end of the latent models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddim.samplers import EpsilonModel, OnStep, StepNoise, ddim_sample
from ddim.schedule import sampling_timesteps


def latent_timesteps(num_train: int, steps: int) -> list[int]:
    """Timesteps that DDIM and PLMS visit on latents, ascending: those of the pixel models, each one later.

    Args:
        num_train: T.
        steps: how many; as in :func:`ddim.schedule.sampling_timesteps` a number that does not divide T visits more.
            Above T / 2 all of 1 ... T - 1 are visited.

    Raises:
        ValueError: ``steps`` outside 1 ... T.
    """
    return [t + 1 for t in sampling_timesteps(num_train, steps) if t + 1 < num_train]


def final_alpha(alpha_bar: Tensor) -> float:
    """Alpha-bar where the last step ends: that of timestep 0, which the model itself is never asked about."""
    return float(alpha_bar[0])


def sample_ddim(
    model: EpsilonModel,
    x: Tensor,
    timesteps: Sequence[int],
    alpha_bar: Tensor,
    *,
    eta: float = 0.0,
    noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents from starting noise by DDIM; ends at timestep 0.

    Args, result and errors as in :func:`ddim.samplers.ddim_sample`; ``timesteps`` as :func:`latent_timesteps` gives
    them. With ``eta`` above 0 the last step adds noise too.
    """
    final = final_alpha(alpha_bar)
    return ddim_sample(model, x, timesteps, alpha_bar, eta=eta, alpha_final=final, noise=noise, on_step=on_step)
