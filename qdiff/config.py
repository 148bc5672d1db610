"""What to quantize and how to calibrate, as frozen dataclasses that refuse impossible values when they are made."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

RangeMethod = Literal["max", "mse"]
TimedRanges = Literal["none", "input", "all"]

WEIGHT_BITS = tuple(range(2, 9))
ACT_BITS = (*range(2, 9), 16)
RANGE_METHODS = ("max", "mse")
CALI_PRECISIONS = ("fp32", "tf32", "bf16")
ENGINES = ("fast", "eager")
TIMED_RANGES = ("none", "input", "all")


@dataclass(frozen=True)
class QuantizerConfig:
    """One uniform quantizer. The field names are the dictionary keys of the published interface.

    Attributes:
        n_bits: bits of an integer, 2 to 16.
        symmetric: signed grid around zero; otherwise unsigned with a zero point.
        channel_wise: one range for each slice of the first axis; otherwise one for the whole tensor.
        scale_method: ``max`` takes the range from minimum and maximum, ``mse`` searches the shrunk range with the
            least L2.4 error.
        leaf_param: the step size may be learned later (activations).
        always_zero: zero point fixed at 0 on an unsigned grid (softmax maps of the latent models).
    """

    n_bits: int = 8
    symmetric: bool = False
    channel_wise: bool = False
    scale_method: RangeMethod = "max"
    leaf_param: bool = False
    always_zero: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.n_bits <= 16:
            raise ValueError(f"n_bits={self.n_bits}: a quantizer has 2 to 16 bits")
        if self.scale_method not in RANGE_METHODS:
            raise ValueError(f"scale_method={self.scale_method!r}: choose one of {', '.join(RANGE_METHODS)}")

    @classmethod
    def from_params(cls, params: QuantizerConfig | dict[str, Any]) -> QuantizerConfig:
        """Accept a config or the published dictionary; an unknown key is an error that lists the known ones."""
        if isinstance(params, QuantizerConfig):
            return params
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(params) - known):
            raise ValueError(f"unknown quantizer parameter {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**params)


@dataclass(frozen=True)
class QuantConfig:
    """How a UNet is quantized: all that is needed, beside its architecture, to give a checkpoint a meaning.

    Attributes:
        weight_bit, act_bit, sm_abit: bits of weights, of activations, of attention maps after softmax.
        quant_act: quantize activations too.
        a_sym: symmetric activation quantizers.
        split: quantize the halves of each up-path shortcut separately (Q-Diffusion, section 3.3).
        weight_range, act_range: how ranges are found before reconstruction.
        timed_ranges: which activation quantizers have a grid for each calibrated timestep in place of one for all:
            ``none``, the layers that see the network's ``input``, or ``all``.
        timesteps: the calibrated timesteps, ascending; where they are not known yet, empty. Only with
            ``timed_ranges``.
        split_input: the layers that see the network's input quantize its negative and its positive values as two
            tensors.
    """

    weight_bit: int = 8
    act_bit: int = 8
    quant_act: bool = False
    a_sym: bool = False
    split: bool = False
    sm_abit: int = 8
    weight_range: RangeMethod = "max"
    act_range: RangeMethod = "max"
    timed_ranges: TimedRanges = "none"
    timesteps: tuple[float, ...] = ()
    split_input: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("weight_bit", WEIGHT_BITS), ("act_bit", ACT_BITS), ("sm_abit", ACT_BITS)):
            value = getattr(self, name)
            if isinstance(value, (bool, float)) or value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, allowed))}")
        for name in ("quant_act", "a_sym", "split", "split_input"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: true or false")
        for name in ("weight_range", "act_range"):
            if getattr(self, name) not in RANGE_METHODS:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(RANGE_METHODS)}")
        if self.timed_ranges not in TIMED_RANGES:
            raise ValueError(f"timed_ranges={self.timed_ranges!r}: choose one of {', '.join(TIMED_RANGES)}")
        object.__setattr__(self, "timesteps", tuple(map(float, self.timesteps)))  # a list, as JSON has it
        if not all(map(math.isfinite, self.timesteps)):
            raise ValueError(f"timesteps={self.timesteps}: not all are numbers")
        if any(later <= earlier for earlier, later in itertools.pairwise(self.timesteps)):
            raise ValueError(f"timesteps={self.timesteps}: must ascend, without repetition")
        if self.timesteps and not self.timed:
            raise ValueError("timesteps without timed_ranges: nothing depends on them")

    @property
    def timed(self) -> bool:
        """Whether some activation grids depend on the timestep."""
        return self.timed_ranges != "none"

    @property
    def published(self) -> bool:
        """Whether the published checkpoint format, and releases that knew it alone, can say what this says."""
        return not (self.timed or self.split_input)

    def at_timesteps(self, t: Iterable[float]) -> QuantConfig:
        """The same with the distinct timesteps of a calibration set, where grids depend on them."""
        return dataclasses.replace(self, timesteps=tuple(sorted({float(v) for v in t}))) if self.timed else self

    @property
    def weight(self) -> QuantizerConfig:
        """Weights: per output channel, always asymmetric."""
        return QuantizerConfig(self.weight_bit, channel_wise=True, scale_method=self.weight_range)

    @property
    def act(self) -> QuantizerConfig:
        """Activations: one range for a whole tensor."""
        return QuantizerConfig(self.act_bit, symmetric=self.a_sym, scale_method=self.act_range, leaf_param=True)

    @property
    def attention_map(self) -> QuantizerConfig:
        """Softmax maps, in which nothing is negative: unsigned from zero, with ``a_sym`` too."""
        return QuantizerConfig(self.sm_abit, scale_method=self.act_range, leaf_param=True, always_zero=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values. Options of later releases are left out where they are not used, for earlier ones to read."""
        facts = dataclasses.asdict(self)
        if self.published:
            del facts["timed_ranges"], facts["timesteps"], facts["split_input"]
        return facts


@dataclass(frozen=True)
class CalibrationConfig:
    """The reconstruction of every unit.

    Attributes:
        iters, iters_a: optimisation steps of a unit's weights (AdaRound) and of its activation step sizes (LSQ).
        batch_size: samples an optimisation step.
        weight_lr: Adam's rate for the rounding variables; lr: for the step sizes, decayed along a cosine.
        p: exponent of the activation loss; the weight loss is quadratic.
        round_weight: weight of the rounding regulariser; beta_start, beta_end, warmup: its exponent falls linearly
            after ``warmup`` (a share of the iterations) during which it is off.
        range_samples: how many calibration samples set the first activation ranges, None for the whole set;
            range_order: which ones. Grids that depend on the timestep always use all samples of their timestep.
        noisy_weight: how many times as often samples of the noisiest timestep are drawn as those of the cleanest, in
            equal ratios from one timestep to the next; 1 draws all alike, as published.
        running_stat: average the ranges over the whole set first (momentum 0.95); rs_sm_only: softmax maps only.
        seed: of every draw; the same seed gives the same checkpoint.
        precision: of the reconstruction's arithmetic on a GPU; a CPU computes in fp32.
        engine: ``fast``, or ``eager``: all of it left to autograd in fp32, the oracle.
        deterministic: on a GPU, kernels that give the same bits every time, none chosen by a stopwatch.
        correct_scale: fit the output's scale error, timestep by timestep, when all else is done; correct_mean: and its
            mean error, pixel by pixel.
    """

    iters: int = 20_000
    iters_a: int = 5_000
    batch_size: int = 32
    weight_lr: float = 1e-3
    lr: float = 4e-4
    p: float = 2.4
    round_weight: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2
    range_samples: int | None = 64
    range_order: Literal["random", "first"] = "random"
    noisy_weight: float = 1.0
    running_stat: bool = False
    rs_sm_only: bool = False
    seed: int = 1234
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    engine: Literal["fast", "eager"] = "fast"
    deterministic: bool = False
    correct_scale: bool = False
    correct_mean: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "range_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name in ("iters", "iters_a"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("weight_lr", "lr", "p", "noisy_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: a share of the iterations, from 0 to below 1")
        for name, known in (("precision", CALI_PRECISIONS), ("engine", ENGINES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.rs_sm_only and not self.running_stat:
            raise ValueError("rs_sm_only needs running_stat")
        if self.correct_mean and not self.correct_scale:
            raise ValueError("correct_mean needs correct_scale")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
