"""Between images in [0, 1] and the range a network sees, as the config's ``data`` section says."""

from __future__ import annotations

import torch
from torch import Tensor

from ddim.config import DataConfig

# Logits are taken of values squeezed into [margin, 1 - margin], so that black and white stay finite.
LOGIT_MARGIN = 1e-6
GREY_LEVELS = 256
GAUSSIAN_DEQUANTIZATION_STD = 0.01


def check_transforms(config: DataConfig) -> None:
    """Raise ValueError where the config asks for two ranges at once."""
    if config.rescaled and config.logit_transform:
        raise ValueError("data.rescaled and data.logit_transform exclude each other; set one of them to false")


def to_model(images: Tensor, config: DataConfig, generator: torch.Generator | None = None) -> Tensor:
    """Images in [0, 1] -> what the network is trained on, same shape.

    Args:
        images: N x C x H x W (any shape works).
        config: ``rescaled`` gives [-1, 1], ``logit_transform`` the whole line, neither leaves [0, 1].
        generator: of the dequantization noise, on the images' device; not used without dequantization.

    Raises:
        ValueError: the config asks for two ranges at once.
    """
    check_transforms(config)
    if config.uniform_dequantization:  # spread each of the 256 grey levels evenly over its share of [0, 1)
        noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        images = (images * (GREY_LEVELS - 1) + noise) / GREY_LEVELS
    if config.gaussian_dequantization:
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        images = images + GAUSSIAN_DEQUANTIZATION_STD * noise
    if config.rescaled:
        return 2 * images - 1
    if config.logit_transform:
        return torch.logit(LOGIT_MARGIN + (1 - 2 * LOGIT_MARGIN) * images, eps=LOGIT_MARGIN)
    return images


def to_images(x: Tensor, config: DataConfig) -> Tensor:
    """What the network makes -> images in [0, 1], same shape: the inverse of :func:`to_model`, clamped."""
    check_transforms(config)
    if config.rescaled:
        x = (x + 1) / 2
    elif config.logit_transform:
        x = (torch.sigmoid(x) - LOGIT_MARGIN) / (1 - 2 * LOGIT_MARGIN)
    return x.clamp(0, 1)
