"""The UNet2DModel of diffusers, in stages (:mod:`ddim.diffusers_unet`): the example of docs/adapters.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from qdiff.adapters import Adapter
from qdiff.attention import attention, attention_rounding_its_map
from qdiff.config import QuantConfig, QuantizerConfig
from qdiff.quant_block import BaseQuantBlock
from qdiff.quantizers import UniformAffineQuantizer

# Axes in comments: N images, C channels, P positions, A heads, K channels of a head.


class QuantResnetBlock2D(BaseQuantBlock, ResnetBlock2D):
    """A residual block: only its layers are quantized."""

    kind = "residual block"


class QuantAttention2D(BaseQuantBlock, Attention):
    """Self-attention with quantized q, k, v and softmax map. q and k are quantized before they are scaled."""

    kind = "attention block"
    heads: int
    group_norm: nn.Module | None
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    rescale_output_factor: float
    act_quantizer_q: UniformAffineQuantizer
    act_quantizer_k: UniformAffineQuantizer
    act_quantizer_v: UniformAffineQuantizer
    act_quantizer_w: UniformAffineQuantizer

    def add_quantizers(self, act: QuantizerConfig, softmax: QuantizerConfig) -> None:
        for name, config in {"q": act, "k": act, "v": act, "w": softmax}.items():
            setattr(self, f"act_quantizer_{name}", UniformAffineQuantizer.from_config(config))

    def attention_quantizers(self) -> dict[str, UniformAffineQuantizer]:
        return {name: getattr(self, f"act_quantizer_{name}") for name in "qkvw"}

    def attention_map_values(self, x: Tensor, context: Tensor | None = None) -> int:
        return len(x) * self.heads * x[0, 0].numel() ** 2

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if self.group_norm is not None:
            tokens = self.group_norm(tokens)
        tokens = tokens.transpose(1, 2)  # N, P, C
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # N, A, P, K
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = self.to_out[0](self.attend(q, k, v).transpose(1, 2).flatten(2))  # N, P, C
        return (out.transpose(1, 2).unflatten(2, x.shape[2:]) + x) / self.rescale_output_factor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.use_act_quant:
            return attention(q, k, v)
        q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)
        return attention_rounding_its_map(q, k, v, self.act_quantizer_w)


def _shortcuts(unet: Any) -> Iterator[tuple[str, int]]:
    width = unet.config.block_out_channels[-1]  # of what comes from below
    for number, block in enumerate(unet.up_blocks):
        for index, resnet in enumerate(block.resnets):
            if resnet.conv_shortcut is not None:
                yield f"up_blocks.{number}.resnets.{index}.conv_shortcut", width
            width = resnet.out_channels


def _finish_block(block: BaseQuantBlock, config: QuantConfig) -> None:
    if isinstance(block, QuantAttention2D):
        block.add_quantizers(config.act, config.attention_map)


def _inputs(unet: nn.Module) -> Iterator[str]:
    yield "conv_in"


ADAPTER = Adapter(
    family="diffusers",
    blocks={ResnetBlock2D: QuantResnetBlock2D, Attention: QuantAttention2D},
    shortcuts=_shortcuts,
    finish_block=_finish_block,
    inputs=_inputs,
    time_embedding=("time_embedding",),
    upsamplers={Upsample2D: "conv"},
)
