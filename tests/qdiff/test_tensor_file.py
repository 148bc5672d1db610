"""Files in the form of torch.save that are laid out first and filled in place."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from qdiff.tensor_file import StoredTensor, TensorFile

ROWS = 7
IMAGES = [StoredTensor(f"x{step}", (ROWS, 3, 5, 5), torch.float16 if step else torch.float32) for step in range(3)]
EMBEDDINGS, NOTHING = StoredTensor("c", (ROWS, 2, 3)), StoredTensor("uc", (ROWS, 2, 3), repeated=True)
STRUCTURE = {"xs": IMAGES, "cs": [EMBEDDINGS] * 3, "ucs": [NOTHING] * 3}


def values(tensor: StoredTensor) -> torch.Tensor:
    draws = torch.Generator().manual_seed(sum(tensor.key.encode()))
    content = torch.randn(tensor.shape, generator=draws).to(tensor.dtype)
    return content[:1].expand(tensor.shape) if tensor.repeated else content


def filled(path: Path, cuts: list[tuple[int, int]]) -> Path:
    """The file, its rows written in pieces [first, end)."""
    file = TensorFile(path, STRUCTURE)
    file.create()
    with file.rows() as rows:
        for first, end in cuts:
            for tensor in (*IMAGES, EMBEDDINGS, NOTHING):
                rows.write(tensor.key, first, values(tensor)[first:end])
        rows.sync()
    file.seal()
    return path


@pytest.mark.parametrize("options", [{}, {"mmap": True}], ids=["read", "mapped"])
def test_torch_load_reads_it(tmp_path: Path, options: dict[str, bool]) -> None:
    content = torch.load(filled(tmp_path / "set.pt", [(0, ROWS)]), weights_only=True, **options)
    assert list(content) == ["xs", "cs", "ucs"]
    for name, tensors in STRUCTURE.items():
        for found, tensor in zip(content[name], tensors, strict=True):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, values(tensor))
            assert found.data_ptr() % 4 == 0
    assert len({found.data_ptr() for found in content["cs"]}) == 1
    assert content["ucs"][0].untyped_storage().nbytes() == NOTHING.row_bytes, "all rows are one"


def test_it_is_a_sound_archive_of_its_numbers(tmp_path: Path) -> None:
    path = filled(tmp_path / "set.pt", [(0, ROWS)])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "a checksum is wrong"
        for tensor in (*IMAGES, EMBEDDINGS):
            assert archive.read(f"archive/data/{tensor.key}") == values(tensor).numpy().tobytes()
    assert path.stat().st_size < sum(t.nbytes for t in (*IMAGES, EMBEDDINGS, NOTHING)) + 4000


def test_the_order_of_writing_leaves_no_trace(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole.pt", [(0, ROWS)]).read_bytes()
    pieces = filled(tmp_path / "pieces.pt", [(5, 7), (0, 2), (2, 5), (0, 2)])
    assert pieces.read_bytes() == whole
    TensorFile(pieces, STRUCTURE).seal()  # once more, as after a kill
    assert pieces.read_bytes() == whole


@pytest.mark.parametrize(("row", "shape"), [(0, (2, 3, 5, 4)), (6, (2, 3, 5, 5))], ids=["shape", "too many"])
def test_rows_that_do_not_fit(tmp_path: Path, row: int, shape: tuple[int, ...]) -> None:
    file = TensorFile(tmp_path / "set.pt", STRUCTURE)
    file.create()
    with file.rows() as rows, pytest.raises(ValueError, match=f"from {row} on do not fit into x0"):
        rows.write("x0", row, torch.zeros(shape))


def test_a_file_that_was_cut_is_not_sealed(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "set.pt", STRUCTURE)
    file.create()
    with open(file.path, "r+b") as opened:
        opened.truncate(file.size - 1)
    with pytest.raises(OSError, match=r"set\.pt"):
        file.seal()
