"""Pictures out of a colour font with bitmaps (tables CBDT and CBLC), such as Noto Color Emoji.

fontTools reads the font: an emoji of several code points (a flag, a skin tone, persons with a profession) is one glyph,
which the ligatures of the font's GSUB table name. That needs no text shaping library on the machine.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image

from ldm.data.emoji_list import EMOJI_PRESENTATION

BACKGROUNDS = {"white": 255, "grey": 128}  # grey is the middle of [-1, 1]
LIGATURES, EXTENSION = 4, 7  # types of GSUB lookups


class EmojiFontError(ValueError):
    """The file is no font, or has no bitmaps."""


class EmojiFont:
    """The largest bitmaps of a font."""

    def __init__(self, path: str | Path):
        """Reads the font's tables.

        Raises:
            EmojiFontError: see there.
        """
        try:
            font = TTFont(path)
        except TTLibError as error:
            raise EmojiFontError(f"{path}: not a font file ({error})") from None
        if "CBDT" not in font or "CBLC" not in font:
            raise EmojiFontError(
                f"{path}: a font without bitmaps (tables CBDT and CBLC; it has {', '.join(font.keys())}); "
                "NotoColorEmoji.ttf of Debian's package fonts-noto-color-emoji has them"
            )
        sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes]
        self._bitmaps = font["CBDT"].strikeData[sizes.index(max(sizes))]
        self._glyph_of_point: dict[int, str] = font.getBestCmap()
        self._ligatures: dict[tuple[str | None, ...], str] = dict(_ligatures(font))  # None is in no key

    def picture(self, points: Sequence[int]) -> Image.Image | None:
        """The bitmap of an emoji, RGBA; None where the font has no single glyph for it."""
        # Some fonts spell their ligatures with the presentation selector, most without.
        for spelling in (points, [point for point in points if point != EMOJI_PRESENTATION]):
            glyphs = tuple(self._glyph_of_point.get(point) for point in spelling)
            name = glyphs[0] if len(glyphs) == 1 else self._ligatures.get(glyphs)
            if name in self._bitmaps:
                return Image.open(io.BytesIO(self._bitmaps[name].imageData)).convert("RGBA")
        return None


def _ligatures(font: TTFont) -> Iterator[tuple[tuple[str, ...], str]]:
    """Glyphs → the one glyph that stands for their sequence."""
    lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
    for lookup in lookups:
        for table in lookup.SubTable:
            inner = table.ExtSubTable if lookup.LookupType == EXTENSION else table
            if inner.LookupType == LIGATURES:
                for first, ligatures in inner.ligatures.items():
                    yield from (((first, *ligature.Component), ligature.LigGlyph) for ligature in ligatures)


def on_background(picture: Image.Image, background: int) -> Image.Image:
    """An RGBA picture laid on grey value ``background``: alpha * colour + (1 - alpha) * background."""
    rgba = np.asarray(picture, dtype=np.float32)
    alpha = rgba[..., 3:] / 255
    return Image.fromarray(np.rint(alpha * rgba[..., :3] + (1 - alpha) * background).astype(np.uint8))


def fit(picture: Image.Image, size: int, background: int) -> np.ndarray:
    """An RGBA picture on ``background``, as large as fits, aspect kept, centred: size x size x 3 uint8.

    Laid on the background first and resized then. Both are linear in the colours multiplied by alpha, so this is
    resizing those, with no hidden colours of transparent pixels, and no division.
    """
    scale = size / max(picture.size)
    width, height = (max(1, round(scale * side)) for side in picture.size)
    small = on_background(picture, background).resize((width, height), Image.Resampling.LANCZOS)
    square = np.full((size, size, 3), background, dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(small)
    return square
