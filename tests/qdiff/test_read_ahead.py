"""Rows of a file are in the ring when an iteration wants them, and stay there until it is done."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qdiff.capture import UnitData, unit_data
from qdiff.places import RING_STRETCHES, STRETCH, Collector, Scratch
from qdiff.read_ahead import ReadAhead
from qdiff.reconstruction import draw_batches

ROWS, NEAR, PINNED, BATCH = 50, 9, 6, 4
RING = RING_STRETCHES * STRETCH * BATCH


def split_data(folder: Path, near: int = NEAR, pinned: int = PINNED) -> tuple[UnitData, Tensor, Tensor]:
    """A unit's rows in three places, and the same in one."""
    x, y = torch.randn(ROWS, 3, 4, 4), torch.randn(ROWS, 5)
    scratch = Scratch(folder)
    collectors = [Collector(ROWS, near, compact=False, pinned=pinned, ring=RING, scratch=scratch) for _ in range(2)]
    for rows in torch.arange(ROWS).split(7):
        for collector, whole in zip(collectors, (x, y), strict=True):
            collector.add((whole[rows],))
    return unit_data(*collectors), x, y


class Gpu:
    """Works through what it is given in a thread of its own, with delays, and looks into the ring when it comes there.

    As graphs do: an iteration's rows are fetched while the one before is computed with.
    """

    def __init__(self, data: UnitData, draws: Tensor, x: Tensor, y: Tensor, seed: int):
        self.reader = ReadAhead(data, draws, mark=self.mark)
        self.data, self.draws, self.right = data, draws, (x, y)
        self.random = random.Random(seed)
        self.queue: list[tuple[int, int] | threading.Event] = []
        self.given, self.wrong = threading.Condition(), 0
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def mark(self) -> Gpu.Mark:
        return Gpu.Mark(self)

    class Mark:
        def __init__(self, gpu: Gpu):
            self.event = threading.Event()
            gpu.give(self.event)

        def synchronize(self) -> None:
            assert self.event.wait(20)

    def give(self, what: tuple[int, int] | threading.Event) -> None:
        with self.given:
            self.queue.append(what)
            self.given.notify()

    def work(self) -> None:
        while True:
            with self.given:
                self.given.wait_for(lambda: self.queue)
                what = self.queue.pop(0)
            if isinstance(what, threading.Event):
                what.set()
                continue
            for iteration in range(what[0], min(what[1] + 1, len(self.draws))):
                time.sleep(self.random.choice((0, 0, 0.001, 0.003)))
                self.look(iteration)

    def look(self, iteration: int) -> None:
        assert self.data.tail is not None
        near = len(self.data.target)
        for place, row in zip(self.reader.draws[iteration], self.draws[iteration], strict=True):
            for head, room, right in zip(
                (*self.data.inputs, self.data.target), self.data.tail.room, self.right, strict=True
            ):
                found = head[place] if place < near else room[place - near]
                self.wrong += not torch.equal(found, right[row])


def graphs(iterations: int, every: int) -> Iterator[tuple[int, int]]:
    """First and last iteration of each graph, as the loop plays them between its looks."""
    for look in range(0, iterations, every):
        stop = min(look + every, iterations)
        for first in range(look, stop, STRETCH):
            yield first, min(first + STRETCH, stop)


@pytest.mark.parametrize(("iterations", "every"), [(137, 40), (63, 3), (25, 10), (7, 7), (1, 1)])
@pytest.mark.parametrize(("near", "pinned"), [(NEAR, PINNED), (0, 0), (NEAR, 0)])
def test_every_row_is_there_in_time(iterations: int, every: int, near: int, pinned: int, tmp_path: Path) -> None:
    data, x, y = split_data(tmp_path, near, pinned)
    draws = draw_batches(ROWS, BATCH, iterations, seed=0)
    gpu = Gpu(data, draws, x, y, seed=iterations)
    gpu.reader.need(1)
    for first, stop in graphs(iterations, every):
        gpu.reader.need(stop)
        gpu.give((first, stop))
        gpu.reader.played(stop)
    gpu.mark().synchronize()
    gpu.reader.close()
    assert gpu.wrong == 0
    assert int(gpu.reader.draws.max()) < near + pinned + RING


def test_batches_from_three_places(tmp_path: Path) -> None:
    """Where iterations run one by one, without a ring."""
    data, x, y = split_data(tmp_path)
    index = torch.tensor([49, 0, 14, 15, 8, 9, 30])
    (found,), target = data.rows(index, torch.device("cpu"))
    assert len(data) == ROWS
    assert torch.equal(found, x[index])
    assert torch.equal(target, y[index])


def test_closing_stops_what_is_being_read(tmp_path: Path) -> None:
    data, *_ = split_data(tmp_path)
    for room in data.tail.room:
        room.zero_()  # what was in memory before may be NaN, which does not equal itself
    reader = ReadAhead(data, draw_batches(ROWS, BATCH, 1000, seed=0), mark=lambda: pytest.fail("nothing was played"))
    reader.need(1)
    reader.close()
    before = [room.clone() for room in data.tail.room]
    time.sleep(0.05)
    assert all(torch.equal(a, b) for a, b in zip(before, data.tail.room, strict=True))


def test_without_a_file_there_is_nothing_to_read(tmp_path: Path) -> None:
    data, *_ = split_data(tmp_path, near=ROWS)
    with pytest.raises(ValueError, match="no rows wait in a file"):
        ReadAhead(data, draw_batches(ROWS, BATCH, 10, seed=0), mark=lambda: pytest.fail("nothing was played"))
