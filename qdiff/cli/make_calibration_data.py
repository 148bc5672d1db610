"""Make a calibration set: run the full-precision sampler and keep what the network sees at every step."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ddim.config import PixelConfig, load_config
from qdiff.calibration_data import make_calibration_set, save_calibration_set
from qdiff.cli.errors import exit_on_error, lower_on_out_of_memory
from qdiff.cli.flags import Parser, add_common_flags, at_least, resolve_device
from qdiff.cli.pixel import (
    PixelSampler,
    SamplerOptions,
    add_model_flags,
    add_sampler_flags,
    check_model_flags,
    check_sampler_flags,
    image_bar,
    load_full_precision,
    with_bar,
)

PROGRAM = "make_calibration_data.py"
EXAMPLE = """\
example, the set that the calibrating command in the README takes:
  python scripts/make_calibration_data.py --config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 \\
      --skip_type quad -n 256 --cali_st 20 --out cali.pt
"""


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Record noisy inputs and timesteps along the sampling trajectory of a full-precision pixel model, "
        "as calibration needs them. Use the sampler settings you will sample with.",
        epilog=EXAMPLE,
    )
    add_model_flags(parser)
    add_sampler_flags(parser)
    group = parser.add_argument_group("the set")
    group.add_argument("--out", required=True, metavar="FILE", help="where to write it")
    group.add_argument("--force", action="store_true", help="replace --out where it exists")
    group.add_argument("-n", "--n_samples", type=at_least(1), default=256, metavar="N", help="images to sample")
    group.add_argument(
        "--cali_st",
        type=at_least(1),
        metavar="N",
        help="keep only the steps that a calibration with this --cali_st takes [all steps]",
    )
    group.add_argument(
        "--cali_n",
        type=at_least(1),
        metavar="N",
        help="sample only what a calibration with this --cali_n takes; the same as -n",
    )
    group.add_argument("--half", action="store_true", help="store the inputs in float16, half the size")
    # Not the default of the sampling command: its images shall not be those that calibration has seen.
    add_common_flags(parser, seed=0)
    return parser


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before the config is read."""
    check_model_flags(parser, args)
    if args.cali_n is not None and "n_samples" in args.given and args.cali_n > args.n_samples:
        parser.error(f"--cali_n {args.cali_n}: more than the --n_samples {args.n_samples} that are made")
    out = Path(args.out)
    if out.is_dir():
        parser.error(f"--out {out}: is a folder; name a file")
    if out.exists() and not args.force:
        parser.error(f"--out {out}: exists already; --force replaces it")
    if not out.absolute().parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    if not os.access(out.absolute().parent, os.W_OK):
        parser.error(f"--out {out}: the folder cannot be written to; choose another place")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        config = load_config(args.config)
        check_sampler_flags(parser, args, config)
        content = record(parser, args, config)
        save_calibration_set(args.out, content)
        print(summary(Path(args.out), content))
    return 0


def record(parser: Parser, args: argparse.Namespace, config: PixelConfig) -> dict[str, list[Tensor]]:
    """Sample and record, with a progress bar."""
    device = resolve_device(args.device)
    sampler = PixelSampler(config, SamplerOptions.from_args(args), device)
    if args.cali_st is not None and args.cali_st > sampler.n_steps:
        parser.error(
            f"--cali_st {args.cali_st}: the sampler makes {sampler.n_steps} steps; keep 1 to {sampler.n_steps}"
        )
    model = load_full_precision(args, config).to(device)
    count = args.cali_n or args.n_samples
    batch_size = args.batch_size or config.sampling.batch_size
    with lower_on_out_of_memory("--batch_size", batch_size), image_bar(count) as bar:
        return make_calibration_set(
            with_bar(sampler, model, bar),
            n_samples=count,
            n_steps=sampler.n_steps,
            batch_size=batch_size,
            cali_st=args.cali_st,
            half=args.half,
        )


def summary(path: Path, content: dict[str, list[Tensor]]) -> str:
    """What the file holds, in a few lines."""
    xs, ts = content["xs"], content["ts"]
    shape = "x".join(map(str, xs[0].shape))
    low, high = min(float(x.min()) for x in xs), max(float(x.max()) for x in xs)
    dtype = str(xs[0].dtype).removeprefix("torch.")
    return (
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB\n"
        f"  {len(xs)} steps of {shape} inputs ({dtype}), values {low:.2f} to {high:.2f}\n"
        f"  timesteps {float(ts[0][0]):g} down to {float(ts[-1][0]):g}\n"
        f"  calibrate with --cali_data_path {path} --cali_st {len(xs)} --cali_n {len(xs[0])} or fewer"
    )
