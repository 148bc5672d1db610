"""Configs of latent models: reading them, and building what their ``target`` strings name.

A target is looked up in a list and nothing else is ever imported, so a config file cannot make this code run another.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from ddim.config import ConfigError
from ddim.untrusted import read_yaml_text, reason, refuse_interpolations

TARGETS = frozenset(
    {
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.models.autoencoder.IdentityFirstStage",
        "ldm.models.autoencoder.VQModelInterface",
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "ldm.modules.encoders.modules.BERTEmbedder",
        "ldm.modules.encoders.modules.ClassEmbedder",
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "torch.nn.Identity",
    }
)

_KEYS = ("target", "params", "base_learning_rate")  # the last one only matters for training


def instantiate_from_config(config: Mapping[str, Any] | str, where: str = "model") -> nn.Module:
    """Build the module that a config section describes.

    Args:
        config: ``target``, a name of :data:`TARGETS`, and its keywords as ``params``.
        where: the section's place in the config, for errors.

    Raises:
        ConfigError: no target or one that is not in the list (before anything is imported), or keywords that it does
            not take.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("target"), str):
        raise ConfigError(f"{where}: expected a section with the keys target and params, found {config!r}")
    unknown = [key for key in config if key not in _KEYS]
    if unknown:
        raise ConfigError(f"{where}: unknown key '{unknown[0]}'; known here: {', '.join(_KEYS)}")
    target, params = config["target"], dict(config.get("params") or {})
    if target not in TARGETS:
        raise ConfigError(f"{where}: target '{target}' is none of {', '.join(sorted(TARGETS))}")
    module, _, name = target.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    check_keywords(cls, params, where)
    return cls(**params)


def check_keywords(cls: type, params: Mapping[str, Any], where: str) -> None:
    """Whether a class can be made with these keywords, before it is.

    Raises:
        ConfigError: naming the keyword that is unknown or missing.
    """
    try:
        inspect.signature(cls).bind(**params)
    except TypeError as error:
        raise ConfigError(f"{where}: {cls.__name__}: {error}") from None


def refuse_unknown(params: Mapping[str, Any], ignored: Collection[str], where: str) -> None:
    """For constructors that take the published keywords: those left over must be known to matter only for training.

    Raises:
        ConfigError: naming the first one that is not.
    """
    unknown = [key for key in params if key not in ignored]
    if unknown:
        raise ConfigError(f"{where}: unknown keyword '{unknown[0]}'")


def load_model_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The ``model`` section of a YAML config; other sections but ``sampling`` are for training and ignored.

    Args:
        overrides: ``key=value`` words in dots, such as ``model.params.image_size=32``; later ones win. They change
            sections that the file has: a misspelt one would change nothing, and nobody would notice.

    Raises:
        ConfigError: the file is missing, is not YAML of plain values (``${...}`` is none), or has no such section, or
            an override is not of one of them.
    """
    model = _section(Path(path), "model", overrides)
    if not model:
        raise ConfigError(f"{path}: has no section 'model'")
    if not isinstance(model, dict):
        raise ConfigError(f"{path}: 'model' is no section but {model!r}")
    return {str(key): value for key, value in model.items()}


def load_guidance(path: str | Path, overrides: Sequence[str] = ()) -> float | None:
    """The scale of classifier-free guidance that a model's config recommends: ``scale`` of its section ``sampling``.

    Published configs have no such section.

    Args:
        overrides: as in :func:`load_model_config`.

    Raises:
        ConfigError: as there, or the section holds anything but a number from 0 on.
    """
    sampling = _section(Path(path), "sampling", overrides)
    if sampling is None:
        return None
    scale = sampling.get("scale") if isinstance(sampling, dict) and set(sampling) == {"scale"} else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf:
        raise ConfigError(f"{path}: 'sampling' holds 'scale' alone, a number from 0 on; here it is {sampling!r}")
    return float(scale)


def _section(path: Path, name: str, overrides: Sequence[str]) -> Any:
    """Plain values of a section, changed by the overrides; None where there is none."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        config = OmegaConf.create(read_yaml_text(path))
        if not isinstance(config, DictConfig):
            return None
        changes = OmegaConf.from_dotlist(list(overrides))
        for section in changes:
            if section not in config:
                raise ConfigError(f"{path}: has no section {section!r} to override, only {', '.join(map(str, config))}")
        merged = OmegaConf.merge(config, changes)
        assert isinstance(merged, DictConfig)
        section = merged.get(name)
        if not isinstance(section, DictConfig):
            return section
        values = OmegaConf.to_container(section)
        refuse_interpolations(values, name)
    except ConfigError:
        raise
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as a config: {reason(error)}") from None
    return values
