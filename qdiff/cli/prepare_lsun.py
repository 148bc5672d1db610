"""A reference set as the papers' evaluation has it: photographs of LSUN as squares, in files without loss."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import Parser, at_least
from qdiff.evaluation.image_sets import FolderImages, LmdbImages, Reading, open_image_set
from qdiff.evaluation.preparation import DEFAULT_FILTER, FILTERS
from qdiff.evaluation.record import read_json, write_json
from qdiff.files import write_atomically

PROGRAM = "prepare_lsun.py"
DESCRIPTION = (
    "Turn an LMDB as LSUN publishes it, or a folder of photographs, into a folder of square PNG files to compare "
    "samples with: cut to the largest central square, resized, no mirroring. A stopped command goes on where it was."
)
EXAMPLES = """\
examples:
  python scripts/prepare_lsun.py data/lsun/bedroom_train_lmdb --out data/bedroom256
  python scripts/prepare_lsun.py photographs --out data/photographs128 --size 128 --limit 10000
"""
ABOUT = "preparation.json"
FILES_IN_A_FOLDER = 10_000
IMAGES_AT_ONCE = 64


def build_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("source", metavar="IN", help="an LMDB of encoded images, or a folder of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the PNG files")
    parser.add_argument("--size", type=at_least(8), default=256, metavar="N", help="width and height")
    parser.add_argument(
        "--filter",
        choices=tuple(FILTERS),
        default=DEFAULT_FILTER,
        help="Pillow's, for images whose square has another size; another filter than bicubic changes distances",
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N images [all]")
    parser.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    args = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        print(prepare(args))
    return 0


def prepare(args: argparse.Namespace) -> str:
    """Write the files that are missing; returns what to tell.

    Raises:
        UserError: no such images, or a folder that was made in another way.
    """
    images = open_image_set(args.source, Reading(channels=3, size=args.size, method=args.filter))
    if not isinstance(images, FolderImages | LmdbImages):
        raise UserError(f"{args.source}: expected an LMDB or a folder of images")
    total = min(len(images), args.limit or len(images))
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"source": str(Path(args.source).absolute()), "size": args.size, "filter": args.filter}
    _check_same(args.out / ABOUT, about)
    with tqdm(total=total, unit=" images") as bar:
        for start in range(0, total, IMAGES_AT_ONCE):
            numbers = range(start, min(start + IMAGES_AT_ONCE, total))
            if not all(image_path(args.out, number).is_file() for number in numbers):
                for number, image in zip(numbers, images.read(numbers.start, numbers.stop), strict=True):
                    _save(image, image_path(args.out, number))
            bar.update(len(numbers))
    write_json(args.out / ABOUT, about | {"images": total})
    return f"{args.out}: {total} images of {args.size}x{args.size}"


def image_path(folder: Path, number: int) -> Path:
    """Not too many files in one folder: file systems and people get slow."""
    return folder / f"{number // FILES_IN_A_FOLDER:04d}" / f"{number:07d}.png"


def _check_same(path: Path, about: dict[str, Any]) -> None:
    """A folder goes on as it was begun.

    Raises:
        UserError: it was begun in another way.
    """
    try:
        before = read_json(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    differing = [
        f"{name} is {about[name]!r}, was {before[name]!r}"
        for name in about
        if before.get(name, about[name]) != about[name]
    ]
    if differing:
        raise UserError(f"{path.parent} was made in another way: {'; '.join(differing)}; give --out another folder")
    write_json(path, about)


def _save(image: Tensor, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue(), durable=False)
