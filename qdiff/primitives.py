"""The arithmetic of fake quantization: pure functions on tensors, no state.

Symbols follow the papers: x a real tensor, δ (``delta``) the step size, z (``zero_point``) the integer that stands for
zero, b (``n_bits``) the bits of an integer, [lo, hi] the integers that b bits hold.

    x_int = clamp(round(x / δ) + z, lo, hi)          Q-Diffusion (Li et al. 2023), equation 3
    x_hat = (x_int - z) · δ
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from qdiff import fused

# Rectified sigmoid of AdaRound (Nagel et al. 2020, equation 23).
ZETA, GAMMA = 1.1, -0.1

MSE_CANDIDATES = 80  # the observed range times 1.00, 0.99, ... 0.21
MSE_NORM = 2.4
SMALLEST_DELTA = 1e-8
_SEARCH_BYTES = 64 * 2**20  # of scratch space for one slice of candidates
_SEARCH_PRUNED = 2**16  # values from which it pays to look at a part of them first
_SEARCH_SAMPLED = 16  # every so many of them
_SEARCH_SLACK = 1.001  # for sums in float32
_SEARCH_TOGETHER = 2**16  # values that a CPU works on at once: they stay in its cache

Bound = TypeVar("Bound", Tensor, float)  # of a grid's two bounds both are of one kind


def integer_bounds(n_bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest integer of the grid: signed when symmetric, else unsigned."""
    if symmetric:
        return -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    return 0, 2**n_bits - 1


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with the gradients of LSQ, written out.

    They must not be left to torch.clamp: what its gradient is *at* a bound differs between releases of torch, and
    integers lie on bounds all the time (most values of a softmax map on the lower one).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, lo: Bound, hi: Bound) -> Tensor:
        scaled = x / delta
        nearest = scaled.round()
        integers = nearest.clamp(lo, hi)
        inside = nearest.eq_(integers)  # 1 or 0, where clamped; numbers, since a CPU applies masks many times slower
        slope = torch.addcmul(integers, inside, scaled, value=-1)  # of the output in δ
        ctx.save_for_backward(inside, slope)
        ctx.delta_shape = delta.shape
        return integers.mul_(delta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        inside, slope = ctx.saved_tensors
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_delta = None
        if ctx.needs_input_grad[1]:
            grad_delta = (grad * slope).sum_to_size(ctx.delta_shape)
        return grad_x, grad_delta, None, None


def fake_quantize(x: Tensor, delta: Tensor, lo: Bound, hi: Bound) -> Tensor:
    """Quantize and dequantize. Differentiable in ``x`` and ``delta`` (LSQ, Esser et al. 2020, equations 1 to 3).

    Rounding passes gradients on as if nothing had happened (straight-through estimator, Bengio et al. 2013), clamping
    stops them.

    Args:
        x: any shape.
        delta: step size, broadcast against ``x``.
        lo, hi: the grid's bounds **less the zero point**: clamp(round(x/δ) + z, lo, hi) - z is the same integer as
            clamp(round(x/δ), lo - z, hi - z), one pass over memory cheaper each way.
    """
    if fused.can_fake_quantize(x, delta, lo):
        return fused.fake_quantize(x, delta, lo, hi)
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        return _FakeQuantize.apply(x, delta, lo, hi)
    return (x / delta).round_().clamp_(lo, hi).mul_(delta)


def observed_range(x: Tensor, channel_wise: bool) -> tuple[Tensor, Tensor]:
    """Minimum and maximum: 0-dim, or one a slice of the first axis, shaped to broadcast against ``x``."""
    if not channel_wise:
        lowest, highest = torch.aminmax(x.detach())
        return lowest, highest
    rows = x.detach().flatten(1)
    shape = (-1,) + (1,) * (x.dim() - 1)
    lowest, highest = torch.aminmax(rows, dim=1)
    return lowest.view(shape), highest.view(shape)


def range_to_grid(
    lowest: Tensor, highest: Tensor, n_bits: int, *, symmetric: bool, always_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Step size and zero point of a min-max range, which is widened to hold zero.

    Returns:
        ``(delta, zero_point)`` in the shape of the range; the zero point is a whole number in floating point.
    """
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    if symmetric:
        delta = torch.maximum(-lowest, highest) / (2 ** (n_bits - 1) - 1)
        delta = delta.clamp(min=SMALLEST_DELTA)
        return delta, torch.zeros_like(delta)
    if always_zero:
        delta = (highest / (2**n_bits - 1)).clamp(min=SMALLEST_DELTA)
        return delta, torch.zeros_like(delta)
    delta = ((highest - lowest) / (2**n_bits - 1)).clamp(min=SMALLEST_DELTA)
    return delta, (-lowest / delta).round()


def search_grid(
    x: Tensor, n_bits: int, *, symmetric: bool, channel_wise: bool, always_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Step size and zero point of the shrunk range with the least mean |x - x_hat|^2.4, the first of equals.

    All channels are searched at once, and with small tensors many candidates. Unlike :func:`range_to_grid` the range
    is not widened to hold zero, so the zero point may lie outside the grid. With ``symmetric`` the candidates are
    symmetric grids.

    Returns:
        ``(delta, zero_point)``: 0-dim, or one a channel, shaped to broadcast against ``x``.
    """
    x = x.detach().float()
    rows = x.flatten(1) if channel_wise else x.reshape(1, -1)
    per_slice = max(1, _SEARCH_BYTES // (4 * rows.shape[1]))
    grids = [_search_rows(part, n_bits, symmetric, always_zero) for part in rows.split(per_slice)]
    shape = (-1,) + (1,) * (x.dim() - 1) if channel_wise else ()
    delta, zero_point = (torch.cat(parts).reshape(shape) for parts in zip(*grids, strict=True))
    return delta, zero_point


def _search_rows(rows: Tensor, n_bits: int, symmetric: bool, always_zero: bool) -> tuple[Tensor, Tensor]:
    """The search over R rows of values, each with a range of its own: R x K -> R, R."""
    lowest, highest = torch.aminmax(rows, dim=1)
    shrinks = torch.tensor([1.0 - 0.01 * step for step in range(MSE_CANDIDATES)], device=rows.device).unsqueeze(1)
    deltas, zeros = _candidate(lowest * shrinks, highest * shrinks, n_bits, symmetric, always_zero)  # candidates x R
    bounds = integer_bounds(n_bits, symmetric)
    if rows.is_cpu and len(rows) == 1 and rows.numel() >= _SEARCH_PRUNED:
        scores = _pruned_scores(rows, deltas, zeros, bounds)
    else:
        scores = _scores_of_all(rows, deltas, zeros, bounds)
    scores = torch.where(scores.isnan(), math.inf, scores)
    best = scores.argmin(0, keepdim=True)  # the first of equals
    found = scores.gather(0, best) < math.inf
    delta = torch.where(found, deltas.gather(0, best), 1.0)
    return delta.squeeze(0), torch.where(found, zeros.gather(0, best), 0.0).squeeze(0)


def _scores_of_all(rows: Tensor, deltas: Tensor, zeros: Tensor, bounds: tuple[int, int]) -> Tensor:
    """:func:`_scores`, as many candidates at once as there is room for."""
    together = max(1, (_SEARCH_TOGETHER if rows.is_cpu else _SEARCH_BYTES // 4) // rows.numel())
    parts = zip(deltas.split(together), zeros.split(together), strict=True)
    return torch.cat([_scores(rows, delta, zero, bounds) for delta, zero in parts])


def _pruned_scores(row: Tensor, deltas: Tensor, zeros: Tensor, bounds: tuple[int, int]) -> Tensor:
    """The same for one row of values; infinity for candidates that are certainly not the best.

    No value lowers a mean below what a part of the values contributes to it: a sixteenth of them tells most of the
    ranges that cut off too much.
    """
    part = row[:, ::_SEARCH_SAMPLED].contiguous()
    least = _scores_of_all(part, deltas, zeros, bounds).flatten() * (part.numel() / row.numel())
    scores = torch.full_like(deltas, math.inf)
    best = math.inf
    for candidate in [int(least.argmin()), *range(len(deltas))]:
        if scores[candidate] < math.inf or least[candidate] > best * _SEARCH_SLACK:
            continue
        scores[candidate] = _scores(row, deltas[[candidate]], zeros[[candidate]], bounds)
        best = min(best, scores[candidate].item())
    return scores


def _scores(rows: Tensor, delta: Tensor, zero: Tensor, bounds: tuple[int, int]) -> Tensor:
    """What C grids a row make of it, R x K and C x R -> C x R."""
    lo, hi = bounds
    delta, zero = delta.unsqueeze(2), zero.unsqueeze(2)
    work = rows.div(delta).round_()
    torch.maximum(work, lo - zero, out=work)  # clamp_() with a bound a row is many times slower
    torch.minimum(work, hi - zero, out=work).mul_(delta)
    return work.sub_(rows).abs_().pow_(MSE_NORM).mean(dim=2)


def _candidate(
    lowest: Tensor, highest: Tensor, n_bits: int, symmetric: bool, always_zero: bool
) -> tuple[Tensor, Tensor]:
    if symmetric:
        delta = torch.maximum(lowest.abs(), highest.abs()) / (2 ** (n_bits - 1) - 1)
    elif always_zero:
        delta = highest / (2**n_bits - 1)
    else:
        delta = (highest - lowest) / (2**n_bits - 1)
    delta = delta.clamp(min=SMALLEST_DELTA)
    if symmetric or always_zero:
        return delta, torch.zeros_like(delta)
    return delta, (-lowest / delta).round()


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(α) = clip(sigmoid(α) · (ζ - γ) + γ, 0, 1): how far up each weight is rounded (AdaRound, equation 23)."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def rounding_variable(fraction: Tensor) -> Tensor:
    """The α with h(α) = ``fraction``, a weight's distance above its lower grid point in steps, in [0, 1)."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def rounding_regularizer(alpha: Tensor, beta: Tensor | float) -> Tensor:
    """Σ 1 - |2 h(α) - 1|^β, which pulls h to 0 or 1 the harder the smaller β (AdaRound, equation 24)."""
    return (1 - (2 * rectified_sigmoid(alpha) - 1).abs().pow(beta)).sum()


def annealed_beta(iteration: int, iterations: int, *, start: float, end: float, warmup: float) -> float:
    """β at one iteration: ``start`` through the warm-up, then linearly down to ``end`` at the last iteration."""
    first = warmup * iterations
    if iteration < first or iterations <= first:
        return start
    return end + (start - end) * max(0.0, 1 - (iteration - first) / (iterations - first))


def reconstruction_loss(prediction: Tensor, target: Tensor, p: float = 2.0) -> Tensor:
    """|difference|^p summed over axis 1 (channels), mean over all other axes (BRECQ, Li et al. 2021)."""
    return (prediction - target).abs().pow(p).sum(dim=1).mean()


def reconstruction_slope(prediction: Tensor, target: Tensor, p: float = 2.0) -> tuple[Tensor, Tensor]:
    """:func:`reconstruction_loss` and its gradient in the prediction, written out."""
    difference = prediction - target
    scale = prediction.shape[1] / prediction.numel()
    if p == 2:
        return difference.square().sum() * scale, difference.mul_(2 * scale)
    size = difference.abs()
    power = size.pow(p - 1)
    return torch.dot(power.flatten(), size.flatten()) * scale, power.copysign_(difference).mul_(p * scale)
