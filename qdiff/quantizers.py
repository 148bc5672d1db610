"""Quantizers: the state of a grid (step size, zero point, rounding) around the functions of :mod:`qdiff.primitives`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from qdiff import primitives
from qdiff.clock import Clock
from qdiff.config import QuantizerConfig, RangeMethod

RANGE_MOMENTUM = 0.95
SEARCH_VALUES = 2**17  # of a whole set's values that an error search looks at
_MOST_SHUFFLED = 2**24  # values of a sample
SMALLEST_ALPHA = 1e-6  # still negative in float16, in which rounding variables may be stored


class UniformAffineQuantizer(nn.Module):
    """Rounds a tensor to the nearest point of a uniform grid.

    A grid that was never set sets itself from the first tensor that passes (the published behaviour); everything
    else about it is declared here, so that it moves, saves and loads like any other state.

    Args:
        n_bits, symmetric, channel_wise, scale_method, leaf_param, always_zero: see
            :class:`qdiff.config.QuantizerConfig`.
        grid_shape: shape of the step size where it is known in advance: that of a weight with all but the first axis 1.

    Attributes:
        averages: each tensor that passes moves the range first, see :meth:`update_range`.
    """

    delta: Tensor
    zero_point: Tensor
    averages: bool = False

    def __init__(
        self,
        n_bits: int = 8,
        symmetric: bool = False,
        channel_wise: bool = False,
        scale_method: RangeMethod = "max",
        leaf_param: bool = False,
        always_zero: bool = False,
        *,
        grid_shape: tuple[int, ...] = (),
    ):
        super().__init__()
        config = QuantizerConfig(n_bits, symmetric, channel_wise, scale_method, leaf_param, always_zero)
        self.config = config
        self.bounds = primitives.integer_bounds(n_bits, symmetric)
        delta = torch.ones(grid_shape)
        if leaf_param:
            self.delta = nn.Parameter(delta, requires_grad=False)  # learned in the second phase, by request
        else:
            self.register_buffer("delta", delta)
        self.register_buffer("zero_point", torch.zeros(grid_shape))
        self.ready = False
        self._shifted: tuple[Any, Any] = self.bounds
        self._range: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_config(cls, config: QuantizerConfig, grid_shape: tuple[int, ...] = ()) -> UniformAffineQuantizer:
        c = config
        return cls(
            c.n_bits, c.symmetric, c.channel_wise, c.scale_method, c.leaf_param, c.always_zero, grid_shape=grid_shape
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.averages:
            self.update_range(x)
        if not self.ready:
            self.find_grid(x)
        return primitives.fake_quantize(x, self.delta, *self._shifted)

    def grids_of(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Step size, lowest and highest whole number, 0 standing for 0: one for all rows, or one for each."""
        lo, hi = (b if isinstance(b, Tensor) else torch.full_like(self.delta, b) for b in self._shifted)
        return self.delta, lo, hi

    @torch.no_grad()
    def find_grid(self, x: Tensor) -> None:
        """Set step size and zero point from a tensor, by the configured method."""
        c = self.config
        if c.scale_method == "mse":
            grid = primitives.search_grid(
                x, c.n_bits, symmetric=c.symmetric, channel_wise=c.channel_wise, always_zero=c.always_zero
            )
        else:
            lowest, highest = primitives.observed_range(x, c.channel_wise)
            grid = primitives.range_to_grid(lowest, highest, c.n_bits, symmetric=c.symmetric, always_zero=c.always_zero)
        self.set_grid(*grid)
        self._range = None  # averages start anew

    @torch.no_grad()
    def update_range(self, x: Tensor) -> None:
        """Move the range a twentieth of the way to that of ``x``; the first call starts from it.

        Minimum and maximum are averaged separately, then turned into a min-max grid. Nothing is read back from a GPU
        meanwhile; :meth:`settle` when all was seen.
        """
        self.follow_range(*primitives.observed_range(x, self.config.channel_wise))

    @torch.no_grad()
    def follow_range(self, lowest: Tensor, highest: Tensor) -> None:
        """:meth:`update_range` to that of a tensor that was never whole."""
        seen = lowest, highest
        if self._range is None:
            self._range = (seen[0].clone(), seen[1].clone())
        else:
            for average, latest in zip(self._range, seen, strict=True):  # in place: a CUDA graph knows where they lie
                average.mul_(RANGE_MOMENTUM).add_(latest * (1 - RANGE_MOMENTUM))
        lowest, highest = self._range
        c = self.config
        self._take_over(
            *primitives.range_to_grid(lowest, highest, c.n_bits, symmetric=c.symmetric, always_zero=c.always_zero)
        )
        self._mark_ready(read_back=False)

    def settle(self) -> None:
        """Read a grid's bounds back, where they are plain numbers: with these it is used faster.

        The grid moves out of the memory of whatever it was averaged in.
        """
        self.set_grid(self.delta, self.zero_point)

    @torch.no_grad()
    def set_grid(self, delta: Tensor, zero_point: Tensor) -> None:
        """Take over a grid. The zero point must hold whole numbers; shapes may differ from the declared ones."""
        self._take_over(delta, zero_point)
        self._mark_ready()

    def _take_over(self, delta: Tensor, zero_point: Tensor) -> None:
        self.delta.data = delta.detach().to(self.delta).clone()
        self.zero_point = zero_point.detach().to(self.zero_point).clone()

    def _mark_ready(self, *, read_back: bool = True) -> None:
        self.ready = True
        lo, hi = self.bounds
        if (
            self.zero_point.dim() == 0 and read_back
        ):  # plain numbers clamp faster than tensors, and need no read-back in a forward
            zero = 0.0 if self.zero_point.is_meta else self.zero_point.item()
            self._shifted = (lo - zero, hi - zero)
        else:
            self._shifted = (lo - self.zero_point, hi - self.zero_point)

    def _apply(self, fn: Any, recurse: bool = True) -> UniformAffineQuantizer:
        super()._apply(fn, recurse)
        if self.ready:
            self._mark_ready()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("delta", "zero_point"):
            own, stored = getattr(self, name), state_dict.get(prefix + name)
            if stored is None or stored.shape == own.shape:
                continue
            if self.config.channel_wise and own.dim() == 0:  # a grid without a declared shape takes the one it finds
                own.data = torch.empty_like(stored).to(own)
            elif not self.config.channel_wise and stored.numel() == own.numel() == 1:  # a number, stored with an axis
                own.data = own.data.reshape(())
                state_dict[prefix + name] = stored.reshape(())
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "delta" in state_dict:
            self._mark_ready()

    def extra_repr(self) -> str:
        c = self.config
        grid = "symmetric" if c.symmetric else "z = 0" if c.always_zero else "asymmetric"
        return f"{c.n_bits} bits, {grid}, {c.scale_method}{', per channel' if c.channel_wise else ''}"


class TimedQuantizer(UniformAffineQuantizer):
    """An activation quantizer with a grid of its own for each group of timesteps: still b-bit integers, a tensor at a
    time, one table lookup a step.

    Row n of its input uses the grid of sample n's timestep, which the clock knows. A batch may mix timesteps.

    Args:
        config: of one grid; not channel-wise.
        clock: shared with the network, which sets it to each batch's timesteps.

    Attributes:
        delta, zero_point: K values, one for each group of the clock.
    """

    def __init__(self, config: QuantizerConfig, clock: Clock):
        if config.channel_wise:
            raise ValueError("channel_wise=True: a time-dependent quantizer has one range for a whole tensor")
        if not clock.groups:
            raise ValueError("the clock has no timesteps to have grids for")
        c = config
        grid_shape = (clock.groups,)
        super().__init__(
            c.n_bits, c.symmetric, c.channel_wise, c.scale_method, c.leaf_param, c.always_zero, grid_shape=grid_shape
        )
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.find_grid(x)
        shape = (-1,) + (1,) * (x.dim() - 1)
        delta, lo, hi = (values.view(shape) for values in self.grids_of(len(x)))
        return primitives.fake_quantize(x, delta, lo, hi).to(x.dtype)  # a grid a row would widen half precision

    def grids_of(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        index = self.clock.rows(rows)
        lo, hi = (table.index_select(0, index) for table in self._shifted)
        return self._chosen_delta(index), lo, hi

    def _chosen_delta(self, index: Tensor) -> Tensor:
        """The step size of each row. Gradients are added up in a fixed order; on a GPU those of an index are not."""
        if not (torch.is_grad_enabled() and self.delta.requires_grad):
            return self.delta.index_select(0, index)
        groups = torch.arange(len(self.delta), device=index.device)
        return torch.where(index[:, None] == groups, self.delta, 0.0).sum(1)

    @torch.no_grad()
    def set_grid(self, delta: Tensor, zero_point: Tensor) -> None:
        """Take over K grids, or one for every group."""
        shape = (self.clock.groups,)
        super().set_grid(delta.detach().expand(shape), zero_point.detach().expand(shape))

    @torch.no_grad()
    def set_group(self, group: int, delta: Tensor, zero_point: Tensor) -> None:
        """Take over the grid of one group, each 0-dim."""
        self.delta.data[group] = delta
        self.zero_point[group] = zero_point
        self._mark_ready()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.clock.groups} groups of timesteps"


@functools.lru_cache(maxsize=32)
def _some_places(width: int, wanted: int) -> Tensor:
    """Random ones, since a stride would meet edges only. Of a large map's values a few may be drawn twice: to shuffle
    them all takes many seconds.
    """
    generator = torch.Generator().manual_seed(0)
    if width > _MOST_SHUFFLED:
        return torch.randint(width, (wanted,), generator=generator)
    return torch.randperm(width, generator=generator)[:wanted]


class RangeObserver:
    """What reaches a quantizer in pieces, as much of it as its grid is found from.

    Minimum and maximum are exact. An error search sees about ``SEARCH_VALUES`` values, at the same places in every
    sample, so that the grid does not depend on how the samples were divided into pieces.

    Args:
        config: of the quantizer.
        samples: how many samples there will be in all.
    """

    def __init__(self, config: QuantizerConfig, samples: int):
        self.config, self.samples = config, samples
        self._range: tuple[Tensor, Tensor] | None = None
        self._values: list[Tensor] = []
        self._complete = True

    @torch.no_grad()
    def add(self, x: Tensor, samples: int) -> None:
        """Args:
        x: what reached the quantizer, from ``samples`` samples; axis 0 is theirs.
        """
        lowest, highest = primitives.observed_range(x, channel_wise=False)
        if self._range is not None:
            lowest, highest = torch.minimum(lowest, self._range[0]), torch.maximum(highest, self._range[1])
        self._range = lowest, highest
        if self.config.scale_method == "mse":
            self._values.append(self._some_of(x.detach().reshape(samples, -1)).flatten().float())

    def _some_of(self, rows: Tensor) -> Tensor:
        width, wanted = rows.shape[1], -(-SEARCH_VALUES // self.samples)
        if width <= wanted:
            return rows
        self._complete = False
        return rows[:, _some_places(width, wanted).to(rows.device)]

    def grid(self) -> tuple[Tensor, Tensor]:
        """``(delta, zero_point)``, each 0-dim."""
        c = self.config
        if self._range is None:
            raise RuntimeError("nothing was observed")
        if c.scale_method == "max":
            return primitives.range_to_grid(*self._range, c.n_bits, symmetric=c.symmetric, always_zero=c.always_zero)
        values = torch.cat(self._values if self._complete else [*self._values, torch.stack(self._range).float()])
        return primitives.search_grid(
            values, c.n_bits, symmetric=c.symmetric, channel_wise=False, always_zero=c.always_zero
        )


class AdaRoundQuantizer(nn.Module):
    """A weight's quantizer whose every value is rounded down or up as learned (Nagel et al. 2020).

    Takes over the grid of a :class:`UniformAffineQuantizer` and adds α, one rounding variable a weight: soft
    h(α) in [0, 1] while learning, hard (α >= 0) afterwards.

    Args:
        quantizer: the grid; must be set already.
        weight: the full-precision weight, from which α starts so that the soft value equals the weight.
        round_mode: accepted for the published signature; only ``learned_hard_sigmoid`` exists.
    """

    delta: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: UniformAffineQuantizer, weight: Tensor, round_mode: str = "learned_hard_sigmoid"):
        super().__init__()
        if round_mode != "learned_hard_sigmoid":
            raise ValueError(f"round_mode={round_mode!r}: only learned_hard_sigmoid is supported")
        self.config, self.bounds = quantizer.config, quantizer.bounds
        self.register_buffer("delta", quantizer.delta.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.detach().clone())
        self.alpha = nn.Parameter(self._initial_alpha(weight), requires_grad=False)
        self.soft = False

    def _initial_alpha(self, weight: Tensor) -> Tensor:
        if weight.is_meta:
            return torch.empty_like(weight)
        scaled = weight.detach() / self.delta
        alpha = primitives.rounding_variable(scaled - scaled.floor())
        # Hard rounding starts at the nearest, ties included: round() takes them to even, alpha = 0 would mean up.
        up = scaled.round() > scaled.floor()
        return torch.where(up, alpha.clamp(min=0), alpha.clamp(max=-SMALLEST_ALPHA))

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight, soft or hard."""
        up = primitives.rectified_sigmoid(self.alpha) if self.soft else (self.alpha >= 0).to(weight.dtype)
        lo, hi = self.bounds
        integers = (weight / self.delta).floor() + up
        return integers.clamp(lo - self.zero_point, hi - self.zero_point) * self.delta

    def regularizer(self, beta: Tensor | float) -> Tensor:
        return primitives.rounding_regularizer(self.alpha, beta)

    def extra_repr(self) -> str:
        return f"{self.config.n_bits} bits, learned rounding"


WeightQuantizer = UniformAffineQuantizer | AdaRoundQuantizer

MAX_ZERO_POINT = 2**31  # what the packed format can say


@torch.no_grad()
def check_grid(delta: Tensor, zero_point: Tensor) -> None:
    """Whether stored step sizes and zero points are those of a grid.

    Raises:
        ValueError: a step size that is not a positive number, a zero point that is no whole one, or unlike shapes.
    """
    if delta.numel() != zero_point.numel():
        raise ValueError(f"{delta.numel()} step sizes and {zero_point.numel()} zero points")
    if not delta.is_floating_point() or zero_point.is_complex() or zero_point.dtype == torch.bool:
        raise ValueError(f"step sizes are {delta.dtype}, zero points {zero_point.dtype}; expected numbers")
    steps = delta.float()
    if not bool((steps.isfinite() & (steps > 0)).all()):
        raise ValueError(f"the step size {_first(steps, ~(steps.isfinite() & (steps > 0)))} is not a positive number")
    zeros = zero_point.double()
    whole = zeros.isfinite() & (zeros == zeros.round()) & (zeros.abs() < MAX_ZERO_POINT)
    if not bool(whole.all()):
        raise ValueError(f"the zero point {_first(zeros, ~whole)} is no whole number of 32 bits")


def _first(values: Tensor, chosen: Tensor) -> float:
    return values[chosen][0].item() if values.dim() else values.item()


@torch.no_grad()
def integer_codes(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """The integers that stand for a quantized weight, in [lo, hi], as uint8 (weights have at most 8 bits).

    For an :class:`AdaRoundQuantizer` those of hard rounding.
    """
    if isinstance(quantizer, AdaRoundQuantizer):
        return rounded_codes(weight, quantizer.alpha, quantizer.delta, quantizer.zero_point, quantizer.bounds)
    lo, hi = quantizer.bounds
    return ((weight / quantizer.delta).round() + quantizer.zero_point).clamp(lo, hi).to(torch.uint8)


def rounded_codes(weight: Tensor, alpha: Tensor, delta: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> Tensor:
    """The integers of a weight on a grid, rounded up where its rounding variable ``alpha`` is not negative."""
    return ((weight / delta).floor() + (alpha >= 0) + zero_point).clamp(*bounds).to(torch.uint8)


def dequantize_codes(codes: Tensor, delta: Tensor, zero_point: Tensor) -> Tensor:
    """Integers back to weights: (x_int - z) · δ, bit for bit what the quantizer itself computes."""
    values = codes.to(delta.dtype, copy=True)
    return values.sub_(zero_point.to(delta.dtype)).mul_(delta)
