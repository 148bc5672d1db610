"""Draw images of texts with Stable Diffusion: in full precision, calibrated now, or from a calibrated checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qdiff.attention import UNQUANTIZED_MAP
from qdiff.calibration_data import CalibrationSet, load_calibration_set
from qdiff.cli import finishing
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import (
    Parser,
    add_calibration_flags,
    add_common_flags,
    add_inference_flags,
    add_quantization_flags,
    add_resume_flags,
    at_least,
    check_file,
    check_inference,
    check_quantization,
    real,
    resolve_device,
    typed_command,
)
from qdiff.cli.pipeline import QuantPlan, make_plan
from qdiff.cli.run_folder import Layout, RunFolder
from qdiff.cli.sampling import run
from qdiff.cli.text import (
    STABLE_DIFFUSION,
    TextSampler,
    add_guidance_flag,
    add_prompt_flags,
    add_text_model_flags,
    add_text_sampler_flags,
    check_text_flags,
    read_prompts,
    text_model,
    text_options,
    told_of_cut_prompts,
)
from qdiff.version import __version__
from qdiff.workers import joined_processes

PROGRAM = "txt2img.py"
OUTDIR, OUTDIR_LAION = "outputs/txt2img-samples", "outputs/txt2img-samples-laion400m"
DESCRIPTION = (
    "Draw images of texts with Stable Diffusion v1 or the LAION-400M model: in full precision; with --ptq quantized "
    "and calibrated first; with --ptq --resume from a calibrated checkpoint. Only the UNet is quantized."
)
EXAMPLES = """\
examples:
  full precision
    python scripts/txt2img.py --prompt "a puppy wearing a hat" --plms --n_samples 5 --ckpt sd-v1-4.ckpt
  calibrate to 4-bit weights and 8-bit activations, then draw
    python scripts/make_calibration_data.py --from-file prompts.txt --plms --ckpt sd-v1-4.ckpt -n 128 --cali_st 25 \\
        --out cali.pt
    python scripts/txt2img.py --prompt "a puppy wearing a hat" --plms --ckpt sd-v1-4.ckpt --ptq --weight_bit 4 \\
        --quant_act --sm_abit 16 --split --running_stat --no_grad_ckpt --cali_st 25 --cali_n 128 --cali_batch_size 8 \\
        --cali_data_path cali.pt
  from the checkpoint that this wrote
    python scripts/txt2img.py --prompt "a puppy wearing a hat" --plms --ckpt sd-v1-4.ckpt --ptq --quant_act --resume \\
        --cali_ckpt outputs/txt2img-samples/<date>/ckpt.safetensors
"""

# What of the options an image's file tells: all that decides the image.
TOLD = (
    *("plms", "dpm", "ddim_steps", "ddim_eta", "scale", "fixed_code", "precision"),
    *("ptq", "weight_bit", "quant_act", "act_bit", "sm_abit", "split", "timed_ranges", "split_input", "quant_mode"),
    "unrounded_maps",
)

logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        overrides=True,
        usage="%(prog)s (--prompt TEXT | --from-file FILE) [flags] [key=value ...]",
    )
    add_prompt_flags(parser.add_argument_group("prompts"))
    model = parser.add_argument_group(
        "model", "Bare words such as model.params.image_size=32 change the model's config."
    )
    model.add_argument("--config", metavar="FILE", help=f"the model's YAML file [{STABLE_DIFFUSION[0]}]")
    model.add_argument(
        "--ckpt",
        metavar="FILE",
        help=f"the full-precision model: .ckpt or .safetensors, or a folder of one [{STABLE_DIFFUSION[1]}]. Sampling "
        "from a calibrated checkpoint does not read its UNet, which may be absent (scripts/strip_unet.py)",
    )
    add_text_model_flags(model)
    model.add_argument("--C", type=at_least(1), metavar="N", help="channels of a latent [the config's]")
    model.add_argument("--f", type=at_least(1), metavar="N", help="pixels along a side of a latent's [the config's]")
    _add_sampler_flags(parser.add_argument_group("sampler"))
    add_inference_flags(parser, precision="autocast", maps=True)
    _add_output_flags(parser.add_argument_group("output"))
    add_quantization_flags(parser, a_sym=False)
    add_calibration_flags(parser, range_samples=16)
    add_resume_flags(parser)
    add_common_flags(parser, seed=42)
    accepted = parser.add_argument_group("accepted")
    accepted.add_argument("--cond", action="store_true", help="that the model is conditional, which it is anyway")
    accepted.add_argument(
        "--no_grad_ckpt",
        action="store_true",
        help="while calibrating keep all activations of a transformer block; otherwise those inside its parts are "
        "computed twice, which needs less memory and gives the same result",
    )
    return parser


def _add_sampler_flags(group: argparse._ArgumentGroup) -> None:
    add_text_sampler_flags(group)
    group.add_argument("--dpm", action="store_true", help="DPM-Solver++ of order 2 in place of DDIM")
    group.add_argument(
        "--ddim_eta", type=real(zero=True), default=0.0, metavar="X", help="noise in DDIM steps: 0 none, 1 as in DDPM"
    )
    add_guidance_flag(group)
    group.add_argument(
        "--fixed_code",
        action="store_true",
        help="the same starting noises in every iteration; with --from-file the same one for all prompts",
    )
    group.add_argument("--n_iter", type=at_least(0), default=2, metavar="N", help="how often; 0 only calibrates")
    group.add_argument(
        "--n_samples",
        type=at_least(1),
        default=3,
        metavar="N",
        help="images at once: with --prompt how many each iteration makes, with --from-file, which makes one of each "
        "prompt, without effect on the images",
    )


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--outdir",
        dest="logdir",
        metavar="DIR",
        help="a new run folder DIR/<date>/ is made; where DIR is a run folder itself, that run is continued "
        f"[{OUTDIR}, with --laion400m {OUTDIR_LAION}]",
    )
    group.add_argument("--skip_grid", action="store_true", help="no picture of the first images together")
    group.add_argument("--skip_save", action="store_true", help="keep that picture only")
    group.add_argument("--n_rows", type=at_least(0), default=0, metavar="N", help="its images in a row [n_samples]")
    group.add_argument(
        "--no_watermark",
        action="store_true",
        help="do not mark images invisibly, as is done where the package invisible-watermark is installed",
    )
    group.add_argument(
        "--safety_checker",
        metavar="PATH_OR_NAME",
        help="black out images that this checker (of diffusers, or a classifier of transformers) objects to [off]",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(words)
    check_text_flags(parser, args, eta="ddim_eta")
    check_file(parser, args, "config", "configs/stable-diffusion/ has Stable Diffusion's")
    check_quantization(parser, args)
    check_inference(parser, args)
    args.logdir = args.logdir or (OUTDIR_LAION if args.laion400m else OUTDIR)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        task = TextTask(parser, args)
        with joined_processes(resolve_device(args.device)):
            run(parser, args, task, command=[*typed_command(PROGRAM), *words])
    return 0


class TextTask:
    """A text-to-image model in the course of :func:`qdiff.cli.sampling.run`."""

    model_name = ""
    batch_flag = "--n_samples"

    def __init__(self, parser: Parser, args: argparse.Namespace):
        self.args, self.prompts = args, read_prompts(args)
        self._plan: QuantPlan | None = None
        self.model = text_model(args)
        args.config, args.ckpt = str(self.model.config_path), str(self.model.checkpoint)  # as they were resolved
        args.prompts_sha256 = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()  # a file may change
        self._check_shape()
        many = args.from_file is not None
        self.sampler = TextSampler(
            self.model,
            text_options(parser, args, self.model, eta=args.ddim_eta),
            resolve_device(args.device),
            self.prompts,
            size=(args.H, args.W),
            codes=(1 if many else args.n_samples) if args.fixed_code else None,
        )
        self.images = args.n_iter * (len(self.prompts) if many else args.n_samples)
        self.batch_size = args.n_samples
        self.model_config = self.model.facts()
        self.architecture = self.model.architecture()
        self.paths = ("config", "ckpt", "from_file", "tokenizer")
        self.layout = Layout(
            flags=("--outdir",),
            runs="",
            images="samples",
            digits=5,
            grid=not args.skip_grid,
            columns=args.n_rows or args.n_samples,
            keep_images=not args.skip_save,
            free_options=("no_grad_ckpt", *(("n_samples", "n_rows") if many else ())),
        )
        self.steps = finishing.image_steps(args)  # now: what they need may be missing

    def _check_shape(self) -> None:
        """``--C`` and ``--f`` say what the config says already."""
        for flag, said, fact in (
            ("--C", self.args.C, self.model.diffusion.channels),
            ("--f", self.args.f, self.model.factor),
        ):
            if said not in (None, fact):
                raise UserError(f"{flag} {said}: it is {fact} in {self.model.config_path}; leave it out")

    def plan(self, parser: Parser) -> QuantPlan:
        self._plan = make_plan(
            parser,
            self.args,
            self.architecture,
            source=str(self.model.config_path),
            weight_range="mse",
            act_range="mse",
        )
        if self.args.unrounded_maps and not (self._plan.quant_act and self._plan.quant.sm_abit >= UNQUANTIZED_MAP):
            parser.error(
                f"--unrounded_maps: softmax maps are quantized to {self._plan.quant.sm_abit} bits here; only those of "
                f"{UNQUANTIZED_MAP} (--sm_abit {UNQUANTIZED_MAP}) can stay unrounded"
            )
        return self._plan

    def calibration_samples(self, path: Path) -> CalibrationSet:
        args = self.args
        return load_calibration_set(
            path,
            cali_st=args.cali_st,
            cali_n=args.cali_n,
            image_shape=self.sampler.image_shape,
            conditional=True,
            context_width=self.model.context_shape[1],
        )

    def network(self, *, weights: bool) -> nn.Module:
        self.model.load(unet=weights, device=self.sampler.device)
        unet = self.model.unet
        self.model.diffusion.model.diffusion_model = nn.Identity()  # the caller's from now on, also on its device
        return unet

    def to_images(self, samples: Tensor) -> Tensor:
        images = self.sampler.decode(samples)
        for step in self.steps:
            images = step(images)
        return images

    def image_text(self, index: int) -> dict[str, str]:
        """Prompt, seed, options and where the weights came from."""
        return {"prompt": self.sampler.prompt(index), "image": str(index), **self._text_of_all}

    @cached_property
    def _text_of_all(self) -> dict[str, str]:
        args = self.args
        if cut := told_of_cut_prompts(self.model, self.prompts):
            logger.warning("%s", cut)
        options: dict[str, Any] = {name: getattr(args, name) for name in TOLD if args.ptq or name not in QUANT_TOLD}
        if self._plan is not None:  # a packed checkpoint answers what the flags leave open
            options |= {name: value for name, value in self._plan.resolved_flags().items() if name in TOLD}
        options |= {"height": self.sampler.image_shape[1] * self.model.factor}
        options |= {"width": self.sampler.image_shape[2] * self.model.factor}
        text = {
            "seed": str(args.seed),
            "options": json.dumps(options, sort_keys=True),
            "checkpoint": _named_hash(self.model.checkpoint),
            "software": f"qdiff {__version__}",
        }
        if args.cali_ckpt is not None:
            text["quantized checkpoint"] = _named_hash(Path(args.cali_ckpt))
        return text

    def finish(self, folder: RunFolder, *, changed: bool) -> None:
        """The images are all there is."""


QUANT_TOLD = TOLD[TOLD.index("weight_bit") :]


def _named_hash(path: Path) -> str:
    """A file's name and the SHA-256 of its content."""
    with open(path, "rb") as file:
        return f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
