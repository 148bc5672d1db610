from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.evaluation.image_sets import load_image_set


def test_a_folder_in_order_of_numbers_without_the_grid(tmp_path: Path) -> None:
    for index in (1, 0, 2):
        Image.new("L", (4, 5), index * 10).save(tmp_path / f"{index:06d}.png")
    Image.new("L", (9, 9)).save(tmp_path / "grid.png")
    images = load_image_set(tmp_path)
    assert images.dtype == torch.uint8
    assert images.shape == (3, 1, 5, 4)
    assert images[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_colour_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pixels)
    assert torch.equal(load_image_set(tmp_path / "a.npz"), torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_tensors(tmp_path: Path) -> None:
    images = torch.rand(2, 1, 4, 4)
    torch.save(images, tmp_path / "a.pt")
    assert torch.equal(load_image_set(tmp_path / "a.pt"), images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.rand(2, 1, 4, 4) * 2 - 1.5, "expected \\[0, 1\\]"),
        (torch.full((1, 1, 2, 2), float("nan")), "expected \\[0, 1\\]"),
        (torch.zeros(4, 4), "found \\(4, 4\\)"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), "found torch.int64"),
        ({"images": torch.zeros(1)}, "found dict"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_image_set(tmp_path / "a.pt")


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        load_image_set(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="no images in it"):
        load_image_set(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder of images, an LMDB, or an \.npz"):
        load_image_set(tmp_path / "a.txt")
