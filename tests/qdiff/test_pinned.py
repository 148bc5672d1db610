"""A stretch of host memory and the tensors that are cut out of it. Nothing here needs a GPU: without pinning it is the
same bookkeeping on the same kind of memory."""

from __future__ import annotations

import gc
import mmap
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdiff import pinned
from qdiff.memory import resident_bytes
from qdiff.pinned import ALIGNMENT, Arena


def arena(pieces: int) -> Arena:
    return Arena(pieces * ALIGNMENT, pinned=False)


def piece(of: Arena, pieces: int = 1, **options: bool) -> Tensor | None:
    return of.empty((pieces * ALIGNMENT,), torch.uint8, **options)


def test_pieces_are_what_was_asked_for() -> None:
    x = arena(8).empty((3, 5), torch.float16)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 5), torch.float16, True)
    assert torch.equal(x.copy_(torch.arange(15).view(3, 5)), torch.arange(15.0).view(3, 5).half())


def test_a_piece_lives_as_long_as_any_view_of_it() -> None:
    mine = arena(4)
    whole = piece(mine, 4)
    view = whole[5:].view(-1)
    del whole
    gc.collect()
    assert mine.free_bytes == 0
    del view
    assert mine.free_bytes == 4 * ALIGNMENT


def test_pieces_outlive_the_arena() -> None:
    x = piece(arena(2), 2).fill_(7)
    gc.collect()
    assert bool((x == 7).all())


def test_there_is_none_where_no_stretch_is_long_enough() -> None:
    mine = arena(4)
    held = [piece(mine) for _ in range(4)]
    assert piece(mine) is None
    held[0] = held[2] = None
    assert mine.free_bytes == 2 * ALIGNMENT
    assert piece(mine, 2) is None
    held[1] = None
    assert piece(mine, 3) is not None


def test_the_top_and_the_bottom() -> None:
    mine = arena(4)
    top, bottom = piece(mine, from_top=True), piece(mine)
    assert top.data_ptr() - bottom.data_ptr() == 3 * ALIGNMENT
    assert piece(mine, 2) is not None


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=12), st.data())
def test_pieces_move_together(sizes: list[tuple[int, bool]], data: st.DataObject) -> None:
    """What is free is one stretch then; every piece, and whatever looks at it, is what it was."""
    mine = arena(40)
    top = piece(mine, 2, from_top=True).fill_(255)  # not one of those that move
    held = [mine.empty((n * 64, 4), torch.float16).fill_(i) for i, (n, _) in enumerate(sizes)]
    held = [x for x, (_, stays) in zip(held, sizes, strict=True) if stays]
    seen = [(x.view(4, -1).t(), x[0, 0].item()) for x in held]
    tensors = data.draw(st.permutations([*held, *(view for view, _ in seen)]))
    before = [(x.shape, x.stride(), x.clone()) for x in tensors]
    moved = mine.moved_together(tensors)
    after = [moved[id(x)] for x in tensors]
    held.clear(), seen.clear(), tensors.clear(), moved.clear()
    for (shape, stride, content), x in zip(before, after, strict=True):
        assert (x.shape, x.stride()) == (shape, stride)
        assert torch.equal(x, content)
    used = sum(n for n, stays in sizes if stays)
    assert mine.longest == mine.free_bytes == (38 - used) * ALIGNMENT
    assert bool((top == 255).all())
    x = None
    after.clear()
    assert mine.longest == 38 * ALIGNMENT


def test_whose_pieces() -> None:
    mine, other = arena(2), arena(2)
    x = piece(mine, 2)
    assert mine.holds(x)
    assert mine.holds(x[-1:])
    assert not other.holds(x)
    assert not mine.holds(torch.empty(3))


def test_nothing_takes_no_room() -> None:
    assert arena(0).empty((0, 3), torch.float32).shape == (0, 3)
    assert piece(arena(0)) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3000), st.booleans()), max_size=60))
def test_pieces_never_overlap_and_all_memory_comes_back(steps: list[tuple[int, int, bool]]) -> None:
    """Whatever is taken and given back in whatever order; what is free is one stretch in the end."""
    mine = arena(20)
    held: dict[int, tuple[int, Tensor]] = {}
    for number, (slot, size, from_top) in enumerate(steps):
        if held.pop(slot, None) is None:
            x = mine.empty((size,), torch.uint8, from_top=from_top)
            if x is not None:
                held[slot] = number % 251, x.fill_(number % 251)
        taken = sum(-(-x.numel() // ALIGNMENT) * ALIGNMENT for _, x in held.values())
        del slot
        x = None
        assert mine.free_bytes == 20 * ALIGNMENT - taken
        assert all(bool((x == value).all()) for value, x in held.values())
    held.clear()
    assert piece(mine, 20) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_it_for_pinned() -> None:
    mine = Arena(2**20)
    x = mine.empty((1000,), torch.float32)
    assert x.is_pinned()
    on_gpu = torch.randn(1000, device="cuda")
    assert torch.equal(x.copy_(on_gpu).cuda(), on_gpu)


def linux_before(*version: int) -> bool:
    release = platform.release().split("-")[0].split(".")
    return platform.system() != "Linux" or tuple(map(int, release[:2])) < version


@pytest.mark.skipif(linux_before(5, 14), reason="needs Linux 5.14")
def test_memory_is_there_before_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_PART", 2**22)
    size = 2**26 + mmap.PAGESIZE
    for populate, taken in ((lambda memory: None, range(2**24)), (pinned._populate, range(size - 2**24, size + 2**24))):
        memory = pinned._in_large_pages(size)
        before = resident_bytes()
        populate(memory)
        assert resident_bytes() - before in taken
        assert not memory.any()


@pytest.mark.parametrize("shift", [0, 1])
def test_populating_changes_nothing(shift: int) -> None:
    """Also of memory that does not begin with a page."""
    memory = pinned._in_large_pages(3 * mmap.PAGESIZE)[shift:].fill_(7)
    pinned._populate(memory)
    assert bool((memory == 7).all())
