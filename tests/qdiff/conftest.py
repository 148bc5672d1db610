"""A pixel UNet small enough to calibrate in a test, and ways to get it quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from ddim.unet import UNet
from qdiff.calibrate import find_act_ranges
from qdiff.calibration_data import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel

properties = settings(deadline=None, max_examples=50, derandomize=True)  # for @given, on busy machines too

CHANNELS, SIZE = 3, 8
DROPOUT = 0.4  # high, so that a test notices where it is on
SMALL: dict[str, Any] = {"ch_mult": (1,), "attn_resolutions": ()}  # one level, for tests that need many networks


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def tiny_unet(seed: int = 0, *, ch_mult: tuple[int, ...] = (1, 2), **changes: Any) -> UNet:
    """Two levels, attention on the coarse one; the halves of some shortcuts differ in width. In training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {
            "image_size": SIZE,
            "in_channels": CHANNELS,
            "out_ch": CHANNELS,
            "ch": 32,
            "ch_mult": ch_mult,
            "num_res_blocks": 1,
            "attn_resolutions": (4,),
            "dropout": DROPOUT,
        }
        model = UNet(**options | changes)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):  # as made they are ones and zeros, which hide a mix-up
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
    return model


def noisy_inputs(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and timesteps."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, CHANNELS, SIZE, SIZE, generator=draws)
    return x, torch.randint(0, 1000, (samples,), generator=draws).float()


def calibration_set(samples: int, seed: int = 0) -> CalibrationSet:
    return CalibrationSet(*noisy_inputs(samples, seed))


def wrapped(config: QuantConfig | None = None, **unet: Any) -> QuantModel:
    """A tiny UNet with quantizers whose grids are not set, in evaluation mode."""
    return QuantModel.from_config(tiny_unet(**unet).eval(), config or QuantConfig(4, 8, quant_act=True, split=True))


def with_grids(config: QuantConfig | None = None, **unet: Any) -> QuantModel:
    """The same with every grid set, rounding to nearest, quantization on."""
    qnn = wrapped(config, **unet)
    qnn.find_weight_grids()
    x, t = noisy_inputs(4, seed=1)
    if qnn.config.timed:  # a sample of each timestep at least
        t = torch.tensor(qnn.config.timesteps)[torch.arange(len(t)) % qnn.clock.groups]
    find_act_ranges(qnn, (x, t))
    qnn.set_quant_state(True, qnn.config.quant_act)
    return qnn


def as_calibrated(config: QuantConfig | None = None, **unet: Any) -> QuantModel:
    """The same with a rounding that is not the nearest: a tenth of the weights goes the other way."""
    qnn = with_grids(config, **unet)
    qnn.learn_rounding()
    draws = torch.Generator().manual_seed(2)
    for layer in qnn.layers().values():
        for quantizer, _ in layer.weight_quantizers():
            flip = torch.rand(quantizer.alpha.shape, generator=draws) < 0.1
            quantizer.alpha.data = torch.where(flip, -quantizer.alpha, quantizer.alpha)
    qnn.bake()
    return qnn
