"""The first look at a latent model, in minutes, on a CPU: calibrate it to 4 bits and compare its images.

    make demo-ldm

does for the bundled class-conditional model of emoji what ``make demo`` does for the pixel-space one: makes a
calibration set, calibrates the UNet with few iterations, resumes from the packed checkpoint, calibrates the activations
once more with the options beside the published flags, and puts images of full precision, plain rounding, both
calibrations and the two bundled ones side by side: ``demo-ldm/comparison.png``, ``demo-ldm/comparison.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from qdiff.cli import make_calibration_data, sample_ldm
from qdiff.cli.bundles import BUNDLES, LatentBundle
from qdiff.cli.demonstration import (
    Row,
    bundled_rows,
    command,
    comparison,
    fresh_folders,
    measured,
    quantized_rows,
    quick_calibration,
    quoted,
    say,
    show,
)
from qdiff.cli.errors import exit_on_error
from qdiff.cli.flags import Help, at_least
from qdiff.evaluation.image_sets import load_image_set

PROGRAM = "demo_ldm.py"
EMOJI = BUNDLES["emoji64"]
BUNDLED = {"bundled, published W4A8": "w4a8-published.safetensors", "bundled, options W4A8": "w4a8.safetensors"}

SEED = 7
TIMESTEPS = 20
SAMPLES_A_STEP = 16
ITERATIONS, ITERATIONS_A, BATCH = 160, 60, 8
ROUNDING_RATE = 0.02  # of AdaRound: with a hundredth of the iterations each has to move further (default 0.001)
IMAGES_AT_ONCE = 12


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__.splitlines()[0], formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("demo-ldm"))
    parser.add_argument("--bundle", type=Path, default=EMOJI.folder, help="the model's folder [models/ldm/emoji64]")
    parser.add_argument("--images", type=at_least(1), default=12, help="images of each variant, all classes in turn")
    parser.add_argument("--iters", type=at_least(0), default=ITERATIONS, help="iterations a unit, weights")
    parser.add_argument("--iters_a", type=at_least(0), default=ITERATIONS_A, help="iterations a unit, activations")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    with exit_on_error(PROGRAM):
        bundle = dataclasses.replace(EMOJI, folder=args.bundle)
        bundle.check(*BUNDLED.values())
        demonstrate(bundle, args)
    return 0


def demonstrate(bundle: LatentBundle, args: argparse.Namespace) -> None:
    """The commands one after another, then all variants from the same noise."""
    started = time.perf_counter()
    calibrated, resumed, improved = fresh_folders(args.out, "calibrated", "resumed", "options")
    calibration_set = args.out / "calibration.pt"
    sampler = f"-r {quoted(bundle.folder)} -c {TIMESTEPS} -e 0 --scale {bundle.scale:g} --device cpu"
    weights = f"{sampler} --ptq --quant_act"
    data = f"--cali_data_path {quoted(calibration_set)} --cali_st {TIMESTEPS} --cali_n {SAMPLES_A_STEP}"
    data += f" --cali_batch_size {BATCH}"
    say("1. A calibration set: noisy latents along the full-precision sampler's trajectory, classes in turn")
    command(
        make_calibration_data.main,
        f"make_calibration_data.py {sampler} -n {SAMPLES_A_STEP} --batch_size {SAMPLES_A_STEP} --seed 1 "
        f"--out {quoted(calibration_set)} --force",
    )
    say(f"2. {quick_calibration(args.iters, args.iters_a, ROUNDING_RATE)}")
    command(
        sample_ldm.main,
        f"sample_diffusion_ldm.py {weights} --weight_bit 4 --act_bit 8 --a_sym --a_min_max --running_stat --split "
        f"{data} --cali_iters {args.iters} --cali_iters_a {args.iters_a} --cali_weight_lr {ROUNDING_RATE} --seed 1 "
        f"-n 0 -l {quoted(calibrated)}",
    )
    packed = next(calibrated.glob("*/samples/*/ckpt.safetensors"))
    say("3. Sampling from the packed checkpoint that this wrote, decoded by the model's first stage")
    command(
        sample_ldm.main,
        f"sample_diffusion_ldm.py {weights} --resume --cali_ckpt {quoted(packed)} --seed {SEED} -n {args.images} "
        f"--batch_size {IMAGES_AT_ONCE} -l {quoted(resumed)}",
    )
    say(
        "4. The same weights, activations with the options beside the published flags: asymmetric ranges for each "
        "timestep, the noisy latent as two tensors, scale and mean error of the output corrected"
    )
    command(
        sample_ldm.main,
        f"sample_diffusion_ldm.py {weights} --act_bit 8 --a_min_max --resume_w --cali_ckpt {quoted(packed)} "
        f"--timed_ranges all --split_input --correct_scale --correct_mean {data} --cali_iters_a {args.iters_a} "
        f"--seed 1 -n 0 -l {quoted(improved)}",
    )
    options = next(improved.glob("*/samples/*/ckpt.safetensors"))
    say("5. The same noise through full precision, plain rounding and all calibrations")
    rows = compare(bundle, calibration_set, packed, next(resumed.glob("*/samples/*/img")), options, args.images)
    table = summary(rows, bundle)
    show(rows, table, args.out, title=f"{TIMESTEPS} {bundle.steps_are}, the same noise in a column", started=started)


def compare(
    bundle: LatentBundle, calibration_set: Path, packed: Path, resumed: Path, options: Path, count: int
) -> list[Row]:
    """A row a variant: measured on the same inputs, sampled from the same noise."""
    full = bundle.full_precision()
    held_out = bundle.held_out(full, device=torch.device("cpu"), steps=TIMESTEPS, per_step=4)

    def measure(label: str, model: nn.Module, size: int, images: torch.Tensor | None = None) -> Row:
        print(f"   {label}", flush=True)
        if images is None:
            images = bundle.sample(
                model, count=count, batch_size=IMAGES_AT_ONCE, timesteps=TIMESTEPS, eta=0.0, seed=SEED
            )
        return measured(label, model, held_out, size, images)

    rows = [measure("full precision", full, 4 * sum(p.numel() for p in full.parameters()))]
    data = bundle.calibration_samples(calibration_set, cali_st=TIMESTEPS, cali_n=SAMPLES_A_STEP)
    rows += quantized_rows(measure, bundle, full, packed, data, load_image_set(resumed).float() / 255)
    rows.append(measure("the same, options W4A8", bundle.from_packed(options), options.stat().st_size))
    return rows + bundled_rows(measure, bundle, BUNDLED)


def summary(rows: list[Row], bundle: LatentBundle) -> str:
    """The table, and what it does not show by itself."""
    closing = f"{len(rows[0].images)} images, {TIMESTEPS} {bundle.steps_are}; CPU. Sizes are those of the UNet."
    text = comparison(rows, batch="16 images" if bundle.scale != 1 else "32 images", closing=closing)
    return "\n".join([*text, "Low bits are simulated: the file is small, the arithmetic is not faster."])


if __name__ == "__main__":
    raise SystemExit(main())
