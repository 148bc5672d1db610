"""Tensors that go to files and back while others compute."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qdiff import block_io as module
from qdiff.block_io import BlockIO
from qdiff.places import Filed, Scratch, fetched

CPU = torch.device("cpu")


@pytest.fixture(params=["at once", "by staging"])
def io(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BlockIO:
    """In blocks of 64 bytes; the second way is a GPU's, here with both ends on the host."""
    monkeypatch.setattr(module, "BLOCK", 64)
    if request.param == "by staging":
        monkeypatch.setattr(module, "_is_on_host", lambda x: False)
    own = BlockIO()
    for name in ("qdiff.places.block_io", "qdiff.memory.block_io"):
        monkeypatch.setattr(name, lambda: own)
    return own


def stored(scratch: Scratch, count: int, size: int = 1000) -> tuple[list[Tensor], list[Filed]]:
    tensors = [torch.randn(1, size) for _ in range(count)]
    return tensors, [scratch.store(x) for x in tensors]


@pytest.mark.parametrize("size", [1, 16, 17, 1000])
def test_what_is_written_comes_back(io: BlockIO, size: int, tmp_path: Path) -> None:
    tensors, filed = stored(Scratch(tmp_path), 5, size)
    for x, there in zip(tensors, filed, strict=True):
        assert torch.equal(fetched(there, CPU), x)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2], [1, 1]])
@pytest.mark.parametrize("expected", [[], [0, 1, 2, 3], [3, 0], [2, 2]])
def test_what_is_expected_comes_too_in_any_order(
    io: BlockIO, order: list[int], expected: list[int], tmp_path: Path
) -> None:
    """More blocks than are read ahead, in whatever order they are asked for, asked for or not."""
    tensors, filed = stored(Scratch(tmp_path), 4)
    for _ in range(2):
        io.expect(filed[number].piece for number in expected)
        for number in order:
            assert torch.equal(fetched(filed[number], CPU), tensors[number])


def test_what_is_expected_is_read_before_it_is_asked_for(
    io: BlockIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (x,), (filed,) = stored(Scratch(tmp_path), 1, 40)
    filed.piece.written()
    read = threading.Event()
    preadv = module.os.preadv

    def noted(*arguments: object) -> int:
        read.set()
        return preadv(*arguments)

    monkeypatch.setattr(module.os, "preadv", noted)
    io.expect([filed.piece])
    assert read.wait(10)
    assert torch.equal(fetched(filed, CPU), x)


def test_who_waits_for_the_disk_waits_for_all_of_it(
    io: BlockIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is read that is still being written, nor does its place go to others."""
    go = threading.Event()
    pwrite = module.os.pwrite

    def slow(*arguments: object) -> int:
        assert go.wait(10)
        return pwrite(*arguments)

    monkeypatch.setattr(module.os, "pwrite", slow)
    scratch = Scratch(tmp_path)
    x = torch.randn(1, 16)
    filed = scratch.store(x)
    assert not all(task.done() for task in filed.piece.pending)
    gone = scratch.store(x)
    offset = gone.piece.lanes.base
    del gone
    other = scratch.store(2 * x)
    assert other.piece.lanes.base > offset
    threading.Timer(0.05, go.set).start()
    assert torch.equal(fetched(filed, CPU), x)
    assert torch.equal(fetched(other, CPU), 2 * x)
    deadline = time.monotonic() + 10  # of the three, what nobody waits for may be written last
    while scratch.store(x).piece.lanes.base != offset:
        assert time.monotonic() < deadline


def test_a_slow_disk_is_waited_for(io: BlockIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not more than a few blocks are held in memory for it."""
    go, started = threading.Event(), threading.Semaphore(0)
    pwrite = module.os.pwrite

    def slow(*arguments: object) -> int:
        started.release()
        assert go.wait(10)
        return pwrite(*arguments)

    monkeypatch.setattr(module.os, "pwrite", slow)
    scratch, stored = Scratch(tmp_path), list[Filed]()
    tensors = [torch.randn(1, 16) for _ in range(20)]
    thread = threading.Thread(target=lambda: [stored.append(scratch.store(x)) for x in tensors])
    thread.start()
    for _ in range(module.THREADS):
        assert started.acquire(timeout=10)
    thread.join(0.1)
    assert thread.is_alive()
    assert len(stored) == module._WRITTEN
    go.set()
    thread.join(10)
    for x, there in zip(tensors, stored, strict=True):
        assert torch.equal(fetched(there, CPU), x)


def test_pinned_memory_is_given_back_when_all_is_written(io: BlockIO, tmp_path: Path) -> None:
    tensors, filed = stored(Scratch(tmp_path), 4)
    io.expect(x.piece for x in filed)
    io.close()
    assert all(task.done() for x in filed for task in x.piece.pending)
    assert not [name for name, value in vars(io).items() if "reading" in name or name == "_for_writing"]
    for x, there in zip(tensors, filed, strict=True):  # and taken again
        assert torch.equal(fetched(there, CPU), x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_what_is_written_comes_back(tmp_path: Path) -> None:
    """Two dozen tensors of three blocks and a bit, the memory of each taken by the next one at once."""
    device, scratch = torch.device("cuda"), Scratch(tmp_path)
    torch.manual_seed(0)
    filed, sums = [], []
    for _ in range(24):
        x = torch.randn(13, 320, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        sums.append((x.double().sum().item(), x[-1, -1, -1, -1].item()))
        filed.append(scratch.store(x))
        del x
    for expected in ([], range(24), range(0, 24, 2)):
        module.block_io().expect(filed[number].piece for number in expected)
        for there, (whole, last) in zip(filed, sums, strict=True):
            y = fetched(there, device)
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert y.double().sum().item() == whole
            assert y[-1, -1, -1, -1].item() == last
