"""The places where captured data wait: on the GPU, in pinned host memory, in files.

Features wait on a :class:`Shelf`, as they come; a unit's rows in a :class:`Collector`, each where it belongs. What lies
where is the business of :mod:`qdiff.memory`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import logging
import math
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qdiff import fused
from qdiff.block_io import THREADS, Lanes, Piece, block_io, read_at_once
from qdiff.pinned import Arena, advise, alone
from qdiff.stretches import Stretches
from qdiff.transfers import transfers

FILES = THREADS if sys.platform.startswith("linux") else 1  # in which captured data wait: one for each who writes
_ROWS_STRIPE = 2**24  # bytes; each is a mapping of its own, of which a process may have some ten thousands
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux's, which mmap does not name
STRETCH = 10  # iterations whose rows are read from a file at once
RING_STRETCHES = 3  # one that is computed with, the next one, and one that is being read

Place = Literal["gpu", "host", "partly"]
"""Of features: all in one place, or on the host as far as there is room."""

log = logging.getLogger(__name__)


def compactable(x: Tensor) -> bool:
    """Whether it may wait in half precision: not timesteps and other vectors."""
    return x.dtype == torch.float32 and x.dim() > 1


def packed(x: Tensor) -> Tensor:
    """A feature in half precision, 11 bits of mantissa, where its values fit.

    Rounding to it costs 2e-8 of a feature's power, 4-bit weights cost 1e-3. Timesteps and other vectors stay as they
    are.
    """
    if not compactable(x):
        return x
    half = x.half()
    return half if _all_finite(half) else x


def _all_finite(x: Tensor) -> bool:
    """In one pass over the values."""
    return not x.numel() or math.isfinite(torch.linalg.vector_norm(x, math.inf).item())


def unpacked(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def on_host(x: Tensor) -> Tensor:
    """``x`` there; what comes from a GPU, in pinned memory of its own."""
    if x.device.type != "cuda":
        return x.cpu()
    place = _laid_out_like(alone((x.numel(),), x.dtype), x)
    transfers().store(x, place)
    return place


class Shelf:
    """Keeps features as they come, in one place.

    Args:
        place: where they stay on the GPU; or, as far as they wait here, on the host.
        compact: in half precision.
        scratch: a file in which they wait instead.
        arena: pinned memory, for the host's.
    """

    def __init__(self, place: Place, *, compact: bool, scratch: Scratch | None = None, arena: Arena | None = None):
        self.place, self.compact, self.arena, self._scratch = place, compact, arena, scratch

    def rounded(self, x: Any) -> Any:
        """``x`` as it would come back, where it is."""
        return packed(x) if self.compact and isinstance(x, Tensor) else x

    def keep(self, x: Any) -> Any:
        """``x``, a tensor or a feature in a file, where it shall wait; itself where it is there already."""
        x = self.rounded(x)
        if self._scratch is not None and x.dim() > 1:  # vectors are asked for at any time, and small
            return x if isinstance(x, Filed) else self._scratch.store(x)
        if isinstance(x, Filed):
            x = x.fetched(torch.device("cpu"))
        if self.place == "gpu" or x.device.type == "cpu":
            return x
        flat = None if self.arena is None else self.arena.empty((x.numel(),), x.dtype)
        place = torch.empty_like(x, device="cpu") if flat is None else _laid_out_like(flat, x)
        transfers().store(x, place)
        return place


class Scratch:
    """Files without a name, in which features and rows wait side by side, and which are gone with their holders.

    They grow as far as they have to, and do not shrink: the system waits for what it is just writing before it gives
    room on the disk back, and has to find that room again for what comes next.

    Args:
        folder: where they are; None: the system's temporary one.
        files: how many; see :class:`qdiff.block_io.Lanes`.
    """

    def __init__(self, folder: Path | None, files: int = FILES):
        self.folder, self.place = folder, str(folder or tempfile.gettempdir())
        self._handles: list[int] = []
        closing = _closing(os.getpid())  # a finalizer must not start threads
        weakref.finalize(self, _close, self._handles, closing)
        for _ in range(files):
            handle, name = tempfile.mkstemp(dir=folder, prefix=".captured-", suffix=".part")
            os.unlink(name)
            self._handles.append(handle)
        self._reach = 0  # of each
        self._turn = 0
        self._free = Stretches()
        self._gone: deque[tuple[int, int, list[Future[None]]]] = deque()  # sections that may still be written to

    @property
    def size(self) -> int:
        """In bytes; the disk has room for it."""
        return self._reach * len(self._handles)

    def reserve(self, size: int) -> None:
        """See to it that there is room on the disk for so many bytes in all.

        Raises:
            OSError: the disk is full; found out here, not by a signal when the memory is read.
        """
        self._reach_to(_whole_pages(-(-size // len(self._handles))))

    def _reach_to(self, end: int) -> None:
        more = end - self._reach
        if more <= 0:
            return
        try:
            for handle in self._handles:
                os.posix_fallocate(handle, self._reach, more)
        except OSError as error:
            for handle in self._handles:
                os.ftruncate(handle, self._reach)  # what was found of it is for others
            raise OSError(error.errno, error.strerror, self.place) from error
        self._free.give_back(self._reach, more)
        self._reach = end

    def section(self, size: int, *, stripe: int = 2**20, from_top: bool = False) -> Section:
        """So many bytes of them, which are free again when nobody holds them.

        Args:
            stripe: bytes that lie one behind the other.
            from_top: the highest place that is free instead of the lowest: what lives long and what lives short then do
                not end up between one another.

        Raises:
            OSError: the disk is full.
        """
        turns, rest = divmod(max(1, size), stripe * len(self._handles))
        length = turns * stripe + (_whole_pages(min(rest, stripe)) if rest else 0)  # of each file
        for _ in range(len(self._gone)):
            gone = self._gone.popleft()
            if all(task.done() for task in gone[2]):
                self._free.give_back(gone[0], gone[1])
            else:
                self._gone.append(gone)
        if self._free.longest < length:
            self._reach_to(self._reach + length - self._free.ending_at(self._reach))
        offset = self._free.take(length, from_top=from_top)
        assert offset is not None  # there is a stretch of that length now
        first = self._turn = (self._turn + 1) % len(self._handles)  # sections of one stripe go to all files too
        section = Section(self, Lanes((*self._handles[first:], *self._handles[:first]), offset, stripe))
        weakref.finalize(section, self._gone.append, (offset, length, section.pending)).atexit = False
        return section

    def store(self, x: Tensor) -> Filed:
        """Have a tensor written.

        Raises:
            OSError: the disk is full.
        """
        size = x.numel() * x.element_size()
        section = self.section(size)
        block_io().write(section.to_write(0, size), _flat(x))
        return Filed(section.to_read(0, size, pending=section.pending), x)

    def to_the_disk(self, *, forget: bool = False) -> None:
        """Wait until the system has all of it on the disk.

        Args:
            forget: and nothing of it in memory.
        """
        for handle in self._handles:
            os.fsync(handle)
            if forget and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _close(handles: list[int], closing: SimpleQueue[Callable[[], object]]) -> None:
    for handle in handles:
        closing.put(functools.partial(os.close, handle))


@functools.cache
def _closing(process: int) -> SimpleQueue[Callable[[], object]]:
    """What a thread of this process works through, one after the other, beside whatever comes next.

    Where a disk is told of the room that files give back, closing them takes a second for every few gigabytes.
    """
    todo: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def work() -> None:
        while True:
            with contextlib.suppress(OSError):
                todo.get()()

    threading.Thread(target=work, name="giving files back", daemon=True).start()
    return todo


def wait_for_closed() -> None:
    """Wait until the disk has the room of all files back that were let go."""
    done = threading.Event()
    _closing(os.getpid()).put(done.set)
    done.wait()


class Section:
    """A part of a scratch: free again when nobody holds it any more and all of it is written.

    Attributes:
        lanes: where it is.
        pending: what is being written.
    """

    def __init__(self, scratch: Scratch, lanes: Lanes):
        self.lanes = lanes
        self.pending: list[Future[None]] = []
        self._scratch = scratch  # its files live as long as this

    def to_write(self, offset: int, size: int) -> Piece:
        """A stretch of it, in bytes, which is read when all that was being written to the section is there.

        It holds the files and not the section, which is not free before all is written anyway: who writes may let go
        of it a moment later.
        """
        return Piece(self.lanes, offset, size, self._scratch.place, holder=self._scratch, pending=self.pending)

    def to_read(self, offset: int, size: int, pending: list[Future[None]] | None = None) -> Piece:
        """A stretch of it, in bytes, that is written, or is when ``pending`` is done."""
        return Piece(self.lanes, offset, size, self._scratch.place, holder=self, pending=pending)

    def mapped(self, size: int) -> mmap.mmap:
        """Memory that is its first so many bytes, stripe after stripe.

        Raises:
            OSError: the system has no room for it among addresses.
        """
        if len(self.lanes.handles) == 1:
            return mmap.mmap(self.lanes.handles[0], size, offset=self.lanes.base)
        # Addresses alone, which the stripes take over; they go with this object.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        start, position = torch.frombuffer(memory, dtype=torch.uint8).data_ptr(), 0
        while position < size:
            handle, offset, length = self.lanes.at(position)
            _map_over(start + position, min(length, size - position), handle, offset)
            position += length
        return memory


def _map_over(start: int, size: int, handle: int, offset: int) -> None:
    """Let addresses that this process holds stand for a stretch of a file.

    Raises:
        OSError: the system refuses.
    """
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if call(start, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, handle, offset) != start:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Filed:
    """A feature that waits in a file.

    Args:
        like: a tensor of its shape, its type and its layout in memory.
    """

    def __init__(self, piece: Piece, like: Tensor):
        self.piece, self.dtype = piece, like.dtype
        self._like = torch.empty_like(like, device="meta")

    def dim(self) -> int:
        return self._like.dim()

    def fetched(self, device: torch.device) -> Tensor:
        """The feature, on a device."""
        flat = torch.empty(self._like.numel(), dtype=self.dtype, device=device)
        return _laid_out_like(block_io().read(self.piece, flat), self._like)


class File:
    """A part of a scratch for rows, which goes with whoever holds it or a tensor that is mapped to it.

    It is mapped for those who want single rows, and written by calls: writing to mapped memory goes page by page
    through the system, several times as slow.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, size: int, scratch: Scratch):
        self._section = scratch.section(size, stripe=_ROWS_STRIPE, from_top=True)

    def mapped(self, count: int, dtype: torch.dtype) -> Tensor:
        """So many values from its beginning. To be asked for once."""
        mapping = self._section.mapped(count * dtype.itemsize)
        flat = torch.frombuffer(mapping, dtype=dtype, count=count)
        _MAPPED[flat.data_ptr()] = self
        weakref.finalize(mapping, _MAPPED.pop, flat.data_ptr(), None).atexit = False  # torch holds on to the mapping
        return flat

    def write(self, offset: int, values: Tensor) -> None:
        """Have values in one row written, at a number of bytes from its beginning."""
        pending = self._section.pending
        pending[:] = [task for task in pending if not task.done() or task.exception()]
        block_io().write(self._section.to_write(offset, values.numel() * values.element_size()), values)

    def written(self) -> None:
        """Wait until all of it is there."""
        for task in self._section.pending:
            task.result()
        self._section.pending.clear()

    def piece(self, offset: int, size: int) -> Piece:
        """A stretch of it, in bytes, that is written."""
        return self._section.to_read(offset, size)

    def read(self, offset: int, out: Tensor) -> None:
        """Fill a dense tensor on the host from a number of bytes on. Any thread may do so."""
        flat = _as_it_lies(out).view(torch.uint8)
        read_at_once(self.piece(offset, flat.numel()), flat)


def _whole_pages(size: int) -> int:
    return -(-max(1, size) // mmap.PAGESIZE) * mmap.PAGESIZE


_MAPPED: dict[int, File] = {}  # by where its contents begin in memory


def _file_of(x: Tensor) -> File | None:
    return _MAPPED.get(x.untyped_storage().data_ptr())


def is_filed(x: Any) -> bool:
    """Whether it is a feature in a file, or a tensor whose memory is a file's."""
    return isinstance(x, Filed) or _file_of(x) is not None


def _offset_in_file(x: Tensor) -> int:
    return x.data_ptr() - x.untyped_storage().data_ptr()


def read_filed(x: Tensor, out: Tensor) -> None:
    """Copy what lies in a file, one behind the other in memory, to where it shall lie on the host, by calls."""
    file = _file_of(x)
    if file is None:
        out.copy_(x)
    else:
        file.read(_offset_in_file(x), out)


def fetched(x: Any, device: torch.device) -> Tensor:
    """A tensor or a feature in a file, on a device.

    What is read through a mapping is the system's, which keeps as much of it in memory as it has room for, but counts
    as this process's from the first touch: on its way to a GPU it is read by calls.
    """
    if isinstance(x, Filed):
        return x.fetched(device)
    file = _file_of(x)
    if file is None or device.type == "cpu":
        return transfers().fetched(x, device)
    out = torch.empty_like(x, device=device)  # dense, in the order in which it lies in the file
    block_io().read(file.piece(_offset_in_file(x), x.numel() * x.element_size()), _as_it_lies(out))
    return out


def _as_it_lies(x: Tensor) -> Tensor:
    """The values of a dense tensor in one row."""
    return x.as_strided((x.numel(),), (1,))


def released(x: Tensor) -> None:
    """Let go of the memory to which a file's contents were read, where ``x`` is such a file's."""
    if _file_of(x) is not None:
        start = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = x.data_ptr() + x.numel() * x.element_size() - start
        advise(start, size, mmap.MADV_DONTNEED)


def _flat(x: Tensor) -> Tensor:
    """As it lies in memory, for :func:`_laid_out_like`."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def _laid_out_like(flat: Tensor, like: Tensor) -> Tensor:
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)


@dataclass(frozen=True)
class _Layout:
    """Where the rows of one collector go; see :class:`Collector`."""

    rows: int
    near: int
    pinned: int
    ring: int
    compact: bool
    scratch: Scratch | None
    arena: Arena | None

    @property
    def filed(self) -> int:
        """Rows in a file."""
        return self.rows - self.near - self.pinned


class Collector:
    """Puts a unit's rows where they shall lie as they come, chunk by chunk: no second copy of them ever exists.

    Args:
        rows: how many will come; near: how many of them stay on the device they come from.
        compact: in half precision.
        pinned: how many of the others wait in host memory, out of ``arena`` where they come from a GPU; None for all.
            The last ones wait in ``scratch``.
        ring: room for so many rows behind the pinned ones, where some wait in a file: they are read to there.
    """

    def __init__(
        self,
        rows: int,
        near: int,
        *,
        compact: bool,
        pinned: int | None = None,
        ring: int = 0,
        scratch: Scratch | None = None,
        arena: Arena | None = None,
    ):
        self.rows = rows
        near = min(near, rows)
        pinned = rows - near if pinned is None else min(pinned, rows - near)
        self._layout = _Layout(rows, near, pinned, ring, compact, scratch, arena)
        self.filled = 0
        self._stores: list[_RowStore] = []

    def add(self, tensors: tuple[Tensor, ...]) -> None:
        """The next rows, of every tensor."""
        if not self._stores:
            self._stores = [_RowStore(self._layout, x) for x in tensors]
        for store, x in zip(self._stores, tensors, strict=True):
            store.write(self.filled, x)
        self.filled += len(tensors[0])

    @torch.no_grad()
    def become(self, step: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]], chunk: int) -> None:
        """Let other rows take the place of these: what ``step`` makes of them, chunk by chunk.

        A tensor whose rows are as long as those of the one it replaces lies in the same memory.

        Args:
            step: takes the number of a chunk's first row, and the chunk's tensors in float32, where they came from.
        """
        before, after = self._stores, list[_RowStore]()
        for store in before:
            store.written()
        for start in range(0, self.rows, chunk):
            made = step(start, tuple(store.read(start, min(start + chunk, self.rows)) for store in before))
            after = after or [
                before[i].reshaped(x) if i < len(before) and before[i].fits(x) else _RowStore(self._layout, x)
                for i, x in enumerate(made)
            ]
            for store, x in zip(after, made, strict=True):
                store.write(start, x)
        self._stores = after

    def parts(self) -> Rows:
        """All rows, by where they lie."""
        if self.filled != self.rows:
            raise RuntimeError(f"{self.filled} of {self.rows} rows were collected")
        return Rows(*(tuple(part) for part in zip(*(store.parts() for store in self._stores), strict=True)))


class Rows(NamedTuple):
    """Of every tensor of a collector.

    Attributes:
        near: on the device they came from; far: in host memory; filed: in a file.
        room: the far ones with the ring behind them.
    """

    near: tuple[Tensor, ...]
    far: tuple[Tensor, ...]
    filed: tuple[Tensor, ...]
    room: tuple[Tensor, ...]


class _RowStore:
    """The rows of one tensor, as they lie in memory: channels last on a GPU."""

    def __init__(self, layout: _Layout, first: Tensor):
        # Not the collector itself: the two would keep one another alive until the next collection of garbage.
        self.layout, self.shape = layout, tuple(first.shape[1:])
        self.last = first.device.type == "cuda"
        self.dtype = torch.float16 if layout.compact and compactable(first) else first.dtype
        self.length = first[0].numel()
        self.head = torch.empty(layout.near, self.length, dtype=self.dtype, device=first.device)
        self._file: File | None = None
        self.room, self.file = self._far(), self._filed()

    def fits(self, x: Tensor) -> bool:
        """Whether such rows could lie where these do."""
        return x[0].numel() == self.length and compactable(x) == self.dtype.is_floating_point

    def reshaped(self, x: Tensor) -> _RowStore:
        """The same memory, for rows of the shape of ``x``."""
        other = copy.copy(self)
        other.shape = tuple(x.shape[1:])
        return other

    def read(self, start: int, stop: int) -> Tensor:
        """Some of the rows, in float32 on the device they came from."""
        pieces, first = [], 0
        for part, length in self._parts():
            begin, end = max(start, first), min(stop, first + length)
            if begin < end:
                pieces.append(fetched(part[begin - first : end - first], self.head.device))
            first += length
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return self._shaped(rows.float() if rows.is_floating_point() else rows)

    def _far(self) -> Tensor:
        count = self.layout.pinned + (self.layout.ring if self.layout.filed else 0)
        return self._pinned(count) if count and self.last else torch.empty(count, self.length, dtype=self.dtype)

    def _filed(self) -> Tensor:
        """Mapped."""
        count = self.layout.filed
        if not count:
            return torch.empty(0, self.length, dtype=self.dtype)
        values = count * self.length
        assert self.layout.scratch is not None  # as the layout has rows that are to wait there
        self._file = File(values * self.dtype.itemsize, self.layout.scratch)
        return self._file.mapped(values, self.dtype).view(count, self.length)

    def _pinned(self, count: int) -> Tensor:
        """Out of the arena; where its gaps are too small, memory of its own: the GPU has to reach it."""
        shape, arena = (count, self.length), self.layout.arena
        piece = None if arena is None else arena.empty(shape, self.dtype, from_top=True)
        if piece is None:
            log.debug("%d rows of %d values get pinned memory of their own", *shape)
            piece = alone(shape, self.dtype)
        return piece

    def write(self, start: int, x: Tensor) -> None:
        rows = fused.rows_view(x) if self.last else x.reshape(len(x), -1)
        if self.dtype == torch.float16 and rows.dtype == torch.float32:
            half = rows.half()
            if _all_finite(half):
                rows = half
            else:
                self._widen()
        first = 0  # of a part's rows
        for part, length in self._parts():
            begin, end = max(start, first), min(start + len(rows), first + length)
            if begin < end and part is self.file:
                assert self._file is not None
                offset = (begin - first) * self.length * self.dtype.itemsize
                self._file.write(offset, rows[begin - start : end - start].to(self.dtype).reshape(-1))
            elif begin < end:
                transfers().store(rows[begin - start : end - start], part[begin - first : end - first])
            first += length

    def _parts(self) -> list[tuple[Tensor, int]]:
        layout = self.layout
        return [(self.head, layout.near), (self.room, layout.pinned), (self.file, layout.filed)]

    def _widen(self) -> None:
        """Values beyond half precision have come."""
        self.written()
        self.dtype = torch.float32
        self.head = self.head.float()
        room, file = self._far(), self._filed()
        self.room, self.file = room.copy_(self.room), file.copy_(self.file)
        released(self.file)

    def written(self) -> None:
        """Wait until all is there, on the host and in the file."""
        transfers().wait()
        if self._file is not None:
            self._file.written()

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :class:`Rows` has them."""
        self.written()
        far = self.room[: self.layout.pinned]
        near, far, filed, room = (self._shaped(rows) for rows in (self.head, far, self.file, self.room))
        return near, far, filed, room

    def _shaped(self, rows: Tensor) -> Tensor:
        return fused.from_rows(rows, self.shape) if self.last else rows.view(len(rows), *self.shape)
