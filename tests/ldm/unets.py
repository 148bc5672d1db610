"""Latent UNets small enough to run and to calibrate in a test: one of each kind that is published."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel

CHANNELS, SIZE, TOKENS, CONTEXT = 3, 8, 5, 24
_COMMON: dict[str, Any] = {
    "image_size": SIZE,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
}
KINDS: dict[str, dict[str, Any]] = {
    "head_channels": {"num_head_channels": 16},
    "scale_shift": {"num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True},
    "transformer": {"num_heads": 4, "use_spatial_transformer": True, "context_dim": CONTEXT, "dropout": 0.3},
}


def tiny_latent_unet(kind: str, seed: int = 0, **changes: Any) -> UNetModel:
    """Two levels, attention on the coarse one; the halves of some shortcuts differ in width. In training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNetModel(**_COMMON | KINDS[kind] | changes)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):  # as made they are ones and zeros, which hide a mix-up
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
    return model


def latent_inputs(kind: str, samples: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Latents, timesteps and, where the kind takes one, context."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, CHANNELS, SIZE, SIZE, generator=draws)
    t = torch.randint(0, 1000, (samples,), generator=draws).float()
    if kind != "transformer":
        return x, t
    return x, t, torch.randn(samples, TOKENS, CONTEXT, generator=draws)
