"""Tensors to files and back, block by block, while others compute: threads, and pinned memory between disk and GPU.

Writing returns as soon as the last block has left the GPU; reading can be announced, and is ahead of who reads then.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BLOCK = 2**23
# For each direction. One alone does not keep a disk busy; what the system has in memory each copies at some GB/s.
THREADS = min(8, max(4, CORES // 4))
_WRITTEN, _READ_AHEAD, _READ = 3 * THREADS, 24, THREADS  # blocks of pinned memory
STAGING_BYTES = (_WRITTEN + _READ_AHEAD + _READ) * BLOCK


class _Staging:
    """A block of pinned memory; ``mark`` is the end of what a GPU was given to copy from or to it."""

    def __init__(self) -> None:
        self.memory = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.mark: torch.cuda.Event | None = None

    def marked(self) -> None:
        if torch.cuda.is_available():
            self.mark = self.mark or torch.cuda.Event()
            self.mark.record()

    def wait(self) -> None:
        if self.mark is not None:
            self.mark.synchronize()


class Lanes(NamedTuple):
    """Files to which stripes of what is stored go in turn: the system lets threads write to one file one by one.

    Attributes:
        handles: of the open files.
        base: where it begins, in each.
        stripe: bytes.
    """

    handles: tuple[int, ...]
    base: int
    stripe: int

    def at(self, position: int) -> tuple[int, int, int]:
        """The file of a byte, its offset there, and how many bytes there are up to the end of the stripe."""
        stripe, within = divmod(position, self.stripe)
        turn, lane = divmod(stripe, len(self.handles))
        return self.handles[lane], self.base + turn * self.stripe + within, self.stripe - within


class Piece:
    """A stretch of what is stored in files.

    Args:
        lanes: where it is stored; offset, size: of the stretch, in bytes.
        place: what errors name.
        holder: what keeps the files open.
        pending: what is being written, here or beside it; None: nothing yet.
    """

    def __init__(
        self,
        lanes: Lanes,
        offset: int,
        size: int,
        place: str,
        holder: Any = None,
        pending: list[Future[None]] | None = None,
    ):
        self.lanes, self.offset, self.size, self.place, self.holder = lanes, offset, size, place, holder
        self.pending = [] if pending is None else pending

    def blocks(self) -> Iterable[tuple[int, int]]:
        """Offset within the piece and size of each block, which threads take one by one."""
        return ((start, min(BLOCK, self.size - start)) for start in range(0, self.size, BLOCK))

    def written(self) -> None:
        """Wait until all of it is in the file.

        Raises:
            OSError: it could not be written.
        """
        for task in self.pending:
            task.result()


class BlockIO:
    """Reads and writes pieces of files for one thread, which computes meanwhile."""

    def __init__(self) -> None:
        self._writers, self._readers = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(THREADS)
        self._unwritten = threading.BoundedSemaphore(_WRITTEN)  # of blocks on the host, which wait where they are
        self._coming: deque[tuple[Piece, int, int]] = deque()
        self._ahead: dict[tuple[int, int], tuple[Piece, _Staging, Future[None]]] = {}

    @functools.cached_property
    def _for_writing(self) -> SimpleQueue[_Staging]:
        blocks: SimpleQueue[_Staging] = SimpleQueue()
        for _ in range(_WRITTEN):
            blocks.put(_Staging())
        return blocks

    @functools.cached_property
    def _for_reading_ahead(self) -> list[_Staging]:
        return [_Staging() for _ in range(_READ_AHEAD)]

    @functools.cached_property
    def _for_reading(self) -> list[_Staging]:
        return [_Staging() for _ in range(_READ)]

    def write(self, piece: Piece, values: Tensor) -> None:
        """Have a piece filled with values in one row, which must not change until :meth:`Piece.written` returns.

        It waits where the disk does not keep up: no more than a few blocks are on their way.
        """
        data = values.contiguous().view(torch.uint8)
        for start, size in piece.blocks():
            part = data[start : start + size]
            if _is_on_host(data):
                self._unwritten.acquire()
                task = self._writers.submit(self._write_from_host, piece, start, part)
            else:
                staging = self._for_writing.get()
                staging.memory[:size].copy_(part, non_blocking=True)
                staging.marked()
                task = self._writers.submit(self._write_staged, piece, start, size, staging)
            piece.pending.append(task)

    def _write_from_host(self, piece: Piece, start: int, values: Tensor) -> None:
        try:
            _write(piece, start, values)
        finally:
            self._unwritten.release()

    def _write_staged(self, piece: Piece, start: int, size: int, staging: _Staging) -> None:
        try:
            staging.wait()
            _write(piece, start, staging.memory[:size])
        finally:
            self._for_writing.put(staging)

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Read pieces ahead that will be read to a GPU, in about this order; those announced before are not."""
        for _, staging, read in self._ahead.values():
            read.exception()
            self._for_reading_ahead.append(staging)
        self._ahead.clear()
        self._coming = deque((piece, start, size) for piece in pieces for start, size in piece.blocks())
        self._go_ahead()

    def _go_ahead(self) -> None:
        while self._coming and self._for_reading_ahead:
            piece, start, size = self._coming.popleft()
            staging = self._for_reading_ahead.pop(0)  # the one that has rested longest
            self._ahead[id(piece), start] = piece, staging, self._read_to(staging, piece, start, size)

    def read(self, piece: Piece, out: Tensor) -> Tensor:
        """Fill a tensor of values in one row, on any device, with a piece.

        Raises:
            OSError: it could not be read, or not be written before.
        """
        data = out.view(torch.uint8)
        if _is_on_host(data):
            tasks = [
                self._readers.submit(_read, piece, start, data[start : start + size]) for start, size in piece.blocks()
            ]
            for task in tasks:
                task.result()
            return out
        started: deque[tuple[int, int, _Staging, Future[None], list[_Staging]]] = deque()

        def finish() -> None:
            start, size, staging, read, home = started.popleft()
            read.result()
            data[start : start + size].copy_(staging.memory[:size], non_blocking=True)
            staging.marked()
            home.append(staging)

        for start, size in piece.blocks():
            if (key := (id(piece), start)) in self._ahead:
                _, staging, read = self._ahead.pop(key)
                started.append((start, size, staging, read, self._for_reading_ahead))
            else:
                while not self._for_reading:
                    finish()
                staging = self._for_reading.pop(0)
                read = self._read_to(staging, piece, start, size)
                started.append((start, size, staging, read, self._for_reading))
        while started:
            finish()
        self._go_ahead()
        return out

    def close(self) -> None:
        """Give back the pinned memory, when all is written; it is taken again by who writes or reads."""
        self.expect(())
        for _ in range(_WRITTEN):
            self._unwritten.acquire()
        self._unwritten.release(_WRITTEN)
        if "_for_writing" in vars(self):
            for _ in range(_WRITTEN):
                self._for_writing.get()
        for name in ("_for_writing", "_for_reading_ahead", "_for_reading"):
            vars(self).pop(name, None)

    def _read_to(self, staging: _Staging, piece: Piece, start: int, size: int) -> Future[None]:
        def read() -> None:
            staging.wait()
            _read(piece, start, staging.memory[:size])

        return self._readers.submit(read)


def _is_on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


@functools.cache
def block_io() -> BlockIO:
    """The one of this process."""
    return BlockIO()


def _write(piece: Piece, start: int, values: Tensor) -> None:
    _all(os.pwrite, piece, start, values)


def read_at_once(piece: Piece, out: Tensor) -> None:
    """Fill bytes on the host with a piece that is written: in this thread, whichever it is."""
    _read(piece, 0, out)


def _read(piece: Piece, start: int, values: Tensor) -> None:
    piece.written()
    _all(lambda handle, rest, offset: os.preadv(handle, [rest], offset), piece, start, values)


def _all(call: Callable[[int, Any, int], int], piece: Piece, start: int, values: Tensor) -> None:
    """Read or write as often as it takes.

    Raises:
        OSError: naming the place; also where a file ends too early.
    """
    rest, position = values.numpy().data, piece.offset + start
    while rest:
        handle, offset, size = piece.lanes.at(position)
        try:
            done = call(handle, rest[:size], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, piece.place) from error
        if not done:
            raise OSError(errno.EIO, os.strerror(errno.EIO), piece.place)
        rest, position = rest[done:], position + done
