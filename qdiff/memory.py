"""Where a calibration's captured data wait: on the GPU, in host memory, in files.

Two things are large. *Features*: the calibration set as it stands before the next stage, of both networks. *A unit's
data*: its inputs and targets, of which every iteration takes a batch. A :class:`MemoryPlan` places the features as
near as a budget allows: all of them on the GPU or on the host; or on the host as far as there is room, and the rest
in files or computed anew from the set whenever it is wanted, whichever is quicker. Of each unit's data as many rows
stay on the GPU as fit; the rest lie in pinned host memory (:mod:`qdiff.pinned`), which the GPU reads by itself while it
computes, and what does not fit there in files, from which they are read ahead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qdiff.attention import LARGEST_MAP, PART_OF_MAP, as_if_learning
from qdiff.block_io import STAGING_BYTES, Piece, block_io
from qdiff.pinned import ALIGNMENT, Arena
from qdiff.places import RING_STRETCHES, STRETCH, Collector, Place, Scratch, Shelf, compactable, wait_for_closed
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_model import QuantModel

GPU_SHARE, HOST_SHARE = 0.85, 0.6  # of what is free, where no budget is given
FILE_SHARE = 0.8  # of what is free: finished units and checkpoints go to the same disk
GIB = 2**30
_WORKING_COPIES = 4  # of a chunk's largest tensor, in float32, that a forward pass holds at once
_MAPS_AT_ONCE = 4 * GIB  # what maps may take while ranges are searched
_LEARNING_COPIES = 6  # of a batch's attention map, that learning holds at once
_LEARNING_TENSORS = 16  # of the size of a unit's inputs and output, in float32, that learning holds of a sample
_SMALLEST_CHUNK = 4
_PASSING_SHARE = 4  # a pass takes no more than that part of the room, where more samples at once gain nothing
_LOADED_LATER = 2**30  # of host memory: libraries and kernels that a calibration loads as it goes
_ARENA_SLACK = 1.08
_MAPPED_AT_ONCE = 20 * 2**20  # bytes of a page of GPU memory where it is mapped page by page
_PROBE_BYTES, _PROBE_SECONDS = 2**30, 1.0
_CACHE_SHARE = 0.3  # of what is free beside the budget: what files may take to be still in the system's memory
_LONG = 1e9  # seconds

log = logging.getLogger(__name__)


class BudgetError(ValueError):
    """A budget too small for the calibration; the message names the flag to raise."""


class PlacesPool:
    """Pinned memory and files, which one phase of a calibration leaves to the next, and how fast files are.

    Pinning takes seconds for every ten gigabytes, and so does giving a file back; to time a disk that is writing what
    the phase before left takes as long.
    """

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._scratch: Scratch | None = None
        self._rates: dict[Path | None, FileRates] = {}

    @property
    def pinned_bytes(self) -> int:
        """What is pinned."""
        return 0 if self._arena is None else self._arena.size

    @property
    def file_bytes(self) -> int:
        """What the disk has room for, in files that are there."""
        return 0 if self._scratch is None else self._scratch.size

    def arena(self, size: int) -> Arena | None:
        """Pinned memory, none of it in use; None for none.

        Raises:
            RuntimeError: the system does not give so much.
        """
        if not size:
            return None
        held = self._arena
        if held is None or held.size < size - ALIGNMENT or held.free_bytes < held.size:
            self._arena = held = None  # before there is another one
            self._arena = Arena(size)
        return self._arena

    def scratch(self, folder: Path | None, size: int) -> Scratch:
        """Files with room for so many bytes, as far as the disk has room; they grow where more are needed.

        Reserving room all at once takes less time than piece by piece, while the disk is busy with what was written.
        """
        if self._scratch is None or self._scratch.folder != folder:
            self._scratch = Scratch(folder)
        try:
            self._scratch.reserve(size)
        except OSError as error:
            log.debug("%s: no room for %.1f GiB at once", error, size / GIB)
        return self._scratch

    def rates(self, folder: Path | None) -> FileRates:
        """How fast files are in a folder, as it was when this was asked first."""
        if folder not in self._rates:
            self._rates[folder] = file_rates(folder)
        return self._rates[folder]

    def close(self) -> None:
        """Give both back, as soon as nothing lies there any more."""
        self._arena = self._scratch = None
        self._rates.clear()


@dataclass(frozen=True)
class MemoryBudget:
    """What a calibration may take.

    Attributes:
        gpu_bytes: for everything that PyTorch puts on the GPU, what is there already included; None: most of what is
            free.
        host_bytes: for the whole process; None: most of what is free, for captured data.
        folder: for files of captured data, which are removed with the calibration; None: the system's temporary one.
        pool: places that one phase leaves to the next.
    """

    gpu_bytes: int | None = None
    host_bytes: int | None = None
    folder: Path | None = None
    pool: PlacesPool = field(default_factory=PlacesPool, compare=False, repr=False)


def sets_rounding_aside(budget: MemoryBudget | None) -> bool:
    """Whether the rounding variables of finished units wait on the host: each takes as much as its weight."""
    return budget is not None and budget.gpu_bytes is not None


@dataclass(frozen=True)
class Boundary:
    """What waits before one stage of a network, in bytes a sample.

    Attributes:
        trunk: the feature map, and the embedding that goes along with it.
        skips: each open U connection, the oldest first; one that is the feature map itself takes nothing more.
        units: paths of the units in the stage.
        origin: of the connection that the stage joins: the number of the first stage before which it waits.
        chained: each unit's data come out of those of the one before.
    """

    trunk: int
    skips: tuple[int, ...] = ()
    units: tuple[str, ...] = ()
    origin: int | None = None
    chained: bool = False


@dataclass(frozen=True)
class Sizes:
    """Bytes a sample.

    Attributes:
        features: of one network's features between two stages, at their largest.
        units: of each unit's inputs and output as they wait, by path; in a chained stage those of its largest one.
        boundaries: one before each stage.
        widest: of any module, what goes in and comes out, in float32.
        attention_map: of the largest one, of all heads, in float32; heads: how many these are.
        passing_map: of the largest one that is a tensor while data are captured with quantized activations.
        start: of what enters the network, its timestep and context included: there once, for both networks.
        computed: of any unit's module, what goes in and comes out, in float32.
    """

    features: int
    units: dict[str, int]
    boundaries: tuple[Boundary, ...] = ()
    widest: int = 0
    attention_map: int = 0
    heads: int = 1
    passing_map: int = 0
    start: int = 0
    computed: int = 0

    @property
    def taken(self) -> int:
        """What waits before a stage and is taken by it, at its largest."""
        joined = (0 if boundary.origin is None else boundary.skips[-1] for boundary in self.boundaries)
        return max((boundary.trunk + skip for boundary, skip in zip(self.boundaries, joined, strict=True)), default=0)


@torch.no_grad()
def measure(qnn: QuantModel, sample: tuple[Tensor, ...], *, compact: bool) -> Sizes:
    """Run one sample through the full-precision network and look at what travels."""

    def size(x: Tensor) -> int:
        return x.numel() * (2 if compact and compactable(x) else x.element_size())

    units: dict[str, int] = {}
    maps, passing_maps, widths, computed = [(0, 1)], [0], [0], [0]

    def attended(block: BaseQuantBlock, args: tuple[Tensor, ...]) -> None:
        size = 4 * block.attention_map_values(*args)
        maps.append((size, getattr(block, "heads", 1)))
        with as_if_learning():
            passing_maps.append(size * block.rounds_map())

    def passed(module: Any, args: tuple[Any, ...], output: Any) -> None:
        widths.append(sum(4 * x.numel() for x in (*args, output) if isinstance(x, Tensor)))

    def seen(path: str) -> Any:
        def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            units[path] = sum(size(x) for x in (*args, output))

        return record

    def computed_with(module: Any, args: tuple[Any, ...], output: Any) -> None:
        computed.append(sum(4 * x.numel() for x in (*args, output)))

    handles = [unit.entry.register_forward_hook(seen(unit.path)) for unit in qnn.units()]
    handles += [unit.module.register_forward_hook(computed_with) for unit in qnn.units()]
    blocks = [module for module in qnn.modules() if isinstance(module, BaseQuantBlock)]
    handles += [block.register_forward_pre_hook(attended) for block in blocks]
    handles += [module.register_forward_hook(passed) for unit in qnn.units() for module in unit.module.modules()]
    boundaries: list[Boundary] = []
    origins = connection_origins(qnn.model.stages())
    try:
        flow = qnn.model.begin(*sample)
        start = sum(size(x) for x in (flow.h, flow.t, flow.context) if x is not None)
        with qnn.quant_state(False, False):
            for number, stage in enumerate(qnn.model.stages()):
                skips = tuple(0 if skip is None or skip is flow.h else size(skip) for skip in flow.skips)
                trunk = size(flow.h) + (0 if flow.temb is None else size(flow.temb))
                paths = tuple(unit.path for unit in qnn.units_of(stage))
                boundaries.append(Boundary(trunk, skips, paths, origins[number], stage.chained))
                qnn.model.advance(stage, flow)
                if stage.chained:  # their rows lie in the same memory, one after the other's
                    units.update(dict.fromkeys(paths, max(units[path] for path in paths)))
    finally:
        for handle in handles:
            handle.remove()
    features = max(boundary.trunk + sum(boundary.skips) for boundary in boundaries)
    return Sizes(features, units, tuple(boundaries), max(widths), *max(maps), max(passing_maps), start, max(computed))


def learning_bytes(qnn: QuantModel, *, weights: bool, variables_stay: bool = True) -> int:
    """What learning takes, beside the network: for all units what stays of it, for the largest what passes.

    Args:
        weights: their rounding is learned. A rounding variable and a finished weight stay of each, in float32; while a
            unit learns, variables have a start, a gradient and Adam's two means, and weights a soft value.
        variables_stay: those of finished units stay on the device.
    """
    if not weights:
        return 0
    sizes = [sum(layer.weight.numel() for layer in unit.layers()) for unit in qnn.units()]
    return 4 * ((1 + variables_stay) * sum(sizes) + 6 * max(sizes))


def bytes_set_aside(qnn: QuantModel, budget: MemoryBudget | None) -> int:
    """What the rounding variables of finished units take on the host, see :func:`sets_rounding_aside`."""
    if not sets_rounding_aside(budget):
        return 0
    return 4 * sum(layer.weight.numel() for unit in qnn.units() for layer in unit.layers())


def connection_origins(stages: Sequence[Any]) -> list[int | None]:
    """For each stage that joins a U connection: the number of the first stage before which that one is open."""
    left: list[int] = []
    origins = []
    for number, stage in enumerate(stages):
        origins.append(left.pop() if stage.joins else None)
        if stage.leaves:
            left.append(number + 1)
    return origins


class Kept(NamedTuple):
    """What of one network's features waits before a stage; the rest is computed anew.

    Attributes:
        trunk: without it nothing is kept.
        skips: for each open U connection, the oldest first.
        filed, filed_skips: which of these wait in files; () for no connection. All else that waits is on the host.
    """

    trunk: bool
    skips: tuple[bool, ...]
    filed: bool = False
    filed_skips: tuple[bool, ...] = ()

    def bytes_of(self, boundary: Boundary) -> int:
        """What it takes of the host, a sample."""
        trunk = boundary.trunk if self.trunk and not self.filed else 0
        return trunk + sum(itertools.compress(boundary.skips, self.skips)) - self._filed_skips_of(boundary)

    def file_bytes_of(self, boundary: Boundary) -> int:
        """What it takes in files, a sample."""
        return boundary.trunk * self.filed + self._filed_skips_of(boundary)

    def _filed_skips_of(self, boundary: Boundary) -> int:
        return sum(itertools.compress(boundary.skips, self.filed_skips))


class FileRate(NamedTuple):
    """Bytes a second that files take and give."""

    written: float
    read: float

    def seconds(self, size: float, times_read: float = 1) -> float:
        """For writing so many bytes once and reading them again."""
        return size / self.written + times_read * size / self.read


class FileRates(NamedTuple):
    """How fast files are that the system writes to the disk and reads from it, and those that fit into its memory.

    It writes these too, in its own time: what is written over while it waits is written once.
    """

    disk: FileRate
    cached: FileRate


_UNKNOWN_RATE = FileRate(1e9, 1e9)
_Where = Literal["host", "file", "nowhere"]


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything waits in one phase.

    Attributes:
        rows: samples of the calibration set; chunk: of them at once through a network.
        features: place of both networks' features; feature_bytes: what all of them take.
        unit_gpu_bytes: for one unit's data on the GPU; unit_host_bytes: in pinned memory.
        host_bytes: for both.
        batch: samples that are learned from at once.
        pass_seconds: how long the whole set takes through the network; shares: of each stage in that, none where all
            are taken to cost the same; file_room: bytes for files; file_rate: how fast these are; cached: the system
            has memory for all of them. Of plans that compute a part of the features anew.
    """

    rows: int
    chunk: int
    features: Place
    feature_bytes: int
    unit_gpu_bytes: int
    unit_host_bytes: int
    host_bytes: int
    sizes: Sizes
    compact: bool
    on_gpu: bool
    batch: int = 0
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    pass_seconds: float = 0.0
    shares: tuple[float, ...] = ()
    file_room: int = 0
    file_rate: FileRate = _UNKNOWN_RATE
    cached: bool = False

    @classmethod
    def make(
        cls,
        sizes: Sizes,
        rows: int,
        budget: MemoryBudget | None,
        device: torch.device,
        *,
        chunk: int,
        compact: bool,
        batch: int = 0,
        maps: bool = False,
        passing_maps: bool = True,
        learning_bytes: int = 0,
        aside_bytes: int = 0,
        stage_seconds: Callable[[int], Sequence[float]] = lambda chunk: (_LONG,),
    ) -> MemoryPlan:
        """Fit a calibration into a budget.

        Args:
            batch: samples that are learned from at once.
            maps: attention maps are tensors of their own. Fused attention makes none.
            passing_maps: so they are where they need not be rounded, while data are captured.
            learning_bytes: what the learned state of units will take on the device; aside_bytes: in host memory.
            stage_seconds: how long so many samples take through each stage; asked only where it decides.

        Raises:
            BudgetError: the GPU's part is too small even with all data elsewhere, or what has to lie in files has no
                room there.
        """
        budget = budget or MemoryBudget()
        on_gpu = device.type == "cuda"
        start = rows * sizes.start if on_gpu else 0  # elsewhere it is the set itself
        features, largest = 2 * rows * sizes.features + start, max(sizes.units.values())
        host = _host_room(budget, aside_bytes + (STAGING_BYTES if on_gpu else 0))
        gpu = 0
        if on_gpu:
            learned = sizes.attention_map if maps else 0
            passing = learned if passing_maps else min(learned, sizes.passing_map)
            unit_bytes = max(sizes.computed, largest * (2 if compact else 1))
            work = _Work(unit_bytes, sizes.widest, learned, passing, sizes.heads, batch, learning_bytes)
            gpu, chunk = _gpu_room(budget, device, work, min(chunk, rows))
        chunk = min(chunk, rows)
        unit = rows * largest

        def plan(place: Place, gpu: int, unit_host: int) -> MemoryPlan:
            return cls(
                rows=rows,
                chunk=chunk,
                features=place,
                feature_bytes=features,
                unit_gpu_bytes=gpu,
                unit_host_bytes=max(0, unit_host),
                host_bytes=host,
                sizes=sizes,
                compact=compact,
                on_gpu=on_gpu,
                batch=batch,
                budget=budget,
            )

        if on_gpu and features + unit <= gpu:
            return plan("gpu", gpu - features, host)
        whole = plan("host", max(0, gpu - chunk * sizes.taken), host - features)
        if on_gpu and features + max(map(whole.far_bytes, sizes.units)) <= host:
            return whole
        if not on_gpu and features + unit <= host // 2:
            return whole
        host = max(0, host - start)
        partly = plan("partly", max(0, gpu - chunk * sizes.features * (2 if compact else 1)), host)
        return partly._with_files(stage_seconds)

    def _with_files(self, stage_seconds: Callable[[int], Sequence[float]]) -> MemoryPlan:
        """This plan, which computes anew the features that have no room, with some of them in files instead.

        Raises:
            BudgetError: files have no room for what must lie there in any case.
        """
        folder, held = self.budget.folder, self.budget.pool.file_bytes
        free = free_file_bytes(folder)
        room = free + held
        if self.file_bytes > room:
            raise BudgetError(
                f"captured data need {self.file_bytes / GIB:.1f} GiB in files, and {_folder_of_files(folder)} has room "
                f"for {room / GIB:.1f}; free some there, raise --cali_host_gb or --cali_gpu_gb, or lower --cali_n"
            )
        each = stage_seconds(self.chunk)
        # Where there is no room for the probe, no file to speak of has room either.
        rates = self.budget.pool.rates(folder) if free >= _PROBE_BYTES else FileRates(_UNKNOWN_RATE, _UNKNOWN_RATE)
        on_disk = dataclasses.replace(
            self,
            pass_seconds=sum(each) * math.ceil(self.rows / self.chunk),
            shares=tuple(x / sum(each) for x in each) if len(each) == len(self.sizes.boundaries) else (),
            file_room=room,
            file_rate=rates.disk,
        )
        budgeted = max(0, self.host_bytes - self.budget.pool.pinned_bytes)
        cache = min(room, int(_CACHE_SHARE * max(0, free_host_bytes() - budgeted)))
        if self.file_bytes > cache:
            return on_disk
        in_cache = dataclasses.replace(on_disk, file_room=cache, file_rate=rates.cached, cached=True)
        return min(on_disk, in_cache, key=MemoryPlan.feature_seconds)

    def __str__(self) -> str:
        where = {
            "gpu": "on the GPU",
            "host": "in host memory",
            "partly": "in host memory as far as there is room, computed anew where not",
            "filed": "in host memory as far as there is room, in files or computed anew where not",
        }["filed" if self._files_features else self.features]
        near = [self.gpu_rows(path) for path in self.sizes.units]
        parts = [f"{self.feature_bytes / GIB:.2f} GiB of features {where}, {self.chunk} samples at once"]
        largest = self.rows * max(self.sizes.units.values()) / GIB
        if self.on_gpu:
            resident = sum(rows == self.rows for rows in near)
            parts.append(f"data of {resident} of {len(near)} units wholly on the GPU, of the others in part")
            filed = sum(self.gpu_rows(path) + self.pinned_rows(path) < self.rows for path in self.sizes.units)
            if filed:
                parts.append(f"{filed} of {len(near)} units partly in files")
        if self.file_bytes:
            where = ", for which the system has memory" if self.cached else ""
            parts.append(f"files take up to {self.file_bytes / GIB:.2f} GiB{where}")
        parts.append(f"the largest unit's take {largest:.2f} GiB")
        return "; ".join(parts)

    def gpu_rows(self, path: str) -> int:
        """How many of a unit's rows lie where it computes."""
        if not self.on_gpu:
            return self.rows
        return min(self.rows, self.unit_gpu_bytes // max(1, self.sizes.units[path]))

    def together(self, paths: Sequence[str]) -> bool:
        """Whether there is room for the data of several units at once."""
        size = self.rows * sum(self.sizes.units[path] for path in paths)
        return len(paths) == 1 or size <= (self.unit_gpu_bytes if self.on_gpu else self.host_bytes // 2)

    def far_bytes(self, path: str) -> int:
        """What of a unit's data has no room where it computes."""
        return (self.rows - self.gpu_rows(path)) * self.sizes.units[path]

    def unit_on_host(self, path: str) -> int:
        """What a unit's data take in host memory, files not counted."""
        if not self.on_gpu:
            return self.rows * self.sizes.units[path]
        ring = self.ring_rows if self.pinned_rows(path) < self.rows - self.gpu_rows(path) else 0
        return (self.pinned_rows(path) + ring) * self.sizes.units[path]

    @property
    def _files_features(self) -> bool:
        """Whether some feature maps wait in files, beside others that do not."""
        return self.features == "partly" and any(
            kept.filed or kept.filed_skips for networks in self.kept() for kept in networks
        )

    @property
    def file_bytes(self) -> int:
        """What files take at most: features, as far as they lie there, and rows for which nothing else has room.

        On a CPU all of a unit's rows are in memory.
        """
        rows = max(map(self._filed_bytes, self.sizes.units))
        if self.features != "partly":
            return rows
        waiting = zip(self._rows_around(self._filed_bytes), self._around(Kept.file_bytes_of), strict=True)
        return max([rows, *(filed + quantized + max(full, after) for filed, (quantized, full, after) in waiting)])

    def _filed_bytes(self, path: str) -> int:
        """What of a unit's rows is in a file."""
        return self.far_bytes(path) - self.pinned_rows(path) * self.sizes.units[path]

    @property
    def ring_rows(self) -> int:
        """Of a unit some of whose rows wait in a file: what is read ahead."""
        return RING_STRETCHES * STRETCH * self.batch

    def pinned_rows(self, path: str) -> int:
        """How many of a unit's rows wait in pinned memory."""
        size, far = self.sizes.units[path], self.rows - self.gpu_rows(path)
        if far * size <= self.unit_host_bytes:
            return far
        return max(0, int(self.unit_host_bytes / _ARENA_SLACK) // size - self.ring_rows)

    @property
    def largest_far(self) -> int:
        """Of all units, what waits in host memory."""
        return max(map(self.unit_on_host, self.sizes.units), default=0)

    def kept(self) -> list[tuple[Kept, Kept]]:
        """What of the quantized and the full-precision network's features waits before each stage, and where.

        The rows of the stage's units come first, or those of the next one's, whose inputs are collected while the
        quantized network leaves this one. Then feature maps, without which everything has to be computed anew, then
        connections, the small ones first: the large ones were left by early stages, which is a short way from the set.
        What has no room on the host goes to a file, if that is quicker than computing it anew, and connections stay
        there.
        """
        there: list[list[_Where]] = [[], []]  # each network's open connections
        origins: list[int] = []  # of these, the stages before which they were open first
        kept: list[tuple[Kept, Kept]] = []
        host = self.host_bytes / _ARENA_SLACK
        # What the full-precision network may take: it moves on while the stage before is still learned.
        ahead, files_ahead = host, float(self.file_room)
        pinned, filed_rows = self._rows_around(self.unit_on_host), self._rows_around(self._filed_bytes)
        for number, boundary in enumerate(self.sizes.boundaries):
            trunk = self.rows * boundary.trunk
            memory = _Room(host - pinned[number], ahead)
            disk = _Room(self.file_room - filed_rows[number], files_ahead)
            on_host = [memory.take(network, trunk) for network in range(2)]
            joined = [not places or places[-1] != "nowhere" for places in there]
            filed = self._in_files(number, on_host, joined, disk)
            trunks = [any(places) for places in zip(on_host, filed, strict=True)]
            origins = (origins + [number] * len(boundary.skips))[: len(boundary.skips)]
            for places in there:
                places[:] = (places + ["host"] * len(boundary.skips))[: len(boundary.skips)]
            for skip in sorted(range(len(boundary.skips)), key=lambda i: boundary.skips[i]):
                for network, places in enumerate(there):
                    size = self.rows * boundary.skips[skip]
                    if places[skip] == "nowhere" or not trunks[network]:
                        places[skip] = "nowhere"
                    elif not size:  # it is the feature map itself
                        places[skip] = "file" if filed[network] else "host"
                    elif places[skip] == "file" or not memory.take(network, size):
                        worth = places[skip] == "file" or self._skip_worth_a_file(size, origins[skip], network)
                        places[skip] = "file" if worth and disk.take(network, size) else "nowhere"
            quantized, full = (
                Kept(
                    waits,
                    tuple(place != "nowhere" for place in places),
                    in_file,
                    tuple(place == "file" for place in places) if "file" in places else (),
                )
                for waits, places, in_file in zip(trunks, there, filed, strict=True)
            )
            kept.append((quantized, full))
            for places, waits in zip(there, trunks, strict=True):
                if not waits:  # the next stage is reached from the set, with all connections
                    places[:] = ["host"] * len(places)
            ahead = host - pinned[number] - self.rows * quantized.bytes_of(boundary)
            files_ahead = self.file_room - filed_rows[number] - self.rows * quantized.file_bytes_of(boundary)
        return kept

    def _in_files(self, number: int, on_host: Sequence[bool], joined: Sequence[bool], disk: _Room) -> list[bool]:
        """Which networks' feature maps are to wait in a file before a stage, of those that are not on the host.

        The disk works while the GPU computes: the one that takes longer is to take as short as it can. While one
        network's come from a file the other's may be computed anew.

        Args:
            joined: the connection that the stage joins, if it joins one, is kept if the feature map is.
            disk: the room that is left, which is taken.
        """
        size, sweeps = self.rows * self.sizes.boundaries[number].trunk, self._sweeps(number)
        best, chosen = (math.inf, math.inf), [False, False]
        for choice in itertools.product((False, True), repeat=2):
            left = disk.copy()
            travelling = 0.0
            for network in itertools.compress(range(2), choice):
                fits = not on_host[network] and left.take(network, size)
                travelling += self.file_rate.seconds(size, sweeps[network]) if fits else math.inf
            quantized, full = (
                Kept(here or in_file, (there,)) for here, in_file, there in zip(on_host, choice, joined, strict=True)
            )
            computing = self._anyway(number) + self._anew(number, (quantized, full))
            longer = max(computing * self.pass_seconds, travelling)
            if (longer, travelling) < best:
                best, chosen = (longer, travelling), list(choice)
        return [in_file and disk.take(network, size) for network, in_file in enumerate(chosen)]

    def _skip_worth_a_file(self, size: int, origin: int, network: int) -> bool:
        """Whether a connection is sooner read from a file than computed anew."""
        joined_by = next(n for n, boundary in enumerate(self.sizes.boundaries) if boundary.origin == origin)
        times = self._skip_sweeps(joined_by)[network]
        return self.file_rate.seconds(size, times) < times * self._way(origin) * self.pass_seconds

    def _anyway(self, number: int) -> float:
        """What a stage costs, of a pass, wherever the features before it wait."""
        return (self._way(number + 1) - self._way(number)) * sum(self._sweeps(number))

    def _way(self, number: int) -> float:
        """What the way from the set to a stage costs, of a pass."""
        return sum(self.shares[:number]) if self.shares else number / len(self.sizes.boundaries)

    def _sweeps(self, number: int) -> tuple[int, int]:
        """How often the set passes a stage, for the quantized and the full-precision network.

        The way on, and inputs of each unit but the first, which are taken on the way here; targets on the way on, of
        all units at once where there is room. In a chained stage the way on alone.
        """
        units = self.sizes.boundaries[number].units
        if self.sizes.boundaries[number].chained:
            return 1, 1
        each = max(1, len(units))
        return each, 1 if not units or self.together(units) else each

    def _skip_sweeps(self, number: int) -> tuple[int, int]:
        """The same for a U connection: the inputs of the first unit, which are taken on the way here, need it too."""
        quantized, full = self._sweeps(number)
        return quantized + bool(self.sizes.boundaries[number].units), full

    def _rows_around(self, bytes_of: Callable[[str], int]) -> list[int]:
        """Most bytes of a unit's rows while features wait before each stage, until they wait before the next one."""
        units = [max(map(bytes_of, boundary.units), default=0) for boundary in self.sizes.boundaries]
        return [max(pair) for pair in itertools.pairwise([*units, 0])]

    def passes(self) -> float:
        """Forward passes in which a phase computes anew what is not kept."""
        return sum(self._anew(number, networks) for number, networks in enumerate(self._kept_in_part()))

    def feature_seconds(self) -> float:
        """How long features take in a phase: at each stage through the networks, or files, whichever is longer."""
        kept = self._kept_in_part()
        computing = [
            (self._anyway(number) + self._anew(number, networks)) * self.pass_seconds
            for number, networks in enumerate(kept)
        ]
        return sum(map(max, computing, self._travelling(kept)))

    def _kept_in_part(self) -> list[tuple[Kept, Kept]]:
        return self.kept() if self.features == "partly" else []

    def _anew(self, number: int, networks: tuple[Kept, Kept]) -> float:
        """What is computed anew for a stage, of a pass."""
        total, origin = 0.0, self.sizes.boundaries[number].origin
        for network, kept in enumerate(networks):
            if not kept.trunk:
                total += self._sweeps(number)[network] * self._way(number)
            elif origin is not None and not kept.skips[-1]:
                total += self._skip_sweeps(number)[network] * self._way(origin)
        return total

    def _travelling(self, kept: Sequence[tuple[Kept, Kept]]) -> list[float]:
        """How long the disk takes for what is in files, before each stage."""
        seconds = [0.0] * len(kept)
        for network in range(2):
            before: tuple[bool, ...] = ()  # which connections were in files before the stage before
            for number, (boundary, networks) in enumerate(zip(self.sizes.boundaries, kept, strict=True)):
                here = networks[network]
                written, read = boundary.trunk * here.filed, boundary.trunk * here.filed * self._sweeps(number)[network]
                were_there = [*before, *[False] * len(boundary.skips)]
                for size, is_filed, was in zip(boundary.skips, here.filed_skips, were_there, strict=False):
                    written += size * (is_filed and not was)
                if boundary.origin is not None and here.filed_skips and here.filed_skips[-1]:
                    read += (boundary.skips[-1] or boundary.trunk) * self._skip_sweeps(number)[network]
                before = here.filed_skips
                seconds[number] += self.rows * (written / self.file_rate.written + read / self.file_rate.read)
        return seconds

    @property
    def arena_bytes(self) -> int:
        """Pinned memory for the features and the rows that lie on the host."""
        if not self.on_gpu:
            return 0
        need = self.largest_far
        if self.features == "host":
            need += self.feature_bytes
        elif self.features == "partly":
            need = max(self._waiting())
        return int(min(self.host_bytes, _ARENA_SLACK * need))

    def _waiting(self) -> Iterator[int]:
        """Bytes on the host before each stage, and while the full-precision network moves on from there."""
        for units, (quantized, full, after) in zip(
            self._rows_around(self.unit_on_host), self._around(Kept.bytes_of), strict=True
        ):
            yield units + quantized + max(full, after)

    def _around(self, bytes_of: Callable[[Kept, Boundary], int]) -> Iterator[tuple[int, int, int]]:
        """Before each stage: what the quantized network's features take, full precision's, and these a stage later."""
        sizes = [
            [self.rows * bytes_of(kept, boundary) for kept in networks]
            for boundary, networks in zip(self.sizes.boundaries, self.kept(), strict=True)
        ]
        after = [full for _, full in [*sizes, [0, 0]][1:]]
        return ((quantized, full, later) for (quantized, full), later in zip(sizes, after, strict=True))


class _Room:
    """Room for the features of both networks before a stage.

    Args:
        both: bytes for both; full: for the full-precision one, number 1, which may not have all of it.
    """

    def __init__(self, both: float, full: float):
        self._left = [both, full]

    def copy(self) -> _Room:
        """The same room, to be taken by others."""
        return _Room(*self._left)

    def take(self, network: int, size: int) -> bool:
        """Whether there was so much for a network; it is taken then."""
        if size > min(self._left[: network + 1]):
            return False
        self._left[0] -= size
        self._left[1] -= size * network
        return True


class Storage:
    """The places of a plan, taken.

    Attributes:
        plan: what lies where.
        arena: the pinned memory, where some is needed.

    Raises:
        BudgetError: the system does not give so much pinned memory.
    """

    def __init__(self, plan: MemoryPlan):
        self.plan = plan
        try:
            self.arena = plan.budget.pool.arena(plan.arena_bytes)
        except RuntimeError as error:
            raise BudgetError(
                f"the system gives no {plan.arena_bytes / GIB:.1f} GiB of pinned memory ({error}); lower --cali_host_gb"
            ) from error

    @functools.cached_property
    def _scratch(self) -> Scratch | None:
        size, budget = int(_ARENA_SLACK * self.plan.file_bytes), self.plan.budget
        return budget.pool.scratch(budget.folder, size) if size else None

    def shelf(self) -> Shelf:
        """A place for features."""
        return Shelf(self.plan.features, compact=self.plan.compact, arena=self.arena)

    def files(self) -> Shelf:
        """A place in files, where some features are to wait there."""
        return Shelf(self.plan.features, compact=self.plan.compact, scratch=self._scratch)

    def collector(self, unit: Any) -> Collector:
        """A place for a unit's inputs, or its outputs."""
        plan = self.plan
        return Collector(
            plan.rows,
            plan.gpu_rows(unit.path),
            compact=plan.compact,
            pinned=plan.pinned_rows(unit.path),
            ring=plan.ring_rows,
            scratch=self._scratch,
            arena=self.arena,
        )


def _host_room(budget: MemoryBudget, beside: int) -> int:
    """Bytes of host memory for captured data, beside what the process takes and will take in any case."""
    if budget.host_bytes is None:
        return max(0, int(HOST_SHARE * (free_host_bytes() + budget.pool.pinned_bytes)) - beside)
    there = resident_bytes() - budget.pool.pinned_bytes + _LOADED_LATER + beside
    if there > budget.host_bytes:
        log.warning(
            "the process takes %.1f of the %.1f GiB of host memory allowed, without any captured data",
            there / GIB,
            budget.host_bytes / GIB,
        )
    return max(0, budget.host_bytes - there)


class _Work(NamedTuple):
    """What computing takes, beside captured data, in bytes.

    Attributes:
        unit: a unit's inputs and output, a sample, in float32; widest: the same of the widest module inside.
        learned_map, passing_map: the largest attention map that is a tensor of its own, a sample, while units learn and
            while data are captured; heads: whose maps it consists of.
        batch: samples that are learned from at once.
        stays: of learning, to its end.
    """

    unit: int
    widest: int
    learned_map: int
    passing_map: int
    heads: int
    batch: int
    stays: int

    def _at_once(self, attention_map: int, samples: int) -> int:
        """What of their attention map is in memory: see :func:`qdiff.attention.by_heads`."""
        whole = attention_map * samples
        return whole if whole <= LARGEST_MAP else max(PART_OF_MAP, whole // self.heads)

    def passing(self, chunk: int) -> int:
        """While ``chunk`` samples pass through a network.

        A gated layer's twice as wide output, of which two halves are made, is there with what went in and comes out.
        """
        tensors = max(_WORKING_COPIES * self.unit, 2 * self.widest + self.unit) * chunk
        return max(tensors, _WORKING_COPIES * self._at_once(self.passing_map, chunk))

    @property
    def learning(self) -> int:
        """While a unit learns."""
        return max(
            _LEARNING_TENSORS * self.unit * self.batch, _LEARNING_COPIES * self._at_once(self.learned_map, self.batch)
        )


def _gpu_room(budget: MemoryBudget, device: torch.device, work: _Work, chunk: int) -> tuple[int, int]:
    """Bytes for captured data, beside what is there already and what computing takes, and samples at once."""
    used = torch.cuda.memory_allocated(device) + work.stays
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - used
    total = budget.gpu_bytes if budget.gpu_bytes is not None else used + int(GPU_SHARE * (free + idle - work.stays))
    room = total - used
    # Learning takes its part anyway; passes may take as much.
    while chunk > _SMALLEST_CHUNK and work.passing(chunk) > max(room // _PASSING_SHARE, work.learning):
        chunk //= 2
    needed = max(work.passing(chunk), work.learning)
    if needed > room:
        raise BudgetError(
            f"computing alone takes about {(used + needed) / GIB:.1f} GiB of GPU memory, more than the "
            f"{total / GIB:.1f} GiB allowed; raise --cali_gpu_gb or lower --cali_batch_size"
        )
    return room - needed, chunk


def samples_at_once(qnn: QuantModel, sample: tuple[Tensor, ...], *, most: int) -> int:
    """How many samples to take through the network at once while it quantizes activations, by their attention maps.

    It depends on the network alone: a search for ranges may see other values where samples are divided otherwise.

    Args:
        sample: one of the network's inputs.
    """
    attention_map = measure(qnn, sample, compact=False).attention_map
    return max(1, min(most, _MAPS_AT_ONCE // max(1, _WORKING_COPIES * attention_map)))


def free_host_bytes() -> int:
    """Memory that can be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def free_file_bytes(folder: Path | None) -> int:
    """What files of captured data may take, where they are made, when those before them are gone."""
    wait_for_closed()
    return int(FILE_SHARE * shutil.disk_usage(_folder_of_files(folder)).free)


def file_rates(folder: Path | None) -> FileRates:
    """How fast files are. For the disk's rate one is waited for, and read when the system does not hold it any more."""
    scratch, part = Scratch(folder), torch.empty(1, 2**26, dtype=torch.uint8).random_()
    started = time.perf_counter()
    pieces: list[Piece] = []
    while sum(piece.size for piece in pieces) < _PROBE_BYTES and time.perf_counter() < started + _PROBE_SECONDS:
        pieces.append(scratch.store(part).piece)
    size = sum(piece.size for piece in pieces)

    def reading() -> float:
        began = time.perf_counter()
        for piece in pieces:
            block_io().read(piece, part.view(-1))
        return size / (time.perf_counter() - began)

    for piece in pieces:
        piece.written()
    handed_over = time.perf_counter()
    from_memory = reading()
    waited = time.perf_counter()
    scratch.to_the_disk(forget=True)
    on_disk = time.perf_counter() - waited + handed_over - started
    return FileRates(FileRate(size / on_disk, reading()), FileRate(size / (handed_over - started), from_memory))


def _folder_of_files(folder: Path | None) -> Path:
    return Path(tempfile.gettempdir()) if folder is None else folder


def resident_bytes() -> int:
    """Memory that this process takes now; 0 where the system does not say."""
    return _status_bytes("VmRSS:")


def forget_host_peak() -> None:
    """Let :func:`host_peak_bytes` start anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def host_peak_bytes() -> int:
    """The most memory this process had in use since :func:`forget_host_peak`; 0 where the system does not say."""
    return _status_bytes("VmHWM:")


def _status_bytes(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


# The GPU's limit.

_limited: set[torch.device] = set()


@contextlib.contextmanager
def gpu_limit(budget: MemoryBudget | None, device: torch.device) -> Iterator[None]:
    """Inside the ``with`` block PyTorch takes no more of a GPU than the budget says, trial workspaces included.

    What the driver takes for itself (its context, code, recorded graphs) comes on top.
    """
    if device.type != "cuda" or budget is None or budget.gpu_bytes is None:
        yield
        return
    device = _with_index(device)
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    _expand_segments(True)
    limit = max(0, budget.gpu_bytes - _MAPPED_AT_ONCE)  # the limit is looked at before a size is rounded up to pages
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    _limited.add(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"the {budget.gpu_bytes / GIB:.1f} GiB of GPU memory allowed are not enough; "
            "raise --cali_gpu_gb or lower --cali_batch_size"
        ) from error
    finally:
        _limited.discard(device)
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        _expand_segments(False)


def _expand_segments(on: bool) -> None:
    """Whether PyTorch maps memory page by page, so that what is free in the middle of a block can serve elsewhere.

    A calibration leaves a few small tensors with every unit. In ordinary blocks each of them keeps the block it lies in
    from being given back: 2.1 of 3.3 GB were lost that way. Settings of the user's own stay.
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        return
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    change(f"expandable_segments:{on}")


def _with_index(device: torch.device) -> torch.device:
    return torch.device(device.type, torch.cuda.current_device()) if device.index is None else device


def give_back_unused(device: torch.device) -> None:
    """Where a limit is set, free what PyTorch holds but does not use: a graph being recorded cannot do so itself."""
    if _limited and _with_index(device) in _limited:
        torch.cuda.empty_cache()
