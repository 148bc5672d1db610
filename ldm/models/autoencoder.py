"""First stages: autoencoders between images, in [-1, 1], and latents (Rombach et al. 2022, section 3.1).

Symbols: f downsampling factor, z latent, D ``embed_dim`` channels of the latent, K ``n_embed`` codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddim.config import ConfigError
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.util import check_keywords, refuse_unknown

# Published keywords that say how a first stage was trained, or where its weights once lay.
TRAINING_ONLY = frozenset(
    {
        "batch_resize_range",
        "ckpt_path",
        "colorize_nlabels",
        "ignore_keys",
        "image_key",
        "lossconfig",
        "lr_g_factor",
        "monitor",
        "scheduler_config",
    }
)

# exp() of these bounds, half of them for the standard deviation, stays far inside float32.
LOG_VARIANCE_RANGE = (-30.0, 20.0)

POSITIONS_AT_ONCE = 4096  # looked up in the codebook together; their distances to 8192 codes take 128 MiB


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal distributions, one for each element of a latent (Kingma and Welling 2014, appendix B).

    Attributes:
        mean: N x D x H/f x W/f.
        logvar: logarithm of the variance, like ``mean``.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """From N x 2D x H/f x W/f: means, then log-variances, which are clamped to :data:`LOG_VARIANCE_RANGE`."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOG_VARIANCE_RANGE))

    def sample(self, noise: Tensor) -> Tensor:
        """The draw that standard normal ``noise``, like ``mean``, stands for."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over each image's elements: N."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class _Autoencoder(nn.Module):
    """Encoder and decoder with a 1x1 convolution between each of them and the latent."""

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int, double_z: bool):
        super().__init__()
        ddconfig = {"double_z": double_z, **ddconfig}
        if ddconfig["double_z"] is not double_z:
            raise ConfigError(f"ddconfig: double_z must be {double_z} for {type(self).__name__}")
        for part in (Encoder, Decoder):
            check_keywords(part, ddconfig, "ddconfig")
        z_channels, moments = ddconfig["z_channels"], 2 if double_z else 1
        self.downsampling = 2 ** (len(ddconfig["ch_mult"]) - 1)  # f
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(moments * z_channels, moments * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)


class AutoencoderKL(_Autoencoder):
    """First stage whose latent is held near a standard normal by a Kullback-Leibler term.

    Args:
        ddconfig: keywords of :class:`Encoder` and :class:`Decoder`; ``double_z`` is true.
        embed_dim: D.
        training: published keywords that sampling has no use for (:data:`TRAINING_ONLY`).

    Raises:
        ConfigError: a keyword that is not known, here or in ``ddconfig``.
    """

    def __init__(self, *, ddconfig: Mapping[str, Any], embed_dim: int, **training: Any):
        refuse_unknown(training, TRAINING_ONLY, "AutoencoderKL")
        super().__init__(ddconfig, embed_dim, double_z=True)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """N x 3 x H x W in [-1, 1] -> the posterior over latents."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(image)))

    def decode(self, latent: Tensor) -> Tensor:
        """N x D x H/f x W/f -> N x 3 x H x W, about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent))


class VectorQuantizer(nn.Module):
    """A codebook: each position's D numbers become the nearest of K codes (van den Oord et al. 2017, equation 1)."""

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def indices(self, latent: Tensor) -> Tensor:
        """Numbers of the nearest codes: N x D x h x w -> N x h x w, int64."""
        positions = latent.movedim(1, -1)  # N, h, w, D
        nearest = [
            torch.cdist(part, self.embedding.weight, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
            for part in positions.flatten(0, 2).split(POSITIONS_AT_ONCE)
        ]  # not by a matrix product: in TF32 it would take wrong codes
        return torch.cat(nearest).view(positions.shape[:-1])

    def forward(self, latent: Tensor) -> Tensor:
        """The nearest codes themselves, like ``latent``."""
        return self.embedding(self.indices(latent)).movedim(-1, 1)


class VQModelInterface(_Autoencoder):
    """First stage with a codebook. Diffusion works on latents before they are quantized; decoding quantizes them.

    Args as in :class:`AutoencoderKL`.
        n_embed: K.
    """

    def __init__(self, *, ddconfig: Mapping[str, Any], embed_dim: int, n_embed: int, **training: Any):
        refuse_unknown(training, TRAINING_ONLY, "VQModelInterface")
        super().__init__(ddconfig, embed_dim, double_z=False)
        self.quantize = VectorQuantizer(n_embed, embed_dim)

    def encode(self, image: Tensor) -> Tensor:
        """N x 3 x H x W in [-1, 1] -> N x D x H/f x W/f, not quantized."""
        return self.quant_conv(self.encoder(image))

    def decode(self, latent: Tensor, quantize: bool = True) -> Tensor:
        """N x D x H/f x W/f -> N x 3 x H x W, about in [-1, 1]. ``quantize``: take the nearest codes first."""
        if quantize:
            latent = self.quantize(latent)
        return self.decoder(self.post_quant_conv(latent))


class IdentityFirstStage(nn.Module):
    """For diffusion on the pixels themselves: latent and image are the same.

    Args:
        training: accepted as for the other first stages, and ``vq_interface``, which changes nothing about it.
    """

    downsampling = 1

    def __init__(self, **training: Any):
        refuse_unknown(training, TRAINING_ONLY | {"vq_interface"}, "IdentityFirstStage")
        super().__init__()

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, latent: Tensor) -> Tensor:
        return latent


FirstStage = AutoencoderKL | VQModelInterface | IdentityFirstStage
