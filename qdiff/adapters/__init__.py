"""What the quantizer must know about each family of UNets, and nothing else in :mod:`qdiff` knows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from ddim.unet import Stage, StagedNetwork
from qdiff.config import QuantConfig
from qdiff.quant_block import BaseQuantBlock

__all__ = ["Adapter", "Stage", "StagedNetwork", "find_adapter"]

# The class of a network -> the module of its adapter, which is imported when such a network is wrapped.
FAMILIES = {
    "ddim.unet.UNet": "ddim",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": "ldm",
    "ddim.diffusers_unet.StagedUNet2D": "diffusers",
}


@dataclass(frozen=True)
class Adapter:
    """One family of UNets.

    The network itself offers its forward pass in pieces: it is a :class:`ddim.unet.StagedNetwork`.

    Attributes:
        family: short name, recorded in checkpoints.
        blocks: full-precision block class -> its quantized class.
        shortcuts: yields ``(path, decoder channels)`` of every layer over a concatenation that ``--split`` cuts.
        finish_block: adds a quantized block's own quantizers, given the quantization asked for; called for blocks
            inside blocks too.
        inputs: yields the paths of the layers that see the noisy image itself, and nothing else.
        time_embedding: paths of the modules that embed the timestep, which compute in float32 at any precision.
        upsamplers: class of a module that enlarges a feature map -> the name of the layer in it that comes after.
    """

    family: str
    blocks: Mapping[type[nn.Module], type[BaseQuantBlock]]
    shortcuts: Callable[[nn.Module], Iterator[tuple[str, int]]]
    finish_block: Callable[[BaseQuantBlock, QuantConfig], None]
    inputs: Callable[[nn.Module], Iterator[str]]
    time_embedding: tuple[str, ...] = ()
    upsamplers: Mapping[type[nn.Module], str] = field(default_factory=dict)


def find_adapter(unet: nn.Module) -> Adapter:
    """The adapter of a network's class.

    Raises:
        TypeError: no family claims the class.
    """
    for cls in type(unet).__mro__:
        if name := FAMILIES.get(f"{cls.__module__}.{cls.__qualname__}"):
            return importlib.import_module(f"qdiff.adapters.{name}").ADAPTER
    raise TypeError(f"{type(unet).__name__} is not a UNet that can be quantized; known: {', '.join(FAMILIES)}")
