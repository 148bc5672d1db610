"""Fit the scale error of a quantized network's output on a calibration set (see :mod:`qdiff.output_scale`)."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.calibration_data import CalibrationSet
from qdiff.output_scale import OutputScale
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel, evaluating

FIT_CHUNK = 256  # samples at once


@torch.no_grad()
def fit_output_scale(qnn: QuantModel, data: CalibrationSet, *, chunk: int = FIT_CHUNK) -> OutputScale:
    """The least-squares scale at each timestep of the set: s = Σ quantized · full / Σ full².

    With quantized weights only, and where the network's activations are quantized, with those as well. The network is
    left as it was; ``qnn.output_scale = fit_output_scale(qnn, data)`` corrects it.

    Args:
        qnn: calibrated, with its full-precision weights still there, on any device.
        chunk: samples that pass through the network at once; limits memory, does not change the result beyond
            rounding.

    Raises:
        ValueError: the network no longer holds its full-precision weights, or its output does not resemble theirs.
    """
    _check_full_precision(qnn)
    device = next(qnn.parameters()).device
    timesteps, group = data.t.unique(return_inverse=True)  # ascending
    states = {"weights": (True, False)} | ({"activations": (True, True)} if qnn.config.quant_act else {})
    products = {name: torch.zeros(len(timesteps), dtype=torch.float64, device=device) for name in ("full", *states)}
    before, qnn.output_scale = qnn.output_scale, None
    try:
        with evaluating(qnn):
            for rows in torch.arange(len(data)).split(chunk):
                inputs = tuple(x[rows].to(device) for x in data.inputs())
                index = group[rows].to(device)
                with qnn.quant_state(False, False):
                    full = qnn(*inputs)
                products["full"].index_add_(0, index, _dot(full, full))
                for name, state in states.items():
                    with qnn.quant_state(*state):
                        products[name].index_add_(0, index, _dot(qnn(*inputs), full))
    finally:
        qnn.output_scale = before
    scales = {name: (products[name] / products["full"]).float() for name in states}
    for name, scale in scales.items():
        if not bool((scale > 0).all() and scale.isfinite().all()):
            raise ValueError(
                f"no scale fits: with quantized {name} the output does not resemble the full-precision one"
            )
    return OutputScale(timesteps, scales["weights"], scales.get("activations")).to(device)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product sample by sample, N x ... -> N, in float64."""
    return (a.double() * b.double()).flatten(1).sum(1)


def _check_full_precision(qnn: QuantModel) -> None:
    """A network from a packed file holds its quantized weights only, against which every scale would be 1."""

    def quantized(layer: QuantModule) -> Tensor:
        return layer.quantized_weight() if layer.baked_weight is None else layer.baked_weight

    if all(torch.equal(layer.weight, quantized(layer)) for layer in qnn.layers().values()):
        raise ValueError("the network holds no full-precision weights to compare with; load them beside its checkpoint")
