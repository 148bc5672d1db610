"""What a folder that diffusers saved says of a pixel-space model.

Read are ``unet/config.json`` and ``scheduler/scheduler_config.json`` of a pipeline such as DDPM's, or the
``config.json`` of a UNet2DModel alone, whose schedule is taken to be DDPM's. Nothing of diffusers is imported for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddim.config import ConfigError, DataConfig, DiffusionConfig, ModelConfig, PixelConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}
ONLY: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
SCHEDULES = {"linear": "linear", "scaled_linear": "quad"}  # diffusers' names of betas, ours


@dataclass
class DiffusersConfig(PixelConfig):
    """A pixel-space model whose network diffusers describes.

    Attributes:
        unet: the UNet's ``config.json``.
        folder: where that lies, with the weights beside it.
    """

    unet: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"folder": str(self.folder)}

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS


def read_folder(folder: Path) -> DiffusersConfig:
    """The model that a folder holds.

    Raises:
        ConfigError: it holds none, or one with parts that are not known here; the message names file and key.
    """
    place = next((place for place in (folder / "unet", folder) if (place / "config.json").is_file()), None)
    if place is None:
        raise ConfigError(f"{folder}: neither unet/config.json nor config.json: no folder that diffusers saved")
    source = place / "config.json"
    unet = _read(source)
    _check(unet, source)
    channels = unet["block_out_channels"]
    scheduler = place.parent / "scheduler" / "scheduler_config.json"
    return DiffusersConfig(
        data=DataConfig(dataset="diffusers", image_size=unet["sample_size"], channels=unet["in_channels"]),
        model=ModelConfig(
            in_channels=unet["in_channels"],
            out_ch=unet["out_channels"],
            ch=channels[0],
            ch_mult=[width // channels[0] for width in channels],
            num_res_blocks=unet["layers_per_block"],
            attn_resolutions=[
                unet["sample_size"] >> level
                for level, name in enumerate(unet["down_block_types"])
                if name.startswith("Attn")
            ],
        ),
        diffusion=_schedule(scheduler) if place.name == "unet" and scheduler.is_file() else DiffusionConfig(),
        unet=unet,
        folder=place,
    )


def _check(unet: dict[str, Any], source: Path) -> None:
    if (name := unet.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ConfigError(f"{source}: describes a {name}; only a UNet2DModel can be quantized")
    for key in ("sample_size", "in_channels", "out_channels", "layers_per_block"):
        if not isinstance(unet.get(key), int) or isinstance(unet[key], bool) or unet[key] < 1:
            raise ConfigError(f"{source}: key '{key}': expected a number of at least 1, found {unet.get(key)!r}")
    widths = unet.get("block_out_channels")
    if not isinstance(widths, list) or not widths or not all(type(w) is int and w > 0 for w in widths):
        raise ConfigError(f"{source}: key 'block_out_channels': expected channels of each level, found {widths!r}")
    for key, known in BLOCKS.items():
        names = unet.get(key)
        if not isinstance(names, list) or len(names) != len(widths):
            raise ConfigError(f"{source}: key '{key}': expected the name of a block for each level, found {names!r}")
        if unknown := sorted({str(name) for name in names} - set(known)):
            raise ConfigError(f"{source}: key '{key}': {', '.join(unknown)} not supported; known: {', '.join(known)}")
    for key, values in ONLY.items():
        if unet.get(key, values[0]) not in values:
            raise ConfigError(f"{source}: key '{key}': {unet[key]!r} is not supported; known: {values[0]}")


def _schedule(path: Path) -> DiffusionConfig:
    content = _read(path)
    name = content.get("beta_schedule", "linear")
    if name not in SCHEDULES or content.get("trained_betas") is not None:
        raise ConfigError(f"{path}: key 'beta_schedule': {name!r} is not supported; known: {', '.join(SCHEDULES)}")
    if (kind := content.get("prediction_type", "epsilon")) != "epsilon":
        raise ConfigError(f"{path}: key 'prediction_type': {kind!r}; samplers here need epsilon, predicted noise")
    try:
        return DiffusionConfig(
            SCHEDULES[name],
            float(content.get("beta_start", 1e-4)),
            float(content.get("beta_end", 0.02)),
            int(content.get("num_train_timesteps", 1000)),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping, found a {type(content).__name__}")
    return content
