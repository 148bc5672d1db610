"""A latent model of a few hundred parameters; a convolution takes the UNet's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm import util
from ldm.models.diffusion.ddpm import LatentDiffusion

DDCONFIG: dict[str, Any] = {
    "z_channels": 2,
    "resolution": 8,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class TinyUNet(nn.Module):
    """Any network of the UNet's signature; its output depends on all that it is given."""

    def __init__(self, channels: int = 2, context: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.context = nn.Linear(context, channels)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        h = 0.3 * self.conv(x) + 0.2 * torch.sin(t / 100).reshape(-1, 1, 1, 1)
        return h if context is None else h + self.context(context.mean(1))[:, :, None, None]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The ``model`` section of an unconditional model whose first stage is a KL autoencoder."""
    target = f"{__name__}.TinyUNet"
    monkeypatch.setattr(util, "TARGETS", util.TARGETS | {target})
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0155,
            "timesteps": 1000,
            "image_size": 4,
            "channels": 2,
            "monitor": "val/loss",
            "scheduler_config": {"target": "ldm.lr_scheduler.LambdaLinearScheduler"},
            "unet_config": {"target": target, "params": {"channels": 2, "context": 4}},
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {"embed_dim": 2, "ddconfig": DDCONFIG},
            },
            "cond_stage_config": "__is_unconditional__",
        },
    }


@pytest.fixture
def class_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same, conditional on one of ten classes; the eleventh is unconditional."""
    config["params"] |= {
        "conditioning_key": "crossattn",
        "cond_stage_key": "class_label",
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"embed_dim": 4, "n_classes": 11, "key": "class_label"},
        },
    }
    return config


def build(config: dict[str, Any], seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    return util.instantiate_from_config(config).eval().requires_grad_(False)
