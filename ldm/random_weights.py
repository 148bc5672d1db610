"""Checkpoints with random weights in the layout of the published files, to try a model's speed and memory without it.

Nothing larger than one tensor is ever held: the layout is worked out without storage, and every tensor is drawn from a
generator of its own, keyed by seed and name, straight into the file.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion, make_betas, schedule_buffers
from ldm.modules.ema import EMA_COPY, MODEL, buffer_names
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.pretrained import CLIP_NAMES, CLIP_OLD, CLIP_POSITIONS, build_latent_diffusion

NORM_SPREAD = 0.1  # of gains around 1 and of shifts around 0: as trained ones, none is exactly neutral
BIAS_SPREAD = 0.05
EMA_DECAY = 0.9999
NORMS = (nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Draw:
    """One tensor of a checkpoint: normally distributed, or of known values.

    Attributes:
        shape, dtype: as in the file.
        mean, std: of the distribution.
        values: the values themselves, where they are not drawn.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float = 0.0
    std: float = 0.0
    values: Tensor | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def fill(self, tensor: Tensor, name: str, seed: int) -> None:
        """Write the values of tensor ``name`` into ``tensor``, which has the right shape and type."""
        if self.values is not None:
            tensor.copy_(self.values)
            return
        key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)  # 63 bits
        tensor.normal_(self.mean, self.std, generator=generator)


def random_checkpoint(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Draw]:
    """The state dict of the model that a config's ``model`` section describes, as draws in place of tensors.

    Weights have the variance 1 / fan-in, the last convolution too, so that activations keep their size through the
    network and its output is neither zero nor growing. Where the config says ``use_ema``, averages follow the weights;
    they are other draws, so that it shows which of the two a program takes.

    Args:
        dtype: of parameters and their averages; the schedule stays in float32.

    Raises:
        ConfigError, ValueError: the model cannot be built.
    """
    with torch.device("meta"):
        model = build_latent_diffusion(config)
    known = _known_values(config)
    parameters = {name: _drawn(name, tensor, model, dtype) for name, tensor in model.named_parameters()}
    draws = {}
    for name, tensor in model.state_dict().items():
        draws[name] = parameters.get(name) or _exact(known[name].to(tensor.dtype))
    draws = _published_clip_names(draws, model)
    if not model.use_ema:
        return draws
    short = buffer_names(name.removeprefix(MODEL) for name in parameters if name.startswith(MODEL))
    counters = {"decay": torch.tensor(EMA_DECAY), "num_updates": torch.tensor(0, dtype=torch.int32)}
    draws |= {EMA_COPY + name: _exact(value) for name, value in counters.items()}
    return draws | {EMA_COPY + average: parameters[MODEL + name] for name, average in short.items()}


def _known_values(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The buffers of a model: its noise schedule, and the factor of its latents."""
    call = inspect.signature(LatentDiffusion).bind(**config["params"])
    call.apply_defaults()
    told = call.arguments
    betas = make_betas(told["linear_start"], told["linear_end"], told["timesteps"])
    return schedule_buffers(betas) | {"scale_factor": torch.tensor(float(told["scale_factor"]))}


def _published_clip_names(draws: dict[str, Draw], model: LatentDiffusion) -> dict[str, Draw]:
    """CLIP's text tower as the published file spells it, with its buffer of positions."""
    encoder = getattr(model, "cond_stage_model", None)
    if not isinstance(encoder, FrozenCLIPEmbedder):
        return draws
    length = encoder.transformer.config.max_position_embeddings
    positions = {CLIP_OLD + CLIP_POSITIONS: _exact(torch.arange(length)[None])}

    def published(name: str) -> str:
        new = name.startswith(CLIP_NAMES) and not name.startswith(CLIP_OLD)
        return CLIP_OLD + name.removeprefix(CLIP_NAMES) if new else name

    return {published(name): draw for name, draw in draws.items()} | positions


def _exact(values: Tensor) -> Draw:
    return Draw(tuple(values.shape), values.dtype, values=values)


def _drawn(name: str, tensor: Tensor, model: nn.Module, dtype: torch.dtype) -> Draw:
    path, _, kind = name.rpartition(".")
    owner, shape = model.get_submodule(path), tuple(tensor.shape)
    if isinstance(owner, NORMS):
        return Draw(shape, dtype, 1.0 if kind == "weight" else 0.0, NORM_SPREAD)
    if isinstance(owner, nn.Embedding):
        return Draw(shape, dtype, std=1.0)
    if tensor.dim() < 2:
        return Draw(shape, dtype, std=BIAS_SPREAD)
    return Draw(shape, dtype, std=math.prod(shape[1:]) ** -0.5)
