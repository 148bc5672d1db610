"""Pixel-space models of all kinds: those of this package, and folders that diffusers saved."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ddim.config import ConfigError, PixelConfig, load_config
from ddim.diffusers_config import DiffusersConfig, read_folder
from ddim.unet import UNet


def load_pixel_config(path: str | Path) -> PixelConfig:
    """A YAML file, or a folder that diffusers saved.

    Raises:
        ConfigError: it cannot be used; the message names file, key and remedy.
    """
    return read_folder(Path(path)) if Path(path).is_dir() else load_config(path)


def build(config: PixelConfig) -> nn.Module:
    """The UNet of a config, with random weights.

    Raises:
        ConfigError: it needs diffusers, which is not installed, or cannot be built.
    """
    if not isinstance(config, DiffusersConfig):
        return UNet.from_config(config)
    try:
        from ddim.diffusers_unet import StagedUNet2D
    except ImportError as error:
        raise ConfigError(
            f"{config.folder}: a model of diffusers, which cannot be imported ({error}); pip install 'qdiff[diffusers]'"
        ) from None
    try:
        return StagedUNet2D.of(config.unet)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ConfigError(f"{config.folder / 'config.json'}: the network cannot be built: {error}") from None
