"""The latent UNets of :mod:`ldm`: attention over heads, and transformers with a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.attention import GEGLU, AttentionBlock, CrossAttention, TransformerBlock, gated_gelu
from ldm.modules.diffusionmodules.openaimodel import ResBlock, Upsample
from qdiff import fused
from qdiff.adapters import Adapter
from qdiff.attention import (
    UNQUANTIZED_MAP,
    attention,
    attention_rounding_its_map,
    by_heads,
    rounded_in_passing,
    rounds_map,
)
from qdiff.config import QuantConfig, QuantizerConfig
from qdiff.quant_block import BaseQuantBlock
from qdiff.quantizers import UniformAffineQuantizer


class QuantResBlock(BaseQuantBlock, ResBlock):
    """A residual block: only its layers are quantized."""

    kind = "residual block"

    def normalised(self, norm: nn.Module, x: Tensor, *, silu: bool) -> Tensor:
        return fused.group_norm(norm, x, silu=silu)


class QuantAttentionBlock(BaseQuantBlock, AttentionBlock):
    """Attention over heads with quantized q, k, v and softmax map.

    q and k are quantized after each was multiplied by K^(-1/4), K the channels of a head. The published names put the
    quantizers below the two products that they belong to.
    """

    kind = "attention block"
    fused_attention = staticmethod(attention)

    def add_quantizers(self, act: QuantizerConfig, softmax: QuantizerConfig) -> None:
        products = {"qkv_matmul": {"q": act, "k": act}, "smv_matmul": {"v": act, "w": softmax}}
        self.attention = nn.ModuleDict(
            {product: nn.ModuleDict(_act_quantizers(configs)) for product, configs in products.items()}
        )

    def block_act_quantizers(self) -> list[UniformAffineQuantizer]:
        return list(self.attention_quantizers().values())

    def attention_quantizers(self) -> dict[str, UniformAffineQuantizer]:
        scores, sums = self._products()
        names = {"q": scores, "k": scores, "v": sums, "w": sums}
        # A ModuleDict does not say what it holds.
        return {name: cast(UniformAffineQuantizer, product[f"act_quantizer_{name}"]) for name, product in names.items()}

    def _products(self) -> tuple[nn.ModuleDict, nn.ModuleDict]:
        """The quantizers of q k, and of v times the map."""
        scores, sums = self.attention["qkv_matmul"], self.attention["smv_matmul"]
        assert isinstance(scores, nn.ModuleDict)
        assert isinstance(sums, nn.ModuleDict)
        return scores, sums

    def attention_map_values(self, x: Tensor, context: Tensor | None = None) -> int:
        return len(x) * self.heads * x[0, 0].numel() ** 2

    def normalised(self, x: Tensor) -> Tensor:
        return fused.group_norm(self.norm, x, silu=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.use_act_quant:
            return super().attend(q, k, v)
        scores, sums = self._products()
        scale = q.shape[2] ** -0.25
        q, k = scores["act_quantizer_q"](q * scale), scores["act_quantizer_k"](k * scale)  # N, A, K, P
        v = sums["act_quantizer_v"](v)
        rows = q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)
        if (out := rounded_in_passing(*rows, sums["act_quantizer_w"], scale=1.0)) is not None:
            return out.transpose(2, 3)

        def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = sums["act_quantizer_w"]((q.transpose(2, 3) @ k).softmax(dim=3))  # N, A, P (of q), P (of k)
            return v @ weights.transpose(2, 3)

        size = q[:, :, 0].numel() * k.shape[3]
        return by_heads(summed, q, k, v, map_values=size, quantizer=self.attention_quantizers()["w"])


class QuantCrossAttention(BaseQuantBlock, CrossAttention):
    """A transformer's attention with quantized q, k, v and softmax map. q and k are quantized before they are scaled.

    It belongs to the unit of its transformer block.
    """

    kind = "attention"
    act_quantizer_q: UniformAffineQuantizer
    act_quantizer_k: UniformAffineQuantizer
    act_quantizer_v: UniformAffineQuantizer
    act_quantizer_w: UniformAffineQuantizer
    fused_attention = staticmethod(attention)

    def add_quantizers(self, act: QuantizerConfig, softmax: QuantizerConfig) -> None:
        for name, quantizer in _act_quantizers({"q": act, "k": act, "v": act, "w": softmax}).items():
            setattr(self, name, quantizer)

    def attention_quantizers(self) -> dict[str, UniformAffineQuantizer]:
        return {name: getattr(self, f"act_quantizer_{name}") for name in "qkvw"}

    def attention_map_values(self, x: Tensor, context: Tensor | None = None) -> int:
        source = x if context is None else context
        return len(x) * self.heads * x.shape[1] * source.shape[1]

    def can_leave_map_unrounded(self) -> bool:
        return self.act_quantizer_w.config.n_bits >= UNQUANTIZED_MAP

    def rounds_map(self) -> bool:
        return not self.unrounded_map and rounds_map(self.act_quantizer_w)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.use_act_quant:
            return super().attend(q, k, v)
        q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)  # N, A, P or L, K
        if not self.rounds_map():
            return super().attend(q, k, v)
        return attention_rounding_its_map(q, k, v, self.act_quantizer_w)


class QuantTransformerBlock(BaseQuantBlock, TransformerBlock):
    """A transformer block: its layers are quantized, and the products of both its attentions.

    Attributes:
        grad_ckpt: while it is reconstructed keep only what passes between its three parts, and compute the inside of
            a part again when its gradients are wanted: the maps of one attention in memory at once, not of both. Same
            values, more time.
    """

    kind = "transformer block"

    def attend_to_itself(self, x: Tensor) -> Tensor:
        return self._kept_or_computed_again(super().attend_to_itself, x)

    def attend_to_context(self, x: Tensor, context: Tensor) -> Tensor:
        return self._kept_or_computed_again(super().attend_to_context, x, context)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self._kept_or_computed_again(super().feed_forward, x)

    def normalised(self, norm: nn.Module, x: Tensor) -> Tensor:
        # Rounded to bfloat16 before it is quantized it would be rounded twice.
        return fused.layer_norm(norm, x, for_products=not self.use_act_quant)

    def _kept_or_computed_again(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not (self.grad_ckpt and torch.is_grad_enabled()):
            return part(*inputs)
        # Nothing in a part is random, and a CUDA graph may not look at the state of the generator.
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)


def _act_quantizers(configs: dict[str, QuantizerConfig]) -> dict[str, UniformAffineQuantizer]:
    return {f"act_quantizer_{name}": UniformAffineQuantizer.from_config(config) for name, config in configs.items()}


def _shortcuts(unet: nn.Module) -> Iterator[tuple[str, int]]:
    for path, module in unet.named_modules():
        if isinstance(module, ResBlock) and module.skip_channels and isinstance(module.skip_connection, nn.Conv2d):
            yield f"{path}.skip_connection", module.in_channels - module.skip_channels


def _finish_block(block: BaseQuantBlock, config: QuantConfig) -> None:
    if isinstance(block, QuantAttentionBlock | QuantCrossAttention):
        block.add_quantizers(config.act, config.attention_map)
    if isinstance(block, QuantTransformerBlock):
        for gate in (module for module in block.modules() if isinstance(module, GEGLU)):
            gate.gated = _gated


def _gated(x: Tensor) -> Tensor:
    return fused.gated_gelu(x) if fused.can_gate(x) else gated_gelu(x)


def _inputs(unet: nn.Module) -> Iterator[str]:
    yield "input_blocks.0.0"


ADAPTER = Adapter(
    family="ldm",
    blocks={
        ResBlock: QuantResBlock,
        AttentionBlock: QuantAttentionBlock,
        CrossAttention: QuantCrossAttention,
        TransformerBlock: QuantTransformerBlock,
    },
    shortcuts=_shortcuts,
    finish_block=_finish_block,
    inputs=_inputs,
    time_embedding=("time_embed",),
    upsamplers={Upsample: "conv"},
)
