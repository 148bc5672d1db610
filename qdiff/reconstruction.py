"""The optimisation of one unit: its weights' rounding, or its activations' step sizes.

One loop serves layers and blocks, weights (AdaRound, Nagel et al. 2020; block-wise as in BRECQ, Li et al. 2021) and
activations (LSQ, Esser et al. 2020). It runs in one of two ways that compute the same:

- ``fast``: gradients outside of the unit written out (:mod:`qdiff.learners`), and on a GPU a few iterations captured
  as one CUDA graph, which draws its batches by a counter on the device, so that the host only says "again";
- ``eager``: everything left to autograd and ``torch.optim.Adam`` in float32, iteration by iteration: the oracle that
  tests hold the other to.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qdiff import fused
from qdiff.attention import half_precision, sparing, unrounded_maps
from qdiff.capture import UnitData
from qdiff.config import CalibrationConfig
from qdiff.graphs import recording, side_stream
from qdiff.learners import (
    ADAM_BETAS,
    ADAM_EPS,
    Learner,
    Progress,
    RoundingLearner,
    Schedule,
    StepLearner,
    cosine_schedule,
    rounding_progress,
    rounding_schedule,
)
from qdiff.memory import forget_host_peak, give_back_unused, host_peak_bytes
from qdiff.places import STRETCH
from qdiff.primitives import SMALLEST_DELTA, reconstruction_loss, reconstruction_slope
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import Unit, evaluating, frozen_parameters
from qdiff.quantizers import UniformAffineQuantizer
from qdiff.read_ahead import ReadAhead
from qdiff.workers import WORKERS

Phase = Literal["weights", "activations"]

FIXED_BATCH = 64  # samples of the batch on which a unit's loss is reported
TRACE_POINTS = 20  # of each unit, where the loop looks at itself
_FEW_POINTS = 4  # of a unit whose iterations stand for many more: looks would be a large part of their time
DIVERGED = 100.0  # times the loss of rounding to nearest (or of the first ranges): no use going on
RETRY_RATE = 0.1  # of the learning rate, the second time
_WORTH_TUNING = 4000  # iterations from which trying all convolution algorithms is taken to pay
_STAND_FOR_MANY = contextvars.ContextVar("_STAND_FOR_MANY", default=False)
_UNROLL = STRETCH  # iterations a CUDA graph
_GRAPH_WARMUP = 3  # iterations before one is captured, for allocators and autotuning

log = logging.getLogger(__name__)


class TracePoint(NamedTuple):
    """A look at a unit's optimisation.

    Attributes:
        loss: mean over the iterations since the look before, without the regulariser.
        rounding_loss: the regulariser, weighted; temperature: its exponent β; settled: share of roundings decided.
        steps: step sizes of the activations.
    """

    iteration: int
    loss: float
    rounding_loss: float
    temperature: float
    settled: float
    steps: tuple[float, ...]


def looks(iterations: int, points: int = TRACE_POINTS) -> list[int]:
    """After which iterations an optimisation of so many is looked at."""
    every = max(1, -(-iterations // points))
    if every > _UNROLL:
        every = -(-every // _UNROLL) * _UNROLL
    return [*range(every, iterations, every), iterations]


@dataclass(frozen=True)
class UnitReport:
    """What became of one unit in one phase; losses on one fixed batch, without the regulariser.

    Attributes:
        loss_before: rounding to nearest (weights) or initial ranges (activations).
        loss_after: hard rounding, or learned step sizes.
        outcome: ``learned``, ``learned at a tenth of the rate``, or ``kept``: as it was before, because learning failed
            or made it worse; ``note`` says why.
        peak_gpu_bytes, peak_host_bytes: the most memory that was in use meanwhile.
        trace: looks at the optimisation.
        loop_seconds: of ``seconds``, what the iterations took; the rest is preparation and measuring.
        iteration_seconds: of one of them, counted behind the first look, before which a GPU takes in what it will play,
            and without looks; look_seconds: of one of these.
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
    loop_seconds: float = 0.0
    peak_host_bytes: int = 0
    iteration_seconds: float = 0.0
    look_seconds: float = 0.0


def reconstruct_weights(unit: Unit, data: UnitData, config: CalibrationConfig, *, seed: int) -> UnitReport:
    """Learn how to round the weights of one unit, whose grids must be set. Afterwards they are baked, hard-rounded.

    A unit that ends with a larger loss than rounding to nearest keeps rounding to nearest.

    Args:
        data: inputs and targets, on the unit's device or the host.
        seed: of the order in which samples are drawn.
    """
    started = _start(unit)
    layers = unit.layers()
    with evaluating(unit.entry), frozen_parameters(unit.module):
        unit.module.set_quant_state(True, False)
        for layer in layers:
            layer.unbake()
            layer.learn_rounding()  # starts at the nearest
        before = fixed_batch_loss(unit, data, p=2.0, batch_size=config.batch_size)

        def learner(rate: float) -> Learner:
            schedule = rounding_schedule(config, config.iters, rate, device_of(unit))
            if config.engine == "eager":
                return _EagerRounding(layers, schedule)
            return RoundingLearner(layers, schedule, dtype=_dtype(config))

        def hard_loss() -> float:
            for layer in layers:
                layer.bake()
            return fixed_batch_loss(unit, data, p=2.0, batch_size=config.batch_size)

        rate = config.weight_lr
        result = _learn(unit, data, config, learner, hard_loss, before, rate, config.iters, p=2.0, seed=seed)
    return _report(unit, "weights", config.iters, before, result, started)


def reconstruct_activations(unit: Unit, data: UnitData, config: CalibrationConfig, *, seed: int) -> UnitReport:
    """Learn step sizes of one unit's activation quantizers, whose ranges must be set; zero points stay.

    Softmax maps in 16 bits keep theirs (:meth:`Unit.learnable_act_quantizers`).
    """
    started = _start(unit)
    with evaluating(unit.entry), frozen_parameters(unit.module):
        unit.module.set_quant_state(True, True)
        before = fixed_batch_loss(unit, data, p=config.p, batch_size=config.batch_size)

        def learner(rate: float) -> Learner:
            schedule = cosine_schedule(config.iters_a, rate, device_of(unit))
            make = _EagerSteps if config.engine == "eager" else StepLearner
            return make(unit.learnable_act_quantizers(), schedule)

        def loss() -> float:
            return fixed_batch_loss(unit, data, p=config.p, batch_size=config.batch_size)

        result = _learn(unit, data, config, learner, loss, before, config.lr, config.iters_a, p=config.p, seed=seed)
    return _report(unit, "activations", config.iters_a, before, result, started)


class _Result(NamedTuple):
    loss: float
    outcome: str
    note: str
    trace: tuple[TracePoint, ...]
    loop_seconds: float = 0.0
    iteration_seconds: float = 0.0
    look_seconds: float = 0.0


def _learn(
    unit: Unit,
    data: UnitData,
    config: CalibrationConfig,
    make_learner: Callable[[float], Learner],
    measure: Callable[[], float],
    before: float,
    rate: float,
    iterations: int,
    *,
    p: float,
    seed: int,
) -> _Result:
    """Try, try again more gently, or leave the unit as it was."""
    if iterations == 0:
        return _Result(measure(), "learned", "", ())
    problems: list[str] = []
    for attempt_rate, outcome in ((rate, "learned"), (rate * RETRY_RATE, "learned at a tenth of the rate")):
        learner = make_learner(attempt_rate)
        loop = _Loop(unit, data, learner, config, iterations=iterations, p=p, seed=seed, reference=before)
        with arithmetic(config, loop.device, repeats=iterations), _working_weights(unit, config, learner):
            problem = loop.run()
        learner.finish(learned=not problem)
        after = WORKERS.same(measure())
        if not problem and math.isfinite(after) and after <= before:
            return _Result(after, outcome, "; ".join(problems), *loop.account())
        if not problem:
            problem = f"the loss rose from {before:.4g} to {after:.4g}"
            learner.finish(learned=False)
            problems.append(problem)
            break  # a sound optimisation that does not help; a smaller rate would not either
        problems.append(problem)
        log.warning("%s: %s", unit.path, problem)
    return _Result(measure(), "kept", "; ".join(problems), *loop.account())


def device_of(unit: Unit) -> torch.device:
    """Where the unit computes."""
    return next(unit.module.parameters()).device


def _start(unit: Unit) -> float:
    device = device_of(unit)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    forget_host_peak()
    return time.perf_counter()


def _report(unit: Unit, phase: Phase, iterations: int, before: float, result: _Result, started: float) -> UnitReport:
    device = device_of(unit)
    peak = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    return UnitReport(
        unit.path,
        unit.kind,
        phase,
        unit.parameter_count(),
        iterations,
        before,
        result.loss,
        time.perf_counter() - started,
        result.outcome,
        result.note,
        peak,
        result.trace,
        result.loop_seconds,
        host_peak_bytes(),
        result.iteration_seconds,
        result.look_seconds,
    )


@torch.no_grad()
def fixed_batch_loss(unit: Unit, data: UnitData, *, p: float, batch_size: int = FIXED_BATCH) -> float:
    """The reconstruction loss on evenly spaced samples of the set: the same ones before and after.

    Args:
        batch_size: samples at once.
    """
    index = torch.linspace(0, len(data) - 1, min(FIXED_BATCH, len(data))).long()
    losses = []
    for part in index.split(batch_size):
        inputs, target = data.rows(part, device_of(unit))
        set_clock(unit, data, part)
        losses.append(reconstruction_loss(unit.entry(*inputs), target, p) * (len(part) / len(index)))
    return torch.stack(losses).sum().item()


def set_clock(unit: Unit, data: UnitData, index: Tensor) -> None:
    """Tell quantizers that depend on it which timesteps the batch is from."""
    if unit.clock.groups and data.t is not None:
        unit.clock.set(data.t.index_select(0, index.to(data.t.device)))


def timestep_weights(t: Tensor | None, noisy_weight: float) -> Tensor | None:
    """How often each sample is drawn, relative to those of the cleanest timestep; None: all alike.

    Args:
        t: the timestep of every sample; larger is noisier.
        noisy_weight: see :class:`CalibrationConfig`.
    """
    if t is None or noisy_weight == 1:
        return None
    known, rank = t.cpu().unique(return_inverse=True)
    return noisy_weight ** (rank.double() / max(1, len(known) - 1))


def draw_batches(samples: int, batch_size: int, iterations: int, seed: int, *, weights: Tensor | None = None) -> Tensor:
    """Which samples each iteration sees: iterations x batch_size indices, shuffled epoch after epoch.

    Args:
        weights: draw with replacement instead, each sample in proportion to its weight.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch_size, samples)
    if weights is not None:
        chosen = torch.multinomial(weights, iterations * batch, replacement=True, generator=generator)
        return chosen.view(iterations, batch)
    epochs = max(1, -(-iterations * batch // samples))
    order = torch.cat([torch.randperm(samples, generator=generator) for _ in range(epochs)])
    return order[: iterations * batch].view(iterations, batch)


# Arithmetic: which units of the GPU compute, in which type.


def _dtype(config: CalibrationConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def capturing(config: CalibrationConfig) -> CalibrationConfig:
    """The same, for running whole networks: TF32 at the least, so that targets do not carry bfloat16's rounding."""
    return dataclasses.replace(config, precision="tf32") if config.precision == "bf16" else config


@contextlib.contextmanager
def standing_for_many() -> Iterator[None]:
    """Inside the ``with`` block few iterations are timed that stand for a long optimisation.

    The fastest convolutions are searched for, as there, and looks are as far apart as few iterations allow.
    """
    token = _STAND_FOR_MANY.set(True)
    try:
        yield
    finally:
        _STAND_FOR_MANY.reset(token)


@contextlib.contextmanager
def arithmetic(config: CalibrationConfig, device: torch.device, *, repeats: int = 0) -> Iterator[None]:
    """The precision and determinism asked for, inside the ``with`` block.

    Args:
        repeats: how often the same work will be done: worth the search for the fastest convolution where often.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    matmul.allow_tf32 = cudnn.allow_tf32 = config.precision != "fp32" and config.engine != "eager"
    often = repeats >= _WORTH_TUNING or (repeats and _STAND_FOR_MANY.get())
    cudnn.benchmark = bool(often and not config.deterministic)
    cudnn.deterministic = config.deterministic
    kernels = fused.plain_pytorch() if config.engine == "eager" else contextlib.nullcontext()
    half = config.precision == "bf16" and config.engine != "eager"
    quick = cudnn.allow_tf32 and not config.deterministic
    try:
        with (
            kernels,
            sparing(unfused=config.deterministic),
            half_precision(quick and not half),
            unrounded_maps(quick),
            torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False),
        ):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


@contextlib.contextmanager
def _working_weights(unit: Unit, config: CalibrationConfig, learner: Learner) -> Iterator[None]:
    """Fixed weights in the type and memory layout in which the unit computes, for the length of a ``with`` block."""
    learned = {id(leaf) for leaf in learner.leaves}
    baked = [(layer, layer.baked_weight) for layer in unit.layers()]
    before = [(layer, weight) for layer, weight in baked if weight is not None and id(weight) not in learned]
    device = device_of(unit)
    if config.engine == "eager" or device.type != "cuda":
        yield
        return
    for layer, weight in before:
        form = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        layer.baked_weight = weight.to(_dtype(config), memory_format=form)
    try:
        yield
    finally:
        for layer, weight in before:
            layer.baked_weight = weight


# The loop.


class _Loop:
    """The iterations of one unit: batch, forward, loss, backward, update."""

    def __init__(
        self,
        unit: Unit,
        data: UnitData,
        learner: Learner,
        config: CalibrationConfig,
        *,
        iterations: int,
        p: float,
        seed: int,
        reference: float,
    ):
        self.unit, self.module, self.data, self.learner = unit, unit.entry, data, learner
        self.config, self.p = config, p
        self.device = device_of(unit)
        self.iterations, self.reference = iterations, reference
        weights = timestep_weights(data.t, config.noisy_weight)
        draws = draw_batches(len(data), config.batch_size, iterations, seed, weights=weights)
        self.batch = draws.shape[1]  # of all processes together
        self.draws = WORKERS.share(draws).contiguous().to(self.device)
        self.losses = torch.zeros(iterations, device=self.device)
        self.trace: list[TracePoint] = []
        self.advancing: list[float] = []  # seconds up to every look
        self.looking: list[float] = []  # and of the look

    def account(self) -> tuple[tuple[TracePoint, ...], float, float, float]:
        """The looks, the seconds of all, of an iteration behind the first look, and of a look. 0 where it broke off."""
        stops = self._looks()
        if len(self.looking) < len(stops):
            return tuple(self.trace), 0.0, 0.0, 0.0
        whole, each = sum(self.advancing) + sum(self.looking), sum(self.looking) / len(stops)
        if len(stops) == 1:
            return tuple(self.trace), whole, self.advancing[0] / self.iterations, each
        return tuple(self.trace), whole, sum(self.advancing[1:]) / (self.iterations - stops[0]), each

    def run(self) -> str:
        """All iterations. Returns what went wrong, empty where nothing did."""
        graphs = self.device.type == "cuda" and self.config.engine != "eager" and _Stage.serves(self.data, self.device)
        with contextlib.ExitStack() as held:
            # The stage has the buffers that graphs read and write.
            stage = held.enter_context(_Stage(self)) if graphs else None
            advance = self._eagerly if stage is None else stage.recorded(self._looks()).advance
            done, before = 0, self._now()
            for stop in self._looks():
                advance(done, stop)
                there = self._now()
                problem = self._look(done, stop)
                if problem:
                    return problem
                self.advancing.append(there - before)
                done, before = stop, self._now()
                self.looking.append(before - there)
        return ""

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _looks(self) -> list[int]:
        return looks(self.iterations, _FEW_POINTS if _STAND_FOR_MANY.get() else TRACE_POINTS)

    def _look(self, done: int, stop: int) -> str:
        loss = WORKERS.total(self.losses[done:stop].clone()).mean().item()
        progress = self.learner.progress(stop - 1)
        self.trace.append(
            TracePoint(stop, loss, progress.rounding_loss, progress.temperature, progress.settled, progress.steps)
        )
        if not (math.isfinite(loss) and progress.finite):
            return f"the loss is not a number after {stop} iterations"
        if loss > DIVERGED * self.reference + 1e-12:
            return f"the loss grew to {loss:.4g} within {stop} iterations"
        return ""

    # One after the other: on a CPU, and the oracle anywhere.

    def _eagerly(self, start: int, stop: int) -> None:
        learner = self.learner
        for k in range(start, stop):
            inputs, target = self.data.rows(self.draws[k], self.device)
            set_clock(self.unit, self.data, self.draws[k])
            prediction = self.module(*inputs)
            share = prediction.shape[0] / self.batch  # of the batch that this process sees
            if isinstance(learner, _EagerLearner):
                loss = reconstruction_loss(prediction, target, self.p) * share
                self.losses[k] = loss.detach()
                total = loss + learner.penalty(k) / WORKERS.count
                gradients = torch.autograd.grad(total, learner.leaves)
            else:
                with torch.no_grad():
                    value, slope = reconstruction_slope(prediction.detach(), target, self.p)
                    self.losses[k] = value * share
                gradients = torch.autograd.grad(prediction, learner.leaves, slope.mul_(share))
                learner.schedule.counter.fill_(k)
            learner.update(WORKERS.summed(gradients), k)


def _mark(device: torch.device) -> torch.cuda.Event:
    """A point in what the GPU was given to do."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class _Stage:
    """On a GPU: a few iterations as one CUDA graph, played again and again, and its fixed buffers.

    A graph knows addresses, not tensors: everything it was recorded with has to live as long as it is played.

    Where some of the unit's rows wait in host memory, the next batch is fetched while the current one is computed with,
    from one graph to the next too.
    """

    def __init__(self, loop: _Loop):
        self.loop, data, device = loop, loop.data, loop.device
        self.counter = loop.learner.schedule.counter
        batch = loop.draws.shape[1]
        self.kernels = fused.enabled(device)
        self.near = [fused.rows_view(x) for x in (*data.inputs, data.target)]
        self.far: list[Tensor] = []
        self.drawn, self.reader = loop.draws, None
        if data.tail is not None:
            self.far = [fused.rows_view(x) for x in data.tail.room or (*data.tail.inputs, data.tail.target)]
            if data.tail.tail is not None:
                # A method of this object would keep it, and the unit's rows with it, until garbage is collected.
                self.reader = ReadAhead(data, loop.draws, mark=functools.partial(_mark, device))
                self.drawn = self.reader.draws.to(device)
        self.shapes = [tuple(x.shape[1:]) for x in data.inputs]
        floating = _dtype(loop.config)

        def buffers() -> list[Tensor]:
            types = [floating if x.is_floating_point() else x.dtype for x in self.near[:-1]]
            types.append(torch.float32 if self.far else floating)  # of the target, which only then is copied
            return [
                torch.empty(batch, x.shape[1], dtype=t, device=device) for x, t in zip(self.near, types, strict=True)
            ]

        self.buffers = [buffers() for _ in range(2 if self.far else 1)]
        self.fetching = side_stream(device, "fetching", first=True)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # |difference|^p summed over channels, mean over everything else: as reconstruction_loss
        self.scale = data.target.shape[1] / (loop.batch * self.near[-1].shape[1])

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *error: object) -> None:
        if self.reader is not None:
            torch.cuda.synchronize(self.loop.device)  # nothing reads the ring any more
            self.reader.close()

    @staticmethod
    def serves(data: UnitData, device: torch.device) -> bool:
        """Whether the GPU can reach all rows by itself, or in a ring to which they are read."""
        if any(x.device != device for x in (*data.inputs, data.target)):
            return False
        return data.tail is None or (data.tail.pinned and fused.enabled(device))

    def recorded(self, looks: list[int]) -> _Stage:
        """Record graphs that lead from each of these iterations to the next."""
        loop, device = self.loop, self.loop.device
        if self.reader is not None:
            self.reader.need(1)
        side = side_stream(device, "recording")
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            if self.far:
                self._fetch(self.buffers[0], 0)
            for _ in range(_GRAPH_WARMUP):
                self.iterate(1)
                self.counter.zero_()
        torch.cuda.current_stream(device).wait_stream(side)
        loop.learner.reset()
        loop.losses.zero_()
        give_back_unused(device)
        lengths = [stop - start for start, stop in itertools.pairwise([0, *looks])]
        counts = {_UNROLL for n in lengths if n >= _UNROLL} | {n % _UNROLL for n in lengths if n % _UNROLL}
        for count in counts:
            self.graphs[count] = torch.cuda.CUDAGraph()
            with recording(self.graphs[count], side):
                self.iterate(count)
        if self.far:
            self._fetch(self.buffers[0], 0)
        return self

    def advance(self, start: int, stop: int) -> None:
        """Play iterations from one number to another."""
        for first in range(start, stop, _UNROLL):
            count = min(_UNROLL, stop - first)
            if self.reader is not None:
                self.reader.need(first + count)  # the batch after the last one is fetched too
            self.graphs[count].replay()
            if self.reader is not None:
                self.reader.played(first + count)

    def iterate(self, count: int) -> None:
        """Some iterations; no value is read back by the host, so they can be captured.

        With rows on the host the first batch is in the first buffer before, and the one after the last is there then.
        """
        main = torch.cuda.current_stream(self.loop.device)
        for k in range(count):
            buffers = self.buffers[k % len(self.buffers)]
            following = self.buffers[(k + 1) % 2 if self.far and k + 1 < count else 0]
            meanwhile = self.far and following is not buffers
            if not self.far:
                self._fetch(buffers, 0)
            if meanwhile:
                self.fetching.wait_stream(main)
                with torch.cuda.stream(self.fetching):
                    self._fetch(following, 1)
            self._compute(buffers)
            if meanwhile:
                main.wait_stream(self.fetching)
            elif self.far:
                self._fetch(following, 1)
            self.counter.add_(1)

    def _fetch(self, buffers: list[Tensor], ahead: int) -> None:
        sources = len(self.near) if self.far else len(self.near) - 1
        for i in range(sources):
            if self.kernels:
                from qdiff import triton_kernels

                far = self.far[i] if self.far else None
                triton_kernels.gather_rows(self.near[i], self.drawn, self.counter, buffers[i], far=far, ahead=ahead)
            else:
                buffers[i].copy_(self.near[i].index_select(0, self._rows()))

    def _rows(self) -> Tensor:
        return self.loop.draws.index_select(0, self.counter).squeeze(0)

    def _compute(self, buffers: list[Tensor]) -> None:
        loop = self.loop
        inputs = [fused.from_rows(b, s) for b, s in zip(buffers[:-1], self.shapes, strict=True)]
        if loop.unit.clock.groups:
            set_clock(loop.unit, loop.data, self._rows())
        prediction = loop.module(*inputs)
        slope = self._slope(prediction.detach(), buffers[-1])
        gradients = torch.autograd.grad(prediction, loop.learner.leaves, slope)
        loop.learner.update(WORKERS.summed(gradients), 0)

    def _slope(self, prediction: Tensor, fetched: Tensor) -> Tensor:
        """Gradient of the loss in the prediction; the loss itself goes to its place in the loop's table."""
        loop = self.loop
        flat = fused.rows_view(prediction)
        if self.kernels:
            from qdiff import triton_kernels

            target, draws = (fetched, None) if self.far else (self.near[-1], loop.draws)
            slope = triton_kernels.loss_gradient(
                flat, target, draws, self.counter, loop.losses, scale=self.scale, p=loop.p
            )
        else:
            difference = flat.float() - self.near[-1].index_select(0, self._rows()).float()
            size = difference.abs()
            power = size.pow(loop.p - 1)
            loop.losses.index_copy_(0, self.counter, (power * size).sum().mul_(self.scale).view(1))
            slope = power.copysign_(difference).mul_(loop.p * self.scale).to(flat.dtype)
        return fused.from_rows(slope, tuple(prediction.shape[1:]))


# The oracle: autograd through the quantizers, torch.optim.Adam.


class _EagerLearner:
    """Parameters of the unit as autograd and ``torch.optim.Adam`` see them."""

    floor: float | None = None

    def __init__(self, leaves: list[Tensor], schedule: Schedule, rates: list[float]):
        self.leaves, self.schedule, self.rates = leaves, schedule, rates
        self.initial = [leaf.detach().clone() for leaf in leaves]
        for leaf in leaves:
            leaf.requires_grad_(True)
        self.optimizer = torch.optim.Adam(leaves, lr=1.0, betas=ADAM_BETAS, eps=ADAM_EPS)

    def penalty(self, k: int) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def update(self, gradients: tuple[Tensor, ...], k: int) -> None:
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient
        self.optimizer.param_groups[0]["lr"] = self.rates[k]
        self.optimizer.step()
        if self.floor is not None:
            with torch.no_grad():
                torch._foreach_clamp_min_(self.leaves, self.floor)

    def reset(self) -> None:
        raise NotImplementedError("the oracle runs once")

    @torch.no_grad()
    def finish(self, *, learned: bool) -> None:
        for leaf, value in zip(self.leaves, self.initial, strict=True):
            if not learned:
                leaf.copy_(value)
            leaf.requires_grad_(False)
            leaf.grad = None


class _EagerRounding(_EagerLearner):
    def __init__(self, layers: list[QuantModule], schedule: Schedule):
        self.layers = layers
        self.quantizers = [q for layer in layers for q, _ in layer.rounding_quantizers()]
        for layer in layers:
            layer.unbake()
        for quantizer in self.quantizers:
            quantizer.soft = True
        super().__init__([q.alpha for q in self.quantizers], schedule, _plain_rates(schedule))

    def penalty(self, k: int) -> Tensor | float:
        _, _, beta, weight = self.schedule.rows[k]
        return weight * sum(q.regularizer(beta) for q in self.quantizers) if weight else 0.0

    def progress(self, k: int) -> Progress:
        with torch.no_grad():
            return rounding_progress(self.leaves, *self.schedule.rows[k][2:])

    def finish(self, *, learned: bool) -> None:
        super().finish(learned=learned)
        for quantizer in self.quantizers:
            quantizer.soft = False


class _EagerSteps(_EagerLearner):
    floor = SMALLEST_DELTA

    def __init__(self, quantizers: list[UniformAffineQuantizer], schedule: Schedule):
        super().__init__([q.delta for q in quantizers], schedule, _plain_rates(schedule))

    def progress(self, k: int) -> Progress:
        steps = tuple(value for leaf in self.leaves for value in leaf.detach().flatten().tolist())
        return Progress(0.0, 0.0, 1.0, steps, all(math.isfinite(step) for step in steps))


def _plain_rates(schedule: Schedule) -> list[float]:
    """The learning rates without Adam's bias correction."""
    return [rate * (1 - ADAM_BETAS[0] ** (k + 1)) for k, (rate, *_) in enumerate(schedule.rows)]
