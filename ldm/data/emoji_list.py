"""Unicode's list of emoji: names, groups, which are variants of one another, and what is held out of training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.data.emoji import CLASS_OF_GROUP, CLASSES

EMOJI_PRESENTATION = 0xFE0F  # says "in colour"; fonts that have only coloured glyphs do not list it
JOINER = 0x200D

# What a variant adds to its base: skin tones, hair, female and male sign, "facing right".
ADDED = frozenset(
    {EMOJI_PRESENTATION, JOINER, 0x2640, 0x2642, 0x27A1, *range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4)}
)

PERSON, CHILD = 0x1F9D1, 0x1F9D2
# Emoji that are a variant by their picture but have a code point of their own, and what they are variants of.
NEUTRAL: dict[int, tuple[int, ...]] = {
    **dict.fromkeys((0x1F468, 0x1F469, 0x1F471, 0x1F9D4), (PERSON,)),  # man, woman, blond hair, beard
    **dict.fromkeys((0x1F466, 0x1F467), (CHILD,)),  # boy, girl
    **dict.fromkeys((0x1F474, 0x1F475), (0x1F9D3,)),  # old man, old woman
    **dict.fromkeys((0x1F934, 0x1F478), (0x1FAC5,)),  # prince, princess: person with crown
    **dict.fromkeys((0x1F930, 0x1FAC3), (0x1FAC4,)),  # pregnant
    **dict.fromkeys((0x1F385, 0x1F936), (PERSON, 0x1F384)),  # Santa Claus, Mrs. Claus: mx claus, a person and a tree
    0x1F57A: (0x1F483,),  # man dancing: woman dancing
    **dict.fromkeys((0x1F46B, 0x1F46C, 0x1F46D), (PERSON, 0x1F91D, PERSON)),  # couples holding hands
    0x1F48F: (PERSON, 0x2764, 0x1F48B, PERSON),  # kiss
    0x1F491: (PERSON, 0x2764, PERSON),  # couple with heart
    0x1F46A: (PERSON, PERSON, CHILD),  # family
    0x1FAF1: (0x1F91D,),  # rightwards hand: with the leftwards one, a handshake of two skin tones
    0x1FAF2: (0x1F91D,),
}

LARGEST_SHARE = 4  # no base emoji may be more than this part, a quarter, of what its class holds out


@dataclass(frozen=True)
class Emoji:
    """A line of the list.

    Attributes:
        points: its code points.
        name: Unicode's short name, in English.
        label: index into :data:`ldm.data.emoji.CLASSES`.
    """

    points: tuple[int, ...]
    name: str
    label: int

    @property
    def text(self) -> str:
        return "".join(map(chr, self.points))


_LINE = re.compile(r"(?P<points>[0-9A-F]+(?: [0-9A-F]+)*)\s*;\s*fully-qualified\s*#\s*\S+\s+E[\d.]+\s+(?P<name>.+)")


def read_emoji_list(path: str | Path) -> list[Emoji]:
    """The emoji in Unicode's ``emoji-test.txt``.

    Raises:
        ValueError: the file is not such a list.
    """
    try:
        emoji = parse_emoji_list(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no text are one, too
        raise ValueError(f"{path}: {error}") from None
    if not emoji:
        raise ValueError(f"{path}: no fully-qualified emoji in it; Unicode's file is called emoji-test.txt")
    return emoji


def parse_emoji_list(text: str) -> list[Emoji]:
    """The fully-qualified emoji, in the list's order. The group "Component" (tones and hair alone) is left out; less
    qualified spellings are the same emoji again.

    Raises:
        ValueError: a group that has no class.
    """
    emoji: list[Emoji] = []
    group = ""
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif group != "Component" and (found := _LINE.fullmatch(line.strip())):
            if group not in CLASS_OF_GROUP:
                raise ValueError(f"group {group!r} of {found['name']!r} is not one of {', '.join(CLASS_OF_GROUP)}")
            points = tuple(int(point, 16) for point in found["points"].split())
            emoji.append(Emoji(points, found["name"], CLASSES.index(CLASS_OF_GROUP[group])))
    return emoji


def base_of(points: Sequence[int]) -> tuple[int, ...]:
    """What all variants of one emoji by skin tone, hair and gender have in common.

    Emoji share it exactly where they are variants of each other. It need not be an emoji itself.
    """
    kept = tuple(point for point in points if point not in ADDED)
    if not kept:  # the female sign or an arrow on its own
        return tuple(point for point in points if point != EMOJI_PRESENTATION)
    base = tuple(neutral for point in kept for neutral in NEUTRAL.get(point, (point,)))
    return (0x1F91D,) if set(base) == {0x1F91D} else base  # the two hands of a handshake are one


def choose_held_out(emoji: Sequence[Emoji], looks: Sequence[bytes], fraction: float, seed: int) -> list[bool]:
    """Which emoji to hold out: about ``fraction`` of each class, all variants of a base emoji or none.

    Bases are taken in an order that depends on the seed and on themselves alone, so a newer list with more emoji moves
    few of the old ones. A base with very many variants (persons, couples) stays in training: alone it would fill the
    share of its class.

    Args:
        looks: a value for each emoji, the same for equal pictures; some flags have one picture, and a picture is never
            on both sides.

    Returns:
        For each emoji, whether it is held out.
    """
    families = _families(emoji, looks)
    held_out = [False] * len(emoji)
    for label in range(len(CLASSES)):
        mine = {base: who for base, who in families.items() if emoji[who[0]].label == label}
        quota = round(fraction * sum(map(len, mine.values())))
        left = quota
        for base in sorted(mine, key=lambda base: hashlib.sha256(f"{seed} {base}".encode()).digest()):
            size = len(mine[base])
            if size <= min(left, max(1, quota // LARGEST_SHARE)):
                left -= size
                for index in mine[base]:
                    held_out[index] = True
    return held_out


def _families(emoji: Sequence[Emoji], looks: Sequence[bytes]) -> dict[tuple[int, ...], list[int]]:
    """Base → indices of its variants; bases that share a picture are joined under the first."""
    families: dict[tuple[int, ...], list[int]] = {}
    family_of_look: dict[bytes, tuple[int, ...]] = {}
    joined: dict[tuple[int, ...], tuple[int, ...]] = {}  # base → the base it went to
    for index, (one, look) in enumerate(zip(emoji, looks, strict=True)):
        base = base_of(one.points)
        base = joined.get(base, base)
        first = family_of_look.setdefault(look, base)
        first = joined.get(first, first)
        families.setdefault(first, []).append(index)
        if base != first:
            families[first].extend(families.pop(base, []))
            joined = {old: first if to == base else to for old, to in joined.items()} | {base: first}
    return families
