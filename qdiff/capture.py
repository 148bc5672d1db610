"""A calibration set on its way through the network: what reaches each unit, and what should leave it.

The set moves through the forward pass stage by stage. What has reached the next stage is kept, so that a whole
calibration costs a few forward passes instead of one for every unit. A unit's input is taken from the network as
quantized so far, its target from full precision (Q-Diffusion, section 3.2; BRECQ, Li et al. 2021).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
        inputs: each positional argument of the unit's module, N x ...
        target: its full-precision output, N x ...
    """

    inputs: tuple[Tensor, ...]
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, index: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """A batch: the given rows of inputs and target."""
        return tuple(x[index] for x in self.inputs), self.target[index]

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
        qnn: the network; its quantization state while :meth:`observe` and :meth:`advance` run is the caller's choice.
        inputs: the network's inputs, each N x ... (noisy images, timesteps, context).
        chunk: samples run at once.
        device: where the network is; storage: where features wait.
    """

    def __init__(
        self, qnn: QuantModel, inputs: tuple[Tensor, ...], *, chunk: int, device: torch.device, storage: torch.device
    ):
        self.unet, self.device, self.storage = qnn.model, device, storage
        self._flows = [
            self.unet.begin(*(x.to(storage) for x in part))
            for part in zip(*(x.split(chunk) for x in inputs), strict=True)
        ]

    @torch.no_grad()
    def observe(self, stage: Any, units: list[Unit]) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        """Run one stage without moving on, and return every unit's inputs and output, by path."""
        seen: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = {unit.path: [] for unit in units}
        with _recording(units, seen, self.storage):
            for flow in self._flows:
                self.unet.advance(stage, flow.map(lambda x: x.to(self.device)))
        return {path: _join(records) for path, records in seen.items()}

    @torch.no_grad()
    def advance(self, stage: Any) -> None:
        """Move the whole set through one stage."""
        for index, flow in enumerate(self._flows):
            moved = flow.map(lambda x: x.to(self.device))
            self.unet.advance(stage, moved)
            self._flows[index] = moved.map(lambda x: x.to(self.storage))


@contextlib.contextmanager
def _recording(units: list[Unit], seen: dict[str, list[Any]], storage: torch.device) -> Iterator[None]:
    def hook(path: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path].append((tuple(x.to(storage) for x in args), output.to(storage)))

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
    """

    def __init__(self, qnn: QuantModel, inputs: tuple[Tensor, ...], *, act_quant: bool, chunk: int):
        self.qnn, self.act_quant = qnn, act_quant
        device = next(qnn.parameters()).device
        storage = choose_storage(qnn, inputs, device)
        make = lambda: Frontier(qnn, inputs, chunk=chunk, device=device, storage=storage)  # noqa: E731
        self._quantized, self._full = make(), make()

    def stages(self) -> Iterator[Any]:
        """Every stage with units in it, in order; the capture moves on when the next one is asked for."""
        for stage in self.qnn.model.stages():
            if self.qnn.units_of(stage):
                yield stage
            with self.qnn.quant_state(True, self.act_quant):
                self._quantized.advance(stage)
            with self.qnn.quant_state(False, False):
                self._full.advance(stage)

    def targets(self, stage: Any) -> dict[str, Tensor]:
        """Full-precision outputs of all units of a stage, in one sweep."""
        with self.qnn.quant_state(False, False):
            seen = self._full.observe(stage, self.qnn.units_of(stage))
        return {path: output for path, (_, output) in seen.items()}

    def inputs(self, unit: Unit) -> tuple[Tensor, ...]:
        """What reaches a unit from the network as quantized so far, the units before it in its stage included."""
        with self.qnn.quant_state(True, self.act_quant):
            return self._quantized.observe(unit.stage, [unit])[unit.path][0]


def choose_storage(qnn: QuantModel, inputs: tuple[Tensor, ...], device: torch.device) -> torch.device:
    """The network's own device where the captured features fit into its free memory, else the host."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    wanted = len(inputs[0]) * feature_bytes(qnn, tuple(x[:1].to(device) for x in inputs))
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
