"""Sample images with a pixel-space model: in full precision, quantized and calibrated now, or from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ddim.config import PixelConfig
from ddim.models import build, load_pixel_config
from ddim.transforms import to_images
from qdiff.calibration_data import CalibrationSet, load_calibration_set
from qdiff.cli.errors import exit_on_error
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
    resolve_device,
    typed_command,
)
from qdiff.cli.pipeline import QuantPlan, make_plan
from qdiff.cli.pixel import (
    PixelSampler,
    SamplerOptions,
    add_model_flags,
    add_sampler_flags,
    architecture,
    check_model_flags,
    check_sampler_flags,
    load_full_precision,
)
from qdiff.cli.run_folder import LAYOUT, RunFolder
from qdiff.cli.sampling import run
from qdiff.workers import joined_processes

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
        --cali_st 20 --cali_n 256 --cali_data_path auto
  from the packed checkpoint that this wrote
    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml \\
        --timesteps 100 --skip_type quad --max_images 64 --ptq --quant_act \\
        --resume --cali_ckpt runs/samples/<date>/ckpt.safetensors
"""


def build_parser() -> Parser:
    parser = Parser(prog=PROGRAM, usage="%(prog)s --config FILE [flags]", description=DESCRIPTION, epilog=EXAMPLES)
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
    check_model_flags(parser, args, standalone=args.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(words)
    check_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        config = load_pixel_config(args.config)
        check_sampler_flags(parser, args, config)
        with joined_processes(resolve_device(args.device)):
            run(parser, args, PixelTask(args, config), command=[*typed_command(PROGRAM), *words])
    return 0


class PixelTask:
    """A pixel-space model in the course of :func:`qdiff.cli.sampling.run`."""

    model_name = ""
    paths = ("config", "ckpt")
    layout, batch_flag = LAYOUT, "--batch_size"

    def __init__(self, args: argparse.Namespace, config: PixelConfig):
        self.args, self.config = args, config
        self.sampler = PixelSampler(config, SamplerOptions.from_args(args), resolve_device(args.device))
        self.images = args.max_images
        self.batch_size = args.batch_size or config.sampling.batch_size
        self.model_config = config.to_dict()
        self.architecture = architecture(config)

    def plan(self, parser: Parser) -> QuantPlan:
        return make_plan(parser, self.args, self.architecture)

    def calibration_samples(self, path: Path) -> CalibrationSet:
        args = self.args
        return load_calibration_set(
            path, cali_st=args.cali_st, cali_n=args.cali_n, image_shape=self.sampler.image_shape
        )

    def network(self, *, weights: bool) -> nn.Module:
        return load_full_precision(self.args, self.config) if weights else build(self.config)

    def to_images(self, samples: Tensor) -> Tensor:
        return to_images(samples, self.config.data)

    def image_text(self, index: int) -> dict[str, str]:
        return {}

    def finish(self, folder: RunFolder, *, changed: bool) -> None:
        """The images are all there is."""
