"""The Triton sources behind :mod:`qdiff.fused`, and thin launchers. Imported only where a kernel is to run."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 1024  # of a flat tensor that one program works on
_FAR_ELEMENTS, _FAR_PROGRAMS = 8192, 16  # the same where rows come over the bus: in flight are 16 x 16 KiB in float16
_ROWS_ELEMENTS = 4096  # of whole rows that one program normalises
# Of attention that rounds its map, up to so many channels of a head: positions and tokens that one program works on at
# once, its warps, and how many blocks of tokens are on their way.
_ATTENTION = {64: (128, 64, 4, 3), 128: (64, 64, 4, 3)}
_NORM_WHOLE = 1024  # of one group's values that are normalised by one program
_NORM_ROWS, _NORM_WIDTH = 128, 32  # positions and channels that one program works on otherwise

# Rounds to the nearest integer, ties to even, for |x| < 2^22; larger values only get clamped afterwards.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _rounded(x):
    return (x + _ROUND) - _ROUND


# Fake quantization.


@triton.jit
def _fake_quantize_kernel(x, delta, lo_rows, hi_rows, out, n, row, lo, hi, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    if PER_ROW:
        r = at // row
        d = tl.load(delta + r, mask=mask, other=1.0)
        low, high = tl.load(lo_rows + r, mask=mask, other=0.0), tl.load(hi_rows + r, mask=mask, other=0.0)
    else:
        d = tl.load(delta) + tl.zeros([BLOCK], tl.float32)
        low, high = lo, hi
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    q = tl.minimum(tl.maximum(_rounded(tl.div_rn(v, d)), low), high)
    tl.store(out + at, (q * d).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _fake_quantize_backward_kernel(
    grad, x, delta, lo_rows, hi_rows, grad_x, partial, n, row, lo, hi,
    PER_ROW: tl.constexpr, NEEDS_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program a block of one row (or of the whole tensor), so that every partial sum belongs to one step size.
    r = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = within < row
    at = r * row + within
    if PER_ROW:
        d, low, high = tl.load(delta + r), tl.load(lo_rows + r), tl.load(hi_rows + r)
    else:
        d, low, high = tl.load(delta), lo, hi
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    scaled = tl.div_rn(v, d + tl.zeros([BLOCK], tl.float32))
    nearest = _rounded(scaled)
    integer = tl.minimum(tl.maximum(nearest, low), high)
    inside = nearest == integer
    slope = tl.where(inside, integer - scaled, integer)
    tl.store(partial + r * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(mask, g * slope, 0.0)))
    if NEEDS_X:
        tl.store(grad_x + at, tl.where(inside, g, 0.0).to(grad_x.dtype.element_ty), mask=mask)


def fake_quantize(x: Tensor, delta: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
    """``x`` dense; ``delta`` 0-dim with numbers or 0-dim tensors as bounds, or one value a row with tensors."""
    out = torch.empty_like(x)
    n, rows = x.numel(), len(x) if delta.dim() > 0 else 1
    bounds = _bounds(x, lo, hi)
    _fake_quantize_kernel[(triton.cdiv(n, _ELEMENTS),)](
        x, delta.contiguous(), bounds[0], bounds[1], out, n, n // rows, bounds[2], bounds[3],
        PER_ROW=isinstance(lo, Tensor), BLOCK=_ELEMENTS,
    )  # fmt: skip
    return out


def fake_quantize_backward(
    grad: Tensor, x: Tensor, delta: Tensor, lo: Tensor | float, hi: Tensor | float, *, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients in ``x`` (None where not needed) and in ``delta``, in its shape. Sums have a fixed order."""
    n, rows = x.numel(), len(x) if delta.dim() > 0 else 1
    bounds = _bounds(x, lo, hi)
    length = n // rows
    block = _ELEMENTS
    blocks = triton.cdiv(length, block)
    grad_x = torch.empty_like(x) if needs_x else grad
    partial = torch.empty(rows, blocks, device=x.device)
    _fake_quantize_backward_kernel[(blocks, rows)](
        grad, x, delta.contiguous(), bounds[0], bounds[1], grad_x, partial, n, length, bounds[2], bounds[3],
        PER_ROW=isinstance(lo, Tensor), NEEDS_X=needs_x, BLOCK=block,
    )  # fmt: skip
    return (grad_x if needs_x else None), partial.sum(1).view(delta.shape)


def _bounds(x: Tensor, lo: Tensor | float, hi: Tensor | float) -> tuple[Tensor, Tensor, float, float]:
    """A grid's bounds as kernels take them: as tensors and as numbers, of which they look at one pair only."""
    if isinstance(lo, Tensor) and isinstance(hi, Tensor):
        return lo.contiguous(), hi.contiguous(), 0.0, 0.0
    return x, x, float(lo), float(hi)


# Elementwise, in one pass.


@triton.jit
def _power_of_two(e):  # of a whole number from -126 to 127, to the bit
    return ((e.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _times_power_kernel(x, exponent, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    e = tl.load(exponent)
    first = tl.floor(e / 3)
    second = tl.floor((e - first) / 2)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * _power_of_two(first)
    v = v * _power_of_two(second) * _power_of_two(e - first - second)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


def times_power(x: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """x 2^exponent in float32, then in ``dtype``. ``x`` dense, the exponent 0-dim and whole, from -378 to 381."""
    out = torch.empty_like(x, dtype=dtype)
    _times_power_kernel[(triton.cdiv(x.numel(), _ELEMENTS),)](x, exponent, out, x.numel(), BLOCK=_ELEMENTS)
    return out


@triton.jit
def _exponent_kernel(largest, out):
    bits = tl.load(largest).to(tl.float32).to(tl.int32, bitcast=True)
    e = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    tl.store(out, tl.where(bits == 0, 0, tl.maximum(e, -126)).to(tl.float32))


def exponent(largest: Tensor) -> Tensor:
    """The smallest whole e from -126 on with ``largest`` <= 2^e, 0 for zero; both 0-dim, the latter not negative."""
    out = torch.empty((), device=largest.device)
    _exponent_kernel[(1,)](largest, out)
    return out


_HALF_ROOT = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution, at 0


@triton.jit
def _gated_gelu_kernel(x, out, n, width, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    place = x + at + (at // width).to(tl.int64) * width  # each row of ``x`` has both halves
    value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
    y = value * (gate * 0.5 * (1.0 + tl.erf(gate * _HALF_ROOT)))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_gelu_backward_kernel(grad, x, grad_x, n, width, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    offset = at + (at // width).to(tl.int64) * width
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + offset + width, mask=mask, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * _HALF_ROOT))
    slope = share + gate * _DENSITY * tl.exp(-0.5 * gate * gate)
    tl.store(grad_x + offset, (g * gate * share).to(grad_x.dtype.element_ty), mask=mask)
    tl.store(grad_x + offset + width, (g * value * slope).to(grad_x.dtype.element_ty), mask=mask)


def gated_gelu(x: Tensor) -> Tensor:
    """... x 2C -> ... x C: the first half of each row times GELU of the second. Contiguous, < 2^31 values."""
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    n = out.numel()
    _gated_gelu_kernel[(triton.cdiv(n, _ELEMENTS),)](x, out, n, width, BLOCK=_ELEMENTS)
    return out


def gated_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient in ``x``."""
    grad_x, n = torch.empty_like(x), grad.numel()
    _gated_gelu_backward_kernel[(triton.cdiv(n, _ELEMENTS),)](grad, x, grad_x, n, x.shape[-1] // 2, BLOCK=_ELEMENTS)
    return grad_x


# Attention that rounds its softmax map: one program takes some positions of one head through all tokens, twice.


@triton.jit
def _scores(queries, k, start, K_P: tl.constexpr, K_C: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
            TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of one block of queries with one of keys; -inf behind the last token."""
    columns, channels = start + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    there = (columns[None, :] < TOKENS) & (channels[:, None] < WIDTH)
    scores = tl.dot(queries, tl.load(k + columns[None, :] * K_P + channels[:, None] * K_C, mask=there, other=0.0))
    if TOKENS % BLOCK:
        scores = tl.where(columns[None, :] < TOKENS, scores, float("-inf"))
    return scores


@triton.jit
def _rounded_attention_kernel(
    q, k, v, delta, lo, hi, out, tops, totals, heads, positions, q_n, k_n, v_n, out_n, per_image, scale,
    Q_A: tl.constexpr, Q_P: tl.constexpr, Q_C: tl.constexpr, K_A: tl.constexpr, K_P: tl.constexpr, K_C: tl.constexpr,
    V_A: tl.constexpr, V_P: tl.constexpr, V_C: tl.constexpr, OUT_A: tl.constexpr, OUT_P: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, KNOWN: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(positions, ROWS)  # those of one head run next to one another, and share its keys and values
    which = tl.program_id(0) // blocks
    image, head = which // heads, which % heads
    rows, channels = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    in_rows = rows < positions
    there = in_rows[:, None] & (channels[None, :] < WIDTH)
    tops += which * positions
    totals += which * positions
    q += image * q_n + head * Q_A
    k += image * k_n + head * K_A
    queries = tl.load(q + rows[:, None] * Q_P + channels[None, :] * Q_C, mask=there, other=0.0)
    if KNOWN:
        top, total = tl.load(tops + rows, mask=in_rows, other=0.0), tl.load(totals + rows, mask=in_rows, other=1.0)
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, TOKENS, BLOCK):
            scores = _scores(queries, k, start, K_P, K_C, WIDTH, PADDED, TOKENS, BLOCK)
            higher = tl.maximum(top, tl.max(scores, 1))
            shares = tl.exp2(scores * scale - (higher * scale)[:, None])
            total = total * tl.exp2((top - higher) * scale) + tl.sum(shares, 1)
            top = higher
    if SUM:  # only now are the values of the map known: once more
        v += image * v_n + head * V_A
        step = tl.load(delta + image * per_image)
        low, high = tl.load(lo + image * per_image), tl.load(hi + image * per_image)
        shift = -tl.log2(total * step) - top * scale  # what each row is divided by, as a power of two
        summed = tl.zeros([ROWS, PADDED], tl.float32)
        for start in range(0, TOKENS, BLOCK):
            scores = _scores(queries, k, start, K_P, K_C, WIDTH, PADDED, TOKENS, BLOCK)
            number = _rounded(tl.exp2(scores * scale + shift[:, None]))
            number = tl.minimum(tl.maximum(number, low), high)
            columns = start + tl.arange(0, BLOCK)
            if TOKENS % BLOCK:
                number = tl.where(columns[None, :] < TOKENS, number, 0.0)
            in_v = (columns[:, None] < TOKENS) & (channels[None, :] < WIDTH)
            values = tl.load(v + columns[:, None] * V_P + channels[None, :] * V_C, mask=in_v, other=0.0)
            summed = tl.dot((number * step).to(values.dtype), values, summed)
        out += image * out_n + head * OUT_A
        tl.store(out + rows[:, None] * OUT_P + channels[None, :], summed.to(out.dtype.element_ty), mask=there)
    else:
        tl.store(tops + rows, top, mask=in_rows)
        tl.store(totals + rows, total, mask=in_rows)


def rounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lo: Tensor,
    hi: Tensor,
    out: Tensor,
    *,
    scale: float,
    rows: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Attention whose softmax map is rounded, block by block: it is never in memory.

    Scores are computed twice, as a value of the map is known when its whole row was seen. Lengths and strides are
    constants, so that the compiler knows how much can be read at once.

    Args:
        q: N x A x P x K in half precision, of N images and A heads; k, v: N x A x L x K; in any layout.
        delta, lo, hi: of the grid, one value or one for each image.
        out: like ``q`` in any precision, channels next to each other.
        rows: what :func:`map_rows` found.
    """
    _attend(q, k, v, (delta, lo, hi), out, rows or (q, q), scale=scale, known=rows is not None)


def map_rows(q: Tensor, k: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Of each row of a softmax map the largest score, and what the row is divided by when that one is 1: N x A x P.

    Its largest value is 1 over the latter.
    """
    top, total = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    _attend(q, k, k, None, q, (top, total), scale=scale, known=False)
    return top, total


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
    rows: tuple[Tensor, Tensor],
    *,
    scale: float,
    known: bool,
) -> None:
    """Find what rows of the map are divided by, unless it is known, and the output, where there are grids."""
    images, heads, positions, width = q.shape
    padded = max(16, triton.next_power_of_2(width))
    block, tokens, warps, stages = _ATTENTION[max(64, padded)]
    delta, lo, hi = grids or (q, q, q)  # what is not asked for is not read
    _rounded_attention_kernel[(triton.cdiv(positions, block) * images * heads,)](
        q, k, v, delta, lo, hi, out, *rows, heads, positions, *(x.stride(0) for x in (q, k, v, out)),
        int(delta.numel() > 1), scale * math.log2(math.e),
        *q.stride()[1:], *k.stride()[1:], *v.stride()[1:], *out.stride()[1:3],
        WIDTH=width, PADDED=padded, TOKENS=k.shape[2], ROWS=block, BLOCK=tokens, KNOWN=known, SUM=grids is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


# Layer normalisation: one program normalises a few rows, each whole.


@triton.jit
def _layer_norm_kernel(
    x, weight, bias, out, means, rstds, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask_r, mask_c = r < rows, c < width
    mask = mask_r[:, None] & mask_c[None, :]
    at = r[:, None] * width + c[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v, 1) / width
    centred = tl.where(mask, v - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(means + r, mean, mask=mask_r)
    tl.store(rstds + r, rstd, mask=mask_r)
    scale = tl.load(weight + c, mask=mask_c, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=mask_c, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * scale[None, :] + offset[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_backward_kernel(
    grad, x, weight, means, rstds, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask_r, mask_c = r < rows, c < width
    mask = mask_r[:, None] & mask_c[None, :]
    at = r[:, None] * width + c[None, :]
    mean, rstd = tl.load(means + r, mask=mask_r, other=0.0), tl.load(rstds + r, mask=mask_r, other=0.0)
    normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
    scale = tl.load(weight + c, mask=mask_c, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :]
    total, along = tl.sum(d, 1) / width, tl.sum(tl.where(mask, d * normal, 0.0), 1) / width
    tl.store(
        out + at, ((d - total[:, None] - normal * along[:, None]) * rstd[:, None]).to(out.dtype.element_ty), mask=mask
    )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the last axis of a contiguous tensor: the result, and each row's mean and 1/std."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x, dtype=dtype)
    means, rstds = (torch.empty(rows, device=x.device) for _ in range(2))
    grid, each, block = _whole_rows(rows, width)
    _layer_norm_kernel[grid](x, weight, bias, out, means, rstds, rows, width, eps, ROWS=each, BLOCK=block)
    return out, means, rstds


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, means: Tensor, rstds: Tensor) -> Tensor:
    """Gradient in ``x``."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    grid, each, block = _whole_rows(rows, width)
    _layer_norm_backward_kernel[grid](grad, x, weight, means, rstds, out, rows, width, ROWS=each, BLOCK=block)
    return out


def _whole_rows(rows: int, width: int) -> tuple[tuple[int], int, int]:
    """Programs, the rows of each, and the power of two into which a row fits."""
    block = triton.next_power_of_2(width)
    each = max(1, _ROWS_ELEMENTS // block)
    return (triton.cdiv(rows, each),), each, block


# Group normalisation and SiLU, of channels-last N x positions x channels. Where a sample has few positions, one program
# normalises one group of it. Otherwise rows of all channels are read as they lie in memory: sums a tile, then sums a
# group, then the result. Means and squares of tiles are merged as Chan et al. (1979) do, without cancellation.


@triton.jit
def _silu_slope(y):
    s = tl.sigmoid(y)
    return s * (1.0 + y * (1.0 - s))


@triton.jit
def _group_norm_kernel(x, weight, bias, out, means, rstds, positions, channels, groups, eps, silu, BLOCK: tl.constexpr):
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = channels // groups
    flat = tl.arange(0, BLOCK)
    c = flat % size
    mask = flat < positions * size
    at = n * positions * channels + g * size + (flat // size) * channels + c
    count = (positions * size).to(tl.float32)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v) / count
    centred = tl.where(mask, v - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / count + eps)
    tl.store(means + n * groups + g, mean)
    tl.store(rstds + n * groups + g, rstd)
    scale = tl.load(weight + g * size + c, mask=mask, other=0.0).to(tl.float32)
    offset = tl.load(bias + g * size + c, mask=mask, other=0.0).to(tl.float32)
    y = centred * rstd * scale + offset
    if silu:
        y = y * tl.sigmoid(y)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_backward_kernel(
    grad, x, weight, bias, means, rstds, out, positions, channels, groups, silu, BLOCK: tl.constexpr
):
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = channels // groups
    flat = tl.arange(0, BLOCK)
    c = flat % size
    mask = flat < positions * size
    at = n * positions * channels + g * size + (flat // size) * channels + c
    mean, rstd = tl.load(means + n * groups + g), tl.load(rstds + n * groups + g)
    scale = tl.load(weight + g * size + c, mask=mask, other=0.0).to(tl.float32)
    offset = tl.load(bias + g * size + c, mask=mask, other=0.0).to(tl.float32)
    normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if silu:
        d = d * _silu_slope(normal * scale + offset)
    d = tl.where(mask, d * scale, 0.0)
    count = (positions * size).to(tl.float32)
    total, along = tl.sum(d) / count, tl.sum(d * normal) / count
    tl.store(out + at, ((d - total - normal * along) * rstd).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tile_sums_kernel(x, firsts, seconds, positions, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # Mean and sum of squared differences of one tile, channel by channel.
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, p = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH), tile * ROWS + tl.arange(0, ROWS)
    mask = (p < positions)[:, None] & (c < channels)[None, :]
    v = tl.load(x + (n * positions + p[:, None]) * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v, 0) / tl.minimum(ROWS, positions - tile * ROWS)
    centred = tl.where(mask, v - mean[None, :], 0.0)
    at = (n * tl.num_programs(1) + tile) * channels + c
    tl.store(firsts + at, mean, mask=c < channels)
    tl.store(seconds + at, tl.sum(centred * centred, 0), mask=c < channels)


@triton.jit
def _tile_gradients_kernel(
    grad, x, weight, bias, means, rstds, firsts, seconds, positions, channels, groups, silu,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Sums of a tile's gradients of the normalised values, plain and times those values, channel by channel.
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, p = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH), tile * ROWS + tl.arange(0, ROWS)
    mask_c = c < channels
    mask = (p < positions)[:, None] & mask_c[None, :]
    g = n * groups + c // (channels // groups)
    mean, rstd = tl.load(means + g, mask=mask_c, other=0.0), tl.load(rstds + g, mask=mask_c, other=0.0)
    scale = tl.load(weight + c, mask=mask_c, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=mask_c, other=0.0).to(tl.float32)
    at = (n * positions + p[:, None]) * channels + c[None, :]
    normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if silu:
        d = d * _silu_slope(normal * scale[None, :] + offset[None, :])
    d = tl.where(mask, d * scale[None, :], 0.0)
    out = (n * tl.num_programs(1) + tile) * channels + c
    tl.store(firsts + out, tl.sum(d, 0), mask=mask_c)
    tl.store(seconds + out, tl.sum(d * normal, 0), mask=mask_c)


@triton.jit
def _group_sums_kernel(
    firsts, seconds, out_first, out_second, positions, channels, groups, tiles, rows, eps,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Of one group of one sample: mean and 1/std from the tiles' moments, or the means of the tiles' two sums.
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = channels // groups
    count = (positions * size).to(tl.float32)
    base = n * tiles * channels + g * size
    total, other = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles * size, BLOCK):
        flat = start + tl.arange(0, BLOCK)
        mask = flat < tiles * size
        t = flat // size
        at = base + t * channels + flat % size
        first = tl.load(firsts + at, mask=mask, other=0.0)
        if MOMENTS:
            total += first * tl.minimum(rows, positions - t * rows)
        else:
            total += first
            other += tl.load(seconds + at, mask=mask, other=0.0)
    mean = tl.sum(total) / count
    tl.store(out_first + n * groups + g, mean)
    if MOMENTS:
        for start in range(0, tiles * size, BLOCK):
            flat = start + tl.arange(0, BLOCK)
            mask = flat < tiles * size
            t = flat // size
            at = base + t * channels + flat % size
            shift = tl.load(firsts + at, mask=mask, other=0.0) - mean
            each = tl.where(mask, tl.minimum(rows, positions - t * rows), 0)
            other += tl.load(seconds + at, mask=mask, other=0.0) + each * shift * shift
        tl.store(out_second + n * groups + g, 1.0 / tl.sqrt(tl.sum(other) / count + eps))
    else:
        tl.store(out_second + n * groups + g, tl.sum(other) / count)


@triton.jit
def _normalise_kernel(
    x, weight, bias, means, rstds, out, positions, channels, groups, silu,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, p = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH), tile * ROWS + tl.arange(0, ROWS)
    mask_c = c < channels
    mask = (p < positions)[:, None] & mask_c[None, :]
    g = n * groups + c // (channels // groups)
    mean, rstd = tl.load(means + g, mask=mask_c, other=0.0), tl.load(rstds + g, mask=mask_c, other=0.0)
    scale = tl.load(weight + c, mask=mask_c, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=mask_c, other=0.0).to(tl.float32)
    at = (n * positions + p[:, None]) * channels + c[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    y = (v - mean[None, :]) * rstd[None, :] * scale[None, :] + offset[None, :]
    if silu:
        y = y * tl.sigmoid(y)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _normalise_backward_kernel(
    grad, x, weight, bias, means, rstds, totals, alongs, out, positions, channels, groups, silu,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, p = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH), tile * ROWS + tl.arange(0, ROWS)
    mask_c = c < channels
    mask = (p < positions)[:, None] & mask_c[None, :]
    g = n * groups + c // (channels // groups)
    mean, rstd = tl.load(means + g, mask=mask_c, other=0.0), tl.load(rstds + g, mask=mask_c, other=0.0)
    total, along = tl.load(totals + g, mask=mask_c, other=0.0), tl.load(alongs + g, mask=mask_c, other=0.0)
    scale = tl.load(weight + c, mask=mask_c, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=mask_c, other=0.0).to(tl.float32)
    at = (n * positions + p[:, None]) * channels + c[None, :]
    normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if silu:
        d = d * _silu_slope(normal * scale[None, :] + offset[None, :])
    d = d * scale[None, :] - total[None, :] - normal * along[None, :]
    tl.store(out + at, (d * rstd[None, :]).to(out.dtype.element_ty), mask=mask)


class _NormPlan:
    """How a feature map is cut for normalising. Tiles have one size, so that kernels are compiled once.

    Attributes:
        whole: one program normalises a group of one sample.
        tiles: of positions, otherwise; ``grid`` of tiles of positions and channels.
        sizes: what every kernel is told.
    """

    def __init__(self, x: Tensor, groups: int):
        n, channels, height, width = x.shape
        positions = height * width
        self.groups_grid = (n, groups)
        self.sizes = (positions, channels, groups)
        self.whole = positions * (channels // groups) <= _NORM_WHOLE
        self.tiles = triton.cdiv(positions, _NORM_ROWS)
        self.grid = (n, self.tiles, triton.cdiv(channels, _NORM_WIDTH))
        self.tile = {"ROWS": _NORM_ROWS, "WIDTH": _NORM_WIDTH, "num_warps": 4}

    def scratch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two values a tile and channel."""
        both = torch.empty(2, len(x), self.tiles, x.shape[1], device=x.device)
        return both[0], both[1]

    def sums(self, first: Tensor, second: Tensor, eps: float, *, moments: bool) -> tuple[Tensor, Tensor]:
        """Two values a sample and group, from the tiles'."""
        out = torch.empty(2, *self.groups_grid, device=first.device)
        _group_sums_kernel[self.groups_grid](
            first, second, out[0], out[1], *self.sizes, self.tiles, _NORM_ROWS, eps, MOMENTS=moments, BLOCK=256
        )
        return out[0], out[1]


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Channels-last N x C x H x W -> the result, and mean and 1/std, N x groups float32."""
    plan, out = _NormPlan(x, groups), torch.empty_like(x)
    if plan.whole:
        mean, rstd = torch.empty(2, *plan.groups_grid, device=x.device).unbind(0)
        _group_norm_kernel[plan.groups_grid](
            x, weight, bias, out, mean, rstd, *plan.sizes, eps, int(silu) * 16, BLOCK=_NORM_WHOLE, num_warps=4
        )
        return out, mean, rstd
    first, second = plan.scratch(x)
    _tile_sums_kernel[plan.grid](x, first, second, *plan.sizes[:2], **plan.tile)
    mean, rstd = plan.sums(first, second, eps, moments=True)
    _normalise_kernel[plan.grid](x, weight, bias, mean, rstd, out, *plan.sizes, int(silu) * 16, **plan.tile)
    return out, mean, rstd


def group_norm_backward(
    grad: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    """Gradient in ``x`` of what :func:`group_norm` computed; scale and shift have none."""
    plan, out = _NormPlan(x, groups), torch.empty_like(x)
    flag = int(silu) * 16  # Triton compiles anew for 1, and for what 16 does not divide
    if plan.whole:
        _group_norm_backward_kernel[plan.groups_grid](
            grad, x, weight, bias, mean, rstd, out, *plan.sizes, flag, BLOCK=_NORM_WHOLE, num_warps=4
        )
        return out
    first, second = plan.scratch(x)
    _tile_gradients_kernel[plan.grid](grad, x, weight, bias, mean, rstd, first, second, *plan.sizes, flag, **plan.tile)
    total, along = plan.sums(first, second, 0.0, moments=False)
    _normalise_backward_kernel[plan.grid](
        grad, x, weight, bias, mean, rstd, total, along, out, *plan.sizes, flag, **plan.tile
    )
    return out


# What an iteration does around the unit's own forward and backward pass. ``counter`` is the iteration, on the device.


@triton.jit
def _gather_kernel(near, draws, counter, out, batch, row, ahead, last, BLOCK: tl.constexpr):
    b = tl.program_id(1)
    iteration = tl.minimum(tl.load(counter) + ahead, last)
    which = tl.load(draws + iteration * batch + b)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < row
    v = tl.load(near + which * row + at, mask=mask)
    tl.store(out + b.to(tl.int64) * row + at, v.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_near", "ahead", "last", "blocks", "tasks"])
def _gather_far_kernel(
    near, far, draws, counter, out, rows_near, batch, row, ahead, last, blocks, tasks, BLOCK: tl.constexpr
):
    iteration = tl.minimum(tl.load(counter) + ahead, last)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        b = task // blocks
        which = tl.load(draws + iteration * batch + b)
        at = (task % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = at < row
        if which < rows_near:
            v = tl.load(near + which * row + at, mask=mask)
        else:
            v = tl.load(far + (which - rows_near) * row + at, mask=mask)
        tl.store(out + b.to(tl.int64) * row + at, v.to(out.dtype.element_ty), mask=mask)


def gather_rows(
    near: Tensor, draws: Tensor, counter: Tensor, out: Tensor, *, far: Tensor | None = None, ahead: int = 0
) -> None:
    """out[b] = source[draws[counter + ahead, b]]: rows of M x L into batch x L, converted to the type of ``out``.

    Args:
        near, far: the source's first rows, on the device, and the rows that follow, in pinned host memory. Those come
            at the speed of the bus, which a few programs are enough for; more of them would only take the place of
            whatever computes meanwhile.
        ahead: which iteration's rows, from the current one; beyond the last one the last one's.
    """
    batch, row = out.shape
    if far is None:
        grid = triton.cdiv(row, _ELEMENTS), batch
        _gather_kernel[grid](near, draws, counter, out, batch, row, ahead, len(draws) - 1, BLOCK=_ELEMENTS)
        return
    blocks = triton.cdiv(row, _FAR_ELEMENTS)
    _gather_far_kernel[(min(_FAR_PROGRAMS, batch * blocks),)](
        near, far, draws, counter, out, len(near), batch, row, ahead, len(draws) - 1, blocks, batch * blocks,
        BLOCK=_FAR_ELEMENTS, num_warps=8,
    )  # fmt: skip


@triton.jit
def _loss_kernel(
    prediction, target, draws, counter, grad, losses, batch, row, scale, p,
    DRAWN: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    iteration = tl.load(counter)
    which = b.to(tl.int64)
    if DRAWN:
        which = tl.load(draws + iteration * batch + b)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < row
    out_at = b.to(tl.int64) * row + at
    d = tl.load(prediction + out_at, mask=mask, other=0.0).to(tl.float32)
    d = d - tl.load(target + which * row + at, mask=mask, other=0.0).to(tl.float32)
    if SQUARE:
        value, slope = d * d, 2.0 * d
    else:
        size = tl.abs(d)
        power = tl.where(size > 0, tl.exp2((p - 1.0) * tl.log2(tl.maximum(size, 1e-30))), 0.0)
        value, slope = power * size, tl.where(d < 0, -p, p) * power
    tl.store(grad + out_at, (slope * scale).to(grad.dtype.element_ty), mask=mask)
    tl.atomic_add(losses + iteration, tl.sum(value) * scale)  # only shown and watched: the order does not matter


def loss_gradient(
    prediction: Tensor,
    target: Tensor,
    draws: Tensor | None,
    counter: Tensor,
    losses: Tensor,
    *,
    scale: float,
    p: float,
) -> Tensor:
    """Gradient of scale · Σ |prediction - target[draws[counter]]|^p in the prediction; the sum goes to losses[counter].

    Args:
        prediction: batch x L, dense rows.
        target: M x L, in the same order within a row; batch x L where ``draws`` is None.
    """
    batch, row = prediction.shape
    grad = torch.empty_like(prediction)
    block = _ELEMENTS
    _loss_kernel[(triton.cdiv(row, block), batch)](
        prediction, target, counter if draws is None else draws, counter, grad, losses, batch, row, scale, p,
        DRAWN=draws is not None, SQUARE=p == 2.0, BLOCK=block,
    )  # fmt: skip
    return grad


@triton.jit
def _rounding_step_kernel(
    alpha, mean, square, floor, grad, weight, delta, lo, hi, tables, counter, n, row, inputs, cut, eps,
    HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    grid = at // row
    if HALVES == 2:
        grid = grid * 2 + ((at % inputs) >= cut).to(tl.int64)
    d = tl.load(delta + grid, mask=mask, other=1.0)
    low, high = tl.load(lo + grid, mask=mask, other=0.0), tl.load(hi + grid, mask=mask, other=0.0)
    iteration = tl.load(counter) * 4
    rate, correction = tl.load(tables + iteration), tl.load(tables + iteration + 1)
    beta, pull = tl.load(tables + iteration + 2), tl.load(tables + iteration + 3)

    a = tl.load(alpha + at, mask=mask, other=0.0)
    base = tl.load(floor + at, mask=mask, other=0.0)
    s = tl.sigmoid(a)
    stretched = s * 1.2 - 0.1
    h = tl.minimum(tl.maximum(stretched, 0.0), 1.0)
    soft = base + h
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * d
    g = tl.where((soft >= low) & (soft <= high), g, 0.0)
    if pull > 0:
        u = 2.0 * h - 1.0
        size = tl.abs(u)
        power = tl.where(size > 0, tl.exp2((beta - 1.0) * tl.log2(tl.maximum(size, 1e-30))), 0.0)
        g += tl.where(u < 0, 2.0, -2.0) * pull * beta * power
    g = tl.where((stretched >= 0.0) & (stretched <= 1.0), g * 1.2 * s * (1.0 - s), 0.0)

    m = tl.load(mean + at, mask=mask, other=0.0)
    v = tl.load(square + at, mask=mask, other=0.0)
    m = m + (g - m) * 0.1
    v = v + (g * g - v) * 0.001
    a = a - rate * m / (tl.sqrt(v) * correction + eps)
    tl.store(mean + at, m, mask=mask)
    tl.store(square + at, v, mask=mask)
    tl.store(alpha + at, a, mask=mask)
    h = tl.minimum(tl.maximum(tl.sigmoid(a) * 1.2 - 0.1, 0.0), 1.0)
    w = tl.minimum(tl.maximum(base + h, low), high) * d
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=mask)


def rounding_step(
    alpha: Tensor, mean: Tensor, square: Tensor, floor: Tensor, grad: Tensor, weight: Tensor,
    delta: Tensor, lo: Tensor, hi: Tensor, tables: Tensor, counter: Tensor,
    *, row: int, inputs: int, cut: int, eps: float,
) -> None:  # fmt: skip
    """One step of AdaRound's gradient, its regulariser and Adam, and the soft weight that comes of it, in place.

    Args:
        alpha, mean, square, floor, grad, weight: of n values, in one order in memory.
        delta, lo, hi: of each output channel, or channels x 2 where the weight is cut.
        tables: iterations x 4: rate over Adam's first bias correction, one over the root of its second, the
            regulariser's exponent, its weight.
        row: values an output channel; inputs: the fastest axis of a cut weight, cut at ``cut``.
    """
    n = alpha.numel()
    _rounding_step_kernel[(triton.cdiv(n, _ELEMENTS),)](
        alpha, mean, square, floor, grad, weight, delta, lo, hi, tables, counter, n, row, inputs, cut, eps,
        HALVES=2 if cut else 1, BLOCK=_ELEMENTS,
    )  # fmt: skip


@triton.jit
def _adam_kernel(value, grad, mean, square, tables, counter, n, eps, floor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    iteration = tl.load(counter) * 4
    rate, correction = tl.load(tables + iteration), tl.load(tables + iteration + 1)
    g = tl.load(grad + at, mask=mask, other=0.0)
    m, v = tl.load(mean + at, mask=mask, other=0.0), tl.load(square + at, mask=mask, other=0.0)
    m = m + (g - m) * 0.1
    v = v + (g * g - v) * 0.001
    x = tl.load(value + at, mask=mask, other=1.0) - rate * m / (tl.sqrt(v) * correction + eps)
    tl.store(mean + at, m, mask=mask)
    tl.store(square + at, v, mask=mask)
    tl.store(value + at, tl.maximum(x, floor), mask=mask)


def adam_step(
    value: Tensor, grad: Tensor, mean: Tensor, square: Tensor, tables: Tensor, counter: Tensor,
    *, eps: float, floor: float,
) -> None:  # fmt: skip
    """One step of Adam on a short vector, kept above ``floor``, in place. ``tables`` as in :func:`rounding_step`."""
    n = value.numel()
    block = _ELEMENTS
    _adam_kernel[(triton.cdiv(n, block),)](value, grad, mean, square, tables, counter, n, eps, floor, BLOCK=block)
