"""The whole calibration, the same for every family: weights, activation ranges, running statistics, step sizes.

1. Weights: unit by unit in network order, rounding is learned (or, in ``linear`` mode, left at nearest).
2. Activation ranges: one forward pass in network order, with calibrated weights and every earlier quantizer on.
3. If asked for: moving averages of those ranges over the whole set.
4. Step sizes: unit by unit in network order (``qdiff`` mode).
5. If asked for: the output's scale error, timestep by timestep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qdiff.act_ranges import find_act_ranges, range_rows, update_running_ranges
from qdiff.calibration_data import CalibrationSet
from qdiff.capture import PairedCapture, UnitData
from qdiff.config import CalibrationConfig
from qdiff.quant_model import QuantModel, evaluating
from qdiff.reconstruction import Phase, UnitReport, reconstruct_activations, reconstruct_weights
from qdiff.scale_correction import fit_output_scale

log = logging.getLogger(__name__)

Mode = Literal["qdiff", "linear"]
CAPTURE_CHUNK = 256  # samples that pass through the network at once while features are collected


@dataclass(frozen=True)
class UnitProgress:
    """One finished unit, number ``index`` (from 0) of ``total`` over both phases."""

    index: int
    total: int
    report: UnitReport


def calibrate(
    qnn: QuantModel,
    data: CalibrationSet | None,
    config: CalibrationConfig,
    *,
    mode: Mode = "qdiff",
    weights_done: bool = False,
    on_unit: Callable[[UnitProgress], None] | None = None,
) -> list[UnitReport]:
    """Calibrate a wrapped UNet in place, on the device it is on; afterwards it is quantized as its config says.

    Args:
        data: the selected calibration samples; may be None where nothing needs them (``linear``, weights only).
        mode: ``qdiff`` reconstructs; ``linear`` only sets ranges and rounds to nearest.
        weights_done: weights were loaded from a calibrated checkpoint; calibrate activations only.
        on_unit: called after each unit.

    Returns:
        one report for each unit and phase.
    """
    quant_act = qnn.config.quant_act
    if data is None and (quant_act or mode == "qdiff" or config.correct_scale):
        raise ValueError("calibration samples are needed to learn rounding, to set activation ranges or to fit scales")
    phases: list[Phase] = []
    if mode == "qdiff":
        phases = ([] if weights_done else ["weights"]) + (["activations"] if quant_act else [])
    progress = _Progress(len(qnn.units()) * len(phases), on_unit)
    with evaluating(qnn):
        if not weights_done:
            qnn.find_weight_grids()
            if mode == "qdiff":
                _reconstruct(qnn, data, config, "weights", progress)
        qnn.bake()
        if quant_act:
            inputs = _on_device(data, qnn)
            find_act_ranges(qnn, inputs, range_rows(len(data.x), config))
            if config.running_stat:
                update_running_ranges(qnn, inputs, config)
            if mode == "qdiff":
                _reconstruct(qnn, data, config, "activations", progress)
    qnn.set_quant_state(True, quant_act)
    qnn.output_scale = fit_output_scale(qnn, data) if config.correct_scale else None
    return progress.reports


class _Progress:
    def __init__(self, total: int, on_unit: Callable[[UnitProgress], None] | None):
        self.total, self.on_unit, self.reports = total, on_unit, []

    def add(self, report: UnitReport) -> None:
        self.reports.append(report)
        log.info(
            "%s, %s: loss %.4g -> %.4g (%.1f s)",
            report.name,
            report.phase,
            report.loss_before,
            report.loss_after,
            report.seconds,
        )
        if self.on_unit is not None:
            self.on_unit(UnitProgress(len(self.reports) - 1, self.total, report))


def _reconstruct(
    qnn: QuantModel, data: CalibrationSet, config: CalibrationConfig, phase: Phase, progress: _Progress
) -> None:
    """One phase over all units, in the order in which the network runs them."""
    step = reconstruct_weights if phase == "weights" else reconstruct_activations
    capture = PairedCapture(
        qnn, network_inputs(data), act_quant=phase == "activations", chunk=min(CAPTURE_CHUNK, len(data.x))
    )
    device, number = next(qnn.parameters()).device, 0
    for stage in capture.stages():
        targets = capture.targets(stage)
        for unit in qnn.units_of(stage):
            unit_data = UnitData(capture.inputs(unit), targets.pop(unit.path)).near(device)
            progress.add(step(unit, unit_data, config, seed=_unit_seed(config.seed, phase, number)))
            number += 1


def _unit_seed(seed: int, phase: Phase, number: int) -> int:
    """Every unit draws from a stream of its own: its result does not depend on how many draws came before."""
    return (seed * 1_000_003 + (number * 2 + (phase == "activations"))) % 2**63


def network_inputs(data: CalibrationSet) -> tuple[Tensor, ...]:
    """The UNet's positional arguments: images, timesteps and, where there is one, context."""
    return data.inputs()


def _on_device(data: CalibrationSet, qnn: QuantModel) -> tuple[Tensor, ...]:
    device = next(qnn.parameters()).device
    return tuple(x.to(device) for x in network_inputs(data))
