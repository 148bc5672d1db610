"""What is hard about quantizing a model, measured on it: the observations of Q-Diffusion's section 3, and what came of
them in a quantized network.

- Ranges of activations differ from timestep to timestep (figure 4 of the paper).
- The inputs and weights of shortcuts over a concatenation have two modes (figure 5).
- Layers differ in how much the output suffers from quantizing one of them alone.
- The error of the noise estimate adds up along the trajectory (figure 3), by its mean more than by its spread.

All of it with a network of any family, its full-precision weights and its quantizers both there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration_data import CalibrationSet
from qdiff.evaluation.variants import run_batches
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel, evaluating

QUANTILES = (0.01, 0.5, 0.99)
VALUES_A_BATCH = 2**14  # of one layer's input that quantiles and histograms look at
VALUES_A_WEIGHT = 2**17

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Inputs:
    """What the network sees along full-precision trajectories.

    Attributes:
        x, t, context: M rows, the noisiest timestep first.
        timesteps: S distinct ones, descending.
        group: of each row, its timestep's place among these.
    """

    x: Tensor
    t: Tensor
    context: Tensor | None
    timesteps: Tensor
    group: Tensor

    @classmethod
    def of(cls, data: CalibrationSet, device: torch.device | str) -> Inputs:
        """A calibration set's samples on a device, ordered by timestep."""
        order = torch.argsort(data.t, descending=True, stable=True)
        x, t = data.x[order].to(device), data.t[order].to(device)
        context = None if data.context is None else data.context[order].to(device)
        ascending, group = t.unique(return_inverse=True)
        return cls(x, t, context, ascending.flip(0), len(ascending) - 1 - group)

    def rows(self, index: Tensor) -> Inputs:
        """Some of the rows, of all timesteps."""
        context = None if self.context is None else self.context[index]
        return Inputs(self.x[index], self.t[index], context, self.timesteps, self.group[index])

    def first(self, count: int) -> Inputs:
        """At most ``count`` rows of each timestep; of a conditional set as many of both kinds, as near as it goes."""
        chosen = []
        for step in range(len(self.timesteps)):
            own = (self.group == step).nonzero().flatten()
            places = torch.linspace(0, len(own) - 1, min(count, len(own)), device=own.device).round().long()
            chosen.append(own[places])
        return self.rows(torch.cat(chosen))

    def run(self, model: nn.Module, batch_size: int) -> Tensor:
        """The network's output for all rows."""
        return run_batches(model, self.x, self.t, batch_size, self.context)

    def mean_by_step(self, values: Tensor) -> Tensor:
        """M x ... -> S x ...: means over the rows of each timestep."""
        sums = values.new_zeros(len(self.timesteps), *values.shape[1:]).index_add_(0, self.group, values)
        counts = torch.bincount(self.group, minlength=len(self.timesteps))
        return sums / counts.view(-1, *(1,) * (values.dim() - 1))


@dataclass(frozen=True)
class Shortcut:
    """A layer over two features glued together.

    Attributes:
        decoder, encoder: values of its input from either side; decoder_weight, encoder_weight: of its weight.
    """

    path: str
    decoder: Tensor
    encoder: Tensor
    decoder_weight: Tensor
    encoder_weight: Tensor

    @property
    def unlikeness(self) -> float:
        """By which factor one side's values spread wider than the other's, 1 or more."""
        a, b = self.decoder.std().item(), self.encoder.std().item()
        return max(a, b) / max(min(a, b), 1e-12)


@dataclass(frozen=True)
class Activations:
    """What reaches the layers of the full-precision network.

    Attributes:
        timesteps: S, descending.
        ranges: by path, S x 5: minimum, 1 %, median, 99 %, maximum.
        shortcuts: those over a concatenation.
    """

    timesteps: Tensor
    ranges: dict[str, Tensor]
    shortcuts: list[Shortcut]

    def swing(self, path: str) -> float:
        """By which factor the layer's widest range is wider than its narrowest."""
        width = self.ranges[path][:, 4] - self.ranges[path][:, 0]
        return (width.max() / width.min().clamp(min=1e-12)).item()


@torch.no_grad()
def observe_activations(
    model: QuantModel, inputs: Inputs, cuts: Mapping[str, int], *, batch_size: int = 64
) -> Activations:
    """Pass the inputs through the full-precision network, timestep by timestep, and look at every layer's input.

    Args:
        cuts: ``adapter.shortcuts`` of the network before it was wrapped: path -> channels of the decoder's part.
    """
    layers = model.layers()
    ranges: dict[str, list[Tensor]] = {path: [] for path in layers}
    halves: dict[str, tuple[list[Tensor], list[Tensor]]] = {path: ([], []) for path in cuts}
    for step in range(len(inputs.timesteps)):
        seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {path: [] for path in layers}

        def look(path: str, x: Tensor, seen: dict[str, list[Any]] = seen) -> None:
            seen[path].append((x.amin(), x.amax(), thinned(x, VALUES_A_BATCH)))
            if path in cuts:
                for half, part in zip(halves[path], x.tensor_split([cuts[path]], dim=1), strict=True):
                    half.append(thinned(part, VALUES_A_BATCH // 4).cpu())

        with _watched(layers, look), model.quant_state(False, False):
            inputs.rows((inputs.group == step).nonzero().flatten()).run(model, batch_size)
        for path, parts in seen.items():
            lowest, highest, values = zip(*parts, strict=True)
            levels = torch.cat(values).float().quantile(torch.tensor(QUANTILES, device=inputs.x.device))
            ends = torch.stack(lowest).amin()[None].float(), torch.stack(highest).amax()[None].float()
            ranges[path].append(torch.cat([ends[0], levels, ends[1]]).cpu())
    shortcuts = []
    for path, cut in cuts.items():
        weights = (thinned(part, VALUES_A_WEIGHT).cpu() for part in layers[path].weight.tensor_split([cut], dim=1))
        shortcuts.append(Shortcut(path, *(torch.cat(half) for half in halves[path]), *weights))
    return Activations(inputs.timesteps.cpu(), {path: torch.stack(rows) for path, rows in ranges.items()}, shortcuts)


def thinned(x: Tensor, most: int) -> Tensor:
    """Values of a tensor at even distances, ``most`` or up to twice as few; all where there are not more. Flat."""
    flat = x.detach().flatten()
    return flat[:: -(-len(flat) // most)].clone()


@contextmanager
def _watched(layers: Mapping[str, QuantModule], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: look(path, args[0])

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Sensitivity:
    """What the output loses when one layer alone is quantized.

    Attributes:
        path: of the layer, or of the attention block whose products are meant.
        kind: ``layer`` or ``products``.
        weight, activation: relative output error, mean of the timesteps; None where there is nothing to quantize.
    """

    path: str
    kind: str
    weight: float | None
    activation: float | None


@torch.no_grad()
def layer_sensitivities(
    model: QuantModel, inputs: Inputs, *, batch_size: int = 64, on_layer: Callable[[str], object] | None = None
) -> list[Sensitivity]:
    """Quantize one layer at a time, first its weight, then its input; and the products of one attention block.

    Args:
        model: with grids.
        on_layer: called with each path when it is done.
    """
    with model.quant_state(False, False):
        full = inputs.run(model, batch_size)

        def error(module: nn.Module, flag: str) -> float:
            setattr(module, flag, True)
            try:
                return relative_error(inputs, inputs.run(model, batch_size), full).mean().item()
            finally:
                setattr(module, flag, False)

        found = []
        for path, module in quantized_one_at_a_time(model):
            if isinstance(module, QuantModule):
                activation = error(module, "use_act_quant") if model.config.quant_act else None
                found.append(Sensitivity(path, "layer", error(module, "use_weight_quant"), activation))
            else:
                found.append(Sensitivity(path, "products", None, error(module, "use_act_quant")))
            if on_layer is not None:
                on_layer(path)
    return found


def quantized_one_at_a_time(model: QuantModel) -> list[tuple[str, nn.Module]]:
    """What :func:`layer_sensitivities` goes through, by path: layers, and blocks for their attention products."""
    return [
        (path, module)
        for path, module in model.model.named_modules()
        if isinstance(module, QuantModule)
        or (model.config.quant_act and isinstance(module, BaseQuantBlock) and module.attention_quantizers())
    ]


def relative_error(inputs: Inputs, output: Tensor, full: Tensor) -> Tensor:
    """S: squared error of each timestep's outputs as a share of their squares."""
    error, size = ((x.float().square().flatten(1).mean(1)) for x in (output - full, full))
    return inputs.mean_by_step(error) / inputs.mean_by_step(size)


@dataclass(frozen=True)
class Errors:
    """A difference between two networks' results, step by step, as shares of the squared full-precision result.

    Attributes:
        timesteps: S, descending.
        bias: of the mean difference, pixel by pixel; what so few samples would show by chance is subtracted, so it can
            be slightly negative.
        variance: of what differs from sample to sample.
        scale: by which factor the result is too large (least squares).
    """

    timesteps: Tensor
    bias: Tensor
    variance: Tensor
    scale: Tensor

    @property
    def total(self) -> Tensor:
        return self.bias + self.variance


def split_error(difference: Tensor, full: Tensor, timesteps: Tensor, group: Tensor) -> Errors:
    """Mean and spread of an error over the samples of each step.

    Args:
        difference, full: M x C x H x W; group: of each row, its place among the S ``timesteps``.

    Raises:
        ValueError: a step has a single sample, which has no spread.
    """
    columns = []
    for step in range(len(timesteps)):
        error, own = difference[group == step].double(), full[group == step].double()
        if len(error) < 2:
            raise ValueError("telling mean and spread apart takes two samples of each timestep at least")
        variance, size = error.var(0).mean(), own.square().mean()
        bias = error.mean(0).square().mean() - variance / len(error)
        scale = 1 + (error * own).sum() / own.square().sum()
        columns.append(torch.stack([bias / size, variance / size, scale]))
    bias, variance, scale = torch.stack(columns, 1).float().cpu()
    return Errors(timesteps.cpu(), bias, variance, scale)


def quantized_states(model: QuantModel) -> dict[str, tuple[bool, bool]]:
    """Name -> weights quantized, activations quantized."""
    states = {"weights": (True, False)}
    return states | ({"weights and activations": (True, True)} if model.config.quant_act else {})


def estimate_errors(model: QuantModel, inputs: Inputs, *, batch_size: int = 64) -> dict[str, Errors]:
    """How the quantized network errs on what the full-precision one sees."""
    with model.quant_state(False, False):
        full = inputs.run(model, batch_size)
    errors = {}
    for name, state in quantized_states(model).items():
        with model.quant_state(*state):
            difference = inputs.run(model, batch_size) - full
        errors[name] = split_error(difference, full, inputs.timesteps, inputs.group)
    return errors


def trajectory_errors(model: QuantModel, sample: Run, indices: Sequence[int]) -> dict[str, Errors]:
    """How far quantized trajectories are from the full-precision one of the same noise, at every step.

    Args:
        sample: a sampler: (noise model, which samples, on_step) -> samples.
    """

    def trajectory(state: tuple[bool, bool]) -> tuple[list[float], Tensor]:
        times: list[float] = []
        points: list[Tensor] = []

        def record(_: int, t: float, x: Tensor) -> None:
            times.append(float(t))
            points.append(x.detach().clone())

        with evaluating(model), model.quant_state(*state):
            points.append(sample(model, indices, record))
        return [*times, 0.0], torch.stack(points)  # the result itself ends the trajectory

    times, full = trajectory((False, False))
    group = torch.arange(len(times)).repeat_interleave(len(indices))
    errors = {}
    for name, state in quantized_states(model).items():
        difference = trajectory(state)[1] - full
        errors[name] = split_error(difference.flatten(0, 1), full.flatten(0, 1), torch.tensor(times), group)
    return errors


@dataclass(frozen=True)
class UnitLoss:
    """A unit's loss before and after learning, as its run recorded it."""

    unit: str
    phase: str
    before: float
    after: float


_UNIT_LINE = re.compile(r"(\S+), (weights|activations): loss (\S+) -> ([^\s;]+)")


def read_unit_losses(log: Path) -> list[UnitLoss]:
    """From a run's ``run.log``; of a unit that stands there more than once, the last.

    Raises:
        OSError: the file cannot be read.
    """
    found: dict[tuple[str, str], UnitLoss] = {}
    for unit, phase, *losses in _UNIT_LINE.findall(log.read_text(encoding="utf-8", errors="replace")):
        try:
            found[unit, phase] = UnitLoss(unit, phase, *map(float, losses))
        except ValueError:  # a line of another kind
            continue
    return list(found.values())
