"""Make a data set of 64 x 64 emoji with names and classes, for latent and text-to-image models, from a font.

Reads the bitmaps of Noto Color Emoji and Unicode's list of emoji, and writes ``train.safetensors``,
``heldout.safetensors`` (read by ``ldm.data.emoji.EmojiImages``) and ``contact_sheet.png`` into a folder. Variants of
one emoji by skin tone, hair or gender are all trained on or all held out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.emoji import CLASSES, SPLITS, pack_split, split_file
from ldm.data.emoji_font import BACKGROUNDS, EmojiFont, fit
from ldm.data.emoji_list import Emoji, choose_held_out, read_emoji_list
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import Parser, at_least
from qdiff.files import write_atomically

PROGRAM = "prepare_emoji.py"
EXAMPLES = """\
examples:
  on Debian or Ubuntu, after apt-get install fonts-noto-color-emoji unicode-data
    python scripts/prepare_emoji.py --out data/emoji64
  from files elsewhere, on the middle grey of the model's range, a tenth held out
    python scripts/prepare_emoji.py --font NotoColorEmoji.ttf --emoji_test emoji-test.txt \\
        --background grey --heldout 0.1 --out data/emoji64-grey
"""
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
SHEET_COLUMNS = 24
SHEET_ROWS = {"train": 2, "heldout": 1}
SHEET_LINE = 14  # pixels, for a line of text


def make_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=__doc__.splitlines()[0], epilog=EXAMPLES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the data set")
    parser.add_argument("--font", type=Path, default=FONT, metavar="FILE", help="a colour font with bitmaps")
    parser.add_argument("--emoji_test", type=Path, default=EMOJI_TEST, metavar="FILE", help="Unicode's emoji-test.txt")
    parser.add_argument("--size", type=at_least(8), default=64, metavar="N", help="width and height of the images")
    parser.add_argument("--background", choices=BACKGROUNDS, default="white", help="behind the emoji")
    parser.add_argument(
        "--heldout", type=fraction, default=0.05, metavar="X", help="part of each class that is not trained on"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="decides which emoji are held out")
    parser.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    return parser


def fraction(text: str) -> float:
    """Converter of a number between 0 and 1, both left out."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        require(args.font, "fonts-noto-color-emoji", "--font")
        require(args.emoji_test, "unicode-data", "--emoji_test")
        try:
            listed, font = read_emoji_list(args.emoji_test), EmojiFont(args.font)
        except ValueError as error:
            raise UserError(str(error)) from None
        prepare(args, listed, font)
    return 0


def require(path: Path, package: str, flag: str) -> None:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; on Debian and Ubuntu `apt-get install {package}` brings it, "
            f"and {flag} FILE names one that lies elsewhere"
        )


def prepare(args: argparse.Namespace, listed: Sequence[Emoji], font: EmojiFont) -> None:
    """Render, split, write, and say how many there are."""
    pictures = [font.picture(one.points) for one in listed]
    emoji = [one for one, picture in zip(listed, pictures, strict=True) if picture is not None]
    if not emoji:
        raise UserError(f"{args.font}: has a picture of none of the {len(listed)} emoji in {args.emoji_test}")
    if len(emoji) < len(listed):
        lacking = [one.name for one, picture in zip(listed, pictures, strict=True) if picture is None]
        more = ", ..." if len(lacking) > 5 else ""
        print(f"{len(lacking)} of {len(listed)} emoji are not in the font: {', '.join(lacking[:5])}{more}")

    background = BACKGROUNDS[args.background]
    images = np.stack([fit(picture, args.size, background) for picture in pictures if picture is not None])
    held_out = np.array(choose_held_out(emoji, [image.tobytes() for image in images], args.heldout, args.seed))
    if held_out.all() or not held_out.any():
        raise UserError(
            f"--heldout {args.heldout}: holds out {held_out.sum()} of {len(emoji)} emoji; both sides need some"
        )

    made_with = {
        "size": args.size,
        "background": args.background,
        "heldout": args.heldout,
        "seed": args.seed,
        "font_sha256": hashlib.sha256(args.font.read_bytes()).hexdigest(),
        "emoji_test_sha256": hashlib.sha256(args.emoji_test.read_bytes()).hexdigest(),
    }
    members = {"train": np.flatnonzero(~held_out), "heldout": np.flatnonzero(held_out)}
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        mine = [emoji[index] for index in members[split]]
        labels, names, texts = [e.label for e in mine], [e.name for e in mine], [e.text for e in mine]
        content = pack_split(images[members[split]], labels, names, texts, made_with)
        write_atomically(split_file(args.out, split), content)
        print(f"{split_file(args.out, split)}: {len(mine)} images, {len(content) / 1e6:.1f} MB")

    labels = np.array([one.label for one in emoji])
    sheet = io.BytesIO()
    contact_sheet(images, labels, members).save(sheet, format="png")
    write_atomically(args.out / "contact_sheet.png", sheet.getvalue())
    counts = {split: Counter(labels[members[split]].tolist()) for split in SPLITS}
    for label, name in enumerate(CLASSES):
        print(f"  {name:10s} {counts['train'][label]:5d} train {counts['heldout'][label]:4d} held out")


def contact_sheet(images: np.ndarray, labels: np.ndarray, members: dict[str, np.ndarray]) -> Image.Image:
    """For each class two rows of training images and one of held-out images, evenly over the list."""
    size = images.shape[1]
    rows = sum(SHEET_ROWS.values())
    block = SHEET_LINE + rows * size
    sheet = Image.new("RGB", (SHEET_COLUMNS * size, len(CLASSES) * block), "white")
    draw = ImageDraw.Draw(sheet)
    for label, name in enumerate(CLASSES):
        top = label * block
        draw.text((4, top + 1), f"{name}: {SHEET_ROWS['train']} rows of training images, then held-out", fill="black")
        top += SHEET_LINE
        for split, count in SHEET_ROWS.items():
            mine = members[split][labels[members[split]] == label]
            room = count * SHEET_COLUMNS
            shown = mine[np.linspace(0, len(mine) - 1, room).round().astype(int)] if len(mine) > room else mine
            for place, index in enumerate(shown):
                row, column = divmod(place, SHEET_COLUMNS)
                sheet.paste(Image.fromarray(images[index]), (column * size, top + row * size))
            top += count * size
    return sheet


if __name__ == "__main__":
    raise SystemExit(main())
