"""A calibration set at a glance: its shapes, steps and ranges in words, some of its samples in a picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from qdiff.calibration_data import SetStep, steps_of
from qdiff.files import write_atomically

ROWS, COLUMNS = 10, 8  # at most, of the picture
TILE = 64  # pixels along a side of a sample, at least
MARGIN, GAP = 76, 2  # pixels: for what is written beside a row, and between samples
SHOWN_SHARE = 0.99  # of the last row's values are within the range from black to white
CHUNK = 1 << 20  # values at once


@dataclass(frozen=True)
class Range:
    """Of the inputs at one step."""

    t: float
    low: float
    high: float
    mean: float
    std: float


def describe(path: Path, *, picture: Path | None = None) -> str:
    """What the file holds, in a few lines; with ``picture``, some of it as a PNG there.

    Reads the file once, step by step.

    Raises:
        CalibrationSetError: it is not a calibration set, or a damaged one.
        OSError: the picture cannot be written.
    """
    ranges: list[Range] = []
    shown: dict[int, Tensor] = {}
    step: SetStep
    for step in steps_of(path):
        ranges.append(_range(step.x, float(step.t[0])))
        if step.number in shown_steps(step.of):
            shown[step.number] = step.x[:COLUMNS].float().clone()
        shape, dtype, context = tuple(step.x.shape), step.x.dtype, step.context_shape
    lines = [
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB",
        f"  {len(ranges)} steps of {_by(shape)} inputs ({str(dtype).removeprefix('torch.')}), "
        f"values {min(r.low for r in ranges):.2f} to {max(r.high for r in ranges):.2f}",
        f"  timesteps {ranges[0].t:g} down to {ranges[-1].t:g}",
    ]
    if context is not None:
        lines.append(f"  with and without the condition: embeddings of {_by(context)}")
    lines += [_row("step", "timestep", "lowest", "highest", "mean", "deviation")]
    for number in shown_steps(len(ranges)):
        r = ranges[number]
        lines.append(_row(str(number), f"{r.t:g}", *(f"{value:.3f}" for value in (r.low, r.high, r.mean, r.std))))
    broken = [number for number, r in enumerate(ranges) if not np.isfinite([r.low, r.high, r.std]).all()]
    if broken:
        lines.append(f"  NaN or infinite values at {len(broken)} steps, first at {broken[0]}: calibration refuses them")
    lines.append(f"  calibrate with --cali_data_path {path} --cali_st {len(ranges)} --cali_n {shape[0]} or fewer")
    if picture is not None:
        write_atomically(picture, draw(shown, [ranges[number].t for number in shown]))
        lines.append(f"  {picture}: {len(shown)} steps, noisiest first, of {len(shown[0])} samples")
    return "\n".join(lines)


def shown_steps(steps: int) -> list[int]:
    """The first, the last and some between, evenly spaced."""
    return sorted({round(place) for place in np.linspace(0, steps - 1, min(steps, ROWS))})


def draw(rows: dict[int, Tensor], times: list[float]) -> bytes:
    """A PNG: a row for each step, a column for each sample.

    Args:
        rows: number of the step -> its samples, N x C x H x W, noisiest first.
        times: the steps' timesteps.
    """
    numbers, samples = list(rows), torch.stack(list(rows.values())).nan_to_num()  # R x N x C x H x W
    pixels = to_rgb(samples).mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()  # R, N, H, W, RGB
    larger = max(1, -(-TILE // max(pixels.shape[2:4])))
    pixels = pixels.repeat(larger, axis=2).repeat(larger, axis=3)  # nearest: what is shown are the set's own pixels
    count, columns, height, width, _ = pixels.shape
    page = Image.new("RGB", (MARGIN + columns * (width + GAP), GAP + count * (height + GAP)), "white")
    pen = ImageDraw.Draw(page)
    for row in range(count):
        top = GAP + row * (height + GAP)
        pen.multiline_text((6, top + height // 2 - 12), f"step {numbers[row]}\nt = {times[row]:g}", fill="black")
        for column in range(columns):
            page.paste(Image.fromarray(pixels[row, column]), (MARGIN + column * (width + GAP), top))
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()


def to_rgb(samples: Tensor) -> Tensor:
    """Inputs of any number of channels -> colours in [0, 1], by one linear map for the whole picture.

    One channel is grey, two or three are red, green and blue as they are. Of more, the latents of a first stage, the
    three principal components of the last row's channels are shown: as brightness, as orange against blue and as green
    against magenta. Black and white are the ends of the range in which most values of the last row lie, so there an
    image has its own colours, and noise before it is clipped.

    Args:
        samples: R x N x C x H x W, the cleanest row last.

    Returns:
        R x N x 3 x H x W.
    """
    channels = samples.shape[2]
    if channels == 1:
        samples = samples.expand(-1, -1, 3, -1, -1)
    elif channels == 2:
        samples = torch.cat([samples, torch.zeros_like(samples[:, :, :1])], 2)
    elif channels > 3:
        samples = torch.einsum("oc,rnchw->rnohw", principal_colours(samples[-1]), samples)
    values = samples[-1].flatten().double()
    ends = torch.tensor([(1 - SHOWN_SHARE) / 2, (1 + SHOWN_SHARE) / 2], dtype=torch.float64)
    low, high = torch.quantile(values[:: max(1, len(values) >> 20)], ends)
    return ((samples - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).float()


BRIGHTNESS = (1.0, 1.0, 1.0)
ORANGE_BLUE = (0.8, 0.1, -0.9)
GREEN_MAGENTA = (-0.4, 0.8, -0.4)


def principal_colours(samples: Tensor) -> Tensor:
    """The linear map 3 x C of :func:`to_rgb` for latents N x C x h x w."""
    rows = samples.movedim(1, -1).flatten(0, -2).double()  # pixels, C
    _, vectors = torch.linalg.eigh(torch.cov(rows.T))
    components = vectors.flip(1)[:, :3].T  # 3, C: the strongest first
    components = components * components.sum(1, keepdim=True).sign()  # eigenvectors have no sign of their own
    colours = torch.tensor([BRIGHTNESS, ORANGE_BLUE, GREEN_MAGENTA], dtype=torch.float64).T  # RGB, component
    return (colours @ components).to(samples.dtype)


def _range(x: Tensor, t: float) -> Range:
    """Over all samples of a step, some at once."""
    low, high, total, squares = float("inf"), float("-inf"), 0.0, 0.0
    for part in x.split(max(1, CHUNK // max(1, x[0].numel()))):
        values = part.double()
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        total, squares = total + float(values.sum()), squares + float(values.square().sum())
    mean = total / x.numel()
    return Range(t, low, high, mean, float(np.sqrt(np.maximum(squares / x.numel() - mean**2, 0))))


def _row(*cells: str) -> str:
    return "  " + "".join(f"{cell:>10}" for cell in cells)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
