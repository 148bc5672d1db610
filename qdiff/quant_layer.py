"""Layers with quantized weights and inputs, in place of the convolutions and linear layers of a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.config import QuantizerConfig
from qdiff.quantizers import AdaRoundQuantizer, UniformAffineQuantizer, WeightQuantizer, dequantize_codes, integer_codes

QUANTIZABLE = (nn.Conv2d, nn.Conv1d, nn.Linear)


class QuantModule(nn.Module):
    """A convolution or linear layer whose weight and input pass through quantizers.

    Takes over the layer's parameters (no copy). With both flags off it computes exactly what the layer did.

    Three weights can serve a forward pass: the full-precision one; the quantized one, computed anew every time
    (needed while rounding is learned); the quantized one, computed once by :meth:`bake`.

    Args:
        layer: what to replace.
        weight_params, act_params: the grids, as configs or as the published dictionaries.
    """

    baked_weight: Tensor | None

    def __init__(
        self,
        layer: nn.Conv2d | nn.Conv1d | nn.Linear,
        weight_params: QuantizerConfig | dict[str, Any] | None = None,
        act_params: QuantizerConfig | dict[str, Any] | None = None,
    ):
        super().__init__()
        if not isinstance(layer, QUANTIZABLE):
            raise TypeError(f"QuantModule takes Conv1d, Conv2d or Linear, got {type(layer).__name__}")
        self.weight, self.bias = layer.weight, layer.bias
        self._operation = _operation_of(layer)
        self._described = repr(layer)
        self._weight_config = QuantizerConfig.from_params(weight_params or {"channel_wise": True})
        self._act_config = QuantizerConfig.from_params(act_params or {"leaf_param": True})
        self.use_weight_quant = False
        self.use_act_quant = False
        self.register_buffer("baked_weight", None, persistent=False)
        self._add_quantizers()

    def _add_quantizers(self) -> None:
        self.weight_quantizer = self._new_weight_quantizer(self.weight)
        self.act_quantizer = UniformAffineQuantizer.from_config(self._act_config)

    def _new_weight_quantizer(self, weight: Tensor) -> UniformAffineQuantizer:
        grid_shape = (weight.shape[0],) + (1,) * (weight.dim() - 1) if self._weight_config.channel_wise else ()
        return UniformAffineQuantizer.from_config(self._weight_config, grid_shape)

    # The parts of the layer, each with a weight quantizer and an input quantizer of its own. A plain layer has one.

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """``(suffix of the quantizers' names, slice of the weight)`` of every separately quantized part."""
        return self.parts_of(self.weight)

    def parts_of(self, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The same of another weight of this layer's shape."""
        yield "", weight

    def weight_quantizers(self) -> list[tuple[WeightQuantizer, Tensor]]:
        """Every weight quantizer with the slice of the weight it quantizes."""
        return [(getattr(self, f"weight_quantizer{suffix}"), part) for suffix, part in self.parts()]

    def rounding_quantizers(self) -> list[tuple[AdaRoundQuantizer, Tensor]]:
        """The same of a layer whose rounding is learned.

        Raises:
            RuntimeError: it is not.
        """
        pairs = []
        for quantizer, part in self.weight_quantizers():
            if not isinstance(quantizer, AdaRoundQuantizer):
                raise RuntimeError("the layer rounds to nearest: call learn_rounding() first")
            pairs.append((quantizer, part))
        return pairs

    def act_quantizers(self) -> list[UniformAffineQuantizer]:
        return [getattr(self, f"act_quantizer{suffix}") for suffix, _ in self.parts()]

    def quantize_input(self, x: Tensor) -> Tensor:
        return self.act_quantizer(x)

    def join_parts(self, parts: list[Tensor]) -> Tensor:
        """The whole weight from its parts, in the order of :meth:`parts`."""
        return parts[0]

    # The forward pass.

    def forward(self, x: Tensor) -> Tensor:
        if self.use_act_quant:
            x = self.quantize_input(x)
        weight = self.effective_weight()
        return self._operation(x.to(weight.dtype), weight, self.bias)  # in half precision, rounded after the grid

    def effective_weight(self) -> Tensor:
        if not self.use_weight_quant:
            return self.weight
        return self.quantized_weight() if self.baked_weight is None else self.baked_weight

    def quantized_weight(self) -> Tensor:
        """Quantize the weight now."""
        return self.join_parts([quantizer(part) for quantizer, part in self.weight_quantizers()])

    # Changing how the weight is quantized.

    def set_quant_state(self, weight_quant: bool = False, act_quant: bool = False) -> None:
        self.use_weight_quant, self.use_act_quant = weight_quant, act_quant

    @torch.no_grad()
    def bake(self) -> None:
        """Compute the quantized weight once and use it from now on, until :meth:`unbake`."""
        self.baked_weight = self.quantized_weight().detach()

    def unbake(self) -> None:
        self.baked_weight = None

    @torch.no_grad()
    def find_weight_grid(self) -> None:
        """Set the weight's grid from the weight, rounding to the nearest point."""
        self.unbake()
        for suffix, part in self.parts():
            quantizer = self._new_weight_quantizer(part).to(part.device)
            quantizer.find_grid(part)
            setattr(self, f"weight_quantizer{suffix}", quantizer)

    def learn_rounding(self) -> None:
        """Replace rounding to nearest by learnable rounding on the same grid."""
        self.unbake()
        for suffix, part in self.parts():
            quantizer = getattr(self, f"weight_quantizer{suffix}")
            if not isinstance(quantizer, AdaRoundQuantizer):
                setattr(self, f"weight_quantizer{suffix}", AdaRoundQuantizer(quantizer, part))

    # Checkpoints.

    def codes(self) -> list[Tensor]:
        """The weight's integers, a tensor a part."""
        return [integer_codes(quantizer, part) for quantizer, part in self.weight_quantizers()]

    @torch.no_grad()
    def load_codes(self, parts: list[tuple[Tensor, Tensor, Tensor]], *, keep_full_precision: bool) -> None:
        """Take quantized weights from ``(codes, delta, zero_point)`` a part.

        Args:
            keep_full_precision: the layer's weight holds the full-precision values that the codes were made from;
                keep it and express the codes as rounding decisions. Otherwise the weight becomes the quantized one.

        Raises:
            ValueError: the codes are not roundings of the weight that is to be kept.
        """
        weight = self.join_parts([dequantize_codes(*part) for part in parts]).to(self.weight.device)
        if not keep_full_precision:
            self.weight = nn.Parameter(weight, requires_grad=False)
        for (suffix, own), (codes, delta, zero_point) in zip(self.parts(), parts, strict=True):
            grid = self._new_weight_quantizer(own).to(own.device)
            grid.set_grid(delta, zero_point)
            if keep_full_precision:
                setattr(self, f"weight_quantizer{suffix}", _rounding_decisions(grid, own, codes.to(own.device)))
            else:
                setattr(self, f"weight_quantizer{suffix}", grid)
        if keep_full_precision:
            self.bake()
        else:
            self.baked_weight = self.weight.detach()  # one tensor: on the grid it is what the grid makes of it

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unbake()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        state = f"weight {'quantized' if self.use_weight_quant else 'full'}"
        return f"{self._described}, {state}, input {'quantized' if self.use_act_quant else 'full'}"


class SplitQuantModule(QuantModule):
    """A shortcut over a concatenation, whose halves are quantized separately (Q-Diffusion, section 3.3).

    The decoder's feature and the encoder's differ so much in range that one grid serves neither. Input and weight are
    cut at the same channel: the plain quantizers take the decoder's part, those named ``_0`` the encoder's.

    Args:
        split_channels: how many input channels, from the first, are the decoder's.
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Conv1d | nn.Linear,
        weight_params: QuantizerConfig | dict[str, Any] | None = None,
        act_params: QuantizerConfig | dict[str, Any] | None = None,
        *,
        split_channels: int,
    ):
        if not 0 < split_channels < layer.weight.shape[1]:
            raise ValueError(
                f"split_channels={split_channels}: must lie inside the {layer.weight.shape[1]} input channels"
            )
        self.split_channels = split_channels
        super().__init__(layer, weight_params, act_params)

    def _add_quantizers(self) -> None:
        super()._add_quantizers()
        self.weight_quantizer_0 = self._new_weight_quantizer(self.weight)
        self.act_quantizer_0 = UniformAffineQuantizer.from_config(self._act_config)

    def parts_of(self, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "", weight[:, : self.split_channels]
        yield "_0", weight[:, self.split_channels :]

    def quantize_input(self, x: Tensor) -> Tensor:
        decoder, encoder = x[:, : self.split_channels], x[:, self.split_channels :]
        return torch.cat([self.act_quantizer(decoder), self.act_quantizer_0(encoder)], dim=1)

    def join_parts(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split at channel {self.split_channels}"


class SignedInputQuantModule(QuantModule):
    """A layer that quantizes the negative and the positive values of its input as two tensors.

    A layer is linear in its input: layer(x) = layer(min(x, 0)) + layer(max(x, 0)), so both parts can be b-bit integers
    that pass through the same integer weights, at the cost of passing twice. Each part takes half the range, which
    halves the step: for the first layer of a diffusion model, whose input holds noise as small as a step.

    ``act_quantizer`` takes the negative values, ``act_quantizer_positive`` the others.
    """

    def _add_quantizers(self) -> None:
        super()._add_quantizers()
        one_sided = dataclasses.replace(self._act_config, symmetric=False)
        self.act_quantizer = UniformAffineQuantizer.from_config(one_sided)
        self.act_quantizer_positive = UniformAffineQuantizer.from_config(one_sided)

    def act_quantizers(self) -> list[UniformAffineQuantizer]:
        return [self.act_quantizer, self.act_quantizer_positive]

    def quantize_input(self, x: Tensor) -> Tensor:
        return self.act_quantizer(x.clamp(max=0)) + self.act_quantizer_positive(x.clamp(min=0))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input split at 0"


def _operation_of(layer: nn.Conv2d | nn.Conv1d | nn.Linear) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    if isinstance(layer, nn.Linear):
        return F.linear
    if layer.padding_mode != "zeros":
        raise ValueError(f"padding_mode={layer.padding_mode!r}: only zero padding is supported")
    function: Callable[..., Tensor] = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv1d
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return lambda x, weight, bias: function(x, weight, bias, *options)


def _rounding_decisions(grid: UniformAffineQuantizer, weight: Tensor, codes: Tensor) -> AdaRoundQuantizer:
    """An AdaRound quantizer whose hard rounding of ``weight`` gives ``codes``."""
    quantizer = AdaRoundQuantizer(grid, weight)
    up = codes.to(weight.dtype) - quantizer.zero_point - (weight / quantizer.delta).floor()
    quantizer.alpha.data = torch.where(up > 0, 1.0, -1.0).to(weight)
    if not torch.equal(integer_codes(quantizer, weight), codes):
        raise ValueError("the quantized weights are not roundings of this full-precision checkpoint's weights")
    return quantizer
