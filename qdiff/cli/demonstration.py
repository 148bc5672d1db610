"""What the demos share: commands that are shown and run as typed, and variants of a model side by side."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qdiff.calibrate import calibrate
from qdiff.calibration_data import CalibrationSet
from qdiff.checkpoint import packed_bytes, read_packed_info
from qdiff.cli.bundles import LatentBundle, TextBundle
from qdiff.config import CalibrationConfig
from qdiff.evaluation.image_metrics import psnr
from qdiff.evaluation.variants import HeldOutInputs, comparison_picture, markdown_table, seconds_per_step
from qdiff.quant_model import QuantModel

ROWS_A_STEP = 32  # of the network's batch, whose time is measured


@dataclass
class Row:
    """One variant in the comparison."""

    label: str
    images: Tensor
    bytes: int
    seconds_per_step: float
    output_error: float = 0.0


def say(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def command(function: Callable[[list[str]], int | None], line: str) -> None:
    """Run one of the real commands, shown as it would be typed."""
    print(f"$ python scripts/{line}\n", flush=True)
    if status := function(shlex.split(line)[1:]):
        raise SystemExit(status)


def fresh_folders(out: Path, *names: str) -> list[Path]:
    """Folders below ``out``, which is there then, for the commands to make: what earlier demos left in them is gone."""
    out.mkdir(parents=True, exist_ok=True)
    folders = [out / name for name in names]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return folders


def quick_calibration(iters: int, iters_a: int, rate: float) -> str:
    """How a demo's calibration differs from the published one, for :func:`say`."""
    return (
        f"Calibration of the UNet to 4-bit weights and 8-bit activations: {iters} + {iters_a} iterations a unit where "
        f"the paper takes 20000 + 5000, and AdaRound's rate raised from 0.001 to {rate} to make up for it"
    )


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def measured(label: str, model: nn.Module, held_out: HeldOutInputs, size: int, images: Tensor) -> Row:
    """A variant with the time of its steps and the error of its output."""
    inputs = [held_out.x, held_out.t] + ([] if held_out.context is None else [held_out.context])
    seconds = seconds_per_step(model, *(column[:ROWS_A_STEP] for column in inputs), repeats=3)
    return Row(label, images, size, seconds, held_out.error(model).mean().item())


def quantized_rows(
    measure: Callable[..., Row],
    bundle: LatentBundle | TextBundle,
    full: nn.Module,
    packed: Path,
    data: CalibrationSet,
    images: Tensor,
) -> list[Row]:
    """What a demo compares: plain rounding, and the calibration that it made.

    Args:
        measure: (label, model, bytes, images=None) -> the row; without images it samples them.
        full: the full-precision network.
        packed: the calibrated checkpoint, whose flags plain rounding takes; data: what sets its activation ranges.
        images: from ``packed``, as the command made them.
    """
    nearest = QuantModel.from_config(full, read_packed_info(packed).quant)
    calibrate(nearest, data, CalibrationConfig(**bundle.calibration), mode="linear")
    return [
        measure("round to nearest W4A8", nearest, len(packed_bytes(nearest))),
        measure("this calibration W4A8", bundle.from_packed(packed), packed.stat().st_size, images),
    ]


def bundled_rows(measure: Callable[..., Row], bundle: LatentBundle | TextBundle, names: Mapping[str, str]) -> list[Row]:
    """Rows of a bundle's own checkpoints, label to file name."""
    paths = {label: bundle.folder / name for label, name in names.items()}
    return [measure(label, bundle.from_packed(path), path.stat().st_size) for label, path in paths.items()]


def comparison(rows: list[Row], *, batch: str, closing: str) -> list[str]:
    """Lines of a table, below it ``closing``, and a sentence for each calibration that does not beat plain rounding.

    Args:
        rows: full precision, rounded to nearest, and the calibrated ones.
        batch: what :data:`ROWS_A_STEP` rows of the network's batch are.
    """
    full, nearest, *calibrated = rows
    lines = []
    for row in rows:
        exact = row is full
        similarity = "" if exact else f"{psnr(row.images, full.images).mean().item():.1f} dB"
        error = "" if exact else f"{row.output_error:.4f}"
        lines.append([row.label, f"{row.bytes / 2**20:.2f} MiB", error, similarity, f"{row.seconds_per_step:.2f} s"])
    header = ["variant", "model size", "output error", "PSNR to full precision", f"a step of {batch}"]
    text = [markdown_table(header, lines), "", closing]
    return text + [sentence for row in calibrated if (sentence := where_worse(row, nearest, full))]


def show(
    rows: list[Row], table: str, folder: Path, *, title: str, started: float, captions: Sequence[str] | None = None
) -> None:
    """Write picture and table into a folder, and print the table and where the picture is.

    Args:
        started: of the demo, on ``time.perf_counter``.
        captions: of the images to be shown, the first ones of every row; None shows all.
    """
    picture = folder / "comparison.png"
    shown = None if captions is None else len(captions)
    comparison_picture({row.label: row.images[:shown] for row in rows}, picture, title=title, captions=captions)
    (folder / "comparison.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n")
    print(f"The images: {picture}   ({time.perf_counter() - started:.0f} s)")


def where_worse(row: Row, nearest: Row, full: Row) -> str:
    """A sentence where a calibrated variant does not beat plain rounding."""
    worse = []
    if row.output_error > nearest.output_error:
        worse.append(f"output error ({row.output_error:.4f} against {nearest.output_error:.4f})")
    mine, theirs = (psnr(x.images, full.images).mean().item() for x in (row, nearest))
    if mine < theirs:
        worse.append(f"PSNR ({mine:.1f} dB against {theirs:.1f} dB)")
    return f"{row.label} is worse than {nearest.label} in {' and '.join(worse)}." if worse else ""
