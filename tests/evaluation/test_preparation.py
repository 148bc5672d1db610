"""Reference sets: the crop to the pixel, the filter against Pillow's and against its definition, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from qdiff.cli import prepare_lsun
from qdiff.evaluation.image_sets import load_image_set
from qdiff.evaluation.preparation import center_square, square_image

from .test_image_kinds import encoded, write_lmdb


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (8, 5), (5, 5)])
def test_the_square_is_the_one_of_integer_division(size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = min(size)
    top, left = (height - side) // 2, (width - side) // 2
    found = np.asarray(center_square(Image.fromarray(pixels)))
    assert np.array_equal(found, pixels[top : top + side, left : left + side])


def test_the_filter_is_an_antialiased_bicubic() -> None:
    """As torch has it in floats; Pillow rounds after each of two passes."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    found = np.asarray(square_image(Image.fromarray(pixels), 32)).astype(float)
    square = torch.from_numpy(pixels[:, 15:105]).permute(2, 0, 1)[None].float()
    expected = interpolate(square, (32, 32), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 255)
    assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() < 1.5


def test_an_image_of_the_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 30, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(square_image(Image.fromarray(pixels), 16)), pixels[:, 7:23])


def test_an_lmdb_becomes_a_folder_that_a_stopped_command_completes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = [np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(5)]
    write_lmdb(tmp_path / "photos_lmdb", [encoded(image) for image in pixels])
    words = [str(tmp_path / "photos_lmdb"), "--out", str(tmp_path / "out"), "--size", "16"]
    assert prepare_lsun.main(words) == 0
    assert "5 images of 16x16" in capsys.readouterr().out
    found = load_image_set(tmp_path / "out").permute(0, 2, 3, 1).numpy()
    expected = np.stack([np.asarray(square_image(Image.fromarray(image), 16)) for image in pixels])
    assert np.array_equal(found, expected)
    assert json.loads((tmp_path / "out" / "preparation.json").read_text())["images"] == 5

    (tmp_path / "out" / "0000" / "0000003.png").unlink()
    assert prepare_lsun.main(words) == 0
    assert np.array_equal(load_image_set(tmp_path / "out").permute(0, 2, 3, 1).numpy(), expected)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        prepare_lsun.main([*words, "--filter", "nearest"])
    assert "filter is 'nearest', was 'bicubic'" in capsys.readouterr().err
