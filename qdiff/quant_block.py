"""Quantized blocks: what is calibrated as one unit, with the activations that no layer's input quantizer reaches."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from qdiff.quant_layer import QuantModule
from qdiff.quantizers import UniformAffineQuantizer


class BaseQuantBlock(nn.Module):
    """A block that is reconstructed as one unit. Families subclass it together with their own full-precision block.

    The quantized block takes over the children and settings of the block it replaces, and inherits its forward pass:
    only the layers in it, already replaced, and what a subclass overrides are different.

    Attributes:
        kind: what the block is called in tables.
        grad_ckpt: save memory while it is reconstructed, by computing activations twice; for families that can.
        unrounded_map: of a block that can leave its softmax map in 16 bits unrounded: whether it does.
    """

    kind: ClassVar[str] = "block"
    grad_ckpt: bool = False
    unrounded_map: bool = False
    use_weight_quant: bool
    use_act_quant: bool

    @classmethod
    def take_over(cls, block: nn.Module) -> BaseQuantBlock:
        """Make the quantized block out of a full-precision one, whose layers may be replaced already."""
        quantized = cls.__new__(cls)
        nn.Module.__init__(quantized)
        for name, value in vars(block).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                quantized.__dict__[name] = value
        for store in ("_modules", "_parameters", "_buffers"):
            getattr(quantized, store).update(getattr(block, store))
        quantized.use_weight_quant = quantized.use_act_quant = False
        return quantized

    def block_act_quantizers(self) -> list[UniformAffineQuantizer]:
        """The quantizers of activations that belong to the block itself and not to one of its layers."""
        return [child for child in self.children() if isinstance(child, UniformAffineQuantizer)]

    def attention_quantizers(self) -> dict[str, UniformAffineQuantizer]:
        """Of a block that attends: the quantizers of ``q``, ``k``, ``v`` and the softmax map ``w``, which all see one
        tensor a forward pass, that of ``w`` ending in positions of q x positions of k. Empty for other blocks.
        """
        return {}

    def attention_map_values(self, x: Tensor, context: Tensor | None = None) -> int:
        """Of a block that attends: how many values the softmax map of all heads has. 0 for other blocks.

        Args:
            x, context: the block's inputs.
        """
        return 0

    def can_leave_map_unrounded(self) -> bool:
        """Of a block that attends: whether its softmax map has 16 bits, and its attention can be fused without it."""
        return False

    def rounds_map(self) -> bool:
        """Of a block that attends: whether its softmax map is rounded here and now, with activations quantized."""
        return True

    def set_quant_state(self, weight_quant: bool = False, act_quant: bool = False) -> None:
        self.use_weight_quant, self.use_act_quant = weight_quant, act_quant
        for module in self.modules():
            if module is not self and isinstance(module, QuantModule | BaseQuantBlock):
                module.set_quant_state(weight_quant, act_quant)
