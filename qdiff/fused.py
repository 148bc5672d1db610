"""CUDA kernels for what is repeated ten thousands of times: each does in one launch what PyTorch does in many.

A unit's optimisation is a small, fixed computation; on a GPU most of its time goes into launching kernels and into
reading and writing the same feature maps. These kernels, written in Triton, serve any shape and are compiled once,
not once a unit. Nothing here is needed for a correct result: the plain PyTorch beside every call does the same, and
:func:`enabled` says which of the two runs.

Feature maps are channels-last in memory (N, H, W, C): what tensor cores read, and what lets C be the fast axis.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_TRITON_THERE = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly: how they are tested there
_WIDEST_ROW = 4096  # that one program holds while it normalises it
_LARGE_MAP = 2**24  # values; smaller ones stay in the GPU's cache
_WIDEST_HEAD = 128
HALVES = (torch.float16, torch.bfloat16)
_state = {"on": True}


def available(device: torch.device) -> bool:
    """Whether kernels can run on a device at all."""
    return (device.type == "cuda" or _INTERPRETED) and _TRITON_THERE


def enabled(device: torch.device) -> bool:
    """Whether kernels are to run on a device now; never in what is being compiled, which makes kernels of its own."""
    return not torch.compiler.is_compiling() and _state["on"] and available(device)


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """No kernel of this module runs inside the ``with`` block."""
    before = _state["on"]
    _state["on"] = False
    try:
        yield
    finally:
        _state["on"] = before


def rows_view(x: Tensor) -> Tensor:
    """N x ... -> N x L: a tensor's rows as they lie in memory, channels last for feature maps.

    Copies only where the tensor has another layout.
    """
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return x.reshape(len(x), -1)


def from_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`rows_view`: N x L -> N x ``shape``, a view."""
    if len(shape) == 3:
        channels, height, width = shape
        return rows.view(len(rows), height, width, channels).permute(0, 3, 1, 2)
    return rows.view(len(rows), *shape)


class _FusedFakeQuantize(torch.autograd.Function):
    """:func:`qdiff.primitives.fake_quantize` with one grid for all values, or one for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
        from qdiff import triton_kernels

        dense = _dense(x)
        ctx.save_for_backward(dense, delta, *(b for b in (lo, hi) if isinstance(b, Tensor)))
        ctx.bounds = None if isinstance(lo, Tensor) else (lo, hi)
        return triton_kernels.fake_quantize(dense, delta, lo, hi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        from qdiff import triton_kernels

        x, delta, *bounds = ctx.saved_tensors
        lo, hi = ctx.bounds or bounds
        grad_x, grad_delta = triton_kernels.fake_quantize_backward(
            _like(grad, x), x, delta, lo, hi, needs_x=ctx.needs_input_grad[0]
        )
        return grad_x, grad_delta, None, None


def fake_quantize(x: Tensor, delta: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
    """As :func:`qdiff.primitives.fake_quantize`; arithmetic in float32 whatever the type of ``x``."""
    return _FusedFakeQuantize.apply(x, delta, lo, hi)


def can_fake_quantize(x: Tensor, delta: Tensor, lo: Tensor | float) -> bool:
    """Whether the kernel serves this call: one grid for everything, or one for each row of ``x``."""
    if not enabled(x.device) or x.numel() == 0:
        return False
    if delta.dim() == 0:
        return not isinstance(lo, Tensor) or lo.dim() == 0
    per_row = delta.dim() == x.dim() and delta.shape[0] == x.shape[0] and delta.numel() == x.shape[0]
    return per_row and isinstance(lo, Tensor) and lo.shape == delta.shape


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        from qdiff import triton_kernels

        x = x.contiguous(memory_format=torch.channels_last)
        out, mean, rstd = triton_kernels.group_norm(x, groups, weight, bias, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = groups, silu
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from qdiff import triton_kernels

        x, weight, bias, mean, rstd = ctx.saved_tensors
        groups, silu = ctx.options
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = triton_kernels.group_norm_backward(grad, x, groups, weight, bias, mean, rstd, silu)
        return grad_x, None, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        from qdiff import triton_kernels

        x = x.contiguous()
        out, means, rstds = triton_kernels.layer_norm(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, means, rstds)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from qdiff import triton_kernels

        return triton_kernels.layer_norm_backward(grad.contiguous(), *ctx.saved_tensors), None, None, None, None


def layer_norm(norm: nn.Module, x: Tensor, *, for_products: bool) -> Tensor:
    """Layer normalisation over the last axis: ... x C.

    The kernel has no gradient for scale and shift, so it serves only where they ask for none.

    Args:
        for_products: nothing but layers takes the result: under autocast it comes in the type in which they would have
            it, instead of in float32.
    """
    if not _can_normalise(norm, x):
        return norm(x)
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device) if for_products else torch.float32
    return _LayerNorm.apply(x, norm.weight, norm.bias, norm.eps, dtype)


def _can_normalise(norm: nn.Module, x: Tensor) -> bool:
    """Whether the kernel serves this call."""
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        return False
    whole_rows = norm.weight.dim() == 1 and norm.weight.numel() <= _WIDEST_ROW
    return whole_rows and _is_frozen(norm) and enabled(x.device) and x.numel() > 0


def _is_frozen(norm: nn.Module) -> bool:
    return not (torch.is_grad_enabled() and (norm.weight.requires_grad or norm.bias.requires_grad))


def group_norm(norm: nn.Module, x: Tensor, *, silu: bool) -> Tensor:
    """Group normalisation of N x C x H x W, followed by SiLU where asked for.

    The kernel has no gradient for scale and shift, so it serves only where they ask for none.
    """
    unwrapped = type(norm) is nn.GroupNorm  # not one wrapped for another precision
    if unwrapped and x.dim() == 4 and _is_frozen(norm) and enabled(x.device):
        return _NormSilu.apply(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu)
    out = norm(x)
    return torch.nn.functional.silu(out) if silu else out


def times_power(x: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """x 2^exponent, computed in float32, then in ``dtype``. Without gradients.

    In three factors, so that none leaves the range of float32 where the product does not.

    Args:
        exponent: a whole number from -378 to 381, as a 0-dim tensor on the same device.
    """
    if enabled(x.device) and x.numel():
        from qdiff import triton_kernels

        return triton_kernels.times_power(x if _is_dense(x) else x.contiguous(), exponent, dtype)
    first = (exponent / 3).floor()
    second = ((exponent - first) / 2).floor()
    return (x.float() * first.exp2() * second.exp2() * (exponent - first - second).exp2()).to(dtype)


def exponent(x: Tensor) -> Tensor:
    """The whole e, 0-dim, with every |x| at most 2^e; 0 for zeros alone. Without gradients."""
    largest = torch.linalg.vector_norm(x.detach(), math.inf).float()  # in one pass
    if enabled(x.device):
        from qdiff import triton_kernels

        return triton_kernels.exponent(largest)
    return torch.where(largest > 0, largest.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil(), 0.0)


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from qdiff import triton_kernels

        x = x.contiguous()
        ctx.save_for_backward(x)
        return triton_kernels.gated_gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from qdiff import triton_kernels

        (x,) = ctx.saved_tensors
        return triton_kernels.gated_gelu_backward(grad.contiguous(), x)


def gated_gelu(x: Tensor) -> Tensor:
    """As :func:`ldm.modules.attention.gated_gelu`."""
    return _GatedGelu.apply(x)


def can_gate(x: Tensor) -> bool:
    """Whether the kernel serves this call."""
    return enabled(x.device) and x.dtype in (torch.float32, torch.bfloat16) and 0 < x.numel() < 2**31


@torch.library.custom_op("qdiff::rounded_attention", mutates_args=())
def rounded_attention(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    """softmax(scale q k) v for each head, the softmax map rounded to a grid, without the map in memory.

    Scores and map are in float32 until the map meets the values. Without gradients. An operation of its own, which
    torch.compile takes as it is.

    Args:
        q: N x A x P x K, of N images and A heads; k, v: N x A x L x K.
        delta, lo, hi: step size and integer bounds of the grid, one value each or one for each image.

    Returns:
        N x A x P x K, the heads of a position next to each other in memory.
    """
    from qdiff import triton_kernels

    out = _room_for_attended(q, q.dtype)
    triton_kernels.rounded_attention(q, k, v, delta, lo, hi, out, scale=scale)
    return out


@rounded_attention.register_fake
def _like_attended(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    return _room_for_attended(q, q.dtype)


def _room_for_attended(q: Tensor, dtype: torch.dtype) -> Tensor:
    """N x A x P x K, laid out as the layer behind it wants to have it."""
    images, heads, positions, width = q.shape
    return torch.empty(images, positions, heads, width, dtype=dtype, device=q.device).transpose(1, 2)


def attention_setting_its_grid(
    q: Tensor, k: Tensor, v: Tensor, grids: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], *, scale: float
) -> Tensor:
    """:func:`rounded_attention` in float32, with a grid that depends on the map's largest value.

    Args:
        grids: gives step size, lowest and highest whole number for that value, 0-dim.
    """
    from qdiff import triton_kernels

    rows = triton_kernels.map_rows(q, k, scale=scale)
    delta, lo, hi = grids(1 / rows[1].min())
    out = _room_for_attended(q, torch.float32)
    triton_kernels.rounded_attention(q, k, v, delta, lo, hi, out, scale=scale, rows=rows)
    return out


def can_round_in_passing(q: Tensor, k: Tensor, v: Tensor, *, dtypes: Sequence[torch.dtype] = HALVES) -> bool:
    """Whether :func:`rounded_attention` serves this call: where the map is large.

    Args:
        dtypes: of tensors that are served.
    """
    if not (_state["on"] and available(q.device)) or q.dtype not in dtypes:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    map_values = q[..., 0].numel() * k.shape[2]
    small_enough = q.shape[3] <= _WIDEST_HEAD and max(x.numel() for x in (q, k, v)) < 2**31
    return k.dtype == v.dtype == q.dtype and small_enough and map_values >= _LARGE_MAP


def _is_dense(x: Tensor) -> bool:
    """Its values fill a stretch of memory, in whatever order of axes: PyTorch keeps that order, and no other."""
    return torch.empty_like(x, device="meta").stride() == x.stride()


def _dense(x: Tensor) -> Tensor:
    """Rows one after the other without gaps, in whatever order of axes they have."""
    if x.is_contiguous() or _channels_last(x):
        return x
    if x.dim() == 4 and x.stride(1) == 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _channels_last(x: Tensor) -> bool:
    """N x C x ... without gaps, C the fastest axis."""
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in the memory layout of ``x``."""
    if grad.stride() == x.stride():
        return grad
    out = torch.empty_like(x, dtype=grad.dtype)
    return out.copy_(grad)
