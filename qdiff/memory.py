"""Where a calibration's captured data wait: on the GPU, in host memory, in files.

Two things are large. *Features*: the calibration set as it stands before the next stage, of both networks. *A unit's
data*: its inputs and targets, of which every iteration takes a batch. A :class:`MemoryPlan` places the features as
near as a budget allows, or nowhere: where neither the GPU nor the host has room, they are computed anew from the set
whenever they are wanted, if that is quicker than a file. Of each unit's data as many rows stay on the GPU as fit; the
rest lie in pinned host memory, which the GPU reads by itself while it computes, or in files mapped into memory.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qdiff import fused
from qdiff.quant_model import QuantModel

Place = Literal["gpu", "host", "disk", "nowhere"]

GPU_SHARE, HOST_SHARE = 0.85, 0.6  # of what is free, where no budget is given
GIB = 2**30
_WORKING_COPIES = 6  # of a chunk's largest feature, in float32, that a forward pass holds at once
_SMALLEST_CHUNK, _LARGEST_BATCH = 16, 64
_FILE_BYTES_PER_SECOND = 1e9  # what a file may be expected to take and give
_TRAVELLED = 6  # times the largest features' bytes: what one phase writes and reads again, roughly

log = logging.getLogger(__name__)


class BudgetError(ValueError):
    """A budget too small for the calibration; the message names the flag to raise."""


@dataclass(frozen=True)
class MemoryBudget:
    """What a calibration may take.

    Attributes:
        gpu_bytes, host_bytes: in all; None: most of what is free.
        folder: for files of captured data, which are removed with the calibration; None: the system's temporary one.
    """

    gpu_bytes: int | None = None
    host_bytes: int | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Sizes:
    """Bytes a sample.

    Attributes:
        features: of one network's features between two stages, at their largest.
        units: of each unit's inputs and output, by path.
    """

    features: int
    units: dict[str, int]


@torch.no_grad()
def measure(qnn: QuantModel, sample: tuple[Tensor, ...], *, compact: bool) -> Sizes:
    """Run one sample through the full-precision network and look at what travels."""

    def size(x: Tensor) -> int:
        return x.numel() * (2 if compact and _compactable(x) else x.element_size())

    units: dict[str, int] = {}

    def seen(path: str) -> Any:
        def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            units[path] = sum(size(x) for x in (*args, output))

        return record

    handles = [unit.module.register_forward_hook(seen(unit.path)) for unit in qnn.units()]
    largest = 0
    try:
        flow = qnn.model.begin(*sample)
        with qnn.quant_state(False, False):
            for stage in qnn.model.stages():
                travelling: dict[int, int] = {}
                flow.map(lambda x, held=travelling: held.setdefault(id(x), size(x)) and x)
                largest = max(largest, sum(travelling.values()))
                qnn.model.advance(stage, flow)
    finally:
        for handle in handles:
            handle.remove()
    return Sizes(largest, units)


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything waits in one phase.

    Attributes:
        rows: samples of the calibration set; chunk: of them at once through a network.
        features: place of both networks' features; feature_bytes: what they take.
        unit_gpu_bytes: for one unit's data on the GPU; unit_host_bytes: in pinned memory.
    """

    rows: int
    chunk: int
    features: Place
    feature_bytes: int
    unit_gpu_bytes: int
    unit_host_bytes: int
    sizes: Sizes
    compact: bool
    on_gpu: bool
    folder: Path | None = field(default=None)

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
        seconds_of_pass: Callable[[int], float] = lambda chunk: math.inf,
    ) -> MemoryPlan:
        """Fit a calibration into a budget.

        Args:
            seconds_of_pass: how long so many samples take through the network; asked only where it decides.

        Raises:
            BudgetError: the GPU's part is too small even with all data elsewhere.
        """
        budget = budget or MemoryBudget()
        on_gpu = device.type == "cuda"
        features, largest = 2 * rows * sizes.features, max(sizes.units.values())
        host = budget.host_bytes if budget.host_bytes is not None else int(HOST_SHARE * free_host_bytes())
        gpu = 0
        if on_gpu:
            gpu, chunk = _gpu_room(budget, device, largest * (2 if compact else 1), min(chunk, rows))
        unit = rows * largest
        if on_gpu and features + unit <= gpu:
            place: Place = "gpu"
        elif features + (0 if on_gpu else unit) <= host // 2:
            place = "host"
        else:
            place = "disk"
            passes = len(sizes.units) * math.ceil(rows / chunk)  # half of one a unit, for each of the two networks
            if passes * seconds_of_pass(chunk) < _TRAVELLED * features / _FILE_BYTES_PER_SECOND:
                place = "nowhere"
                gpu = max(0, gpu - chunk * sizes.features * (2 if compact else 1))
        return cls(
            rows=rows,
            chunk=min(chunk, rows),
            features=place,
            feature_bytes=features,
            unit_gpu_bytes=gpu - (features if place == "gpu" else 0),
            unit_host_bytes=max(0, host - (features if place == "host" else 0)),
            sizes=sizes,
            compact=compact,
            on_gpu=on_gpu,
            folder=budget.folder,
        )

    def __str__(self) -> str:
        where = {
            "gpu": "on the GPU",
            "host": "in host memory",
            "disk": "in files",
            "nowhere": "computed anew for each unit",
        }[self.features]
        near = [self.gpu_rows(path) for path in self.sizes.units]
        size = "features" if self.features == "nowhere" else f"{self.feature_bytes / GIB:.2f} GiB of features"
        parts = [f"{size} {where}, {self.chunk} samples at once"]
        largest = self.rows * max(self.sizes.units.values()) / GIB
        if self.on_gpu:
            resident = sum(rows == self.rows for rows in near)
            parts.append(f"data of {resident} of {len(near)} units wholly on the GPU, of the others in part")
        parts.append(f"the largest unit's take {largest:.2f} GiB")
        return "; ".join(parts)

    def gpu_rows(self, path: str) -> int:
        """How many of a unit's rows lie where it computes."""
        if not self.on_gpu:
            return self.rows
        return min(self.rows, self.unit_gpu_bytes // max(1, self.sizes.units[path]))

    def shelf(self) -> Shelf:
        """A place for one network's features."""
        return Shelf(self.features, compact=self.compact, folder=self.folder)

    def collector(self, unit: Any) -> Collector:
        """A place for a unit's inputs, or its outputs."""
        near = self.gpu_rows(unit.path)
        far_bytes = (self.rows - near) * self.sizes.units[unit.path]
        return Collector(
            self.rows, near, compact=self.compact, pinned=far_bytes <= self.unit_host_bytes, folder=self.folder
        )


def _gpu_room(budget: MemoryBudget, device: torch.device, largest: int, chunk: int) -> tuple[int, int]:
    """Bytes for captured data, beside what is there already and what computing takes, and samples at once."""
    used = torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - used
    total = budget.gpu_bytes if budget.gpu_bytes is not None else used + int(GPU_SHARE * (free + idle))
    room = total - used
    while chunk > _SMALLEST_CHUNK and _WORKING_COPIES * largest * chunk > room // 3:
        chunk //= 2
    working = _WORKING_COPIES * largest * max(chunk, _LARGEST_BATCH)
    if working > room:
        raise BudgetError(
            f"computing alone takes about {(used + working) / GIB:.1f} GiB of GPU memory, more than the "
            f"{total / GIB:.1f} GiB allowed; raise --cali_gpu_gb or lower --cali_batch_size"
        )
    return room - working, chunk


def free_host_bytes() -> int:
    """Memory that can be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def forget_host_peak() -> None:
    """Let :func:`host_peak_bytes` start anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def host_peak_bytes() -> int:
    """The most memory this process had in use since :func:`forget_host_peak`; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


# Types.


def _compactable(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.dim() > 1


def packed(x: Tensor) -> Tensor:
    """A feature in half precision, 11 bits of mantissa, where its values fit.

    Rounding to it costs 2e-8 of a feature's power, 4-bit weights cost 1e-3. Timesteps and other vectors stay as they
    are.
    """
    if not _compactable(x):
        return x
    half = x.half()
    return half if bool(torch.isfinite(half).all()) else x


def unpacked(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


# Places.


class Shelf:
    """Keeps features as they come, in one place.

    Args:
        compact: in half precision.
        folder: of files.
    """

    def __init__(self, place: Place, *, compact: bool, folder: Path | None = None):
        self.place, self.compact, self.folder = place, compact, folder

    def keep(self, x: Tensor) -> Tensor:
        """``x`` where it shall wait; itself where it is there already."""
        x = packed(x) if self.compact else x
        if self.place in ("gpu", "nowhere") or (x.device.type == "cpu" and (self.place == "host" or _is_mapped(x))):
            return x
        if self.place == "host":
            return x.cpu()
        return mapped_empty(x, self.folder).copy_(x)


def mapped_empty(like: Tensor, folder: Path | None) -> Tensor:
    """A tensor of a shape and type whose memory is a file, which goes with it.

    Raises:
        OSError: the disk is full; found out here, not by a signal when the memory is written.
    """
    handle, name = tempfile.mkstemp(dir=folder, prefix=".captured-", suffix=".part")
    try:
        size = max(1, like.numel() * like.element_size())
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder or tempfile.gettempdir())) from error
        flat = torch.from_file(name, shared=True, size=like.numel(), dtype=like.dtype)
    finally:
        os.close(handle)
        os.unlink(name)  # the mapping keeps it until the tensor is gone
    _MAPPED.add(flat.untyped_storage().data_ptr())
    weakref.finalize(flat, _MAPPED.discard, flat.untyped_storage().data_ptr())
    return _laid_out_like(flat, like)


_MAPPED: set[int] = set()


def _is_mapped(x: Tensor) -> bool:
    return x.untyped_storage().data_ptr() in _MAPPED


def _laid_out_like(flat: Tensor, like: Tensor) -> Tensor:
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)


def pinned_empty(rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Host memory that the GPU can read by itself: rows x length, no more than that is taken."""
    x = torch.empty(rows, length, dtype=dtype)
    size = x.numel() * x.element_size()
    if size:
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(x.data_ptr(), size, 0)))
        weakref.finalize(x, runtime.cudaHostUnregister, x.data_ptr())
    return x


@dataclass(frozen=True)
class _Layout:
    """Where the rows of one collector go; see :class:`Collector`."""

    rows: int
    near: int
    compact: bool
    pinned: bool
    folder: Path | None


class Collector:
    """Puts a unit's rows where they shall lie as they come, chunk by chunk: no second copy of them ever exists.

    Args:
        rows: how many will come; near: how many of them stay on the device they come from.
        compact: in half precision.
        pinned: the others in pinned memory; otherwise in a file in ``folder``.
    """

    def __init__(self, rows: int, near: int, *, compact: bool, pinned: bool = True, folder: Path | None = None):
        self.rows, self.pinned = rows, pinned
        self._layout = _Layout(rows, near, compact, pinned, folder)
        self.filled = 0
        self._stores: list[_RowStore] = []

    def add(self, tensors: tuple[Tensor, ...]) -> None:
        """The next rows, of every tensor."""
        if not self._stores:
            self._stores = [_RowStore(self._layout, x) for x in tensors]
        for store, x in zip(self._stores, tensors, strict=True):
            store.write(self.filled, x)
        self.filled += len(tensors[0])

    def parts(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The near rows and the others, of every tensor."""
        if self.filled != self.rows:
            raise RuntimeError(f"{self.filled} of {self.rows} rows were collected")
        return tuple(s.near() for s in self._stores), tuple(s.far() for s in self._stores)


class _RowStore:
    """The rows of one tensor, as they lie in memory: channels last on a GPU."""

    def __init__(self, layout: _Layout, first: Tensor):
        # Not the collector itself: the two would keep one another alive until the next collection of garbage.
        self.layout, self.shape = layout, tuple(first.shape[1:])
        self.last = first.device.type == "cuda"
        self.dtype = torch.float16 if layout.compact and _compactable(first) else first.dtype
        self.length = first[0].numel()
        self.head = torch.empty(layout.near, self.length, dtype=self.dtype, device=first.device)
        self.tail = self._far(layout.rows - layout.near)

    def _far(self, count: int) -> Tensor:
        if count and not self.layout.pinned:
            like = torch.empty(count, self.length, dtype=self.dtype, device="meta")
            return mapped_empty(like, self.layout.folder)
        if count and self.last:
            return pinned_empty(count, self.length, self.dtype)
        return torch.empty(count, self.length, dtype=self.dtype)

    def write(self, start: int, x: Tensor) -> None:
        rows = fused.rows_view(x) if self.last else x.reshape(len(x), -1)
        if self.dtype == torch.float16 and rows.dtype == torch.float32:
            half = rows.half()
            if bool(torch.isfinite(half).all()):
                rows = half
            else:
                self._widen()
        near = max(0, min(len(self.head) - start, len(rows)))
        self.head[start : start + near].copy_(rows[:near])
        offset = max(0, start - len(self.head))
        self.tail[offset : offset + len(rows) - near].copy_(rows[near:])

    def _widen(self) -> None:
        """Values beyond half precision have come."""
        self.dtype = torch.float32
        self.head = self.head.float()
        tail = self._far(len(self.tail))
        self.tail = tail.copy_(self.tail)

    def near(self) -> Tensor:
        return self._shaped(self.head)

    def far(self) -> Tensor:
        return self._shaped(self.tail)

    def _shaped(self, rows: Tensor) -> Tensor:
        return fused.from_rows(rows, self.shape) if self.last else rows.view(len(rows), *self.shape)
