"""Rows that wait in a file, read ahead of the iterations that draw them, into memory that a GPU reads by itself.

CUDA graphs cannot read files. But which rows each iteration draws is known beforehand: the rows of ten iterations, a
*stretch*, are read while the stretches before are computed with, into a ring of three stretches behind the pinned rows.
Every drawn row of a file has its own place in the ring, and the table of draws names that place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from qdiff.block_io import CORES
from qdiff.capture import UnitData
from qdiff.places import RING_STRETCHES, STRETCH, read_filed

# Threads: a unit of large rows learns as fast as they come. Beside an H200 four brought 12 GB/s, from files that the
# system had in memory.
READERS = min(16, max(4, CORES // 2))


class Mark(Protocol):
    """A point in a GPU's work, as ``torch.cuda.Event``."""

    def synchronize(self) -> None:
        """Wait until the GPU has come there."""


class ReadAhead:
    """Fills the ring of one unit's data, stretch by stretch.

    Args:
        data: of three parts: rows near, rows in pinned memory with room behind them, rows in a file.
        draws: iterations x batch indices into all rows.
        mark: marks the end of what a GPU was given to do.

    Attributes:
        draws: the same with the places in the ring of the rows in the file, counted on from the pinned ones.
    """

    def __init__(self, data: UnitData, draws: Tensor, *, mark: Callable[[], Mark]):
        far = data.tail
        if far is None or far.tail is None:
            raise ValueError("no rows wait in a file")
        draws = draws.cpu()
        self._iterations, batch = draws.shape
        first_filed = len(data.target) + len(far.target)
        self._rows = draws - first_filed  # of the file; negative: not in it
        iteration = torch.arange(self._iterations)[:, None]
        self._slots = (iteration % (RING_STRETCHES * STRETCH)) * batch + torch.arange(batch)
        self.draws = torch.where(self._rows < 0, draws, first_filed + self._slots)
        self._files = [*far.tail.inputs, far.tail.target]
        self._rings = [x[len(far.target) :] for x in far.room]
        self._mark = mark
        self._marks: deque[tuple[int, Mark]] = deque()  # how many iterations are done there
        self._planner, self._readers = ThreadPoolExecutor(1), ThreadPoolExecutor(READERS)
        self._read: list[Future[None]] = []  # of each stretch, in order

    def need(self, last: int) -> None:
        """Wait for the rows of all iterations up to number ``last``, and have those of the stretch after read.

        All iterations but the last ``STRETCH`` of them must have been given to the GPU, see :meth:`played`.
        """
        stretch = min(last, self._iterations - 1) // STRETCH
        for number in range(len(self._read), min(stretch + 2, -(-self._iterations // STRETCH))):
            before = self._before(number)
            self._read.append(self._planner.submit(self._fill, number, before))
        self._read[stretch].result()

    def played(self, done: int) -> None:
        """The GPU was given all iterations below ``done``."""
        self._marks.append((done, self._mark()))

    def close(self) -> None:
        """Stop reading; the ring is not written to any more when this returns."""
        for future in self._read:
            future.cancel()
        self._planner.shutdown()
        self._readers.shutdown()

    def _before(self, number: int) -> Mark | None:
        """When the part of the ring is free that a stretch takes: it is that of the stretch three before."""
        free_from = (number - RING_STRETCHES + 1) * STRETCH
        if free_from <= 0:
            return None
        while self._marks[0][0] < free_from:
            self._marks.popleft()
        return self._marks[0][1]

    def _fill(self, number: int, before: Mark | None) -> None:
        if before is not None:
            before.synchronize()
        part = slice(number * STRETCH, (number + 1) * STRETCH)
        rows, slots = self._rows[part].flatten(), self._slots[part].flatten()
        filed = rows >= 0
        copied = [
            self._readers.submit(read_filed, file[row], ring[slot])
            for row, slot in zip(rows[filed].tolist(), slots[filed].tolist(), strict=True)
            for ring, file in zip(self._rings, self._files, strict=True)
        ]
        for copy in copied:
            copy.result()
