"""Sample images with a pixel-space model: in full precision, quantized and calibrated now, or from a checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ddim.config import PixelConfig, load_config
from ddim.samplers import EpsilonModel
from ddim.transforms import to_images
from ddim.unet import UNet
from qdiff.calibration_data import CalibrationSet, batches, load_calibration_set
from qdiff.checkpoint import is_packed
from qdiff.cli.errors import exit_on_error, lower_on_out_of_memory
from qdiff.cli.flags import (
    Parser,
    add_calibration_flags,
    add_common_flags,
    add_inference_flags,
    add_quantization_flags,
    add_resume_flags,
    at_least,
    check_inference,
    check_quantization,
    inference_config,
    needs_calibration_set,
    resolve_device,
)
from qdiff.cli.pipeline import (
    QuantPlan,
    calibrate_and_save,
    make_plan,
    memory_budget,
    quantized_model,
    remove_progress,
    room_needed,
)
from qdiff.cli.pixel import (
    PixelSampler,
    SamplerOptions,
    add_model_flags,
    add_sampler_flags,
    architecture,
    check_model_flags,
    check_sampler_flags,
    image_bar,
    image_shape,
    load_full_precision,
    with_bar,
)
from qdiff.cli.run_folder import RunFolder, check_room
from qdiff.inference import prepare
from qdiff.workers import WORKERS, joined_processes

PROGRAM = "sample_diffusion_ddim.py"
DESCRIPTION = (
    "Sample images with a pixel-space diffusion model: in full precision; with --ptq quantized and calibrated first; "
    "with --ptq --resume from a calibrated checkpoint."
)
EXAMPLES = """\
examples:
  full precision
    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --use_pretrained \\
        --timesteps 100 --skip_type quad --max_images 64
  calibrate to 4-bit weights and 8-bit activations, then sample
    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --use_pretrained \\
        --timesteps 100 --skip_type quad --max_images 64 --ptq --weight_bit 4 --quant_act --a_sym --split \\
        --cali_st 20 --cali_n 256 --cali_data_path cali.pt
  from the packed checkpoint that this wrote
    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml \\
        --timesteps 100 --skip_type quad --max_images 64 --ptq --quant_act \\
        --resume --cali_ckpt runs/samples/<date>/ckpt.safetensors
"""

logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES)
    add_model_flags(parser)
    add_sampler_flags(parser)
    add_inference_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "-l",
        "--logdir",
        default="runs",
        metavar="DIR",
        help="a new run folder DIR/samples/<date>/ is made; where DIR is a run folder itself, that run is continued",
    )
    output.add_argument(
        "--max_images", type=at_least(0), default=50000, metavar="N", help="images to sample; 0 only calibrates"
    )
    add_quantization_flags(parser)
    add_calibration_flags(parser, act_range=True)
    add_resume_flags(parser)
    add_common_flags(parser, seed=1234)
    return parser


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before any file but a checkpoint's header is read."""
    check_quantization(parser, args)
    check_inference(parser, args)
    check_model_flags(parser, args, standalone=args.resume and is_packed(args.cali_ckpt))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(words)
    check_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        config = load_config(args.config)
        check_sampler_flags(parser, args, config)
        with joined_processes(resolve_device(args.device)):
            run(parser, args, config, command=[f"scripts/{PROGRAM}", *words])
    return 0


def run(parser: Parser, args: argparse.Namespace, config: PixelConfig, command: Sequence[str]) -> None:
    """Everything that can be wrong is looked at first; then the run folder is made and the work starts."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    device = resolve_device(args.device)
    sampler = PixelSampler(config, SamplerOptions.from_args(args), device)
    plan = make_plan(parser, args, architecture(config)) if args.ptq else None
    options = run_options(args, config, plan)
    folder = RunFolder.find(args.logdir, options)
    if plan is not None and folder is not None:
        plan = plan.continued_in(folder.path)
    data = calibration_samples(args, config) if plan is not None and plan.calibrates else None
    plan = plan and plan.for_samples(data)

    model = build_model(args, config, plan)
    if plan is not None and plan.calibrates:
        check_room(args.logdir, room_needed(model))
    if WORKERS.rank == 0:
        folder = folder or RunFolder.create(args.logdir, options)
        folder.tidy()
    path = WORKERS.same(folder and folder.path)
    model = model.to(device)

    def calibrated() -> None:
        with lower_on_out_of_memory("--cali_batch_size", args.cali_batch_size):
            facts, budget = config.to_dict(), memory_budget(args, path)
            calibrate_and_save(model, plan, data, path, facts, tensorboard=args.tensorboard, budget=budget)

    if WORKERS.rank > 0:  # helps the first process to calibrate
        if plan is not None and plan.calibrates:
            calibrated()
        return
    with folder.logging(command, verbose=args.verbose):
        if plan is not None and plan.calibrates:
            calibrated()
        else:
            remove_progress(folder.path)  # of a process that was killed between its checkpoints and their tidying up
        sample_images(model, sampler, config, folder, args)


def build_model(args: argparse.Namespace, config: PixelConfig, plan: QuantPlan | None) -> nn.Module:
    """The network with its weights, ready to sample or to be calibrated, on the CPU."""
    if plan is not None and plan.standalone:
        return quantized_model(UNet.from_config(config), plan)
    model = load_full_precision(args, config)
    return model if plan is None else quantized_model(model, plan)


def calibration_samples(args: argparse.Namespace, config: PixelConfig) -> CalibrationSet | None:
    if not needs_calibration_set(args):
        return None
    return load_calibration_set(
        args.cali_data_path, cali_st=args.cali_st, cali_n=args.cali_n, image_shape=image_shape(config)
    )


def run_options(args: argparse.Namespace, config: PixelConfig, plan: QuantPlan | None) -> dict[str, Any]:
    """What ``sampling_config.yaml`` records: every flag as it was resolved, and the model."""
    flags = {name: value for name, value in vars(args).items() if name not in ("given", "help")}
    for name in ("config", "ckpt", "cali_ckpt", "cali_data_path"):
        if flags[name] is not None:
            flags[name] = str(Path(flags[name]).absolute())  # the same file from wherever the run is continued
    flags["device"] = str(resolve_device(args.device))
    flags["batch_size"] = args.batch_size or config.sampling.batch_size
    flags["precision"] = inference_config(args).precision  # decides images, while the device may change
    if plan is not None:
        flags |= plan.resolved_flags()
    return flags | {"model_config": config.to_dict()}


def ready_to_sample(model: nn.Module, sampler: PixelSampler, args: argparse.Namespace, batch_size: int) -> EpsilonModel:
    """The network in the precision of the flags, compiled if they say so."""
    if batch_size == 0:
        return model
    started = time.perf_counter()
    predict = prepare(
        model,
        inference_config(args),
        shape=(batch_size, *sampler.image_shape),
        device=sampler.device,
        cuda_graph=args.compile and sampler.device.type == "cuda",
    )
    if args.compile:
        logger.info("compiled for batches of %d in %.0f s", batch_size, time.perf_counter() - started)
    return predict


def sample_images(
    model: nn.Module, sampler: PixelSampler, config: PixelConfig, folder: RunFolder, args: argparse.Namespace
) -> None:
    """Make the images that are missing, and the grid."""
    missing = folder.missing_images(args.max_images)
    done = args.max_images - len(missing)
    batch_size = args.batch_size or config.sampling.batch_size
    if folder.continued and missing:
        logger.info("%d of %d images are there; going on at %06d", done, args.max_images, missing[0])
    with lower_on_out_of_memory("--batch_size", batch_size), image_bar(args.max_images, done) as bar:
        sample = with_bar(sampler, ready_to_sample(model, sampler, args, min(batch_size, len(missing))), bar)
        for indices in batches(missing, batch_size):
            folder.save_images(indices, to_images(sample(indices), config.data))
            done += len(indices)
            bar.update(done - bar.n)  # the exact number, after fractions of it
    grid = folder.save_grid(args.max_images)
    if grid is not None:
        logger.info("images 000000 to %06d in %s; %s shows the first", args.max_images - 1, folder.images, grid.name)
