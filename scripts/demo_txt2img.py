"""The first look at a text-to-image model, in minutes, on a CPU: calibrate it to 4 bits and compare its pictures.

    make demo-txt2img

does for the bundled model of emoji and their names what ``make demo`` does for the pixel-space one: draws eight
prompts in full precision, makes a calibration set of other captions, calibrates the UNet with few iterations, draws the
prompts from the packed checkpoint that this wrote, and puts full precision, plain rounding, this calibration and the
bundled one side by side: ``demo-txt2img/comparison.png``, ``demo-txt2img/comparison.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.data.emoji import PROMPTS
from qdiff.cli import make_calibration_data, txt2img
from qdiff.cli.bundles import BUNDLES, CAPTIONS_SEED, TextBundle
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

PROGRAM = "demo_txt2img.py"
EMOJI = BUNDLES["emoji-text"]
BUNDLED = {"bundled W4A8": "w4a8.safetensors"}

SEED = 7
STEPS = 50  # of the sampler, as the command has by default; with few of them errors grow from step to step
TIMESTEPS = 20  # of the calibration, out of these
SAMPLES_A_STEP = 8  # each with its caption and without, as guidance asks the network
ITERATIONS, ITERATIONS_A, BATCH = 120, 25, 16
ROUNDING_RATE = 0.03  # of AdaRound: with a hundredth of the iterations each has to move further (default 0.001)
IMAGES_AT_ONCE = 8
MEASURED = 32  # images a row: PSNR differs by several dB from image to image


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__.splitlines()[0], formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("demo-txt2img"))
    parser.add_argument("--bundle", type=Path, default=EMOJI.folder, help="the model's folder [models/ldm/emoji-text]")
    parser.add_argument("--judges", type=Path, default=EMOJI.judges, help="its classifier's [models/ldm/emoji64]")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="what to draw [eight emoji]")
    parser.add_argument(
        "--measured",
        type=at_least(1),
        default=MEASURED,
        help="images that the table is about: of the prompts and others",
    )
    parser.add_argument("--iters", type=at_least(0), default=ITERATIONS, help="iterations a unit, weights")
    parser.add_argument("--iters_a", type=at_least(0), default=ITERATIONS_A, help="iterations a unit, activations")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    with exit_on_error(PROGRAM):
        bundle = dataclasses.replace(EMOJI, folder=args.bundle, judges=args.judges)
        bundle.check(*BUNDLED.values())
        demonstrate(bundle, args)
    return 0


def demonstrate(bundle: TextBundle, args: argparse.Namespace) -> None:
    """The commands one after another, then all variants from the same noise."""
    started = time.perf_counter()
    full, calibrated, resumed = fresh_folders(args.out, "full", "calibrated", "resumed")
    prompts, captions = args.out / "prompts.txt", args.out / "captions.txt"
    write_lines(prompts, args.prompts)
    known = dict.fromkeys(bundle.known.in_turn(CAPTIONS_SEED + 1))
    others = [caption for caption in known if caption not in args.prompts]
    write_lines(captions, others[:SAMPLES_A_STEP])
    measured_too = others[SAMPLES_A_STEP:][: max(0, args.measured - len(args.prompts))]

    calibration_set = args.out / "calibration.pt"
    model = f"--config {quoted(bundle.folder / 'config.yaml')} --ckpt {quoted(bundle.folder / 'model.safetensors')}"
    sampler = f"--plms {model} --ddim_steps {STEPS} --scale {bundle.scale:g} --device cpu"
    draw = f"txt2img.py --from-file {quoted(prompts)} --cond {sampler} --n_iter 1 --n_samples {IMAGES_AT_ONCE}"
    quant = "--ptq --quant_act --act_bit 8 --sm_abit 16 --split"
    say("1. The prompts in full precision")
    command(txt2img.main, f"{draw} --seed {SEED} --outdir {quoted(full)}")
    say("2. A calibration set: noisy latents along the full-precision sampler's trajectory, of other captions")
    command(
        make_calibration_data.main,
        f"make_calibration_data.py --from-file {quoted(captions)} {sampler} -n {SAMPLES_A_STEP} --batch_size "
        f"{SAMPLES_A_STEP} --seed 1 --out {quoted(calibration_set)} --force",
    )
    say(f"3. {quick_calibration(args.iters, args.iters_a, ROUNDING_RATE)}")
    command(
        txt2img.main,
        f"txt2img.py --from-file {quoted(prompts)} --cond {sampler} {quant} --weight_bit 4 --quant_mode qdiff "
        f"--no_grad_ckpt --timed_ranges all --split_input --cali_data_path {quoted(calibration_set)} --cali_st "
        f"{TIMESTEPS} --cali_n {SAMPLES_A_STEP} --cali_batch_size {BATCH} --cali_iters {args.iters} --cali_iters_a "
        f"{args.iters_a} --cali_weight_lr {ROUNDING_RATE} --seed 1 --n_iter 0 --outdir {quoted(calibrated)}",
    )
    packed = next(calibrated.glob("*/ckpt.safetensors"))
    say("4. The prompts from the packed checkpoint that this wrote; text encoder and first stage are the model's own")
    command(
        txt2img.main,
        f"{draw} {quant} --weight_bit 4 --resume --cali_ckpt {quoted(packed)} --seed {SEED} --outdir {quoted(resumed)}",
    )
    say("5. The same noise through full precision, plain rounding, this calibration and the bundled one")
    images = [load_image_set(next(folder.glob("*/samples"))).float() / 255 for folder in (full, resumed)]
    rows = compare(bundle, calibration_set, packed, [*args.prompts, *measured_too], *images)
    title = f"{STEPS} PLMS steps, guidance {bundle.scale:g}, the same noise in a column"
    table = summary(rows, bundle)
    show(rows, table, args.out, title=title, started=started, captions=args.prompts)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(
    bundle: TextBundle, calibration_set: Path, packed: Path, prompts: Sequence[str], full_images: Tensor, images: Tensor
) -> list[Row]:
    """A row a variant: measured on the same inputs, sampled from the same noise.

    Args:
        full_images, images: of full precision and of ``packed``, as the commands drew them: of the first prompts.
    """
    full = bundle.full_precision()
    held_out = bundle.held_out(full, device=torch.device("cpu"), steps=TIMESTEPS, per_step=4)

    def measure(label: str, model: nn.Module, size: int, images: Tensor | None = None) -> Row:
        print(f"   {label}", flush=True)
        if images is None or len(images) < len(prompts):
            sampler = bundle.drawing(prompts, "cpu", timesteps=STEPS, seed=SEED)
            drawn = bundle.sample_with(sampler, model, count=len(prompts), batch_size=IMAGES_AT_ONCE)
            images = drawn if images is None else torch.cat([images, drawn[len(images) :]])
        return measured(label, model, held_out, size, images)

    rows = [measure("full precision", full, 4 * sum(p.numel() for p in full.parameters()), full_images)]
    data = bundle.calibration_samples(calibration_set, cali_st=TIMESTEPS, cali_n=SAMPLES_A_STEP)
    rows += quantized_rows(measure, bundle, full, packed, data, images)
    return rows + bundled_rows(measure, bundle, BUNDLED)


def summary(rows: list[Row], bundle: TextBundle) -> str:
    """The table, and what it does not show by itself."""
    how = f"{STEPS} PLMS steps, guidance {bundle.scale:g}; CPU. Sizes are those of the UNet."
    batch = "16 images" if bundle.scale != 1 else "32 images"
    text = comparison(rows, batch=batch, closing=f"{len(rows[0].images)} images, {how}")
    return "\n".join([*text, "Low bits are simulated: the file is small, the arithmetic is not faster."])


if __name__ == "__main__":
    raise SystemExit(main())
