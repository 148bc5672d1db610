"""The forward process: betas, their cumulative products, and which timesteps a shortened sampler visits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddim.config import DiffusionConfig

SKIP_TYPES = ("uniform", "quad")
BETA_SCHEDULES = ("linear", "quad", "const", "jsd", "sigmoid")

# The quadratic spacing stops at this fraction of the training steps: above it the inputs are all but pure noise.
QUAD_REACH = 0.8


def make_betas(config: DiffusionConfig) -> Tensor:
    """Variance added at each training timestep (beta_t of Ho et al. 2020, section 2): T float32 values.

    Args:
        config: ``beta_start`` and ``beta_end`` bound every schedule but ``jsd``, which is 1/T ... 1/1.

    Raises:
        ValueError: an unknown schedule, or betas outside (0, 1].
    """
    start, end, count = config.beta_start, config.beta_end, config.num_diffusion_timesteps
    match config.beta_schedule:
        case "linear":
            betas = np.linspace(start, end, count)
        case "quad":
            betas = np.square(np.linspace(start**0.5, end**0.5, count))
        case "const":
            betas = np.full(count, float(end))
        case "jsd":
            betas = 1.0 / np.arange(count, 0, -1)
        case "sigmoid":
            betas = start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, count)))
        case other:
            raise ValueError(f"beta_schedule {other!r} is not one of {', '.join(BETA_SCHEDULES)}")
    if betas.min() <= 0 or betas.max() > 1:
        raise ValueError(
            f"beta_start {start} and beta_end {end} give betas from {betas.min():.3g} to {betas.max():.3g}; "
            "they must lie above 0 and not above 1"
        )
    return torch.from_numpy(betas).float()  # rounded as the published models were trained; products start from these


def alphas_cumprod(betas: Tensor) -> Tensor:
    """Share of the image's variance left after each timestep (alpha-bar_t of Ho et al. 2020): T float64 values."""
    return torch.cumprod(1.0 - betas.double(), dim=0)


def sampling_timesteps(num_train: int, steps: int, skip_type: str = "uniform") -> list[int]:
    """Timesteps a shortened sampler visits, ascending (Song et al. 2021, DDIM, appendix D.2).

    Args:
        num_train: timesteps the model was trained with.
        steps: how many to visit. ``uniform`` keeps a whole stride, ``num_train // steps``, so a number that does not
            divide ``num_train`` visits more; ``quad`` visits exactly ``steps``, dense near 0, where it may repeat one.
        skip_type: ``uniform`` or ``quad``.

    Raises:
        ValueError: an unknown ``skip_type``, or ``steps`` outside 1 ... ``num_train``.
    """
    if skip_type not in SKIP_TYPES:
        raise ValueError(f"skip_type {skip_type!r} is not one of {', '.join(SKIP_TYPES)}")
    if not 1 <= steps <= num_train:
        raise ValueError(f"timesteps {steps} must lie between 1 and {num_train}, the steps of the training schedule")
    if skip_type == "uniform":
        return list(range(0, num_train, num_train // steps))
    roots = np.linspace(0.0, np.sqrt(QUAD_REACH * num_train), steps)
    return [int(root**2) for root in roots]
