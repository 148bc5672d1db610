"""The whole calibration, the same for every family: weights, activation ranges, running statistics, step sizes.

1. Weights: unit by unit in network order, rounding is learned (or, in ``linear`` mode, left at nearest).
2. Activation ranges: one forward pass in network order, with calibrated weights and every earlier quantizer on.
3. If asked for: moving averages of those ranges over the whole set.
4. Step sizes: unit by unit in network order (``qdiff`` mode).
5. If asked for: the output's scale error and mean error, timestep by timestep.

With a :class:`~qdiff.progress.CalibrationProgress` every finished unit is on the disk before the next one starts, and
units that are there already are not learned again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qdiff.act_ranges import RANGE_CHUNK, find_act_ranges, range_rows, update_running_ranges
from qdiff.block_io import block_io
from qdiff.calibration_data import CalibrationSet
from qdiff.capture import PairedCapture, UnitData
from qdiff.config import CalibrationConfig
from qdiff.memory import MemoryBudget, gpu_limit, samples_at_once, sets_rounding_aside
from qdiff.places import Collector
from qdiff.primitives import reconstruction_loss
from qdiff.progress import CalibrationProgress, FinishedUnit
from qdiff.quant_model import QuantModel, Unit, evaluating
from qdiff.quantizers import AdaRoundQuantizer
from qdiff.reconstruction import (
    FIXED_BATCH,
    Phase,
    UnitReport,
    arithmetic,
    capturing,
    reconstruct_activations,
    reconstruct_weights,
)
from qdiff.scale_correction import FIT_CHUNK, fit_output_scale
from qdiff.workers import WORKERS

log = logging.getLogger(__name__)

Mode = Literal["qdiff", "linear"]
CAPTURE_CHUNK = 256  # samples that pass through the network at once while features are collected


@dataclass(frozen=True)
class UnitProgress:
    """One finished unit, number ``index`` (from 0) of ``total`` over both phases.

    Attributes:
        relative_loss, elapsed: see :class:`~qdiff.progress.FinishedUnit`.
        restored: it was learned by an earlier process.
    """

    index: int
    total: int
    report: UnitReport
    relative_loss: float = 0.0
    elapsed: float = 0.0
    restored: bool = False


def calibrate(
    qnn: QuantModel,
    data: CalibrationSet | None,
    config: CalibrationConfig,
    *,
    mode: Mode = "qdiff",
    weights_done: bool = False,
    on_unit: Callable[[UnitProgress], None] | None = None,
    progress: CalibrationProgress | None = None,
    budget: MemoryBudget | None = None,
) -> list[UnitReport]:
    """Calibrate a wrapped UNet in place, on the device it is on; afterwards it is quantized as its config says.

    Args:
        data: the selected calibration samples; may be None where nothing needs them (``linear``, weights only).
        mode: ``qdiff`` reconstructs; ``linear`` only sets ranges and rounds to nearest.
        weights_done: weights were loaded from a calibrated checkpoint; calibrate activations only.
        on_unit: called after each unit, restored ones included.
        progress: where finished units are kept, and found; opened for this calibration. None keeps them nowhere. Of
            several processes (:mod:`qdiff.workers`) the first one writes.
        budget: memory that captured data may take; it decides where they wait, not what comes out.

    Returns:
        one report for each unit and phase.

    Raises:
        OSError: a finished unit could not be written.
    """
    quant_act = qnn.config.quant_act
    if data is None and (quant_act or mode == "qdiff" or config.correct_scale):
        raise ValueError("calibration samples are needed to learn rounding, to set activation ranges or to fit scales")
    phases = learning_phases(qnn, mode=mode, weights_done=weights_done)
    tally = _Tally(len(qnn.units()) * len(phases), on_unit)
    device = next(qnn.parameters()).device
    budget = budget or MemoryBudget()
    with (
        evaluating(qnn),
        arithmetic(capturing(config), device),
        gpu_limit(budget, device),
        contextlib.closing(budget.pool),
        contextlib.closing(block_io()),
    ):
        if not weights_done:
            qnn.find_weight_grids()
            if mode == "qdiff":
                assert data is not None
                _reconstruct(qnn, data, config, "weights", tally, progress, budget)
        qnn.bake()
        if quant_act:
            assert data is not None
            _set_act_ranges(qnn, data, config, progress)
            if mode == "qdiff":
                _reconstruct(qnn, data, config, "activations", tally, progress, budget)
    _move_rounding(qnn.units(), device)
    qnn.set_quant_state(True, quant_act)
    qnn.output_scale = None
    if config.correct_scale:
        assert data is not None
        chunk = _samples_at_once(qnn, data, FIT_CHUNK)
        qnn.output_scale = fit_output_scale(qnn, data, mean=config.correct_mean, chunk=chunk)
    return tally.reports


def learning_phases(qnn: QuantModel, *, mode: Mode, weights_done: bool) -> list[Phase]:
    """The phases in which :func:`calibrate` goes through the units."""
    if mode != "qdiff":
        return []
    phases: list[Phase] = [] if weights_done else ["weights"]
    return [*phases, "activations"] if qnn.config.quant_act else phases


class _Tally:
    """The finished units, counted and announced."""

    def __init__(self, total: int, on_unit: Callable[[UnitProgress], None] | None):
        self.total, self.on_unit = total, on_unit
        self.reports: list[UnitReport] = []

    def add(self, finished: FinishedUnit, *, restored: bool) -> None:
        self.reports.append(finished.report)
        log.log(logging.DEBUG if restored else logging.INFO, "%s", describe(finished.report))
        if self.on_unit is not None:
            index = len(self.reports) - 1
            self.on_unit(UnitProgress(index, self.total, **vars(finished), restored=restored))


def describe(report: UnitReport) -> str:
    """What became of a unit, in a line."""
    line = f"{report.name}, {report.phase}: loss {report.loss_before:.4g} -> {report.loss_after:.4g}"
    peaks = [("GPU", report.peak_gpu_bytes), ("host", report.peak_host_bytes)]
    memory = " and ".join(f"{size / 2**30:.2f} GiB of {kind} memory" for kind, size in peaks if size)
    line += f" ({report.seconds:.1f} s" + (f", at most {memory})" if memory else ")")
    if report.outcome != "learned":
        line += f"; {report.outcome}" + (f": {report.note}" if report.note else "")
    return line


def _reconstruct(
    qnn: QuantModel,
    data: CalibrationSet,
    config: CalibrationConfig,
    phase: Phase,
    tally: _Tally,
    progress: CalibrationProgress | None,
    budget: MemoryBudget,
) -> None:
    """One phase over all units, in the order in which the network runs them."""
    units = qnn.units()
    # All of them first: units that are there need no data, and the capture sees their learned values where it passes.
    restored = {} if progress is None else {u.path: progress.restore(u, phase, i) for i, u in enumerate(units)}
    wanted = [unit for unit in units if restored.get(unit.path) is None]
    learned = _learn(qnn, data, config, phase, wanted, budget)
    for number, unit in enumerate(units):
        there = restored.get(unit.path)
        finished = there or next(learned)
        if there is None and progress is not None and WORKERS.rank == 0:
            progress.keep(unit, phase, number, finished)
        if phase == "weights" and sets_rounding_aside(budget):
            _move_rounding([unit], torch.device("cpu"))  # its weight is baked
        tally.add(finished, restored=there is not None)


def _move_rounding(units: Sequence[Unit], device: torch.device) -> None:
    for layer in itertools.chain.from_iterable(unit.layers() for unit in units):
        for quantizer, _ in layer.weight_quantizers():
            if isinstance(quantizer, AdaRoundQuantizer):
                quantizer.alpha.data = quantizer.alpha.data.to(device)


def _learn(
    qnn: QuantModel,
    data: CalibrationSet,
    config: CalibrationConfig,
    phase: Phase,
    wanted: list[Unit],
    budget: MemoryBudget,
) -> Iterator[FinishedUnit]:
    """Reconstruct the wanted units, in network order, while the calibration set moves through all of them."""
    if not wanted:
        return
    started = time.perf_counter()
    step, p = (reconstruct_weights, 2.0) if phase == "weights" else (reconstruct_activations, config.p)
    capture = PairedCapture(
        qnn,
        data.inputs(),
        act_quant=phase == "activations",
        chunk=min(CAPTURE_CHUNK, len(data.x)),
        compact=config.precision != "fp32" and next(qnn.parameters()).device.type == "cuda",
        budget=budget,
        wanted={unit.path for unit in wanted},
        batch=config.batch_size,
        deterministic=config.deterministic,
    )
    numbers = {unit.path: number for number, unit in enumerate(qnn.units())}
    for stage in capture.stages():
        targets: dict[str, Collector] = {}
        for unit in (unit for unit in wanted if unit.stage == stage):
            unit_data = _unit_data(capture, unit, targets)
            report = step(unit, unit_data, config, seed=_unit_seed(config.seed, phase, numbers[unit.path]))
            share = _relative_loss(report, unit_data, p, config.batch_size)
            del unit_data  # before the next one's is collected
            now = time.perf_counter()
            yield FinishedUnit(report, share, now - started)
            started = now


def _unit_data(capture: PairedCapture, unit: Unit, targets: dict[str, Collector]) -> UnitData:
    """What a unit learns from.

    Args:
        targets: of the units of its stage, as far as they were not used yet; filled here when the first is wanted.
    """
    handed_on = capture.handed_on(unit, targets)
    if handed_on is not None:
        return handed_on
    if unit.path not in targets:
        targets.update(capture.targets_from(unit))
    return capture.data(unit, targets)


def _relative_loss(report: UnitReport, data: UnitData, p: float, batch_size: int) -> float:
    """The remaining loss as a share of what an output of zeros would lose, on the samples of the report.

    Args:
        batch_size: samples at once.
    """
    nothing = 0.0
    index = torch.linspace(0, len(data) - 1, min(FIXED_BATCH, len(data))).long()
    for part in index.split(batch_size):
        _, target = data.rows(part, data.target.device)
        nothing += reconstruction_loss(torch.zeros_like(target), target, p).item() * len(part) / len(index)
    return report.loss_after / nothing if nothing else 0.0


def _set_act_ranges(
    qnn: QuantModel, data: CalibrationSet, config: CalibrationConfig, progress: CalibrationProgress | None
) -> None:
    """The activation ranges before anything is learned: those that are there, or new ones."""
    if progress is not None and progress.restore_ranges(qnn):
        return
    rows: Tensor | None = range_rows(len(data.x), config)
    if not qnn.timed_quantizers():  # others look at no more than these
        inputs, rows = _on_device(tuple(x[rows] for x in data.inputs()), qnn), None
    else:
        inputs = _on_device(data.inputs(), qnn)
    find_act_ranges(qnn, inputs, rows, chunk=_samples_at_once(qnn, data, RANGE_CHUNK))
    if config.running_stat:
        update_running_ranges(qnn, data.inputs(), config)
    if progress is not None and WORKERS.rank == 0:
        progress.keep_ranges(qnn)


def _unit_seed(seed: int, phase: Phase, number: int) -> int:
    """Every unit draws from a stream of its own: its result does not depend on how many draws came before."""
    return (seed * 1_000_003 + (number * 2 + (phase == "activations"))) % 2**63


def _on_device(inputs: tuple[Tensor, ...], qnn: QuantModel) -> tuple[Tensor, ...]:
    device = next(qnn.parameters()).device
    return tuple(x.to(device) for x in inputs)


def _samples_at_once(qnn: QuantModel, data: CalibrationSet, most: int) -> int:
    return samples_at_once(qnn, _on_device(tuple(x[:1] for x in data.inputs()), qnn), most=most)
