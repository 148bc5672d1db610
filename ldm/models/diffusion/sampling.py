"""One entry to all samplers of latents, and the guidance they share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddim.dpm_solver import dpm_solver_sample
from ddim.noise import ImageNoise
from ddim.samplers import EpsilonModel, OnStep, ddpm_sample
from ldm.models.diffusion.ddim import latent_timesteps, sample_ddim
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.plms import sample_plms

METHODS = ("ddim", "ddpm", "plms", "dpm")

ConditionalModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x: N,C,H,W; t: N; conditions: N,L,D or None) -> eps like x."""


def guided(
    model: ConditionalModel, cond: Tensor | None = None, uncond: Tensor | None = None, scale: float = 1.0
) -> EpsilonModel:
    """The noise estimate that samplers ask for, with conditions filled in.

    Classifier-free guidance (Ho and Salimans 2022, equation 6; ``scale`` is their 1 + w): away from the estimate
    without the condition, through the one with it. Both are made in one batch of 2 N, the unconditional half first.
    Where they would not differ, at ``scale`` 1 or without ``uncond``, the model is called on N alone.

    Args:
        cond: conditions, N x L x D; None for an unconditional model.
        uncond: their unconditional counterparts, like ``cond``.

    Raises:
        ValueError: guidance without both conditions, or of different batch sizes.
    """
    if scale != 1 and (cond is None or uncond is None):
        raise ValueError(f"guidance with scale {scale} needs both a condition and an unconditional one")
    if cond is None or uncond is None or scale == 1:
        return lambda x, t: model(x, t, cond)
    if cond.shape != uncond.shape:
        raise ValueError(f"conditions have the shape {tuple(cond.shape)}, unconditional ones {tuple(uncond.shape)}")
    both = torch.cat([uncond, cond])

    def estimate(x: Tensor, t: Tensor) -> Tensor:
        without, with_cond = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (with_cond - without)

    return estimate


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    noise: ImageNoise,
    *,
    method: str = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    scale: float = 1.0,
    on_step: OnStep | None = None,
    apply_model: ConditionalModel | None = None,
) -> Tensor:
    """Latents of the images whose noise is given, for :meth:`LatentDiffusion.decode`: N x C x H x W.

    Args:
        noise: starting noise and draws, each image's own whatever the batch.
        method: ``ddim``; ``ddpm``, ancestral over all timesteps; ``plms``; ``dpm``, DPM-Solver++ of order 2.
        steps: timesteps visited; ``ddpm`` does not look at it.
        eta: of DDIM; the others do not look at it.
        cond, uncond, scale: see :func:`guided`.
        on_step: sees each timestep's input beforehand.
        apply_model: estimates the noise in the place of ``model``'s own network, as where that one is compiled.

    Raises:
        ValueError: an unknown method, or steps, eta or conditions that do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    estimate = guided(apply_model or model.apply_model, cond, uncond, scale)
    x, alpha_bar = noise.start(), model.alphas_cumprod
    if method == "dpm":
        return dpm_solver_sample(estimate, x, alpha_bar, steps=steps, on_step=on_step)
    if method == "ddpm":
        return ddpm_sample(
            estimate,
            x,
            range(model.num_timesteps),
            alpha_bar,
            noise=noise.step,
            variance="fixedsmall",
            clip=model.clip_denoised,
            on_step=on_step,
        )
    timesteps = latent_timesteps(model.num_timesteps, steps)
    if method == "plms":
        return sample_plms(estimate, x, timesteps, alpha_bar, on_step=on_step)
    return sample_ddim(estimate, x, timesteps, alpha_bar, eta=eta, noise=noise.step, on_step=on_step)
