"""The pixel UNets of :mod:`ddim`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ddim.unet import AttnBlock, ResnetBlock, Upsample
from qdiff import fused
from qdiff.adapters import Adapter
from qdiff.config import QuantConfig, QuantizerConfig
from qdiff.quant_block import BaseQuantBlock
from qdiff.quantizers import UniformAffineQuantizer


class QuantResnetBlock(BaseQuantBlock, ResnetBlock):
    """A residual block: only its layers are quantized."""

    kind = "residual block"

    def activated(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return fused.group_norm(norm, x, silu=True)


class QuantAttnBlock(BaseQuantBlock, AttnBlock):
    """Self-attention with quantized q, k, v and softmax map. q and k are quantized before they are scaled."""

    kind = "attention block"
    act_quantizer_q: UniformAffineQuantizer
    act_quantizer_k: UniformAffineQuantizer
    act_quantizer_v: UniformAffineQuantizer

    def add_quantizers(self, act: QuantizerConfig, softmax: QuantizerConfig) -> None:
        for name in "qkv":
            setattr(self, f"act_quantizer_{name}", UniformAffineQuantizer.from_config(act))
        self.act_quantizer_w = UniformAffineQuantizer.from_config(softmax)

    def attention_quantizers(self) -> dict[str, UniformAffineQuantizer]:
        return {name: getattr(self, f"act_quantizer_{name}") for name in "qkvw"}

    def attention_map_values(self, x: Tensor, context: Tensor | None = None) -> int:
        return len(x) * x[0, 0].numel() ** 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.use_act_quant:
            q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)
        if q.stride(1) == 1:  # channels last: the transposed product comes out channels last too
            return torch.bmm(self.softmax_map(q, k), v.transpose(1, 2)).transpose(1, 2)
        return super().attend(q, k, v)

    def normalised(self, x: Tensor) -> Tensor:
        return fused.group_norm(self.norm, x, silu=False)

    def softmax_map(self, q: Tensor, k: Tensor) -> Tensor:
        weights = super().softmax_map(q, k)
        return self.act_quantizer_w(weights) if self.use_act_quant else weights


def _shortcuts(unet: nn.Module) -> Iterator[tuple[str, int]]:
    for path, module in unet.named_modules():
        if isinstance(module, ResnetBlock) and module.skip_channels and hasattr(module, "nin_shortcut"):
            yield f"{path}.nin_shortcut", module.in_channels - module.skip_channels


def _finish_block(block: BaseQuantBlock, config: QuantConfig) -> None:
    if isinstance(block, QuantAttnBlock):
        # Here the softmax map's grid follows --a_sym, unlike in the latent families.
        softmax = QuantizerConfig(
            config.sm_abit, symmetric=config.a_sym, scale_method=config.act_range, leaf_param=True
        )
        block.add_quantizers(config.act, softmax)


def _inputs(unet: nn.Module) -> Iterator[str]:
    yield "conv_in"


ADAPTER = Adapter(
    family="ddim",
    blocks={ResnetBlock: QuantResnetBlock, AttnBlock: QuantAttnBlock},
    shortcuts=_shortcuts,
    finish_block=_finish_block,
    inputs=_inputs,
    time_embedding=("temb",),
    upsamplers={Upsample: "conv"},
)
