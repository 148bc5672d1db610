"""The optimisation of one unit: its weights' rounding, or its activations' step sizes.

One loop serves layers and blocks, weights (AdaRound, Nagel et al. 2020; block-wise as in BRECQ, Li et al. 2021) and
activations (LSQ, Esser et al. 2020). Everything an iteration needs (its batch, learning rate and β) lies ready in
tables on the device, looked up by a counter that lives there too: on a GPU the whole iteration is one CUDA graph and
the host only says "again".
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from qdiff.capture import UnitData
from qdiff.config import CalibrationConfig
from qdiff.primitives import SMALLEST_DELTA, annealed_beta, reconstruction_loss
from qdiff.quant_model import Unit, evaluating, frozen_parameters
from qdiff.quantizers import AdaRoundQuantizer

Phase = Literal["weights", "activations"]

FIXED_BATCH = 64  # samples of the batch on which a unit's loss is reported
_GRAPH_WARMUP = 3  # iterations before a CUDA graph is captured, for allocators and autotuning


class TracePoint(NamedTuple):
    """One moment of a unit's optimisation.

    Attributes:
        loss: on the batch of that iteration, without the regulariser.
        rounding_loss, temperature: the rounding regulariser and its exponent; 0 for activations.
        settled: share of the weights whose rounding is within 0.01 of down or up; 1 for activations.
        steps: the step sizes of the activation quantizers; none for weights.
    """

    iteration: int
    loss: float
    rounding_loss: float
    temperature: float
    settled: float
    steps: tuple[float, ...]


@dataclass(frozen=True)
class UnitReport:
    """What became of one unit in one phase; losses on one fixed batch, without the regulariser.

    Attributes:
        loss_before: rounding to nearest (weights) or initial ranges (activations).
        loss_after: hard rounding, or learned step sizes.
        outcome: ``learned``, ``learned at a tenth of the rate`` or ``kept`` (what it started from was better).
        note: why it is not ``learned``.
        peak_gpu_bytes: the most GPU memory that was in use; 0 on a CPU.
        trace: the optimisation, moment by moment.
    """

    name: str
    kind: str
    phase: Phase
    parameters: int
    iterations: int
    loss_before: float
    loss_after: float
    seconds: float
    outcome: str = "learned"
    note: str = ""
    peak_gpu_bytes: int = 0
    trace: tuple[TracePoint, ...] = ()


def reconstruct_weights(unit: Unit, data: UnitData, config: CalibrationConfig, *, seed: int) -> UnitReport:
    """Learn how to round the weights of one unit, whose grids must be set. Afterwards they are baked, hard-rounded.

    Args:
        data: inputs and targets, on the unit's device or the host.
        seed: of the order in which samples are drawn.
    """
    started = time.perf_counter()
    layers = unit.layers()
    with evaluating(unit.module), frozen_parameters(unit.module):
        unit.module.set_quant_state(True, False)
        for layer in layers:
            layer.unbake()
        before = fixed_batch_loss(unit, data, p=2.0)
        for layer in layers:
            layer.learn_rounding()
        quantizers = [quantizer for layer in layers for quantizer, _ in layer.weight_quantizers()]
        _set_soft(quantizers, True)
        loop = _Loop(unit, data, [q.alpha for q in quantizers], config, iterations=config.iters, p=2.0, seed=seed)
        loop.regularize(quantizers)
        loop.run(torch.full((config.iters,), config.weight_lr))
        _set_soft(quantizers, False)
        for layer in layers:
            layer.bake()
        after = fixed_batch_loss(unit, data, p=2.0)
    return _report(unit, "weights", config.iters, before, after, started)


def reconstruct_activations(unit: Unit, data: UnitData, config: CalibrationConfig, *, seed: int) -> UnitReport:
    """Learn the step sizes of one unit's activation quantizers, whose ranges must be set; zero points stay."""
    started = time.perf_counter()
    with evaluating(unit.module), frozen_parameters(unit.module):
        unit.module.set_quant_state(True, True)
        before = fixed_batch_loss(unit, data, p=config.p)
        steps = [quantizer.delta for quantizer in unit.act_quantizers()]
        loop = _Loop(unit, data, steps, config, iterations=config.iters_a, p=config.p, seed=seed)
        loop.keep_above(SMALLEST_DELTA)
        angle = torch.arange(config.iters_a) * (torch.pi / max(1, config.iters_a))
        loop.run(config.lr * 0.5 * (1 + torch.cos(angle)))
        after = fixed_batch_loss(unit, data, p=config.p)
    return _report(unit, "activations", config.iters_a, before, after, started)


@torch.no_grad()
def fixed_batch_loss(unit: Unit, data: UnitData, *, p: float) -> float:
    """The reconstruction loss on evenly spaced samples of the set: the same ones before and after."""
    index = torch.linspace(0, len(data) - 1, min(FIXED_BATCH, len(data))).long().to(data.target.device)
    inputs, target = data.rows(index)
    device = next(unit.module.parameters()).device
    return reconstruction_loss(unit.module(*(x.to(device) for x in inputs)), target.to(device), p).item()


def draw_batches(samples: int, batch_size: int, iterations: int, seed: int) -> Tensor:
    """Which samples each iteration sees: iterations x batch_size indices, shuffled epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch_size, samples)
    epochs = max(1, -(-iterations * batch // samples))
    order = torch.cat([torch.randperm(samples, generator=generator) for _ in range(epochs)])
    return order[: iterations * batch].view(iterations, batch)


class _Loop:
    """Adam over some parameters of a unit against its target, iteration by iteration."""

    def __init__(
        self,
        unit: Unit,
        data: UnitData,
        parameters: list[nn.Parameter],
        config: CalibrationConfig,
        *,
        iterations: int,
        p: float,
        seed: int,
    ):
        self.device = parameters[0].device
        self.module, self.data, self.parameters, self.config, self.p = unit.module, data, parameters, config, p
        self.iterations = iterations
        self.draws = draw_batches(len(data), config.batch_size, iterations, seed).to(data.target.device)
        self.counter = torch.zeros(1, dtype=torch.long, device=self.device)
        self.rounded: list[AdaRoundQuantizer] = []
        self.floor: float | None = None
        self.first_regularized = iterations

    def regularize(self, quantizers: list[AdaRoundQuantizer]) -> None:
        """Add the rounding regulariser of these quantizers once the warm-up is over."""
        c = self.config
        # The schedule counts iterations from 1, as the published one does.
        betas = [
            annealed_beta(i + 1, self.iterations, start=c.beta_start, end=c.beta_end, warmup=c.warmup)
            for i in range(self.iterations)
        ]
        self.betas = torch.tensor(betas, device=self.device)
        self.rounded = quantizers
        self.first_regularized = max(0, int(-(-c.warmup * self.iterations // 1)) - 1)

    def keep_above(self, floor: float) -> None:
        """Never let a parameter fall below ``floor`` (a step size must stay positive)."""
        self.floor = floor

    def run(self, rates: Tensor) -> None:
        """All iterations, at one learning rate each."""
        if self.iterations == 0:
            return
        self.rates = rates.float().to(self.device)
        self.rate = torch.zeros((), device=self.device)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.rate, fused=True, capturable=on_gpu)
        resident = self.data.target.device == self.device
        (self._run_graphs if on_gpu and resident else self._run_eagerly)()
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _run_eagerly(self) -> None:
        for iteration in range(self.iterations):
            self._iterate(regularized=iteration >= self.first_regularized)

    def _run_graphs(self) -> None:
        """Capture one iteration without and one with the regulariser, and replay them."""
        initial = [parameter.detach().clone() for parameter in self.parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(min(_GRAPH_WARMUP, self.iterations)):  # the tables have no more rows
                self._iterate(regularized=bool(self.rounded))
        torch.cuda.current_stream().wait_stream(side)
        self._reset(initial)
        pieces = ((False, self.first_regularized), (True, self.iterations - self.first_regularized))
        for regularized, count in pieces:
            if count == 0:
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._iterate(regularized=regularized)
            for _ in range(count):
                graph.replay()

    @torch.no_grad()
    def _reset(self, initial: list[Tensor]) -> None:
        """Forget the warm-up: parameters, Adam's moments and the counter as at the start."""
        for parameter, value in zip(self.parameters, initial, strict=True):
            parameter.copy_(value)
            parameter.grad = None
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.counter.zero_()

    def _iterate(self, *, regularized: bool) -> None:
        """One iteration; no value is read back by the host, so it can be captured."""
        rows = self.draws.index_select(0, self.counter.to(self.draws.device)).squeeze(0)
        inputs, target = self.data.rows(rows)
        prediction = self.module(*(x.to(self.device) for x in inputs))
        loss = reconstruction_loss(prediction, target.to(self.device), self.p)
        if regularized and self.rounded:
            beta = self.betas.index_select(0, self.counter)
            loss = loss + self.config.round_weight * sum(q.regularizer(beta) for q in self.rounded)
        gradients = torch.autograd.grad(loss, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.rate.copy_(self.rates.index_select(0, self.counter).squeeze(0))
        self.optimizer.step()
        if self.floor is not None:
            with torch.no_grad():
                torch._foreach_clamp_min_(self.parameters, self.floor)
        self.counter.add_(1)


def _set_soft(quantizers: list[AdaRoundQuantizer], soft: bool) -> None:
    for quantizer in quantizers:
        quantizer.soft = soft


def _report(unit: Unit, phase: Phase, iterations: int, before: float, after: float, started: float) -> UnitReport:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return UnitReport(
        unit.path, unit.kind, phase, unit.parameter_count(), iterations, before, after, time.perf_counter() - started
    )
