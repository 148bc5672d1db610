"""Copies beside what a GPU computes; without one the same calls copy at once."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qdiff.calibrate import calibrate
from qdiff.config import CalibrationConfig
from qdiff.memory import FileRate, FileRates, MemoryBudget
from qdiff.pinned import Arena
from qdiff.places import Shelf
from qdiff.transfers import Transfers, transfers

from . import test_latent_unets as latent
from .conftest import calibration_set, wrapped

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_without_a_gpu_it_is_plain_copying() -> None:
    moving, x = Transfers(), torch.randn(3, 4)
    moving.expect(x)
    assert moving.fetched(x, CPU) is x
    place = torch.empty(3, 4)
    moving.store(x, place)
    moving.wait()
    assert torch.equal(place, x)


class Late(Transfers):
    """Copies as late as they may be on a stream of their own: when someone waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Callable[[], object]] = []
        self.expected: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.stored = self.ahead = 0

    def expect(self, x: Tensor) -> None:
        if id(x) not in self.expected:
            copy = _unwritten(x)
            self.queue.append(lambda: copy.copy_(x))
            self.expected[id(x)] = x, copy, len(self.queue)

    def fetched(self, x: Tensor, device: torch.device) -> Tensor:
        there = self.expected.pop(id(x), None)
        if there is None:
            self._run(len(self.queue))
            return x.clone()
        self._run(there[2])
        self.ahead += 1
        return there[1]

    def store(self, x: Tensor, place: Tensor) -> None:
        place.copy_(_unwritten(place))
        self.queue.append(lambda: place.copy_(x))
        self.stored += 1

    def wait(self) -> None:
        self._run(len(self.queue))
        self.expected.clear()

    def _run(self, count: int) -> None:
        for number in range(count):
            self.queue[number]()
            self.queue[number] = lambda: None


def _unwritten(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan") if x.is_floating_point() else 77)


CASES = {
    "pixel": lambda: (wrapped(), calibration_set(7)),
    "transformers": lambda: (latent.wrapped("transformer"), latent.calibration_set("transformer")),
}


@pytest.mark.parametrize("host_bytes", [None, 200_000])
@pytest.mark.parametrize("kind", CASES)
def test_a_calibration_waits_for_what_it_copies(
    kind: str, host_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it reads was written, whatever it writes over was read: it learns the same."""
    late = Late()

    class Away(Shelf):
        def keep(self, x: Tensor) -> Tensor:
            x = self.rounded(x)
            place = torch.empty_like(x)
            late.store(x, place)
            return place

    results = []
    for delayed in (False, True):
        if delayed:
            for name in ("places", "capture"):
                monkeypatch.setattr(f"qdiff.{name}.transfers", lambda: late)
            monkeypatch.setattr("qdiff.memory.Shelf", Away)
        module = sys.modules["qdiff.calibrate"]  # the package has a function of that name
        monkeypatch.setattr(module, "CAPTURE_CHUNK", 2)
        qnn, data = CASES[kind]()
        monkeypatch.setattr("qdiff.memory.resident_bytes", lambda: 0)
        monkeypatch.setattr("qdiff.memory._LOADED_LATER", 0)
        monkeypatch.setattr("qdiff.memory.file_rates", lambda folder: FileRates(FileRate(1e9, 1e9), FileRate(2e9, 2e9)))
        budget = MemoryBudget(host_bytes=host_bytes)
        calibrate(qnn, data, CalibrationConfig(iters=2, iters_a=2, batch_size=2), budget=budget)
        results.append(qnn.state_dict())
    assert late.stored > 100
    assert late.ahead > 100
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_there_are_those_of_the_process() -> None:
    assert transfers() is transfers()


@pytest.mark.gpu
@needs_gpu
def test_what_is_stored_comes_back_whenever_it_is_fetched() -> None:
    """Written and read while the GPU is busy, the memory that it came from in use by others at once."""
    moving, arena = Transfers(), Arena(2**26)
    busy = torch.randn(4096, 4096, device="cuda")
    right, places = [], []
    for number in range(6):
        x = torch.full((2**21,), float(number), device="cuda") + (busy @ busy)[0, 0] * 0
        place = arena.empty((2**21,), torch.float32)
        moving.store(x, place)
        right.append(float(number))
        places.append(place)
        del x
        torch.full((2**21,), -1.0, device="cuda")  # where the one before was, if nobody held it
    for number, place in enumerate(places):
        if number + 1 < len(places):
            moving.expect(places[number + 1])
            moving.expect(places[number + 1])
        found = moving.fetched(place, CUDA)
        assert bool((found == right[number]).all())
    moving.wait()
    assert all(bool((place == value).all()) for place, value in zip(places, right, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_what_was_expected_and_not_fetched_is_forgotten() -> None:
    moving, place = Transfers(), Arena(2**20).empty((1000,), torch.float32).fill_(1)
    moving.expect(place)
    moving.wait()
    place.fill_(2)
    assert bool((moving.fetched(place, CUDA) == 2).all())


@pytest.mark.gpu
@needs_gpu
def test_memory_that_is_not_pinned_is_copied_at_once() -> None:
    moving, x = Transfers(), torch.randn(50)
    moving.expect(x)
    there = moving.fetched(x, CUDA)
    place = torch.empty(50)
    moving.store(there, place)
    assert torch.equal(place, x)
