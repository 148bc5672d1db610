"""Fit what is systematic in the error of a quantized network's output (see :mod:`qdiff.output_scale`)."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.calibration_data import CalibrationSet
from qdiff.output_scale import OutputScale
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel, evaluating

FIT_CHUNK = 256  # samples at once


@torch.no_grad()
def fit_output_scale(
    qnn: QuantModel, data: CalibrationSet, *, mean: bool = False, chunk: int = FIT_CHUNK
) -> OutputScale:
    """The least-squares scale at each timestep of the set: s = Σ quantized · full / Σ full².

    With quantized weights only, and where the network's activations are quantized, with those as well. The network is
    left as it was; ``qnn.output_scale = fit_output_scale(qnn, data)`` corrects it.

    Args:
        qnn: calibrated, with its full-precision weights still there, on any device.
        mean: fit the mean error of every pixel beside the scale. It is shrunk by as much as it would come out too large
            by chance (James and Stein 1961), so that a map that the samples do not show is none.
        chunk: samples that pass through the network at once; limits memory, does not change the result beyond
            rounding.

    Raises:
        ValueError: the network no longer holds its full-precision weights, or its output does not resemble theirs.
    """
    _check_full_precision(qnn)
    device = next(qnn.parameters()).device
    timesteps, group = data.t.unique(return_inverse=True)  # ascending
    states = {"weights": (True, False)} | ({"activations": (True, True)} if qnn.config.quant_act else {})
    sums = {name: _Sums(len(timesteps), device) for name in states}
    before, qnn.output_scale = qnn.output_scale, None
    try:
        with evaluating(qnn):
            for rows in torch.arange(len(data)).split(chunk):
                inputs = tuple(x[rows].to(device) for x in data.inputs())
                index = group[rows].to(device)
                with qnn.quant_state(False, False):
                    full = qnn(*inputs)
                for name, state in states.items():
                    with qnn.quant_state(*state):
                        sums[name].add(index, full, qnn(*inputs), maps=mean)
    finally:
        qnn.output_scale = before
    fitted: dict[str, Tensor] = {}
    for name in states:
        scale, mean_error = sums[name].fit()
        if not bool((scale > 0).all() and scale.isfinite().all()):
            raise ValueError(
                f"no scale fits: with quantized {name} the output does not resemble the full-precision one"
            )
        fitted[name] = scale.float()
        if mean_error is not None:
            fitted[f"{name}_mean"] = mean_error.half().float()  # as a file will hold it: the same images from both
    return OutputScale(timesteps, **fitted).to(device)


class _Sums:
    """What the fit of every timestep needs, summed up in float64.

    Attributes:
        count: samples; full, cross, square: Σ full², Σ quantized · full, Σ quantized².
        full_map, quantized_map: sums pixel by pixel, K x C x H x W, where wanted.
    """

    def __init__(self, timesteps: int, device: torch.device):
        self.count, self.full, self.cross, self.square = torch.zeros(4, timesteps, dtype=torch.float64, device=device)
        self.full_map: Tensor | None = None
        self.quantized_map: Tensor | None = None

    def add(self, index: Tensor, full: Tensor, quantized: Tensor, *, maps: bool) -> None:
        """Some more samples; ``index`` says of which timesteps."""
        self.count.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        self.full.index_add_(0, index, _dot(full, full))
        self.cross.index_add_(0, index, _dot(quantized, full))
        self.square.index_add_(0, index, _dot(quantized, quantized))
        if maps:
            if self.full_map is None or self.quantized_map is None:
                zeros = torch.zeros(len(self.count), *full.shape[1:], dtype=torch.float64, device=full.device)
                self.full_map, self.quantized_map = zeros, zeros.clone()
            self.full_map.index_add_(0, index, full.double())
            self.quantized_map.index_add_(0, index, quantized.double())

    def fit(self) -> tuple[Tensor, Tensor | None]:
        """s, K, and m, K x C x H x W."""
        if self.full_map is None or self.quantized_map is None:
            return self.cross / self.full, None
        n = self.count
        full, quantized = (x / n.view(-1, 1, 1, 1) for x in (self.full_map, self.quantized_map))
        centred = (self.cross - n * _dot(quantized, full)) / (self.full - n * _dot(full, full))
        scale = torch.where(n > 1, centred, self.cross / self.full)  # one sample has no mean to speak of
        mean = quantized - scale.view(-1, 1, 1, 1) * full
        power = _dot(mean, mean)
        rest = self.square - 2 * scale * self.cross + scale.square() * self.full - n * power
        by_chance = rest / (n * (n - 1).clamp(min=1))
        kept = torch.where(n > 1, (1 - by_chance / power).clamp(min=0), 0.0).nan_to_num(0.0)
        return scale, kept.view(-1, 1, 1, 1) * mean


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product sample by sample, N x ... -> N, in float64."""
    return (a.double() * b.double()).flatten(1).sum(1)


def _check_full_precision(qnn: QuantModel) -> None:
    """A network from a packed file holds its quantized weights only, against which every scale would be 1."""

    def quantized(layer: QuantModule) -> Tensor:
        return layer.quantized_weight() if layer.baked_weight is None else layer.baked_weight

    if all(torch.equal(layer.weight, quantized(layer)) for layer in qnn.layers().values()):
        raise ValueError("the network holds no full-precision weights to compare with; load them beside its checkpoint")
