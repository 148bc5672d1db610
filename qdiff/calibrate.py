"""The whole calibration, the same for every family: weights, activation ranges, running statistics, step sizes.

1. Weights: unit by unit in network order, rounding is learned (or, in ``linear`` mode, left at nearest).
2. Activation ranges: one forward pass in network order, with calibrated weights and every earlier quantizer on.
3. If asked for: moving averages of those ranges over the whole set.
4. Step sizes: unit by unit in network order (``qdiff`` mode).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qdiff.calibration_data import CalibrationSet
from qdiff.capture import PairedCapture, UnitData
from qdiff.config import CalibrationConfig
from qdiff.quant_model import QuantModel, evaluating
from qdiff.quantizers import UniformAffineQuantizer
from qdiff.reconstruction import (
    Phase,
    UnitReport,
    arithmetic,
    capturing,
    reconstruct_activations,
    reconstruct_weights,
)

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
    if data is None and (quant_act or mode == "qdiff"):
        raise ValueError("calibration samples are needed to learn rounding and to set activation ranges")
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
            find_act_ranges(qnn, tuple(x[range_rows(len(data.x), config)] for x in inputs))
            if config.running_stat:
                update_running_ranges(qnn, inputs, config)
            if mode == "qdiff":
                _reconstruct(qnn, data, config, "activations", progress)
    qnn.set_quant_state(True, quant_act)
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
    device, number = next(qnn.parameters()).device, 0
    with arithmetic(capturing(config), device):
        capture = PairedCapture(
            qnn,
            network_inputs(data),
            act_quant=phase == "activations",
            chunk=min(CAPTURE_CHUNK, len(data.x)),
            compact=device.type == "cuda" and config.precision != "fp32",
        )
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
    return (data.x, data.t) if data.context is None else (data.x, data.t, data.context)


def _on_device(data: CalibrationSet, qnn: QuantModel) -> tuple[Tensor, ...]:
    device = next(qnn.parameters()).device
    return tuple(x.to(device) for x in network_inputs(data))


def range_rows(samples: int, config: CalibrationConfig) -> Tensor:
    """Which samples set the first activation ranges."""
    count = min(config.range_samples, samples)
    if config.range_order == "first":
        return torch.arange(count)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(config.seed))[:count]


@torch.no_grad()
def find_act_ranges(qnn: QuantModel, inputs: tuple[Tensor, ...]) -> None:
    """Set every activation range from the first tensor its quantizer sees, all earlier quantizers already at work."""
    quantizers = qnn.act_quantizers()
    for quantizer in quantizers.values():
        quantizer.ready = False
    with qnn.quant_state(True, True):
        qnn(*inputs)
    unseen = [path for path, quantizer in quantizers.items() if not quantizer.ready]
    if unseen:
        raise RuntimeError(f"no activation reached the quantizer {unseen[0]} ({len(unseen)} in all)")


@torch.no_grad()
def update_running_ranges(qnn: QuantModel, inputs: tuple[Tensor, ...], config: CalibrationConfig) -> None:
    """Average ranges over the whole set, batch by batch, every activation quantizer or those after softmax only."""
    chosen = [
        quantizer
        for path, quantizer in qnn.act_quantizers().items()
        if not config.rs_sm_only or path.endswith("act_quantizer_w")
    ]
    handles = [quantizer.register_forward_pre_hook(_update_range) for quantizer in chosen]
    try:
        with qnn.quant_state(True, True):
            for batch in zip(*(x.split(config.batch_size) for x in inputs), strict=True):
                qnn(*batch)
    finally:
        for handle in handles:
            handle.remove()


def _update_range(quantizer: UniformAffineQuantizer, args: tuple[Tensor, ...]) -> None:
    quantizer.update_range(args[0])
