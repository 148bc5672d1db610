"""Fused attention for learning in TF32: in float16, which has as many digits, every tensor scaled into its range.

PyTorch's fused attention for float32 makes up for the digits that TF32 drops, with three products for one; for float16
it has a kernel several times as fast. Both types have ten bits after the point. What float16 lacks is range: a loss's
gradients are far below its smallest numbers. Powers of two, chosen on the device from the largest value of a tensor,
bring each into range and are divided out exactly.

Where the softmax map is quantized it must be a tensor, for some blocks a very large one: :func:`by_heads` keeps only a
part of it at a time. So it is where attention must not be fused, for the sake of the same bits every time. A map in 16
bits, which stand for no quantization, need not be rounded while it is learned from in TF32 or bfloat16, whose products
are rounded as much: :func:`unrounded_maps`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from qdiff import fused

LARGEST_MAP = 2 * 2**30  # bytes of a softmax map, in float32, that a calibration keeps whole
PART_OF_MAP = 2**29  # what it keeps at a time of a larger one
UNQUANTIZED_MAP = 16  # bits of a softmax map that stand for no quantization
_in_half = contextvars.ContextVar("_in_half", default=False)
_sparing = contextvars.ContextVar("_sparing", default=False)
_unfused = contextvars.ContextVar("_unfused", default=False)
_unrounded = contextvars.ContextVar("_unrounded", default=False)
_as_if_learning = contextvars.ContextVar("_as_if_learning", default=False)
# Largest gradient in float16. A key that all of 8192 positions attend to adds up to 65 536, where float16 ends.
_LARGEST_GRADIENT = 3  # as a power of two


@contextlib.contextmanager
def _holding(variable: contextvars.ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def half_precision(on: bool) -> contextlib.AbstractContextManager[None]:
    """Whether :func:`attention` may compute in float16 inside the ``with`` block, to learn (:func:`as_if_learning`)."""
    return _holding(_in_half, on)


def unrounded_maps(on: bool) -> contextlib.AbstractContextManager[None]:
    """Whether softmax maps in 16 bits stay unrounded inside the ``with`` block, to learn (:func:`as_if_learning`)."""
    return _holding(_unrounded, on)


def as_if_learning() -> contextlib.AbstractContextManager[None]:
    """Inside the ``with`` block what units learn from is computed: without gradients, but as where they learn."""
    return _holding(_as_if_learning, True)


def _learns() -> bool:
    return torch.is_grad_enabled() or _as_if_learning.get()


def rounds_map(quantizer: nn.Module) -> bool:
    """Whether a softmax map is to be rounded here and now by its quantizer."""
    if torch.compiler.is_compiling() or not (_unrounded.get() and _learns()):
        return True
    config: Any = quantizer.config
    return bool(config.n_bits < UNQUANTIZED_MAP)


@contextlib.contextmanager
def sparing(*, unfused: bool = False) -> Iterator[None]:
    """No large softmax map is kept whole inside the ``with`` block, with gradients or without.

    Args:
        unfused: :func:`attention` is not fused there either, because the gradients of fused attention are added up in
            whatever order they come.
    """
    kernels = sdpa_kernel(SDPBackend.MATH) if unfused else contextlib.nullcontext()
    with _holding(_sparing, True), _holding(_unfused, unfused), kernels:
        yield


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(K)) v for each head, without a map in memory.

    Args:
        q: N x A x P x K, of N images, A heads, P positions and K channels of a head.
        k, v: N x A x L x K, of L positions or tokens.

    Returns:
        N x A x P x K.
    """
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v)
    if _unfused.get():
        return by_heads(F.scaled_dot_product_attention, q, k, v, map_values=q[..., 0].numel() * k.shape[2])
    wanted = _as_if_learning.get() or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    if not (wanted and _in_half.get() and q.dtype is torch.float32):
        return F.scaled_dot_product_attention(q, k, v)
    exponents = _exponents(q, k, v)
    scales = _Scales(down=exponents[2])
    halves = (_ToHalf.apply(x, e, scales) for x, e in zip((q, k, v), exponents, strict=True))
    return _ToFull.apply(F.scaled_dot_product_attention(*halves), scales)


def _exponents(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the powers of two that bring each into float16's range, 0-dim.

    Of q and k only the product matters: they share its size evenly. The output is that of v, scaled as v is.
    """
    shift = ((fused.exponent(k) - fused.exponent(q)) / 2).round()
    return shift, -shift, -fused.exponent(v)


@dataclass
class _Scales:
    """What the two ends of one call know of each other, as powers of two.

    Attributes:
        down: what the values, and with them the output, were multiplied by.
        up: what the output's gradient is, once it has come.
    """

    down: Tensor
    up: Tensor | None = None


class _ToHalf(torch.autograd.Function):
    """x -> 2^exponent x in float16; gradients, which are those of a scaled output, come back in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: Tensor, scales: _Scales) -> Tensor:
        ctx.exponent, ctx.scales = exponent, scales
        return fused.times_power(x, exponent, torch.float16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return fused.times_power(grad, ctx.exponent - ctx.scales.down - ctx.scales.up, torch.float32), None, None


class _ToFull(torch.autograd.Function):
    """The output in float32, and its gradient, scaled, in float16."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, scales: _Scales) -> Tensor:
        ctx.scales = scales
        return fused.times_power(out, -scales.down, torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.scales.up = _LARGEST_GRADIENT - fused.exponent(grad)
        return fused.times_power(grad, ctx.scales.up, torch.float16), None


def _spares(quantizer: nn.Module | None) -> bool:
    if torch.compiler.is_compiling() or not _sparing.get():
        return False
    if quantizer is None:
        return True
    whole = getattr(quantizer, "averages", False) or not getattr(quantizer, "ready", True)
    return not (whole or quantizer._forward_pre_hooks)


def rounded_in_passing(q: Tensor, k: Tensor, v: Tensor, quantizer: Any, *, scale: float) -> Tensor | None:
    """Attention with a rounded map that is never in memory, where a kernel serves; None elsewhere.

    It serves to sample in half precision, and to average ranges in TF32. Else a calibration computes the map as its
    gradients need it: what units learn from then are the same bits.

    Args:
        q, k, v: see :func:`attention`.
        quantizer: of the map. Where something looks at what comes to it, or it sets itself, there has to be a map.
    """
    inner = getattr(quantizer, "module", quantizer)  # in lower precision there is one around it
    watched = quantizer._forward_pre_hooks or quantizer._forward_hooks
    if watched or inner._forward_pre_hooks or inner._forward_hooks or not inner.ready:
        return None
    if inner.averages:
        follows = inner.config.always_zero and _in_half.get()
        return _averaging(q, k, v, inner, scale) if follows else None
    if not torch.compiler.is_compiling() and _sparing.get():
        return None
    if not fused.can_round_in_passing(q, k, v):
        return None
    return fused.rounded_attention(q, k, v, *inner.grids_of(len(q)), scale=scale)


def _averaging(q: Tensor, k: Tensor, v: Tensor, quantizer: Any, scale: float) -> Tensor | None:
    """Attention in float32, whose map moves the range of its quantizer before it is rounded."""
    if not fused.can_round_in_passing(q, k, v, dtypes=(torch.float32,)):
        return None
    exponents = _exponents(q, k, v)
    q, k, v = (fused.times_power(x, e, torch.float16) for x, e in zip((q, k, v), exponents, strict=True))

    def grids(highest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantizer.follow_range(torch.zeros_like(highest), highest)
        return quantizer.grids_of(len(q))

    out = fused.attention_setting_its_grid(q, k, v, grids, scale=scale)
    return fused.times_power(out, -exponents[2], torch.float32)


def attention_rounding_its_map(q: Tensor, k: Tensor, v: Tensor, quantizer: nn.Module) -> Tensor:
    """:func:`attention`, its softmax map rounded by a quantizer: in passing where a kernel serves, else in memory."""
    scale = q.shape[3] ** -0.5
    if (out := rounded_in_passing(q, k, v, quantizer, scale=scale)) is not None:
        return out

    def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(2, 3)).mul_(scale).softmax(dim=3)  # N, A, P, L
        return quantizer(weights) @ v

    return by_heads(summed, q, k, v, map_values=q[..., 0].numel() * k.shape[2], quantizer=quantizer)


def by_heads(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    map_values: int,
    quantizer: nn.Module | None = None,
) -> Tensor:
    """Attention with a map in memory, a group of heads at a time where the map is large.

    A group's map is computed again for its gradients and not kept: the same values, less memory, more time. Without
    gradients the map is only divided while a calibration spares memory (:func:`sparing`).

    Args:
        attend: of the heads that it is given.
        q, k, v: axis 1 is that of the heads.
        map_values: of the map of all heads.
        quantizer: of the map. Where something looks at what comes to it, or it sets itself, the map stays whole;
            neither happens where gradients are wanted.

    Returns:
        What ``attend`` returns, whose axis 1 is that of the heads too.
    """
    learning = torch.is_grad_enabled()
    if 4 * map_values <= LARGEST_MAP or not (learning or _spares(quantizer)):
        return attend(q, k, v)
    heads = q.shape[1]
    size = max(1, heads * PART_OF_MAP // (4 * map_values))
    parts = zip(*(x.split(size, dim=1) for x in (q, k, v)), strict=True)
    if not learning:
        return torch.cat([attend(*part) for part in parts], dim=1)
    # Nothing here is random, and a CUDA graph may not look at the state of the generator.
    again = (checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)
    return torch.cat([*again], dim=1)
