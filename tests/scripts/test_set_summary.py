"""A calibration set in words and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qdiff.cli.make_calibration_data import main
from qdiff.cli.set_summary import COLUMNS, GAP, MARGIN, ROWS, TILE, principal_colours, shown_steps, to_rgb

STEPS, SAMPLES, SIDE = 25, 9, 8


def noisy_images(channels: int) -> dict[str, list[Tensor]]:
    """Sample i is a square of brightness -1 to 1 by its number, the noise less from step to step."""
    draws = torch.Generator().manual_seed(0)
    images = torch.linspace(-1, 1, SAMPLES)[:, None, None, None].expand(-1, channels, SIDE, SIDE)
    noise = torch.randn(images.shape, generator=draws)
    shares = torch.linspace(1, 0, STEPS).tolist()
    return {
        "xs": [(1 - share) * images + share * noise for share in shares],
        "ts": [torch.full((SAMPLES,), 1000 * share) for share in shares],
    }


def tile(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """Pixels of one sample, TILE x TILE x RGB."""
    top, left = GAP + row * (TILE + GAP), MARGIN + column * (TILE + GAP)
    return picture[top : top + TILE, left : left + TILE].astype(int)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_picture_beside_the_set(tmp_path: Path, capsys, channels: int) -> None:
    torch.save(noisy_images(channels), tmp_path / "set.pt")
    assert main(["--summary", str(tmp_path / "set.pt")]) == 0
    said = capsys.readouterr().out
    for words in (
        f"25 steps of 9x{channels}x8x8 inputs (float32)",
        "timesteps 1000 down to 0",
        "--cali_st 25 --cali_n 9 or fewer",
        f"{tmp_path / 'set.png'}: 10 steps, noisiest first, of 8 samples",
    ):
        assert words in said
    last = said.splitlines()[-3].split()
    assert last == ["24", "0", "-1.000", "1.000", "0.000", "0.645"]  # sqrt of the mean square of nine even steps

    with Image.open(tmp_path / "set.png") as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert image.size == (MARGIN + COLUMNS * (TILE + GAP), GAP + ROWS * (TILE + GAP))
        picture = np.asarray(image)
    clean = [tile(picture, ROWS - 1, column) for column in range(COLUMNS)]
    assert all(np.ptp(pixels[..., 0]) == 0 for pixels in clean), "a square of one colour each"
    brightness = [pixels[0, 0].sum() for pixels in clean]
    assert brightness == sorted(brightness)
    assert brightness[-1] - brightness[0] > 300
    assert np.ptp(tile(picture, 0, 0)[..., 0]) > 200, "noise"
    assert np.ptp(picture[:, :MARGIN]) > 200, "steps are named in the margin"


def test_steps_shown() -> None:
    assert shown_steps(1) == [0]
    assert shown_steps(4) == [0, 1, 2, 3]
    assert shown_steps(200) == [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]


def test_images_keep_their_colours() -> None:
    """Three channels, most values of the last row within -1 and 1: these are black and white."""
    last = torch.rand(4, 3, 16, 16) * 2 - 1
    shown = to_rgb(torch.stack([torch.randn(4, 3, 16, 16) * 3, last]))
    assert (shown[1] - (last + 1) / 2).abs().max() < 0.02
    assert shown.min() == 0
    assert shown.max() == 1


def test_latents_of_four_channels_by_what_varies_most() -> None:
    """The strongest component becomes brightness, whichever channels it lies in."""
    brightness = torch.randn(2, 1, 16, 16)
    samples = brightness * torch.tensor([0.0, 2.0, 0.0, 1.0])[:, None, None] + 0.01 * torch.randn(2, 4, 16, 16)
    colours = principal_colours(samples)
    assert colours.shape == (3, 4)
    assert torch.allclose(colours.mean(0), torch.tensor([0.0, 2.0, 0.0, 1.0]) / 5**0.5, atol=0.02)


def test_what_is_wrong_is_said(tmp_path: Path, capsys) -> None:
    content = noisy_images(1)
    content["xs"][3][2, 0, 1, 1] = torch.nan
    torch.save(content, tmp_path / "set.pt")
    main(["--summary", str(tmp_path / "set.pt"), "--picture", str(tmp_path / "other.png")])
    assert "NaN or infinite values at 1 steps, first at 3: calibration refuses them" in capsys.readouterr().out
    assert (tmp_path / "other.png").is_file()


def test_one_tensor_and_one_that_is_conditional(tmp_path: Path, capsys) -> None:
    torch.save(torch.randn(3, 4, 8, 8).half(), tmp_path / "one.pt")
    main(["--summary", str(tmp_path / "one.pt")])
    assert "1 steps of 3x4x8x8 inputs (float16)" in capsys.readouterr().out
    embeddings = {name: [torch.zeros(SAMPLES, 2, 5)] * STEPS for name in ("cs", "ucs")}
    torch.save(noisy_images(3) | embeddings, tmp_path / "two.pt")
    main(["--summary", str(tmp_path / "two.pt")])
    assert "embeddings of 9x2x5" in capsys.readouterr().out


def test_a_picture_of_the_set_that_is_made(miniature, tmp_path: Path) -> None:
    main([*miniature.flags(), "-n", "2", "--out", str(tmp_path / "a.pt"), "--picture", str(tmp_path / "b.png")])
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (MARGIN + 2 * (TILE + GAP), GAP + 5 * (TILE + GAP))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--summary", "{set}", "--out", "x.pt"], ["--out has no effect with --summary"]),
        (["--summary", "{set}", "--config", "x.yml"], ["--config has no effect with --summary"]),
        (["--summary", "none.pt"], ["--summary none.pt: no such file"]),
        (["--summary", "{text}"], ["calibration set {text}", "not a file written by torch.save"]),
        (["--summary", "{flat}"], ["calibration set {flat}: step 0: expected N x C x H x W"]),
        (["--summary", "{set}", "--picture", "{text}"], ["--picture {text}", ".png"]),
        (["--summary", "{shown}"], ["shown.png: exists already; --force replaces it"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_input(tmp_path: Path, failing, flags: list[str], words: list[str]) -> None:
    places = {name: str(tmp_path / f"{name}.pt") for name in ("set", "text", "flat", "shown")}
    for name in ("set", "shown"):
        torch.save(noisy_images(1), places[name])
    Path(places["text"]).write_text("words")
    torch.save({"xs": [torch.zeros(3, 4)], "ts": [torch.zeros(3)]}, places["flat"])
    (tmp_path / "shown.png").write_text("precious")
    failure = failing(*(flag.format(**places) for flag in flags), main=main)
    assert failure.status == 2
    for word in words:
        assert word.format(**places) in failure.message
    assert (tmp_path / "shown.png").read_text() == "precious"
