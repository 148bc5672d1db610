"""Typed configuration of pixel-space models, read from the YAML files in ``configs/``.

The keys are those of the published files (``configs/cifar10.yml`` and its siblings), so that those files load
unchanged; anything else is an error that names file, key and expected type.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddim.untrusted import FileError, UntrustedFileError, read_yaml_text, reason, refuse_interpolations


class ConfigError(FileError):
    """A configuration file that cannot be used; the message names file, key and remedy."""


@dataclass
class DataConfig:
    """Which images, and how pixel values map to the range the network sees."""

    dataset: str = MISSING
    image_size: int = MISSING
    channels: int = MISSING
    logit_transform: bool = False
    uniform_dequantization: bool = False
    gaussian_dequantization: bool = False
    random_flip: bool = False
    rescaled: bool = True
    num_workers: int = 0
    category: Optional[str] = None  # LSUN: bedroom, church_outdoor, cat


@dataclass
class ModelConfig:
    """Architecture of the UNet (:class:`ddim.unet.UNet`)."""

    in_channels: int = MISSING
    out_ch: int = MISSING
    ch: int = MISSING
    ch_mult: list[int] = MISSING
    num_res_blocks: int = MISSING
    attn_resolutions: list[int] = MISSING
    dropout: float = 0.0
    resamp_with_conv: bool = True
    type: str = "simple"
    var_type: str = "fixedlarge"
    ema: bool = True
    ema_rate: float = 0.9999


@dataclass
class DiffusionConfig:
    """The forward process: betas of each training timestep."""

    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_diffusion_timesteps: int = 1000


@dataclass
class TrainingConfig:
    batch_size: int = 128
    n_epochs: int = 10000
    n_iters: int = 5_000_000
    snapshot_freq: int = 5000
    validation_freq: int = 2000


@dataclass
class SamplingConfig:
    batch_size: int = 64
    last_only: bool = True


@dataclass
class OptimConfig:
    optimizer: str = "Adam"
    lr: float = 2e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    amsgrad: bool = False
    eps: float = 1e-8
    grad_clip: float = 1.0


@dataclass
class PixelConfig:
    """One pixel-space model: a whole ``configs/*.yml`` file."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as it is recorded beside samples and in checkpoints."""
        return dataclasses.asdict(self)


_CHOICES = {
    "model.type": ("simple",),
    "model.var_type": ("fixedlarge", "fixedsmall"),
    "diffusion.beta_schedule": ("linear", "quad", "const", "jsd", "sigmoid"),
}
# Each at least 1. Beyond these nothing was ever trained, and a network of that size would fill any memory.
_MOST = {
    "data.image_size": 8192,
    "data.channels": 1024,
    "model.in_channels": 1024,
    "model.out_ch": 2048,
    "model.ch": 2048,
    "model.num_res_blocks": 64,
    "diffusion.num_diffusion_timesteps": 1_000_000,
}
_MOST_LEVELS, _MOST_TIMES = 10, 64


def config_from_dict(content: dict[str, Any], source: str = "config") -> PixelConfig:
    """Check a nested dictionary against the schema above.

    Args:
        content: sections ``data``, ``model``, ``diffusion`` (and optionally the others) with their keys.
        source: what to call the dictionary in an error: usually the file it came from.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type or range.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: expected sections data, model, diffusion; found a {type(content).__name__}")
    _check_keys(content, PixelConfig, source, prefix="")
    for section in ("data", "model", "diffusion"):
        if section not in content:
            raise ConfigError(f"{source}: section '{section}' is missing")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(PixelConfig), content)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{source}: key '{key}': {_first_line(error)}; expected {_expected_type(key)}") from None
    except (TypeError, ValueError, RecursionError) as error:  # a list where a section belongs, and the like
        raise ConfigError(f"{source}: does not fit the schema: {reason(error)}") from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{source}: key '{missing[0]}' is missing; expected {_expected_type(missing[0])}")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, PixelConfig)
    _check_values(config, source)
    return config


def load_config(path: str | Path) -> PixelConfig:
    """Read and check one YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML of plain values, or does not fit the schema.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        content = yaml.safe_load(read_yaml_text(path))
        refuse_interpolations(content)
    except UntrustedFileError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config_from_dict(content, source=str(path))


def _check_keys(content: dict[str, Any], schema: type, source: str, prefix: str) -> None:
    known = {f.name: f for f in dataclasses.fields(schema)}
    defaults = schema()
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise ConfigError(f"{source}: unknown key '{name}'; known here: {', '.join(known)}")
        section = getattr(defaults, key)
        if dataclasses.is_dataclass(section):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: key '{name}': expected a section of keys, found {value!r}")
            _check_keys(value, type(section), source, prefix=f"{name}.")


def _check_values(config: PixelConfig, source: str) -> None:
    values = OmegaConf.structured(config)
    for name, allowed in _CHOICES.items():
        value = OmegaConf.select(values, name)
        if value not in allowed:
            raise ConfigError(f"{source}: key '{name}': {value!r} is not one of {', '.join(allowed)}")
    for name, most in _MOST.items():
        value = OmegaConf.select(values, name)
        if not 1 <= value <= most:
            raise ConfigError(f"{source}: key '{name}': {value} must be at least 1 and at most {most}")
    times = config.model.ch_mult
    if not 1 <= len(times) <= _MOST_LEVELS or min(times) < 1 or max(times) > _MOST_TIMES:
        raise ConfigError(
            f"{source}: key 'model.ch_mult': {times} must be a list of positive integers, at most {_MOST_LEVELS}, "
            f"none above {_MOST_TIMES}"
        )
    if config.model.ch % 32:
        raise ConfigError(f"{source}: key 'model.ch': {config.model.ch} must be a multiple of 32 (group norm)")
    halvings = 2 ** (len(config.model.ch_mult) - 1)
    if config.data.image_size % halvings:
        raise ConfigError(
            f"{source}: key 'data.image_size': {config.data.image_size} must be divisible by {halvings}, "
            f"for the {len(config.model.ch_mult)} levels of model.ch_mult"
        )
    if config.data.channels != config.model.in_channels:
        raise ConfigError(
            f"{source}: key 'model.in_channels': {config.model.in_channels} differs from data.channels "
            f"{config.data.channels}"
        )


def _expected_type(key: str) -> str:
    section, _, name = key.partition(".")
    schema = getattr(PixelConfig(), section, None)
    types = {f.name: f.type for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}
    return str(types.get(name.split("[")[0], "another type"))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
