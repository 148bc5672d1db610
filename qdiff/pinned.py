"""Host memory that a GPU can read and write by itself: taken once, given out in pieces.

A calibration puts other data there for every unit. Pinning takes time of its own, so its share of the host is pinned
once.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import weakref

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes: no two pieces share a page of what a GPU transfers at once


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
        self._memory = torch.empty(self.size, dtype=torch.uint8)
        if pinned and self.size:
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(self._memory.data_ptr(), self.size, 0)))
            weakref.finalize(self._memory, runtime.cudaHostUnregister, self._memory.data_ptr()).atexit = False
        self._free = [(0, self.size)] if self.size else []  # offset and length, in order, never two that touch

    @property
    def free_bytes(self) -> int:
        """All that is free, in however many stretches."""
        return sum(length for _, length in self._free)

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
        offset = self._take(size, from_top=from_top)
        if offset is None:
            return None
        # Torch holds on to the buffer as long as a tensor's storage lives, and the buffer is what gives the piece back.
        buffer = (ctypes.c_char * size).from_address(self._memory.data_ptr() + offset)
        weakref.finalize(buffer, self._give_back, offset, size).atexit = False
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is a piece of this arena."""
        return x.device.type == "cpu" and 0 <= x.data_ptr() - self._memory.data_ptr() < self.size

    def lowered(self, x: Tensor) -> Tensor:
        """A piece, moved to a lower place where one is free: long stretches get free again above it."""
        offset, size = x.data_ptr() - self._memory.data_ptr(), x.untyped_storage().nbytes()
        if not any(start < offset and length >= size for start, length in self._free):
            return x
        flat = self.empty((x.numel(),), x.dtype)  # the lowest
        return torch.as_strided(flat, x.shape, x.stride()).copy_(x)

    def _take(self, size: int, *, from_top: bool) -> int | None:
        places = reversed(range(len(self._free))) if from_top else range(len(self._free))
        for place in places:
            offset, length = self._free[place]
            if length >= size:
                rest = (offset, length - size) if from_top else (offset + size, length - size)
                self._free[place : place + 1] = [rest] if rest[1] else []
                return offset + length - size if from_top else offset
        return None

    def _give_back(self, offset: int, size: int) -> None:
        place = bisect.bisect(self._free, (offset, size))
        end = offset + size
        if place < len(self._free) and self._free[place][0] == end:
            end += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == offset:
            place -= 1
            offset = self._free.pop(place)[0]
        self._free.insert(place, (offset, end - offset))
