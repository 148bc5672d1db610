"""The latent diffusion model: a noise-estimating UNet, a first stage and, if conditional, an encoder of conditions.

A plain module that samples; it has no training loop. Symbols as in Ho et al. 2020 (DDPM): T training timesteps, beta
the variance added at each, alpha = 1 - beta, alpha-bar the cumulative product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddim.config import ConfigError
from ldm.models.autoencoder import DiagonalGaussian, FirstStage
from ldm.util import instantiate_from_config, refuse_unknown

UNCONDITIONAL, IS_FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
CONDITIONING_KEYS = (None, "concat", "crossattn")

# Published keywords that say how a model is trained, logged or filed. Sampling has no use for them.
TRAINING_ONLY = frozenset(
    {
        "ckpt_path",
        "concat_mode",
        "cond_stage_forward",
        "cond_stage_trainable",
        "cosine_s",
        "first_stage_key",
        "ignore_keys",
        "l_simple_weight",
        "learn_logvar",
        "load_only_unet",
        "log_every_t",
        "logvar_init",
        "loss_type",
        "monitor",
        "num_timesteps_cond",
        "original_elbo_weight",
        "scheduler_config",
        "use_positional_encodings",
    }
)

# Published keywords that would change what sampling computes: only the value of the published models is known here.
FIXED = {"beta_schedule": "linear", "given_betas": None, "parameterization": "eps", "v_posterior": 0}


def make_betas(linear_start: float, linear_end: float, timesteps: int) -> Tensor:
    """Betas whose square roots are evenly spaced: T float64 values."""
    return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64).square()


def schedule_buffers(betas: Tensor) -> dict[str, Tensor]:
    """What published checkpoints hold of the schedule, in float32, each T long.

    Args:
        betas: T float64 values.
    """
    alpha_bar = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    variance = betas * (1 - previous) / (1 - alpha_bar)  # of the posterior, equation 7; 0 at the first timestep
    buffers = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - betas).sqrt() * (1 - previous) / (1 - alpha_bar),
    }
    return {name: values.float() for name, values in buffers.items()}


class DiffusionWrapper(nn.Module):
    """The UNet, and how a condition reaches it.

    Args:
        unet_config: target and params.
        conditioning_key: None, ``crossattn`` (the UNet's ``context``) or ``concat`` (channels beside the latent's).
    """

    def __init__(self, unet_config: Mapping[str, Any], conditioning_key: str | None):
        super().__init__()
        self.conditioning_key = conditioning_key
        self.diffusion_model = instantiate_from_config(unet_config, "unet_config")

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        if (cond is None) != (self.conditioning_key is None):
            state = "needs a condition" if cond is None else "is unconditional and takes no condition"
            raise ValueError(f"this model {state} (conditioning_key {self.conditioning_key!r})")
        if self.conditioning_key == "concat":
            assert cond is not None
            return self.diffusion_model(torch.cat([x, cond], 1), t)
        if self.conditioning_key == "crossattn":
            return self.diffusion_model(x, t, context=cond)
        return self.diffusion_model(x, t)


class LatentDiffusion(nn.Module):
    """Diffusion on the latents of a first stage (Rombach et al. 2022).

    The keywords are those of the published configs. In the state dict the UNet is ``model.diffusion_model``.

    Args:
        unet_config, first_stage_config: target and params of each.
        cond_stage_config: the same, or ``__is_unconditional__``, or ``__is_first_stage__`` where the first stage
            encodes the condition, an image, too.
        conditioning_key: see :class:`DiffusionWrapper`; needed by conditional models.
        linear_start, linear_end: betas of the first and the last timestep.
        timesteps: T.
        image_size: height and width of the latent, ``channels`` its channels.
        cond_stage_key: name of the condition in a batch, such as ``class_label``.
        scale_factor: latents are multiplied by it before the diffusion sees them.
        scale_by_std: the factor was measured in training (1 / standard deviation) and comes with the weights.
        use_ema: a checkpoint of this model has moving averages, and they are the weights to sample with.
        clip_denoised: ancestral sampling over all timesteps clamps its predicted latent to [-1, 1].
        published: further published keywords: :data:`TRAINING_ONLY` are ignored, :data:`FIXED` have one value.

    Raises:
        ConfigError: an unknown keyword, a value that is not supported, or a section that cannot be built.
    """

    first_stage_model: FirstStage
    cond_stage_model: nn.Module  # of conditional models
    betas: Tensor
    alphas_cumprod: Tensor
    scale_factor: Tensor | float

    def __init__(
        self,
        *,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        conditioning_key: str | None = None,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        timesteps: int = 1000,
        image_size: int = 256,
        channels: int = 3,
        cond_stage_key: str = "image",
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        use_ema: bool = True,
        clip_denoised: bool = True,
        **published: Any,
    ):
        super().__init__()
        refuse_unknown(published, TRAINING_ONLY | FIXED.keys(), "LatentDiffusion")
        for key, only in FIXED.items():
            if published.get(key, only) != only:
                raise ConfigError(f"LatentDiffusion: {key} {published[key]!r} is not supported, only {only!r}")
        if conditioning_key not in CONDITIONING_KEYS:
            raise ConfigError(f"LatentDiffusion: conditioning_key {conditioning_key!r} is not one of concat, crossattn")
        unconditional = cond_stage_config == UNCONDITIONAL
        if not unconditional and conditioning_key is None:
            raise ConfigError("LatentDiffusion: a conditional model needs conditioning_key: crossattn (or concat)")

        self.num_timesteps, self.image_size, self.channels = timesteps, image_size, channels
        self.cond_stage_key = cond_stage_key
        self.use_ema, self.clip_denoised = use_ema, clip_denoised
        self.model = DiffusionWrapper(unet_config, None if unconditional else conditioning_key)
        first_stage = instantiate_from_config(first_stage_config, "first_stage_config")
        if not isinstance(first_stage, FirstStage):
            raise ConfigError(f"first_stage_config: target '{first_stage_config['target']}' is not a first stage")
        self.first_stage_model = first_stage
        if cond_stage_config == IS_FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
        elif not unconditional:
            self.cond_stage_model = instantiate_from_config(cond_stage_config, "cond_stage_config")
        for name, values in schedule_buffers(make_betas(linear_start, linear_end, timesteps)).items():
            self.register_buffer(name, values)
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = float(scale_factor)

    @property
    def conditional(self) -> bool:
        return self.model.conditioning_key is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C x H x W of one latent."""
        return self.channels, self.image_size, self.image_size

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The UNet's estimate of the noise in a latent, like ``x``.

        Args:
            x: noisy latents, N x C x H x W.
            t: N timesteps.
            cond: what :meth:`get_learned_conditioning` gave; None for an unconditional model.

        Raises:
            ValueError: a condition is missing, or given where there can be none.
        """
        return self.model(x, t, cond)

    forward = apply_model

    def get_learned_conditioning(self, condition: Any) -> Tensor:
        """What the encoder of conditions makes of its input: N x tokens x width for ``crossattn``.

        Raises:
            ValueError: the model is unconditional.
        """
        if not self.conditional:
            raise ValueError("this model is unconditional: it encodes no conditions")
        if self.cond_stage_model is self.first_stage_model:
            return self._latent(condition, None)
        return self.cond_stage_model(condition)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images, N x 3 x H x W in [-1, 1] -> scaled latents, N x C x H/f x W/f.

        Args:
            noise: standard normal, like the latent, to draw from a first stage that gives a distribution; without it
                the mean is taken.
        """
        return self._latent(image, noise) * self.scale_factor

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latents, N x C x h x w -> images, N x 3 x f h x f w, about in [-1, 1]."""
        return self.first_stage_model.decode(latent / self.scale_factor)

    def _latent(self, image: Tensor, noise: Tensor | None) -> Tensor:
        encoded = self.first_stage_model.encode(image)
        if isinstance(encoded, DiagonalGaussian):
            return encoded.mean if noise is None else encoded.sample(noise)
        return encoded
