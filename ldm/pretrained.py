"""Checkpoints of latent diffusion models: built without weights and filled from the file, so that one copy suffices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.config import ConfigError
from ddim.pretrained import describe_differences, read_weights
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import EMA_COPY, has_ema, with_ema_weights
from ldm.modules.encoders.modules import TextEncoder
from ldm.util import instantiate_from_config, load_model_config

# What some published files hold beside a model's tensors, and sampling has no place for.
HARMLESS = (
    "first_stage_model.loss.",  # discriminator and perceptual loss that the first stage was trained with
    "lvlb_weights",  # weights of the training loss, worked out from the betas
    "logvar",  # a learned weight of the training loss
    "cond_stage_model.transformer.to_logits.",  # from embeddings back to words, for training BERTEmbedder
)

UNET = ("model.diffusion_model.", EMA_COPY)
"""Beginnings of the names of a UNet's tensors and of their averages."""

# CLIP's text tower: the prefix that older releases of transformers, and so the published files, have; and a buffer.
CLIP_OLD, CLIP_NAMES = "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
CLIP_POSITIONS = "embeddings.position_ids"  # 0, 1, 2, ...


def build_latent_diffusion(config: Mapping[str, Any]) -> LatentDiffusion:
    """The model that a config's ``model`` section describes, with random weights on the current default device.

    Raises:
        ConfigError: the section names another class, or cannot be built.
    """
    model = instantiate_from_config(config)
    if not isinstance(model, LatentDiffusion):
        raise ConfigError(f"model: target {config['target']} is not a latent diffusion model")
    return model


def load_latent_diffusion(
    checkpoint: str | Path, config: Mapping[str, Any] | None = None, device: torch.device | str = "cpu"
) -> LatentDiffusion:
    """A published model, ready to sample: in evaluation mode, without gradients, with its averaged weights if it has.

    Args:
        checkpoint: ``.ckpt`` or ``.safetensors``, or a folder with ``model.ckpt`` or ``model.safetensors``.
        config: the ``model`` section; by default that of ``config.yaml`` beside the checkpoint. A tokenizer that this
            names as ``./NAME`` is read from there, too.
        device: where the weights go.

    Raises:
        ConfigError: the config is missing or cannot be built.
        ValueError: the file is unusable, or its tensors are not exactly those of the model; says which.
    """
    path = find_checkpoint(checkpoint)
    config_path = path.with_name("config.yaml")
    model_config = load_model_config(config_path) if config is None else config
    with torch.device("meta"):
        model = build_latent_diffusion(model_config)
    encoder = getattr(model, "cond_stage_model", None)
    if config is None and isinstance(encoder, TextEncoder):
        encoder.look_beside(config_path)
    load_state(model, read_weights(path), source=str(path))
    return model.to(device).eval().requires_grad_(False)


def find_checkpoint(path: str | Path) -> Path:
    """The file itself, or the checkpoint in a folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("model.ckpt", "model.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path}: has neither model.ckpt nor model.safetensors")


def load_state(
    model: LatentDiffusion, state: Mapping[str, Tensor], source: str = "the checkpoint", *, unet: bool = True
) -> None:
    """Make a state dict's tensors the model's own, without copying them.

    Args:
        model: may lie on the meta device; left untouched unless everything fits.
        state: published names; with moving averages exactly where the model's config says ``use_ema``.
        source: what to call it in errors.
        unet: whether the UNet's tensors are among them; where its weights come from elsewhere it is left as it is.

    Raises:
        ValueError: names or shapes differ, apart from :data:`HARMLESS`; says how.
    """
    if unet and not any(name.startswith(UNET[0]) for name in state):
        raise ValueError(
            f"{source}: holds no UNet (no {UNET[0]}*); give the whole checkpoint, or sample from a packed one, which "
            "brings its own (--resume --cali_ckpt)"
        )
    if not unet:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(UNET)}
    if unet and model.use_ema != has_ema(state):
        found = "holds no moving averages (model_ema.*)" if model.use_ema else "holds moving averages (model_ema.*)"
        raise ValueError(f"{source}: {found}; say use_ema: {not model.use_ema} in the config (model.params.use_ema)")
    try:
        weights = with_ema_weights(state) if unet and model.use_ema else dict(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    expected = {name: t for name, t in model.state_dict().items() if unet or not name.startswith(UNET)}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(HARMLESS)}
    weights = with_clip_names(weights, expected)
    differences = describe_differences(weights, expected)
    if differences:
        raise ValueError(f"{source}: does not fit the model of the config: {'; '.join(differences)}")
    weights = {name: tensor.to(expected[name].dtype) for name, tensor in weights.items()}
    model.load_state_dict(weights, strict=unet, assign=True)


def with_clip_names(weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The names of CLIP's text tower as the installed transformers spells them, without its buffer of positions.

    Args:
        weights: in either spelling; other names stay.
        expected: names of the model.
    """
    old = any(name.startswith(CLIP_OLD) for name in expected)
    found_old = any(name.startswith(CLIP_OLD) for name in weights)
    source = CLIP_OLD if found_old else CLIP_NAMES
    target = CLIP_OLD if old else CLIP_NAMES
    renamed = {}
    for name, tensor in weights.items():
        if name == source + CLIP_POSITIONS:
            continue
        renamed[target + name.removeprefix(source) if name.startswith(source) else name] = tensor
    return renamed
