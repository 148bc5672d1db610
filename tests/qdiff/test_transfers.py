"""Copies beside what a GPU computes; without one the same calls copy at once."""

from __future__ import annotations

import pytest
import torch

from qdiff.pinned import Arena
from qdiff.transfers import Transfers, transfers

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
