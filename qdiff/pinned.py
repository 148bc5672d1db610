"""Host memory that a GPU can read and write by itself: taken once, given out in pieces.

A calibration puts other data there for every unit. Pinning takes time of its own, so its share of the host is pinned
once.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdiff.stretches import Stretches

ALIGNMENT = 512  # bytes: no two pieces share a page of what a GPU transfers at once
_PART = 2**28  # bytes that one thread asks the system for at a time
_THREADS = 16
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which mmap does not name; since Linux 5.14


@dataclass(frozen=True)
class _Piece:
    size: int
    end: weakref.finalize[..., Any]  # gives it back


class Arena:
    """A stretch of host memory out of which tensors are cut.

    A piece is free again when the last tensor on it is gone, views included.

    Args:
        size: bytes.
        pinned: let GPUs reach it. Needs a CUDA device.

    Raises:
        RuntimeError: the system does not let so much memory be pinned.
    """

    def __init__(self, size: int, *, pinned: bool = True):
        self.size = size - size % ALIGNMENT
        self._memory = _in_large_pages(self.size)
        if pinned and self.size:
            _populate(self._memory)
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(self._memory.data_ptr(), self.size, 0)))
            weakref.finalize(self._memory, runtime.cudaHostUnregister, self._memory.data_ptr()).atexit = False
        self._free = Stretches(self.size)
        self._pieces: dict[int, _Piece] = {}  # by offset

    @property
    def free_bytes(self) -> int:
        """All that is free, in however many stretches."""
        return self._free.total

    @property
    def longest(self) -> int:
        """The longest stretch that is free."""
        return self._free.longest

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, from_top: bool = False) -> Tensor | None:
        """A contiguous tensor, not initialised; None where no free stretch is long enough.

        Args:
            from_top: take the highest place instead of the lowest: what lives long and what lives short then do not
                end up between one another.
        """
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        size = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        offset = self._free.take(size, from_top=from_top)
        if offset is None:
            return None
        return self._piece(offset, size, dtype, count).view(shape)

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is a piece of this arena."""
        return x.device.type == "cpu" and 0 <= x.data_ptr() - self._memory.data_ptr() < self.size

    def moved_together(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        """Move whole pieces as low as they go, so that what is free between them becomes one stretch above.

        Args:
            tensors: on pieces of this arena; the only ones that are left on them. They must not be used afterwards.

        Returns:
            what takes the place of each, by ``id``.
        """
        moved: dict[int, Tensor] = {}
        places: dict[int, Tensor] = {}  # the flat tensor on the piece that was at an offset
        base = self._memory.data_ptr()
        for x in sorted(tensors, key=Tensor.data_ptr):
            offset = x.data_ptr() - base
            if offset not in places:
                places[offset] = self._moved(offset, x.dtype)
            moved[id(x)] = torch.as_strided(places[offset], x.shape, x.stride())
        return moved

    def _moved(self, offset: int, dtype: torch.dtype) -> Tensor:
        piece = self._pieces.pop(offset)
        piece.end.detach()  # what is on the piece now no longer has a say
        self._free.give_back(offset, piece.size)
        target = self._free.take(piece.size)
        assert target is not None  # at most where it was
        base = self._memory.data_ptr()
        ctypes.memmove(base + target, base + offset, piece.size)  # the two may overlap
        return self._piece(target, piece.size, dtype, piece.size // dtype.itemsize)

    def _piece(self, offset: int, size: int, dtype: torch.dtype, count: int) -> Tensor:
        # Torch holds on to the buffer as long as a tensor's storage lives, and the buffer is what gives the piece back.
        buffer = (ctypes.c_char * size).from_address(self._memory.data_ptr() + offset)
        end = weakref.finalize(buffer, self._end, offset)
        end.atexit = False
        self._pieces[offset] = _Piece(size, end)
        return torch.frombuffer(buffer, dtype=dtype, count=count)

    def _end(self, offset: int) -> None:
        self._free.give_back(offset, self._pieces.pop(offset).size)


def alone(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in pinned memory of its own, not initialised, which goes with it."""
    memory = Arena(math.prod(shape) * dtype.itemsize + ALIGNMENT)
    piece = memory.empty(shape, dtype)
    assert piece is not None  # the whole of it
    return piece


def advise(start: int, size: int, advice: int) -> None:
    """Tell the system about whole pages of memory, without holding other threads up; it may refuse."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    madvise(start, size, advice)


def _populate(memory: Tensor) -> None:
    """Have the system give all of it now, to several threads at once: pinning would ask for it in one.

    Where the system does not know this, pinning does it all.
    """
    start, size = memory.data_ptr(), memory.numel()
    if start % mmap.PAGESIZE or not sys.platform.startswith("linux"):
        return

    def ask(offset: int) -> None:
        advise(start + offset, min(_PART, size - offset), _POPULATE_WRITE)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        deque(threads.map(ask, range(0, size, _PART)), maxlen=0)


def _in_large_pages(size: int) -> Tensor:
    """Bytes of host memory, in large pages where the system has them: of those it hands out many more at once."""
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
