"""Files that are whole or not there."""

from __future__ import annotations

import os

import pytest
import torch

from qdiff import files
from qdiff.files import atomic_file, write_atomically


def test_replaces_at_the_end(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_atomically(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(OSError, match="No such file") as caught:
        write_atomically(tmp_path / "nowhere" / "x", b"")
    assert caught.value.filename == str(tmp_path / "nowhere" / "x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_full_disk_under_torch_save(tmp_path, monkeypatch, numbers):
    """torch.save raises an error of its own on top of the operating system's."""
    opened = os.open("/dev/full", os.O_WRONLY), str(tmp_path / "part")
    monkeypatch.setattr(files.tempfile, "mkstemp", lambda **_: opened)
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(tmp_path / "x") as file:
        torch.save({"t": torch.zeros(numbers)}, file)
    assert caught.value.filename == str(tmp_path / "x")
