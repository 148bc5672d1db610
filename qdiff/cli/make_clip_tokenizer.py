"""Write CLIP's tokenizer from the vocabulary that OpenAI published, for machines from which the hub is not reached."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ddim.untrusted import UntrustedFileError, check_claimed, gunzip, reason
from ldm.modules.encoders.tokenizers import LOCAL_TOKENIZERS, read_merges, write_clip_tokenizer
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import Parser, check_file

PROGRAM = "make_clip_tokenizer.py"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
MAX_UNPACKED = 16 << 20  # bytes; it has 3 MB
DEFAULT_OUT = LOCAL_TOKENIZERS / "clip-vit-large-patch14"
EXAMPLES = """\
example: the vocabulary is in the wheel of open_clip_torch, of which nothing else is needed
  pip download --no-deps -d /tmp open_clip_torch
  python scripts/make_clip_tokenizer.py /tmp/open_clip_torch-*.whl
"""


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Write vocab.json and merges.txt of CLIP's tokenizer, where scripts/txt2img.py looks for them.",
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="FILE", help=f"{VOCABULARY}, or a wheel that holds it")
    parser.add_argument("--out", default=str(DEFAULT_OUT), metavar="DIR", help="the folder to write to")
    parser.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_file(parser, args, "source", "open_clip_torch's wheel has it")
    with exit_on_error(PROGRAM, verbose=args.verbose):
        print(run(args))
    return 0


def run(args: argparse.Namespace) -> str:
    """Write the folder; returns what to tell."""
    merges = merges_in(Path(args.source))
    write_clip_tokenizer(args.out, merges)
    return f"{args.out}: CLIP's tokenizer, {len(merges)} merges"


def merges_in(source: Path) -> list[tuple[str, str]]:
    """The merges in OpenAI's file or in a wheel.

    Raises:
        UserError: the file is of another kind or damaged.
    """
    try:
        packed = _from_wheel(source) if zipfile.is_zipfile(source) else source.read_bytes()
        return read_merges(gunzip(packed, MAX_UNPACKED).decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{source}: is not {VOCABULARY} nor a wheel with it, or damaged ({reason(error)})") from None


def _from_wheel(source: Path) -> bytes:
    """The packed vocabulary in a wheel.

    Raises:
        UntrustedFileError: there is none or several, or the wheel is damaged.
    """
    try:
        with zipfile.ZipFile(source) as wheel:
            entries = [entry for entry in wheel.infolist() if Path(entry.filename).name == VOCABULARY]
            if len(entries) != 1:
                raise UntrustedFileError(f"it has {len(entries)} files of that name")
            check_claimed(entries[0], source.stat().st_size)
            with wheel.open(entries[0]) as file:
                return file.read(MAX_UNPACKED)
    except UntrustedFileError:
        raise
    except Exception as error:  # zipfile meets garbage with many kinds of exceptions
        raise UntrustedFileError(reason(error)) from None
