"""A first look, in minutes, on a CPU: calibrate a small trained model to 4 bits and compare its images.

    make demo

runs the real commands on the bundled Fashion-MNIST model: makes a calibration set, calibrates with few iterations,
resumes from the packed checkpoint, calibrates the activations once more with the options beside the published
defaults, and puts images of full precision, plain rounding, both calibrations and the two bundled ones, which had the
paper's iterations, side by side: ``demo/comparison.png``, ``demo/comparison.md``.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ddim.config import PixelConfig, load_config
from qdiff.calibrate import calibrate
from qdiff.calibration_data import load_calibration_set
from qdiff.checkpoint import packed_bytes, read_info
from qdiff.cli import make_calibration_data, sample_ddim
from qdiff.cli.demonstration import Row, command, comparison, measured, quoted, say, show
from qdiff.config import CalibrationConfig
from qdiff.evaluation.image_sets import load_image_set
from qdiff.evaluation.sampling import sample_images
from qdiff.evaluation.variants import (
    HeldOutInputs,
    from_packed,
    full_precision,
    held_out_inputs,
)
from qdiff.quant_model import QuantModel

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "fashion_mnist.yml"
BUNDLE = ROOT / "models" / "pixel" / "fashion_mnist"
BUNDLED = {  # label -> file
    "bundled, published W4A8": BUNDLE / "w4a8-published.safetensors",
    "bundled, options W4A8": BUNDLE / "w4a8.safetensors",
}
RECORDED = ROOT / "docs" / "results.md"

SEED = 7
TIMESTEPS = 20
SAMPLES_A_STEP = 16
ITERATIONS, ITERATIONS_A, BATCH = 200, 40, 16
ROUNDING_RATE = 0.02  # of AdaRound: with a hundredth of the iterations each has to move further (default 0.001)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--images", type=int, default=64, help="images of each variant")
    parser.add_argument("--iters", type=int, default=ITERATIONS, help="iterations a unit, weights")
    parser.add_argument("--iters_a", type=int, default=ITERATIONS_A, help="iterations a unit, activations")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    for old in ("samples", "options"):
        shutil.rmtree(args.out / old, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)

    calibration_set = args.out / "calibration.pt"
    config_file, data, resumed = quoted(CONFIG), quoted(calibration_set), args.out / "resumed"
    sampler = f"--timesteps {TIMESTEPS} --skip_type quad --eta 0 --device cpu"
    say("1. A calibration set: noisy inputs along the full-precision sampler's trajectory")
    command(
        make_calibration_data.main,
        f"make_calibration_data.py --config {config_file} --use_pretrained {sampler} -n {SAMPLES_A_STEP} "
        f"--batch_size {SAMPLES_A_STEP} --seed 1 --out {data} --force",
    )
    say(
        f"2. Calibration to 4-bit weights and 8-bit activations: {args.iters} + {args.iters_a} iterations a unit where "
        f"the paper takes 20000 + 5000, and AdaRound's rate raised from 0.001 to {ROUNDING_RATE} to make up for it"
    )
    command(
        sample_ddim.main,
        f"sample_diffusion_ddim.py --config {config_file} --use_pretrained {sampler} --ptq --weight_bit 4 --quant_act "
        f"--act_bit 8 --a_sym --split --cali_data_path {data} --cali_st {TIMESTEPS} --cali_n {SAMPLES_A_STEP} "
        f"--cali_batch_size {BATCH} --cali_iters {args.iters} --cali_iters_a {args.iters_a} "
        f"--cali_weight_lr {ROUNDING_RATE} --max_images 0 "
        f"-l {quoted(args.out)}",
    )
    packed = next(args.out.glob("samples/*/ckpt.safetensors"))
    say("3. Sampling from the packed checkpoint that this wrote")
    shutil.rmtree(resumed, ignore_errors=True)
    command(
        sample_ddim.main,
        f"sample_diffusion_ddim.py --config {config_file} {sampler} --ptq --quant_act --resume "
        f"--cali_ckpt {quoted(packed)} --seed {SEED} --max_images {args.images} --batch_size 32 -l {quoted(resumed)}",
    )
    say(
        "4. The same weights, activations with the options beside the published defaults: asymmetric ranges for each "
        "timestep, the noisy image as two tensors, scale and mean error of the output corrected"
    )
    command(
        sample_ddim.main,
        f"sample_diffusion_ddim.py --config {config_file} --use_pretrained {sampler} --ptq --quant_act --act_bit 8 "
        f"--resume_w --cali_ckpt {quoted(packed)} --timed_ranges all --split_input --correct_scale --correct_mean "
        f"--cali_data_path {data} --cali_st {TIMESTEPS} --cali_n {SAMPLES_A_STEP} --cali_batch_size {BATCH} "
        f"--cali_iters_a {args.iters_a} --max_images 0 -l {quoted(args.out / 'options')}",
    )
    options = next((args.out / "options").glob("samples/*/ckpt.safetensors"))
    say("5. The same noise through full precision, plain rounding and all calibrations")
    config = load_config(CONFIG)
    rows = compare(config, calibration_set, packed, next(resumed.glob("samples/*/img")), options, args.images)
    table = summary(rows)
    show(rows, table, args.out, title=f"Fashion-MNIST, {TIMESTEPS} steps, the same noise in a column", started=started)


def compare(
    config: PixelConfig, calibration_set: Path, packed: Path, resumed: Path, options: Path, count: int
) -> list[Row]:
    full = full_precision(config)
    held_out = held_out_inputs(full, config, device="cpu")
    size = 4 * sum(p.numel() for p in full.parameters())
    rows = [measure("full precision", full, config, held_out, size, count)]

    nearest = QuantModel.from_config(full, read_info(packed).quant)
    side = config.data.image_size
    data = load_calibration_set(
        calibration_set, cali_st=TIMESTEPS, cali_n=SAMPLES_A_STEP, image_shape=(config.data.channels, side, side)
    )
    calibrate(nearest, data, CalibrationConfig(), mode="linear")
    rows.append(measure("round to nearest W4A8", nearest, config, held_out, len(packed_bytes(nearest)), count))

    demo = from_packed(packed, config)
    images = load_image_set(resumed).float() / 255
    rows.append(measure("this calibration W4A8", demo, config, held_out, packed.stat().st_size, count, images=images))
    better = from_packed(options, config)
    rows.append(measure("the same, options W4A8", better, config, held_out, options.stat().st_size, count))
    for label, path in BUNDLED.items():
        rows.append(measure(label, from_packed(path, config), config, held_out, path.stat().st_size, count))
    return rows


def measure(
    label: str,
    model: nn.Module,
    config: PixelConfig,
    held_out: HeldOutInputs,
    size: int,
    count: int,
    images: Tensor | None = None,
) -> Row:
    print(f"   {label}", flush=True)
    if images is None:
        images = sample_images(
            model, config, count=count, batch_size=32, timesteps=TIMESTEPS, skip_type="quad", seed=SEED
        )
    return measured(label, model, held_out, size, images)


def summary(rows: list[Row]) -> str:
    """The table, and what it does not show by itself."""
    closing = f"{len(rows[0].images)} images, {TIMESTEPS} steps; CPU."
    text = comparison(rows, batch="32 images", closing=closing)
    text.append(
        "Low bits are simulated: the file is small, the arithmetic is not faster. The Fréchet distances of 10 000 "
        "images each, recorded on a GPU (qdiff-w4a8: bundled, published; qdiff-w4a8-BEST-corrected: bundled, options):"
    )
    text += ["", *recorded_distances()]
    return "\n".join(text)


def recorded_distances() -> list[str]:
    """The table of ``docs/results.md``, word for word."""
    lines = RECORDED.read_text(encoding="utf-8").splitlines() if RECORDED.is_file() else []
    tables = [index for index, line in enumerate(lines) if line.startswith("| row")]
    if not tables:
        return [f"({RECORDED.name} has no table yet)"]
    first = tables[0]
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    return lines[first:last]


if __name__ == "__main__":
    main()
