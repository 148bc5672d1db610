"""Measure variants of a bundled pixel model: Fréchet distance, output error, size, seconds a step, a picture of each.

    python scripts/make_results.py --config configs/fashion_mnist.yml --cali_data_path cali.pt --rows linear-w4a8

``full`` is full precision, ``linear-wXaY`` rounds to nearest, ``qdiff-wXaY`` is the bundled calibrated checkpoint;
Y = 32 leaves activations alone. Results are added to a JSON file, one entry a row; with ``--table`` that file is
printed as a table and drawn as one picture.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim.config import PixelConfig, load_config
from qdiff.calibrate import calibrate
from qdiff.calibration_data import CalibrationSet, load_calibration_set
from qdiff.checkpoint import packed_bytes
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.evaluation.features import FashionClassifier, image_statistics
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance
from qdiff.evaluation.sampling import sample_images
from qdiff.evaluation.variants import (
    comparison_picture,
    from_packed,
    full_precision,
    held_out_inputs,
    markdown_table,
    seconds_per_step,
)
from qdiff.quant_model import QuantModel

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "models" / "pixel" / "fashion_mnist"
ROWS = ("full", "linear-w8a8", "linear-w4a32", "linear-w4a8", "qdiff-w8a8", "qdiff-w4a32", "qdiff-w4a8")
SHOWN = 12  # images of each row that the picture keeps


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "fashion_mnist.yml")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="folder of checkpoints, classifier and statistics")
    parser.add_argument("--cali_data_path", type=Path, help="calibration set, for the ranges of linear rows")
    parser.add_argument("--cali_st", type=int, default=20, help="steps taken from the set")
    parser.add_argument("--cali_n", type=int, default=256, help="samples taken from each")
    parser.add_argument("--rows", nargs="*", default=[], help=f"any of {' '.join(ROWS)}, or all")
    parser.add_argument("--count", type=int, default=5000, help="images a row")
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--timesteps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise, the same for every row")
    parser.add_argument("--tf32", action="store_true", help="TF32 while sampling on a GPU")
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    parser.add_argument("--table", type=Path, metavar="PNG", help="print the results file and draw its images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    rows = ROWS if args.rows == ["all"] else args.rows
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"--rows {unknown[0]}: choose from {', '.join(ROWS)}, or all")
    if any(row.startswith("linear") and not row.endswith("a32") for row in rows) and args.cali_data_path is None:
        parser.error("--rows linear-w..a8 needs --cali_data_path, for activation ranges")
    config = load_config(args.config)
    if rows:
        measure_rows(list(rows), config, args)
    if args.table:
        show(args.results, args.table)


def measure_rows(rows: list[str], config: PixelConfig, args: argparse.Namespace) -> None:
    held_out = held_out_inputs(full_precision(config).to(args.device), config, device=args.device)
    data = calibration_set(config, args)
    for row in rows:
        model, size = build(row, config, data, args)
        with tqdm(total=args.count, unit="image", desc=row, dynamic_ncols=True) as bar:
            images = sample_images(
                model,
                config,
                count=args.count,
                batch_size=args.batch_size,
                timesteps=args.timesteps,
                seed=args.seed,
                device=args.device,
                allow_tf32=args.tf32,
                on_batch=bar.update,
            )
        error = torch.zeros(1) if row == "full" else held_out.error(model)
        entry = {
            "frechet": round(distance(images, args), 4),
            "output_error": round(error.mean().item(), 5),
            "last_steps": [round(value, 4) for value in error[-2:].tolist()],
            "bytes": size,
            "seconds_per_step": round(seconds_per_step(model, held_out.x[:64], held_out.t[:64]), 5),
            "count": args.count,
            "timesteps": args.timesteps,
            "seed": args.seed,
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor(),
            "torch": torch.__version__,
        }
        print(row, json.dumps(entry), flush=True)
        record(args.results, row, entry, images)


def calibration_set(config: PixelConfig, args: argparse.Namespace) -> CalibrationSet | None:
    if args.cali_data_path is None:
        return None
    side = config.data.image_size
    return load_calibration_set(
        args.cali_data_path, cali_st=args.cali_st, cali_n=args.cali_n, image_shape=(config.data.channels, side, side)
    )


def build(
    row: str, config: PixelConfig, data: CalibrationSet | None, args: argparse.Namespace
) -> tuple[nn.Module, int]:
    """The network of a row, and the bytes it takes on disk (in full precision: fp32)."""
    if row == "full":
        model = full_precision(config).to(args.device)
        return model, 4 * sum(p.numel() for p in model.parameters())
    mode, weight_bit, act_bit = re.fullmatch(r"(\w+)-w(\d+)a(\d+)", row).groups()
    quant_act = act_bit != "32"
    if mode == "qdiff":
        path = args.bundle / f"w{weight_bit}a8.safetensors"
        model = from_packed(path, config, quant_act=quant_act)
        return model.to(args.device), path.stat().st_size
    quant = QuantConfig(int(weight_bit), 8, quant_act=quant_act, a_sym=True, split=True)
    model = QuantModel.from_config(full_precision(config).to(args.device), quant)
    calibrate(model, data, CalibrationConfig(), mode="linear")
    return model, len(packed_bytes(model))


def distance(images: Tensor, args: argparse.Namespace) -> float:
    """Fréchet distance to the training images, on the bundled classifier's features."""
    classifier = FashionClassifier.load(args.bundle / "classifier.safetensors", args.device)
    reference = FeatureStatistics.load(args.bundle / "reference_statistics.safetensors")
    return frechet_distance(image_statistics(classifier, images, "samples"), reference)


def record(path: Path, row: str, entry: dict, images: Tensor) -> None:
    """Add a row to the results file; its first images lie beside it."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    results[row] = entry
    path.write_text(json.dumps(results, indent=1) + "\n")
    torch.save((images[:SHOWN] * 255).round().to(torch.uint8), path.with_name(f"{path.stem}-{row}.pt"))


def show(path: Path, picture: Path) -> None:
    results = json.loads(path.read_text())
    rows = [row for row in ROWS if row in results]
    lines = [
        [
            row,
            f"{r['frechet']:.3f}",
            "" if row == "full" else f"{r['output_error']:.5f}",
            "" if row == "full" else ", ".join(f"{v:.3f}" for v in r["last_steps"]),
            f"{r['bytes'] / 2**20:.2f}",
            f"{1e3 * r['seconds_per_step']:.1f}",
        ]
        for row, r in ((row, results[row]) for row in rows)
    ]
    print(markdown_table(["row", "Fréchet", "output error", "last 2 steps", "MiB", "ms a step"], lines))
    images = {row: torch.load(path.with_name(f"{path.stem}-{row}.pt"), weights_only=True) / 255 for row in rows}
    comparison_picture(images, picture, title=f"{results[rows[0]]['timesteps']} quad steps, the same noise in a column")


if __name__ == "__main__":
    main()
