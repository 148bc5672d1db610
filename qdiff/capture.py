"""A calibration set on its way through the network: what reaches each unit, and what should leave it.

The set moves through the forward pass stage by stage. What has reached the next stage is kept, so that a whole
calibration costs a few forward passes instead of one for every unit. A unit's input is taken from the network as
quantized so far, its target from full precision (Q-Diffusion, section 3.2; BRECQ, Li et al. 2021).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.quant_model import QuantModel, Unit

MEMORY_SHARE = 0.6  # of the free GPU memory may hold captured features; the rest is for working


@dataclass
class UnitData:
    """One unit's calibration set.

    Attributes:
        inputs: each positional argument of the unit's module, N x ...; half precision where it is only stored.
        target: its full-precision output, N x ...
    """

    inputs: tuple[Tensor, ...]
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, index: Tensor, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
        """A batch, the given rows of inputs and target, in float32 on ``device``."""

        def batch(x: Tensor) -> Tensor:
            rows = x.index_select(0, index.to(x.device)).to(device)
            return rows.float() if rows.is_floating_point() else rows

        return tuple(batch(x) for x in self.inputs), batch(self.target)

    def near(self, device: torch.device) -> UnitData:
        """The same on ``device`` where it fits into the free memory of a GPU; otherwise where it is."""
        tensors = (*self.inputs, self.target)
        if device.type != "cuda" or all(x.device == device for x in tensors):
            return self
        free, _ = torch.cuda.mem_get_info(device)
        if sum(x.numel() * x.element_size() for x in tensors) > MEMORY_SHARE * free:
            return self
        return UnitData(tuple(x.to(device) for x in self.inputs), self.target.to(device))


class Frontier:
    """The calibration set as it stands before one stage of one network, in chunks.

    Args:
        qnn: the network; its quantization state while a stage runs is the caller's choice.
        inputs: the network's inputs, each N x ... (noisy images, timesteps, context).
        chunk: samples run at once.
        device: where the network is; storage: where features wait.
        compact: features wait in half precision (see :func:`packed`).
    """

    def __init__(
        self,
        qnn: QuantModel,
        inputs: tuple[Tensor, ...],
        *,
        chunk: int,
        device: torch.device,
        storage: torch.device,
        compact: bool = False,
    ):
        self.unet, self.device, self.storage, self.compact = qnn.model, device, storage, compact
        self._flows = [
            self._stored(self.unet.begin(*part)) for part in zip(*(x.split(chunk) for x in inputs), strict=True)
        ]

    @torch.no_grad()
    def observe(self, stage: Any, units: list[Unit]) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        """Run one stage without moving on, and return every unit's inputs and output, by path."""
        return self._run(stage, units, keep=False)

    @torch.no_grad()
    def observe_and_advance(self, stage: Any, units: list[Unit]) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        """The same, and move the whole set through the stage."""
        return self._run(stage, units, keep=True)

    @torch.no_grad()
    def inputs(self, unit: Unit) -> tuple[Tensor, ...]:
        """What reaches a unit; the stage is run no further than that."""
        seen: list[tuple[Tensor, ...]] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(tuple(self._keep(x) for x in args))
            raise _Reached

        handle = unit.module.register_forward_pre_hook(stop)
        try:
            for flow in self._flows:
                with contextlib.suppress(_Reached):
                    self.unet.advance(unit.stage, self._ready(flow, unit.stage))
        finally:
            handle.remove()
        if len(seen) != len(self._flows):
            raise RuntimeError(f"{unit.path} is not reached in its stage")
        return tuple(torch.cat(column) for column in zip(*seen, strict=True))

    @torch.no_grad()
    def advance(self, stage: Any) -> None:
        """Move the whole set through one stage."""
        self._run(stage, [], keep=True)

    def _run(self, stage: Any, units: list[Unit], *, keep: bool) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        seen: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = {unit.path: [] for unit in units}
        with _recording(units, seen, self._keep):
            for index, flow in enumerate(self._flows):
                moved = self._ready(flow, stage)
                self.unet.advance(stage, moved)
                if keep:
                    self._flows[index] = self._stored(moved)
        return {path: _join(records) for path, records in seen.items()}

    def _ready(self, flow: Any, stage: Any) -> Any:
        """What the stage takes, on the device in full precision; the rest of the flow stays as it waits."""
        return flow.for_stage(stage, lambda x: unpacked(x.to(self.device)))

    def _stored(self, flow: Any) -> Any:
        kept: dict[int, Tensor] = {}  # a feature that leads on and waits for the way up too is stored once
        return flow.map(lambda x: kept.setdefault(id(x), self._keep(x)))

    def _keep(self, x: Tensor) -> Tensor:
        return (packed(x) if self.compact else x).to(self.storage)


class _Reached(Exception):  # noqa: N818 - nothing went wrong
    """The unit in question is about to run."""


def packed(x: Tensor) -> Tensor:
    """A feature in half precision, 11 bits of mantissa, where its values fit.

    Rounding to it costs 2e-8 of a feature's power, 4-bit weights cost 1e-3. Timesteps and other vectors stay as they
    are.
    """
    if x.dtype != torch.float32 or x.dim() < 2:
        return x
    half = x.half()
    return half if bool(torch.isfinite(half).all()) else x


def unpacked(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


@contextlib.contextmanager
def _recording(units: list[Unit], seen: dict[str, list[Any]], keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(path: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path].append((tuple(keep(x) for x in args), keep(output)))

        return record

    handles = [unit.module.register_forward_hook(hook(unit.path)) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _join(records: list[tuple[tuple[Tensor, ...], Tensor]]) -> tuple[tuple[Tensor, ...], Tensor]:
    inputs = tuple(torch.cat(column) for column in zip(*(args for args, _ in records), strict=True))
    return inputs, torch.cat([output for _, output in records])


class PairedCapture:
    """Both networks' frontiers, quantized and full-precision, moving together.

    Args:
        act_quant: activations of the quantized network are quantized too (second phase).
        compact: features wait in half precision.
    """

    def __init__(
        self, qnn: QuantModel, inputs: tuple[Tensor, ...], *, act_quant: bool, chunk: int, compact: bool = False
    ):
        self.qnn, self.act_quant = qnn, act_quant
        device = next(qnn.parameters()).device
        if device.type == "cuda":  # the layout that tensor cores read; every layer keeps it
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        storage = choose_storage(qnn, inputs, device, compact=compact)
        options = {"chunk": chunk, "device": device, "storage": storage, "compact": compact}
        self._quantized, self._full = (Frontier(qnn, inputs, **options) for _ in range(2))
        self._full_is_ahead = False

    def stages(self) -> Iterator[Any]:
        """Every stage with units in it, in order; the capture moves on when the next one is asked for."""
        for stage in self.qnn.model.stages():
            if self.qnn.units_of(stage):
                yield stage
            with self.qnn.quant_state(True, self.act_quant):
                self._quantized.advance(stage)
            if not self._full_is_ahead:
                with self.qnn.quant_state(False, False):
                    self._full.advance(stage)
            self._full_is_ahead = False

    def targets(self, stage: Any) -> dict[str, Tensor]:
        """Full-precision outputs of all units of a stage, in one sweep. Can be asked for once."""
        if self._full_is_ahead:
            raise RuntimeError(f"the targets of {stage.path} were handed out already")
        with self.qnn.quant_state(False, False):
            seen = self._full.observe_and_advance(stage, self.qnn.units_of(stage))
        self._full_is_ahead = True
        return {path: output for path, (_, output) in seen.items()}

    def inputs(self, unit: Unit) -> tuple[Tensor, ...]:
        """What reaches a unit from the network as quantized so far, the units before it in its stage included."""
        with self.qnn.quant_state(True, self.act_quant):
            return self._quantized.inputs(unit)


def choose_storage(
    qnn: QuantModel, inputs: tuple[Tensor, ...], device: torch.device, *, compact: bool = False
) -> torch.device:
    """The network's own device where the captured features fit into its free memory, else the host."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    wanted = len(inputs[0]) * feature_bytes(qnn, tuple(x[:1].to(device) for x in inputs))
    wanted //= 2 if compact else 1
    return device if wanted < MEMORY_SHARE * free else torch.device("cpu")


@torch.no_grad()
def feature_bytes(qnn: QuantModel, sample: tuple[Tensor, ...]) -> int:
    """Bytes that both frontiers and one unit's data take at their largest, for one sample."""
    sizes: list[int] = []

    def count(x: Tensor) -> Tensor:
        sizes[-1] += x.numel() * x.element_size()
        return x

    flow = qnn.model.begin(*sample)
    with qnn.quant_state(False, False):
        for stage in qnn.model.stages():
            sizes.append(0)
            flow.map(count)
            qnn.model.advance(stage, flow)
    return 3 * max(sizes)


def observe_unit(
    qnn: QuantModel, unit: Unit, inputs: tuple[Tensor, ...], batch_size: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """One unit's inputs and output over a whole set, with the network in the quantization state it is in."""
    device = next(qnn.parameters()).device
    frontier = Frontier(qnn, inputs, chunk=batch_size, device=device, storage=device)
    for stage in qnn.model.stages():
        if stage == unit.stage:
            return frontier.observe(stage, [unit])[unit.path]
        frontier.advance(stage)
    raise ValueError(f"{unit.path}: its stage is not one of this network's")
