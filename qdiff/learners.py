"""What is learned about a unit and how: gradients and Adam written out, so that autograd only sees the unit itself.

A learner offers ``leaves``, tensors that autograd differentiates the unit in, and ``update(gradients, k)``, which
turns their gradients into the next values. For rounding the leaf is the soft weight: what lies between it and the
rounding variable is three lines of calculus, done in one pass over the weight together with the regulariser and Adam.
On a GPU both learners are one kernel of :mod:`qdiff.triton_kernels`; everywhere else they are PyTorch.

The rates, Adam's bias corrections and the course of β are tables, looked up by the iteration: on a GPU by a counter
that lives there, so that iterations can be replayed without the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qdiff import fused
from qdiff.config import CalibrationConfig
from qdiff.primitives import GAMMA, SMALLEST_DELTA, ZETA, annealed_beta, rounding_regularizer
from qdiff.quant_layer import QuantModule
from qdiff.quantizers import UniformAffineQuantizer

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
SETTLED = 0.01  # a rounding is settled when h is this near to 0 or 1


class Progress(NamedTuple):
    """Where a learner stands.

    Attributes:
        rounding_loss: the weighted regulariser; temperature: its exponent β; settled: share of roundings decided.
        steps: step sizes of activations.
        finite: whether everything learned is a number.
    """

    rounding_loss: float
    temperature: float
    settled: float
    steps: tuple[float, ...]
    finite: bool


class Schedule:
    """Everything that depends on the iteration alone.

    Attributes:
        table: iterations x 4 float32: rate over Adam's first bias correction; 1 over the root of its second; β; weight
            of the regulariser.
        counter: the iteration, on the device.

    Args:
        rates: of each iteration; betas, weights: of the regulariser, zeros where there is none.
    """

    def __init__(self, rates: Tensor, betas: Tensor, weights: Tensor, device: torch.device):
        step = torch.arange(1, len(rates) + 1, dtype=torch.float64)
        first, second = 1 - ADAM_BETAS[0] ** step, 1 - ADAM_BETAS[1] ** step
        table = torch.stack([rates.double() / first, second.rsqrt(), betas.double(), weights.double()], dim=1)
        self.table = table.float().to(device)
        self.rows: list[list[float]] = self.table.tolist()
        self.counter = torch.zeros(1, dtype=torch.long, device=device)


def rounding_schedule(config: CalibrationConfig, iterations: int, rate: float, device: torch.device) -> Schedule:
    """A constant rate; β falls once the warm-up, during which the regulariser rests, is over."""
    # Iterations count from 1, as the published ones do.
    betas = [
        annealed_beta(i + 1, iterations, start=config.beta_start, end=config.beta_end, warmup=config.warmup)
        for i in range(iterations)
    ]
    weights = torch.full((iterations,), config.round_weight)
    weights[: first_regularized(config, iterations)] = 0
    return Schedule(torch.full((iterations,), rate), torch.tensor(betas), weights, device)


def first_regularized(config: CalibrationConfig, iterations: int) -> int:
    """Number, from 0, of the first iteration with the regulariser."""
    return min(iterations, max(0, math.ceil(config.warmup * iterations) - 1))


def cosine_schedule(iterations: int, rate: float, device: torch.device) -> Schedule:
    """A rate that falls along half a cosine, and no regulariser."""
    angle = torch.arange(iterations, dtype=torch.float64) * (math.pi / max(1, iterations))
    zeros = torch.zeros(iterations)
    return Schedule(rate * 0.5 * (1 + torch.cos(angle)), zeros, zeros, device)


class Learner(Protocol):
    """What the optimisation loop needs."""

    leaves: list[Tensor]
    schedule: Schedule

    def update(self, gradients: tuple[Tensor, ...], k: int) -> None:
        """One step; ``k`` is the iteration, which the fused kernels read from the schedule's counter instead."""

    def progress(self, k: int) -> Progress:
        """After iteration ``k``; waits for the device."""

    def reset(self) -> None:
        """Back to the start, Adam's moments included."""

    def finish(self, *, learned: bool) -> None:
        """Give the result, or what was there before, to the quantizers."""


class RoundingLearner:
    """AdaRound (Nagel et al. 2020, equations 21 to 25) for all layers of a unit.

    Layers must have learnable rounding; while this object is at work their weight is its leaf.

    Args:
        dtype: of the soft weights that the unit computes with.
    """

    def __init__(self, layers: list[QuantModule], schedule: Schedule, *, dtype: torch.dtype = torch.float32):
        self.parts = [_LayerRounding(layer, schedule, dtype) for layer in layers]
        self.schedule = schedule
        self.leaves = [part.leaf for part in self.parts]

    def update(self, gradients: tuple[Tensor, ...], k: int) -> None:
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.update(gradient, k)

    def progress(self, k: int) -> Progress:
        return rounding_progress([part.alpha for part in self.parts], *self.schedule.rows[k][2:])

    def reset(self) -> None:
        for part in self.parts:
            part.reset()

    def finish(self, *, learned: bool) -> None:
        for part in self.parts:
            part.finish(learned=learned)


def rounding_progress(alphas: list[Tensor], beta: float, weight: float) -> Progress:
    """Where rounding variables stand, with the regulariser's exponent and weight. Waits for the device once."""
    found = []
    for alpha in alphas:
        h = _rectified(alpha)
        rest = rounding_regularizer(alpha, beta) if weight else torch.zeros((), device=alpha.device)
        settled = ((h < SETTLED) | (h > 1 - SETTLED)).sum()
        found.append(torch.stack([x.double() for x in (rest, settled, torch.isfinite(alpha).all())]))
    rests, counts, finite = zip(*torch.stack(found).tolist(), strict=True)
    loss, share = weight * sum(rests), sum(counts) / sum(alpha.numel() for alpha in alphas)
    return Progress(loss, beta, share, (), all(finite))


def _rectified(alpha: Tensor) -> Tensor:
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)


class _LayerRounding:
    """One layer's rounding variables; the halves of a split layer lie side by side, as in its weight."""

    @torch.no_grad()
    def __init__(self, layer: QuantModule, schedule: Schedule, dtype: torch.dtype):
        self.layer, self.schedule = layer, schedule
        self.fused = fused.enabled(layer.weight.device)
        pairs = layer.rounding_quantizers()
        self.quantizers = [quantizer for quantizer, _ in pairs]
        self.widths = [part.shape[1] for _, part in pairs]
        self.initial = self._laid_out(layer.join_parts([q.alpha.detach() for q in self.quantizers]))
        self.alpha = self.initial.clone()
        self.floor = self._laid_out(layer.join_parts([(part / q.delta).floor() for q, part in pairs]))
        self.mean, self.square = torch.zeros_like(self.alpha), torch.zeros_like(self.alpha)
        self.delta = self._broadcast([q.delta for q in self.quantizers])
        self.lo = self._broadcast([q.bounds[0] - q.zero_point for q in self.quantizers])
        self.hi = self._broadcast([q.bounds[1] - q.zero_point for q in self.quantizers])
        if self.fused:
            self.kernel_grid = self._per_channel(self.delta), self._per_channel(self.lo), self._per_channel(self.hi)
        self.leaf = torch.empty_like(self.alpha, dtype=dtype)
        self._write_leaf()
        self.leaf.requires_grad_(True)
        layer.baked_weight = self.leaf

    def _laid_out(self, x: Tensor) -> Tensor:
        """A copy, dense and in the order in which the kernel walks."""
        last = self.fused and x.dim() == 4
        return x.clone(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _broadcast(self, values: list[Tensor]) -> Tensor:
        """One tensor against the whole weight: a number a channel, repeated over each part's inputs where it is cut."""
        if len(values) == 1:
            return values[0].clone()
        return torch.cat([v.expand(-1, n, *v.shape[2:]) for v, n in zip(values, self.widths, strict=True)], dim=1)

    def _per_channel(self, x: Tensor) -> Tensor:
        """For the kernel: channels x parts."""
        columns = [0, self.widths[0]][: len(self.widths)]
        x = x.reshape(x.shape or (1,) * self.alpha.dim())
        return x.expand(len(self.alpha), *x.shape[1:]).flatten(1)[:, columns].float().contiguous()

    @torch.no_grad()
    def _write_leaf(self) -> None:
        soft = (self.floor + _rectified(self.alpha)).clamp_(self.lo, self.hi).mul_(self.delta)
        self.leaf.detach().copy_(soft)

    @torch.no_grad()
    def update(self, gradient: Tensor, k: int) -> None:
        if self.fused:
            self._update_fused(gradient)
        else:
            self._update_plain(gradient, *self.schedule.rows[k])

    def _update_fused(self, gradient: Tensor) -> None:
        from qdiff import triton_kernels

        if gradient.stride() != self.leaf.stride():
            gradient = torch.empty_like(self.leaf).copy_(gradient)
        split = len(self.widths) > 1
        triton_kernels.rounding_step(
            self.alpha, self.mean, self.square, self.floor, gradient, self.leaf.detach(), *self.kernel_grid,
            self.schedule.table, self.schedule.counter, row=self.alpha[0].numel(), inputs=self.alpha.shape[1],
            cut=self.widths[0] if split else 0, eps=ADAM_EPS,
        )  # fmt: skip

    def _update_plain(self, gradient: Tensor, rate: float, correction: float, beta: float, weight: float) -> None:
        s = torch.sigmoid(self.alpha)
        stretched = s * (ZETA - GAMMA) + GAMMA
        h = stretched.clamp(0, 1)
        soft = self.floor + h
        clamped = (soft < self.lo).logical_or_(soft > self.hi)  # by the grid's ends
        g = (gradient * self.delta).masked_fill_(clamped, 0)
        if weight:
            u = h.mul_(2).sub_(1)
            g.sub_(u.abs().pow_(beta - 1).copysign_(u), alpha=2 * weight * beta)
        g.mul_(torch.addcmul(s, s, s, value=-1).mul_(ZETA - GAMMA))  # h'(α)
        g.masked_fill_((stretched < 0).logical_or_(stretched > 1), 0)
        _adam(self.alpha, g, self.mean, self.square, rate, correction)
        self._write_leaf()

    @torch.no_grad()
    def reset(self) -> None:
        self.alpha.copy_(self.initial)
        self.mean.zero_()
        self.square.zero_()
        self._write_leaf()

    @torch.no_grad()
    def finish(self, *, learned: bool) -> None:
        result = self.alpha if learned else self.initial
        for quantizer, alpha in zip(self.quantizers, result.split(self.widths, dim=1), strict=True):
            quantizer.alpha.data = alpha.clone(memory_format=torch.contiguous_format)
        self.layer.unbake()


class StepLearner:
    """Step sizes of a unit's activation quantizers (LSQ, Esser et al. 2020), kept positive.

    Their storage is one vector while this object is at work.
    """

    @torch.no_grad()
    def __init__(self, quantizers: list[UniformAffineQuantizer], schedule: Schedule):
        self.schedule = schedule
        self.leaves: list[Tensor] = [quantizer.delta for quantizer in quantizers]
        self.initial = torch.cat([leaf.detach().flatten() for leaf in self.leaves])
        self.values = self.initial.clone()
        self.mean, self.square = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.fused = fused.enabled(self.values.device)
        for leaf, piece in zip(self.leaves, self.values.split([x.numel() for x in self.leaves]), strict=True):
            leaf.data = piece.view(leaf.shape)
            leaf.requires_grad_(True)

    @torch.no_grad()
    def update(self, gradients: tuple[Tensor, ...], k: int) -> None:
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        if self.fused:
            from qdiff import triton_kernels

            triton_kernels.adam_step(
                self.values, gradient, self.mean, self.square, self.schedule.table, self.schedule.counter,
                eps=ADAM_EPS, floor=SMALLEST_DELTA,
            )  # fmt: skip
            return
        rate, correction, *_ = self.schedule.rows[k]
        _adam(self.values, gradient, self.mean, self.square, rate, correction)
        self.values.clamp_(min=SMALLEST_DELTA)  # Adam moves by up to its rate, whatever the size of a step

    def progress(self, k: int) -> Progress:
        steps = tuple(self.values.tolist())
        return Progress(0.0, 0.0, 1.0, steps, all(math.isfinite(step) for step in steps))

    @torch.no_grad()
    def reset(self) -> None:
        self.values.copy_(self.initial)
        self.mean.zero_()
        self.square.zero_()

    @torch.no_grad()
    def finish(self, *, learned: bool) -> None:
        result = self.values if learned else self.initial
        for leaf, piece in zip(self.leaves, result.split([x.numel() for x in self.leaves]), strict=True):
            leaf.data = piece.view(leaf.shape).clone()
            leaf.requires_grad_(False)
            leaf.grad = None


def _adam(value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, correction: float) -> None:
    """One step of Adam (Kingma and Ba 2015), in place; the bias corrections are in ``rate`` and ``correction``."""
    mean.lerp_(gradient, 1 - ADAM_BETAS[0])
    square.mul_(ADAM_BETAS[1]).addcmul_(gradient, gradient, value=1 - ADAM_BETAS[1])
    value.addcdiv_(mean, square.sqrt().mul_(correction).add_(ADAM_EPS), value=-rate)
