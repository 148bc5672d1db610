"""Write a latent checkpoint without its UNet, for who samples from a calibrated checkpoint, which brings its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from ddim.pretrained import read_weights
from ldm.pretrained import HARMLESS, UNET
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import Parser, check_file
from qdiff.files import write_atomically

PROGRAM = "strip_unet.py"
EXAMPLES = """\
example
  python scripts/strip_unet.py sd-v1-4.ckpt sd-v1-4-without-unet.safetensors
  python scripts/txt2img.py --prompt "a puppy wearing a hat" --plms --ckpt sd-v1-4-without-unet.safetensors \\
      --ptq --quant_act --resume --cali_ckpt ckpt.safetensors
"""


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Write what a calibrated checkpoint leaves out of a latent model: first stage, encoder of "
        "conditions and schedule, without the UNet and its averages.",
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="IN", help="the whole model: .ckpt or .safetensors")
    parser.add_argument("out", metavar="OUT.safetensors", help="where to write the rest")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_file(parser, args, "source", "it is the full-precision model's checkpoint")
    out = Path(args.out)
    if out.suffix != ".safetensors":
        parser.error(f"{out}: what is written is a .safetensors file; name it so")
    if out.exists() and not args.force:
        parser.error(f"{out}: exists already; --force replaces it")
    with exit_on_error(PROGRAM, verbose=args.verbose):
        print(run(args))
    return 0


def run(args: argparse.Namespace) -> str:
    """Write the file; returns what to tell."""
    source, out = Path(args.source), Path(args.out)
    try:
        tensors = read_weights(source, without=(*UNET, *HARMLESS))
    except ValueError as error:
        raise UserError(str(error)) from None
    if not any(name.startswith("first_stage_model.") for name in tensors):
        raise UserError(f"{source}: is no latent model: it has no first stage (first_stage_model.*)")
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(out, save(content, metadata={"format": "pt"}))
    before, after = (path.stat().st_size / 2**20 for path in (source, out))
    return f"{out}: {after:.0f} MiB of {before:.0f}, {len(content)} tensors; all but the UNet"
