"""Add the output's scale per timestep to a calibrated checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ddim.models import build, load_pixel_config
from qdiff.calibration_data import CalibrationSet, load_calibration_set
from qdiff.checkpoint import is_packed, load_quantized, read_info, save_packed
from qdiff.cli import latent, pixel
from qdiff.cli.errors import UserError, exit_on_error, lower_on_out_of_memory
from qdiff.cli.flags import (
    Parser,
    add_machine_flags,
    add_quantizer_flags,
    add_selection_flags,
    at_least,
    check_file,
    resolve_device,
)
from qdiff.cli.pipeline import settled_quant
from qdiff.config import QuantConfig
from qdiff.output_scale import OutputScale
from qdiff.quant_model import QuantModel
from qdiff.scale_correction import FIT_CHUNK, fit_output_scale

PROGRAM = "correct_scale.py"
DESCRIPTION = (
    "Measure by which factor a calibrated network's output is too large at each timestep of a calibration set, and "
    "write a packed checkpoint that records it. Sampling from that file divides by it. With --correct_mean its mean "
    "error is measured too, and subtracted. A calibration with these flags does the same at its end."
)
EXAMPLES = """\
examples:
  from a packed checkpoint, which has no full-precision weights to compare with
    python scripts/correct_scale.py runs/samples/<date>/ckpt.safetensors --out corrected.safetensors \\
        --config configs/fashion_mnist.yml --use_pretrained --cali_data_path cali.pt --cali_st 20 --cali_n 256
  from one in the published format, which has them
    python scripts/correct_scale.py w4a8.pth --weight_bit 4 --quant_act --a_sym --split --out corrected.safetensors \\
        --config configs/cifar10.yml --cali_data_path cali.pt --cali_st 20 --cali_n 256
  of a latent model; of a text-to-image model, whose config lies elsewhere
    python scripts/correct_scale.py runs/samples/<date>/ckpt.safetensors --out corrected.safetensors \\
        -r models/ldm/lsun_beds256/model.ckpt --cali_data_path cali.pt --cali_st 20 --cali_n 256
    python scripts/correct_scale.py outputs/<date>/ckpt.safetensors --out corrected.safetensors \\
        -r sd-v1-4.ckpt --config configs/stable-diffusion/v1-inference.yaml \\
        --cali_data_path cali.pt --cali_st 25 --cali_n 128
"""

logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s CKPT --out FILE --cali_data_path FILE [flags] [key=value ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        overrides=True,
    )
    parser.add_argument(
        "cali_ckpt", metavar="CKPT", help="calibrated checkpoint: ckpt.pth or a packed ckpt.safetensors"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the packed checkpoint to write; may replace a packed CKPT"
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=FIT_CHUNK, metavar="N", help="samples in the network at once"
    )
    parser.add_argument(
        "--correct_mean",
        action="store_true",
        help="record the mean error of every pixel too, which sampling subtracts",
    )
    pixel.add_model_flags(parser, title="pixel-space model", required=False)
    latent.add_model_flags(
        parser, title="or: latent model, of texts too; with --config where its config is not beside it", required=False
    )
    add_selection_flags(parser.add_argument_group("calibration set"), required=True)
    group = parser.add_argument_group("quantization", "of a checkpoint that does not say it itself")
    add_quantizer_flags(group)
    add_machine_flags(parser.add_argument_group("general"))
    return parser


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    check_file(parser, args, "cali_ckpt", "a calibration writes ckpt.pth and ckpt.safetensors into its run folder")
    check_file(parser, args, "cali_data_path", "scripts/make_calibration_data.py makes one")
    if not is_packed(args.out):
        parser.error(f"--out {args.out}: only the packed format has a place for the scale; use a name in .safetensors")
    if args.resume_base is not None:
        for name in ("ckpt", "use_pretrained"):
            if name in args.given:
                parser.error(f"{parser.flag(name)} goes with a pixel-space model, not with -r; leave one of them out")
        return
    if args.config is None:
        parser.error("say which model: --config FILE for a pixel-space one, or -r PATH for a latent one")
    if args.overrides:
        parser.error(f"{args.overrides[0]}: the config of a pixel-space model cannot be changed by such words")
    pixel.check_model_flags(parser, args, standalone=not is_packed(args.cali_ckpt))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    check_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        run(args, (pixel_subject if args.resume_base is None else latent_subject)(parser, args))
    return 0


@dataclass(frozen=True)
class Subject:
    """A model of either kind.

    Attributes:
        unet: with its full-precision weights, where the checkpoint does not bring them itself.
        facts: what checkpoints record of the model.
    """

    unet: nn.Module
    quant: QuantConfig
    data: CalibrationSet
    facts: dict[str, Any]


def pixel_subject(parser: Parser, args: argparse.Namespace) -> Subject:
    """The model of ``--config``."""
    config, path = load_pixel_config(args.config), Path(args.cali_ckpt)
    quant = settled_quant(parser, args, path, pixel.architecture(config))
    data = load_calibration_set(
        args.cali_data_path, cali_st=args.cali_st, cali_n=args.cali_n, image_shape=pixel.image_shape(config)
    )
    unet = pixel.load_full_precision(args, config) if is_packed(path) else build(config)
    return Subject(unet, quant, data, config.to_dict())


def latent_subject(parser: Parser, args: argparse.Namespace) -> Subject:
    """The model of ``-r``."""
    model, path = latent.UNetOfLatentModel(args.resume_base, args.config, args.overrides), Path(args.cali_ckpt)
    quant = settled_quant(parser, args, path, model.architecture(), source=str(model.config_path))
    shape = model.context_shape
    data = load_calibration_set(
        args.cali_data_path,
        cali_st=args.cali_st,
        cali_n=args.cali_n,
        image_shape=model.diffusion.latent_shape,
        conditional=shape is not None,
        context_width=shape[1] if shape else None,
    )
    model.load(unet=is_packed(path))
    return Subject(model.unet, quant, data, model.facts())


def run(args: argparse.Namespace, subject: Subject) -> None:
    path, quant, data = Path(args.cali_ckpt), subject.quant, subject.data
    model = QuantModel.from_config(subject.unet.eval(), quant)
    load_quantized(path, model, quant_act=quant.quant_act, keep_full_precision=True)
    model.to(resolve_device(args.device))
    with lower_on_out_of_memory("--batch_size", args.batch_size):
        try:
            model.output_scale = fit_output_scale(model, data, mean=args.correct_mean, chunk=args.batch_size)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    info = read_info(path)
    save_packed(
        args.out,
        model,
        info={"model_config": subject.facts, "calibration": {} if info is None else info.calibration},
    )
    print(scale_table(model.output_scale))
    print(f"{args.out}: written; sample from it with --ptq --resume --cali_ckpt {args.out}")


def _rms(maps: Tensor | None) -> Tensor | None:
    """K x C x H x W -> K."""
    return None if maps is None else maps.square().flatten(1).mean(1).sqrt()


def scale_table(scale: OutputScale) -> str:
    """One line a timestep: by which factor the output was too large, and how large its mean error is (rms)."""
    tables = {
        "weights": scale.weights,
        "mean error": _rms(scale.weights_mean),
        "weights and activations": scale.activations,
        "their mean error": _rms(scale.activations_mean),
    }
    columns = {name: table.tolist() for name, table in tables.items() if table is not None}
    header = f"{'timestep':>9}" + "".join(f"  {name}" for name in columns)
    lines = [header]
    for i, t in enumerate(scale.timesteps.tolist()):
        lines.append(f"{t:9g}" + "".join(f"  {column[i]:{len(name)}.4f}" for name, column in columns.items()))
    return "\n".join(lines)
