"""What a model costs at several precisions, counted from its config alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from ddim.models import build, load_pixel_config
from ddim.untrusted import UntrustedFileError, read_yaml_text
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config, load_model_config
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import NEEDS_QUANT_ACT, Parser, add_input_flags, add_quantizer_flags, at_least, check_file
from qdiff.cli.pixel import image_shape
from qdiff.config import QuantConfig
from qdiff.costs import FLOATS, Costs, count_costs, reported_sizes, usual_precisions
from qdiff.quant_model import QuantModel

PROGRAM = "model_stats.py"
DESCRIPTION = (
    "Count a noise-estimation UNet's parameters, multiply-accumulates (MACs), bit operations (BOPs) and bytes, from "
    "its config alone: no weights are read and nothing is computed. MACs and BOPs are of one image in one step, "
    "products of attention included; classifier-free guidance takes two such passes a step. Sizes are those of the "
    "tensors in a packed checkpoint, to the byte."
)
EXAMPLES = """\
examples:
  python scripts/model_stats.py --config configs/cifar10.yml --quant_act --split
  python scripts/model_stats.py -r models/ldm/lsun_beds256 --weight_bit 4 --quant_act --act_bit 8 --layers
  python scripts/model_stats.py --config configs/latent-diffusion/cin256-v2.yaml --json model.params.image_size=32
"""
TEXT_TOKENS = 77  # of both published text encoders
MIB = 2**20


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        overrides=True,
        usage="%(prog)s (--config FILE | -r PATH) [flags] [key=value ...]",
    )
    group = parser.add_argument_group("model", "Bare words such as model.params.image_size=32 change a latent config.")
    group.add_argument("--config", metavar="FILE", help="YAML file of a pixel-space or of a latent model")
    group.add_argument(
        "-r",
        "--resume_base",
        metavar="PATH",
        help="a latent model as the sampling command takes it: checkpoint with config.yaml beside it, or their folder; "
        "only config.yaml has to be there",
    )
    group.add_argument(
        "--context_tokens",
        type=at_least(1),
        metavar="N",
        help=f"length of a conditional model's context [1 for classes, {TEXT_TOKENS} for texts]",
    )
    group = parser.add_argument_group("quantization", "as the sampling commands take it")
    add_quantizer_flags(group)
    add_input_flags(group)
    group.add_argument(
        "--correct_scale", action="store_true", help="count the correction of the output that a calibration adds"
    )
    group.add_argument("--correct_mean", action="store_true", help="with --correct_scale: of its mean error too")
    group.add_argument(
        "--cali_st",
        type=at_least(1),
        metavar="N",
        help="how many timesteps --timed_ranges and --correct_scale have grids and corrections for",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--layers", action="store_true", help="every layer, product of attention and other tensor too")
    group.add_argument("--json", action="store_true", help="JSON in place of tables: bytes and plain numbers")
    group.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    return parser


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before the config is read."""
    if (args.config is None) == (args.resume_base is None):
        parser.error("say which model: --config FILE, or -r PATH for a latent one")
    if not (args.config and Path(args.config).is_dir()):
        check_file(parser, args, "config", "the repository's configs/ and models/ have some")
    if not args.quant_act:
        for name in NEEDS_QUANT_ACT:
            if name in args.given:
                parser.error(f"{parser.flag(name)} needs --quant_act, without which activations are in full")
    if args.correct_mean and not args.correct_scale:
        parser.error("--correct_mean needs --correct_scale: it adds the mean error to the scale")
    for name, on in (("timed_ranges", args.timed_ranges != "none"), ("correct_scale", args.correct_scale)):
        if on and args.cali_st is None:
            parser.error(f"--{name} needs --cali_st N, the number of calibrated timesteps")
    if args.cali_st is not None and args.timed_ranges == "none" and not args.correct_scale:
        parser.error("--cali_st changes nothing without --timed_ranges or --correct_scale; leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    check_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        subject = read_subject(parser, args)
        costs = count(args, subject)
        if args.json:
            print(json.dumps({"model": str(subject.source), **costs.to_dict(rows=args.layers)}, indent=2))
        else:
            print(summary(subject, costs, quant_config(args)) + (f"\n\n{layer_table(costs)}" if args.layers else ""))
    return 0


@dataclass(frozen=True)
class Subject:
    """A UNet that has shapes and no weights.

    Attributes:
        source: its config.
        unet: on the meta device.
        image: C, H, W of its input; context: L, D where it takes one.
    """

    source: Path
    unet: nn.Module
    image: tuple[int, int, int]
    context: tuple[int, int] | None = None


def read_subject(parser: Parser, args: argparse.Namespace) -> Subject:
    """The UNet of a config of either kind. Neither first stage nor encoder of conditions is built.

    Raises:
        UserError, ConfigError: the config is missing, or no network can be made from it.
    """
    path = Path(args.config) if args.config else _config_beside(Path(args.resume_base))
    latent = args.resume_base is not None or _is_latent(path)
    if not latent and args.overrides:
        parser.error(f"{args.overrides[0]}: only the config of a latent model can be changed by such words")
    subject = _latent_subject(path, args) if latent else _pixel_subject(path)
    if subject.context is None and args.context_tokens is not None:
        parser.error(f"--context_tokens {args.context_tokens}: the model of {path} takes no context; leave it out")
    return subject


def _config_beside(path: Path) -> Path:
    config = path / "config.yaml" if path.is_dir() else path.with_name("config.yaml")
    if not config.is_file():
        raise UserError(f"--resume_base {path}: there is no {config}; or name the model's YAML file by --config")
    return config


def _is_latent(path: Path) -> bool:
    """Whether a config is of a latent model: those name what to build. Broken files are left to their own readers."""
    if path.is_dir():  # diffusers saved it
        return False
    try:
        content = yaml.safe_load(read_yaml_text(path))
    except (UntrustedFileError, OSError):
        return False
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, dict) and "target" in model


def _pixel_subject(path: Path) -> Subject:
    config = load_pixel_config(path)
    with torch.device("meta"):
        try:
            unet = build(config)
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"{path}: the network cannot be built: {error}") from None
    return Subject(path, unet.eval(), image_shape(config))


def _latent_subject(path: Path, args: argparse.Namespace) -> Subject:
    config = load_model_config(path, args.overrides)
    params = config.get("params") or {}
    if not isinstance(params.get("unet_config"), dict):
        raise UserError(f"{path}: has no section model.params.unet_config, which describes the UNet")
    with torch.device("meta"):
        try:
            unet = instantiate_from_config(params["unet_config"], "model.params.unet_config")
        except (TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"{path}: the network cannot be built: {error}") from None
        except ValueError as error:  # a ConfigError is one
            raise UserError(f"{path}: {error}") from None
    if not isinstance(unet, UNetModel):
        raise UserError(f"{path}: model.params.unet_config names {type(unet).__name__}, which is no UNet")
    size = params.get("image_size", unet.image_size)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path}: model.params.image_size is {size!r}, not the number of rows of a latent")
    context = None
    if unet.context_dim is not None:
        context = (args.context_tokens or _tokens(params.get("cond_stage_config")), unet.context_dim)
    return Subject(path, unet.eval(), (unet.in_channels, size, size), context)


def _tokens(encoder: object) -> int:
    """How long a context is, by the encoder that makes it."""
    if not isinstance(encoder, dict):
        return TEXT_TOKENS
    if str(encoder.get("target", "")).endswith(".ClassEmbedder"):
        return 1
    params = encoder.get("params") or {}
    return params.get("max_length") or params.get("max_seq_len") or TEXT_TOKENS


def quant_config(args: argparse.Namespace) -> QuantConfig:
    """What the flags ask for."""
    timed = args.timed_ranges != "none"
    return QuantConfig(
        weight_bit=args.weight_bit,
        act_bit=args.act_bit,
        quant_act=args.quant_act,
        a_sym=args.a_sym,
        split=args.split,
        sm_abit=args.sm_abit,
        timed_ranges=args.timed_ranges,
        timesteps=tuple(range(args.cali_st)) if timed else (),
        split_input=args.split_input,
    )


def count(args: argparse.Namespace, subject: Subject) -> Costs:
    """Wrap the network as the flags say, and count.

    Raises:
        UserError: the network cannot be run on inputs of the config's size.
    """
    quant = quant_config(args)
    model = QuantModel.from_config(subject.unet, quant)
    try:
        return count_costs(
            model,
            subject.image,
            subject.context,
            precisions=usual_precisions(quant),
            scale_timesteps=args.cali_st if args.correct_scale else 0,
            scale_mean=args.correct_mean,
        )
    except RuntimeError as error:
        size = _shape(subject.image)
        raise UserError(f"{subject.source}: the network cannot be run on inputs of {size}: {error}") from None


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def summary(subject: Subject, costs: Costs, quant: QuantConfig) -> str:
    """A few lines for the whole network, and counts reported elsewhere where there are any."""
    context = f", context {_shape(subject.context)}" if subject.context else ""
    lines = [
        f"{subject.source}: {costs.parameters:,} parameters, {costs.macs:,} MACs an image and step",
        f"input {_shape(subject.image)}{context}; {_described(quant)}",
        "",
        f"{'precision':<9}  {'bytes':>13}  {'MiB':>8}  {'of fp32':>7}  {'TBOPs':>8}  {'of fp32':>7}",
    ]
    size, bops = costs.size("fp32"), costs.bops("fp32")
    for name in (p.name for p in costs.precisions):
        lines.append(
            f"{name:<9}  {costs.size(name):>13,}  {costs.size(name) / MIB:>8.2f}  {costs.size(name) / size:>6.1%}  "
            f" {costs.bops(name) / 1e12:>8.3f}  {costs.bops(name) / bops:>6.1%}"
        )
    reported = reported_sizes(costs)
    if reported is not None:
        lines += ["", f"Sizes reported elsewhere for {reported.model}, by an unknown way of counting:"]
        lines.append(f"{'precision':<9}  {'their MiB':>9}  {'here':>8}  {'difference':>10}")
        for precision in costs.precisions:
            theirs = reported.mebibytes.get(precision.weight)
            if theirs is not None:
                ours = costs.size(precision.name) / MIB
                lines.append(f"{precision.name:<9}  {theirs:>9.1f}  {ours:>8.1f}  {ours / theirs - 1:>+10.2%}")
    return "\n".join(lines)


def _described(quant: QuantConfig) -> str:
    """The quantized rows in words."""
    words = ["shortcuts split" if quant.split else "shortcuts whole"]
    if quant.quant_act:
        words.append(f"activations in {quant.act_bit} bits, softmax maps in {quant.sm_abit}")
    else:
        words.append("activations in fp32")
    if quant.timed:
        words.append(f"ranges of {len(quant.timesteps)} timesteps ({quant.timed_ranges})")
    if quant.split_input:
        words.append("the input in two parts")
    return ", ".join(words)


def layer_table(costs: Costs) -> str:
    """One line a layer, product and other tensor: bytes at each precision, bit operations in units of 10^9."""
    names = [p.name for p in costs.precisions]
    quantized = [p.name for p in costs.precisions if p not in FLOATS]
    width = max(len(row.path) for row in costs.rows)
    header = [f"{'path':<{width}}", f"{'kind':<10}", f"{'shape':<16}", f"{'parameters':>11}", f"{'MACs':>15}"]
    header += [f"{name + ' bytes':>14}" for name in names] + [f"{name + ' GBOPs':>14}" for name in quantized]
    lines = ["  ".join(header)]
    for row in costs.rows:
        cells = [f"{row.path:<{width}}", f"{row.kind:<10}", f"{_shape(row.shape):<16}"]
        cells += [f"{row.parameters:>11,}", f"{row.macs:>15,}"]
        cells += [f"{row.sizes[name]:>14,}" for name in names]
        cells += [f"{row.bops[name] / 1e9:>14.3f}" for name in quantized]
        lines.append("  ".join(cells))
    return "\n".join(lines)
