"""Write a checkpoint with random weights: what a latent model costs in time and memory, before 2 GB are downloaded."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.serialization import set_default_mmap_options, skip_data
from tqdm import tqdm

from ldm.random_weights import Draw, random_checkpoint
from ldm.util import load_model_config
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import Parser, at_least, check_file
from qdiff.cli.run_folder import check_room
from qdiff.files import atomic_file, write_atomically

PROGRAM = "make_random_checkpoint.py"
EXAMPLES = """\
examples:
  beside its config, under the name that the sampling command in the README takes
    python scripts/make_random_checkpoint.py --config models/ldm/lsun_beds256/config.yaml \\
        --out models/ldm/lsun_beds256/model.ckpt
  elsewhere; the config is copied beside it
    python scripts/make_random_checkpoint.py --config configs/latent-diffusion/cin256-v2.yaml \\
        --out /tmp/cin/model.safetensors --dtype fp16
  Stable Diffusion, where scripts/txt2img.py looks for it
    python scripts/make_random_checkpoint.py --config configs/stable-diffusion/v1-inference.yaml \\
        --out models/ldm/stable-diffusion-v1/model.ckpt
"""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
SAFETENSORS_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64"}
PICKLED = (".ckpt", ".pth", ".pt")


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Write a full-size latent diffusion checkpoint with random weights, in the layout of the published "
        "ones. What is sampled from it is noise, at the speed and in the memory of the real model.",
        epilog=EXAMPLES,
        overrides=True,
        usage="%(prog)s --config FILE --out FILE [flags] [key=value ...]",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the model's YAML file; key=value words change it"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write it: .ckpt or .safetensors")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights in the file")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the weights")
    parser.add_argument("--force", action="store_true", help="replace --out where it exists")
    parser.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    return parser


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before the config is read."""
    check_file(parser, args, "config", "models/ldm/*/config.yaml and configs/latent-diffusion/*.yaml are some")
    out = Path(args.out)
    if out.suffix not in (*PICKLED, ".safetensors"):
        parser.error(f"--out {out}: a checkpoint ends in .ckpt, .pth, .pt or .safetensors")
    if out.is_dir():
        parser.error(f"--out {out}: is a folder; name a file, as {out / 'model.ckpt'}")
    if out.exists() and not args.force:
        parser.error(f"--out {out}: exists already; --force replaces it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        print(run(args))
    return 0


def run(args: argparse.Namespace) -> str:
    """Write the file and, where none is there, the config beside it; returns what to tell."""
    config, out = load_model_config(args.config, args.overrides), Path(args.out)
    try:
        draws = random_checkpoint(config, DTYPES[args.dtype])
    except ValueError as error:
        raise UserError(f"{args.config}: {error}") from None
    check_room(out.parent, sum(draw.bytes for draw in draws.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    write = write_safetensors if out.suffix == ".safetensors" else write_pickled
    with tqdm(total=len(draws), unit=" tensors", desc="drawing") as bar:
        write(out, draws, args.seed, bar)
    of_texts = any(name.startswith("cond_stage_model.transformer.") for name in draws)
    note = told_of_config(args) if of_texts else place_config(args, out.with_name("config.yaml"))
    count = sum(_elements(draw) for name, draw in draws.items() if name.startswith("model."))
    return (
        f"{out}: {out.stat().st_size / 2**20:.0f} MiB, a UNet of {count / 1e6:.1f} M random parameters ({args.dtype})\n"
        f"{note}\n"
        f"  sample from it with: python scripts/{text_command(args) if of_texts else ldm_command(out)}"
    )


def ldm_command(out: Path) -> str:
    return f"sample_diffusion_ldm.py -r {out} -n 10 -c 20 --seed 0"


def text_command(args: argparse.Namespace) -> str:
    """It does not look for a config beside the checkpoint."""
    words = "".join(f" {word}" for word in args.overrides)
    return (
        f'txt2img.py --config {args.config} --ckpt {args.out} --prompt "a puppy wearing a hat" --ddim_steps 20{words}'
    )


def told_of_config(args: argparse.Namespace) -> str:
    return f"  its config is {args.config}" + (f", with {' '.join(args.overrides)}" if args.overrides else "")


def place_config(args: argparse.Namespace, beside: Path) -> str:
    """The sampling command reads the config beside the checkpoint: put it there, unless one is; returns what was done.

    Words that change the config are not in the file, so they are told.
    """
    again = f"; give {' '.join(args.overrides)} to the sampling command too" if args.overrides else ""
    if beside.exists():
        same = beside.samefile(args.config) or beside.read_bytes() == Path(args.config).read_bytes()
        return f"  {beside}: " + ("its config" if same else f"was there and is not {args.config}; compare them") + again
    write_atomically(beside, Path(args.config).read_bytes())
    return f"  {beside}: a copy of {args.config}{again}"


@torch.no_grad()
def write_pickled(path: Path, draws: Mapping[str, Draw], seed: int, bar: tqdm[Any]) -> None:
    """As a trainer leaves it: ``state_dict`` and ``global_step``.

    The archive is laid out with nothing in its tensors, then mapped into memory and filled, so that its pages go to the
    disk as memory is wanted for others.

    Raises:
        OSError: the file cannot be written.
    """
    with _partial(path) as partial:
        empty = {name: torch.empty(draw.shape, dtype=draw.dtype) for name, draw in draws.items()}  # no page is touched
        with skip_data():
            torch.save({"epoch": 0, "global_step": 0, "state_dict": empty}, partial)
        del empty
        with set_default_mmap_options(mmap.MAP_SHARED):
            state = torch.load(partial, mmap=True, weights_only=True)["state_dict"]
        for name, draw in draws.items():
            draw.fill(state[name], name, seed)
            bar.update()
        del state


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place at the end of the block."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except RuntimeError as error:  # torch's archive writer tells of a full disk or a missing permission like this
        if not shutil.disk_usage(path.parent).free or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: cannot be written: {str(error).partition(chr(10))[0]}") from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


@torch.no_grad()
def write_safetensors(path: Path, draws: Mapping[str, Draw], seed: int, bar: tqdm[Any]) -> None:
    """A ``.safetensors`` file, tensor by tensor.

    Raises:
        OSError: the file cannot be written.
    """
    header, end = {}, 0
    for name, draw in draws.items():
        start, end = end, end + draw.bytes
        header[name] = {"dtype": SAFETENSORS_TYPES[draw.dtype], "shape": draw.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, draw in draws.items():
            tensor = torch.empty(draw.shape, dtype=draw.dtype)
            draw.fill(tensor, name, seed)
            file.write(tensor.reshape(-1).numpy().data.cast("B"))
            bar.update()


def _elements(draw: Draw) -> int:
    return draw.bytes // draw.dtype.itemsize
