"""What a network costs before anything is run: parameters, multiplications, bit operations, bytes at each precision.

Counted on the meta device, where tensors have shapes and no values, so a network of a billion parameters takes
seconds and no memory.

*MACs* are the multiply-accumulates of one image in one step: those of convolutions and linear layers, and those of the
two products of attention. *BOPs* weight each with its bits (Q-Diffusion, table 1, and the works before it):

    BOPs = MACs · bits of the weight · bits of the activation

and for the products of attention the bits of both operands. *Sizes* are those of the tensors in a packed checkpoint
(:mod:`qdiff.checkpoint`), to the byte, and of plain floats for fp32 and fp16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.checkpoint import other_tensors, packed_length
from qdiff.config import QuantConfig
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QuantModule, SignedInputQuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizers import UniformAffineQuantizer

GRID_BYTES = 4 + 4  # a step size and a zero point
FLOAT_BYTES = 4  # of what a packed file keeps in full precision


@dataclass(frozen=True)
class Precision:
    """How many bits weights and activations have.

    Attributes:
        name: such as ``fp16`` or ``W4A8``.
        weight, act, softmax: bits of weights, of activations, of attention maps after softmax.
        quant: how the network is quantized; None for plain floats.
    """

    name: str
    weight: int
    act: int
    softmax: int
    quant: QuantConfig | None = None

    @classmethod
    def of(cls, quant: QuantConfig) -> Precision:
        """The precision of a quantized network; activations that are not quantized are fp32."""
        act, softmax = (quant.act_bit, quant.sm_abit) if quant.quant_act else (32, 32)
        return cls(f"W{quant.weight_bit}A{act}", quant.weight_bit, act, softmax, quant)


FLOATS = (Precision("fp32", 32, 32, 32), Precision("fp16", 16, 16, 16))


def usual_precisions(quant: QuantConfig) -> tuple[Precision, ...]:
    """fp32, fp16, 8 and 4 bits of the weights and what else ``quant`` asks for; the rest of it the same in all."""
    bits = sorted({8, 4, quant.weight_bit}, reverse=True)
    return (*FLOATS, *(Precision.of(dataclasses.replace(quant, weight_bit=b)) for b in bits))


@dataclass(frozen=True)
class Cost:
    """One layer, product of attention, or tensor of another kind.

    Attributes:
        path: in the UNet, as in checkpoints but for the leading ``model.``; of a product, its block's.
        kind: ``conv 3x3``, ``linear``, ``q k``, ``softmax v`` (products), ``other`` (a tensor of
            normalisation, which stays in full precision) or ``correction`` (of the output, where one is asked for).
        shape: of the weight; of a product's result, for one image.
        parameters: weights and biases.
        macs: multiply-accumulates for one image in one step.
        bops: by the name of the precision.
        sizes: bytes, by the name of the precision.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    bops: dict[str, int]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Costs:
    """A whole network's, in its order of layers.

    Attributes:
        inputs: shapes of what one image in one step is, without the batch: the image or latent, perhaps a context.
    """

    inputs: tuple[tuple[int, ...], ...]
    precisions: tuple[Precision, ...]
    rows: tuple[Cost, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    def size(self, precision: str) -> int:
        """Bytes of all tensors."""
        return sum(row.sizes[precision] for row in self.rows)

    def bops(self, precision: str) -> int:
        return sum(row.bops[precision] for row in self.rows)

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Plain values, for JSON.

        Args:
            rows: layer by layer too.
        """
        facts: dict[str, Any] = {
            "inputs": [list(shape) for shape in self.inputs],
            "parameters": self.parameters,
            "macs": self.macs,
            "precisions": {p.name: {"bytes": self.size(p.name), "bops": self.bops(p.name)} for p in self.precisions},
        }
        return facts | ({"layers": [dataclasses.asdict(row) for row in self.rows]} if rows else {})


def count_costs(
    model: QuantModel,
    image: Sequence[int],
    context: Sequence[int] | None = None,
    *,
    precisions: Sequence[Precision],
    scale_timesteps: int = 0,
    scale_mean: bool = False,
) -> Costs:
    """Count a wrapped network on the meta device; one forward pass of one image, in which nothing is computed.

    Args:
        model: made under ``torch.device("meta")``; its activation grids are marked as set.
        image: C, H, W of the network's input; context: L, D of a conditional network's context.
        precisions: what to count for. The quantized ones may differ from ``model.config`` in bits, not in what decides
            the network's quantizers (split shortcuts, timed ranges, a split input, whether activations are quantized).
        scale_timesteps: at how many the output's scale is corrected (:class:`~qdiff.output_scale.OutputScale`);
            scale_mean: and its mean error, pixel by pixel.

    Raises:
        ValueError: the network is on another device, or a precision is of a network wrapped otherwise.
    """
    if any(not p.is_meta for p in model.parameters()):
        raise ValueError('costs are counted on the meta device: make the network under torch.device("meta")')
    for precision in precisions:
        if precision.quant is not None and _structure(precision.quant) != _structure(model.config):
            raise ValueError(f"{precision.name}: the network is wrapped with other quantizers than these")
    seen = _shapes_in_a_pass(model, image, context)
    rows: list[Cost] = []
    for path, module in model.model.named_modules():
        if isinstance(module, QuantModule):
            rows.append(_layer_cost(path, module, seen[module], precisions))
        elif isinstance(module, BaseQuantBlock) and (quantizers := module.attention_quantizers()):
            rows += _product_costs(path, quantizers, seen, precisions)
    for path, tensor in other_tensors(model).items():
        rows.append(_other_cost(path, tensor, precisions))
    if scale_timesteps:
        rows.append(_correction_cost(scale_timesteps, seen[model][1:], precisions, mean=scale_mean))
    inputs = (tuple(image),) if context is None else (tuple(image), tuple(context))
    return Costs(inputs, tuple(precisions), tuple(rows))


def _structure(quant: QuantConfig) -> tuple[Any, ...]:
    return quant.split, quant.quant_act, quant.timed_ranges, quant.timesteps, quant.split_input


@torch.no_grad()
def _shapes_in_a_pass(
    model: QuantModel, image: Sequence[int], context: Sequence[int] | None
) -> dict[nn.Module, torch.Size]:
    """What the network, its layers and the quantizers of its activations put out, with a batch of one."""
    seen: dict[nn.Module, torch.Size] = {}

    def note_output(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        seen[module] = output.shape

    handles = [module.register_forward_hook(note_output) for module in (model, *model.layers().values())]
    for quantizer in model.act_quantizers().values():
        quantizer.set_grid(quantizer.delta, quantizer.zero_point)  # or it would look for a range
        handles.append(quantizer.register_forward_hook(note_output))
    inputs = [torch.empty(1, *image, device="meta"), torch.zeros(1, device="meta")]
    if context is not None:
        inputs.append(torch.empty(1, *context, device="meta"))
    try:
        with model.quant_state(weight_quant=False, act_quant=True):  # quantized activations show attention's operands
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _layer_cost(path: str, layer: QuantModule, output: torch.Size, precisions: Sequence[Precision]) -> Cost:
    weight = layer.weight
    values = weight.numel() + (0 if layer.bias is None else layer.bias.numel())
    # Each output value is a sum over one output channel's weights, whatever stride, padding and groups.
    macs = math.prod(output) * math.prod(weight.shape[1:])
    # The negative and the positive values of an input pass through the weights one after the other.
    passes = 2 if isinstance(layer, SignedInputQuantModule) else 1
    kernel = "x".join(map(str, weight.shape[2:]))
    bops = {p.name: macs * p.weight * p.act * (passes if p.quant is not None and p.act < 32 else 1) for p in precisions}
    sizes = {p.name: _layer_bytes(layer, values, p) for p in precisions}
    return Cost(path, f"conv {kernel}" if kernel else "linear", tuple(weight.shape), values, macs, bops, sizes)


def _layer_bytes(layer: QuantModule, values: int, precision: Precision) -> int:
    if precision.quant is None:
        return values * precision.weight // 8
    size = 0 if layer.bias is None else layer.bias.numel() * FLOAT_BYTES
    for _, part in layer.parts():
        size += packed_length(part.numel(), precision.weight) + len(part) * GRID_BYTES
    return size + _grid_bytes(layer.act_quantizers(), precision)


def _grid_bytes(quantizers: Sequence[UniformAffineQuantizer], precision: Precision) -> int:
    """Of activation grids, one value a group of timesteps."""
    if precision.quant is None or not precision.quant.quant_act:
        return 0
    return sum(quantizer.delta.numel() for quantizer in quantizers) * GRID_BYTES


def _product_costs(
    path: str,
    quantizers: dict[str, UniformAffineQuantizer],
    seen: dict[nn.Module, torch.Size],
    precisions: Sequence[Precision],
) -> list[Cost]:
    """The two products of attention: q with k into a map, and the map with v."""
    q, k, v, w = (quantizers[name] for name in "qkvw")
    positions, tokens = seen[w][-2:]
    # Every value of q meets each token once, every value of v each position, however heads are laid out.
    scores = math.prod(seen[q]) * tokens
    sums = math.prod(seen[v]) * positions
    return [
        Cost(
            path,
            kind,
            tuple(shape[1:]),
            0,
            macs,
            {p.name: macs * left(p) * p.act for p in precisions},
            {p.name: _grid_bytes(own, p) for p in precisions},
        )
        for kind, shape, macs, left, own in (
            ("q k", seen[w], scores, lambda p: p.act, (q, k)),
            ("softmax v", seen[q], sums, lambda p: p.softmax, (v, w)),
        )
    ]


def _other_cost(path: str, tensor: Tensor, precisions: Sequence[Precision]) -> Cost:
    count = tensor.numel()
    sizes = {p.name: count * (FLOAT_BYTES if p.quant is not None else p.weight // 8) for p in precisions}
    return Cost(path, "other", tuple(tensor.shape), count, 0, {p.name: 0 for p in precisions}, sizes)


def _correction_cost(timesteps: int, output: Sequence[int], precisions: Sequence[Precision], *, mean: bool) -> Cost:
    """One scale a timestep, and a map in half precision: for quantized weights alone, and with activations."""

    def size(precision: Precision) -> int:
        if precision.quant is None:
            return 0
        tables = 1 + precision.quant.quant_act
        return timesteps * ((1 + tables) * FLOAT_BYTES + tables * mean * math.prod(output) * 2)

    sizes = {p.name: size(p) for p in precisions}
    return Cost("output_scale", "correction", tuple(output), 0, 0, {p.name: 0 for p in precisions}, sizes)


@dataclass(frozen=True)
class ReportedSizes:
    """MiB of a UNet's weights, as others count them.

    Attributes:
        model: what is meant.
        parameters: of that UNet: by them it is recognised.
        mebibytes: by bits of the weights.
    """

    model: str
    parameters: int
    mebibytes: dict[int, float]


REPORTED = (
    ReportedSizes("LDM-4, LSUN Bedroom", 274_056_163, {32: 1045.6, 8: 279.1, 4: 148.4}),
    ReportedSizes("LDM-8, LSUN Church", 294_966_916, {32: 1125.4, 8: 330.6, 4: 189.9}),
    ReportedSizes("Stable Diffusion v1", 859_520_964, {32: 3279.1, 8: 949.0, 4: 539.1}),
)
"""Counts reported elsewhere, by the community around the paper. How they count is not known; they are shown beside the
own ones, which are bytes of files, and not matched."""


def reported_sizes(costs: Costs) -> ReportedSizes | None:
    """What others report of this network, where they do."""
    return next((reported for reported in REPORTED if reported.parameters == costs.parameters), None)
