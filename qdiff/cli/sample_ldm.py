"""Sample images with a latent diffusion model: in full precision, calibrated now, or from a calibrated checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

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
from qdiff.cli.latent import (
    LatentModel,
    LatentSampler,
    add_model_flags,
    add_sampler_flags,
    check_sampler_flags,
    first_ranges,
    sampler_options,
)
from qdiff.cli.pipeline import QuantPlan, make_plan
from qdiff.cli.run_folder import LAYOUT, RunFolder
from qdiff.cli.sampling import run
from qdiff.workers import joined_processes

PROGRAM = "sample_diffusion_ldm.py"
DESCRIPTION = (
    "Sample images with a latent diffusion model, unconditional or class-conditional: in full precision; with --ptq "
    "quantized and calibrated first; with --ptq --resume from a calibrated checkpoint. Only the UNet is quantized."
)
EXAMPLES = """\
examples:
  full precision
    python scripts/sample_diffusion_ldm.py -r models/ldm/lsun_beds256/model.ckpt -n 20 -c 200 -e 1.0 --seed 41
  calibrate to 4-bit weights and 8-bit activations, then sample
    python scripts/make_calibration_data.py -r models/ldm/lsun_beds256/model.ckpt -n 256 -c 200 -e 1.0 --out cali.pt
    python scripts/sample_diffusion_ldm.py -r models/ldm/lsun_beds256/model.ckpt -n 20 -c 200 -e 1.0 --seed 40 \\
        --ptq --weight_bit 4 --quant_act --a_sym --a_min_max --running_stat \\
        --cali_st 20 --cali_n 256 --cali_data_path cali.pt
  from the checkpoint that this wrote
    python scripts/sample_diffusion_ldm.py -r models/ldm/lsun_beds256/model.ckpt -n 20 -c 200 -e 1.0 --seed 41 \\
        --ptq --quant_act --resume --cali_ckpt runs/lsun_beds256/samples/<date>/ckpt.safetensors
  class-conditional ImageNet, three classes in turn
    python scripts/sample_diffusion_ldm.py -r models/ldm/cin256-v2/model.ckpt -n 9 -c 20 -e 0 --seed 1 \\
        --class_labels 1,5,207 --scale 3
"""

logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        overrides=True,
        usage="%(prog)s -r PATH --seed N [flags] [key=value ...]",
    )
    add_model_flags(parser)
    add_sampler_flags(parser)
    add_inference_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "-l",
        "--logdir",
        default="runs",
        metavar="DIR",
        help="a new run folder DIR/<model>/samples/<date>/ is made; where DIR is a run folder itself, that run is "
        "continued",
    )
    output.add_argument(
        "-n", "--n_samples", type=at_least(0), default=50000, metavar="N", help="images to sample; 0 only calibrates"
    )
    add_quantization_flags(parser, a_min_max=True)
    add_calibration_flags(parser)
    add_resume_flags(parser)
    add_common_flags(parser, seed=None)
    parser.add_argument_group("accepted").add_argument(
        "--cond",
        action="store_true",
        help="that the model is conditional, which its config says anyway; an error where it is not",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(words)
    check_quantization(parser, args)
    check_inference(parser, args)
    check_sampler_flags(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        task = LatentTask(parser, args)
        with joined_processes(resolve_device(args.device)):
            run(parser, args, task, command=[*typed_command(PROGRAM), *words])
    return 0


class LatentTask:
    """A latent diffusion model in the course of :func:`qdiff.cli.sampling.run`."""

    paths = ("resume_base",)
    layout, batch_flag = LAYOUT, "--batch_size"

    def __init__(self, parser: Parser, args: argparse.Namespace):
        self.args = args
        self.model = LatentModel(args.resume_base, args.overrides)
        self.sampler = LatentSampler(self.model, sampler_options(parser, args, self.model), resolve_device(args.device))
        self.images, self.batch_size = args.n_samples, args.batch_size
        self.model_config = self.model.facts()
        self.architecture = self.model.architecture()
        self.model_name = self.model.name

    def plan(self, parser: Parser) -> QuantPlan:
        return make_plan(
            parser,
            self.args,
            self.architecture,
            source=str(self.model.config_path),
            range_order="first",  # as published for these models
            **first_ranges(self.args),
        )

    def calibration_samples(self, path: Path) -> CalibrationSet:
        args, context = self.args, self.model.context_shape
        return load_calibration_set(
            path,
            cali_st=args.cali_st,
            cali_n=args.cali_n,
            image_shape=self.sampler.image_shape,
            conditional=context is not None,
            context_width=context and context[1],
        )

    def network(self, *, weights: bool) -> nn.Module:
        # A packed checkpoint has the UNet's weights, but first stage and embeddings are always those of the model.
        self.model.load(unet=weights, device=self.sampler.device)
        unet = self.model.unet
        self.model.diffusion.model.diffusion_model = nn.Identity()  # the caller's from now on, also on its device
        return unet

    def to_images(self, samples: Tensor) -> Tensor:
        return self.sampler.decode(samples)

    def image_text(self, index: int) -> dict[str, str]:
        return {}

    def finish(self, folder: RunFolder, *, changed: bool) -> None:
        if changed or not folder.has_array(self.images):
            path = folder.save_array(self.images)
            if path is not None:
                logger.info("%s: all of them as one array", path)
