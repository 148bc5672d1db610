"""The UNet2DModel of diffusers, with its forward pass in stages (imported only where such a model is used)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ddim.unet import Flow, Stage, StagedNetwork


class StagedUNet2D(StagedNetwork, UNet2DModel):
    """Predicts the noise in a noisy image: (N x C x H x W, N timesteps) -> N x C x H x W.

    All parameters have diffusers' names.
    """

    config: Any
    time_proj: nn.Module
    time_embedding: nn.Module
    conv_norm_out: nn.Module
    conv_act: nn.Module
    conv_out: nn.Module
    down_blocks: Any
    mid_block: Any
    up_blocks: Any

    @classmethod
    def of(cls, config: dict[str, Any]) -> StagedUNet2D:
        """With random weights, as a ``config.json`` that :mod:`ddim.diffusers_config` has checked describes it."""
        return cls.from_config({key: value for key, value in config.items() if not key.startswith("_")})

    def begin(self, x: Tensor, t: Tensor) -> Flow:
        """What enters the first stage."""
        return Flow(h=2 * x - 1 if self.config.center_input_sample else x, t=t)

    def run_stage(self, stage: Stage, flow: Flow) -> None:
        if stage.path == "time_embedding":
            flow.temb = self.time_embedding(self.time_proj(flow.t))
        elif stage.path == "conv_out":
            flow.h = self.conv_out(self.conv_act(self.conv_norm_out(flow.h)))
        else:
            super().run_stage(stage, flow)

    def stages(self) -> tuple[Stage, ...]:
        """The parts of the forward pass in the order in which it runs them."""
        return tuple(self._list_stages())

    def _list_stages(self) -> Iterator[Stage]:
        yield Stage("time_embedding")
        yield Stage("conv_in", leaves=True)
        for number, block in enumerate(self.down_blocks):
            yield from _level(f"down_blocks.{number}", block, leaves=True)
            yield from _resamplers(f"down_blocks.{number}.downsamplers", block.downsamplers, leaves=True)
        yield Stage("mid_block.resnets.0", timed=True)
        for index, attention in enumerate(self.mid_block.attentions):
            if attention is not None:
                yield Stage(f"mid_block.attentions.{index}")
            yield Stage(f"mid_block.resnets.{index + 1}", timed=True)
        for number, block in enumerate(self.up_blocks):
            yield from _level(f"up_blocks.{number}", block, joins=True)
            yield from _resamplers(f"up_blocks.{number}.upsamplers", block.upsamplers)
        yield Stage("conv_out")


def _level(path: str, block: Any, *, leaves: bool = False, joins: bool = False) -> Iterator[Stage]:
    attends = hasattr(block, "attentions")
    for index in range(len(block.resnets)):
        yield Stage(f"{path}.resnets.{index}", timed=True, joins=joins, leaves=leaves and not attends)
        if attends:
            yield Stage(f"{path}.attentions.{index}", leaves=leaves)


def _resamplers(path: str, modules: Any, *, leaves: bool = False) -> Iterator[Stage]:
    for index, module in enumerate(modules or ()):
        yield Stage(f"{path}.{index}", timed=isinstance(module, ResnetBlock2D), leaves=leaves)
