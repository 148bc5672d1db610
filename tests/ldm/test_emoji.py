"""The list of emoji, their variants, the split, and pictures from a font (a real one, cut down to a few glyphs)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from ddim.datasets import DatasetUnavailable
from ldm.data.emoji import CLASSES, EmojiImages, pack_split, split_file
from ldm.data.emoji_font import EmojiFont, EmojiFontError, fit, on_background
from ldm.data.emoji_list import Emoji, base_of, choose_held_out, parse_emoji_list, read_emoji_list

FONT = Path(__file__).resolve().parents[1] / "data" / "emoji" / "NotoColorEmoji-subset.ttf"
SEQUENCES = {  # in the cut-down font: single code points, a presentation selector, joined ones, a keycap, a flag
    "grinning face": "1F600",
    "red heart": "2764 FE0F",
    "heart on fire": "2764 FE0F 200D 1F525",
    "waving hand, medium": "1F44B 1F3FD",
    "health worker": "1F9D1 200D 2695 FE0F",
    "woman health worker, medium": "1F469 1F3FD 200D 2695 FE0F",
    "keycap": "23 FE0F 20E3",
    "flag: Germany": "1F1E9 1F1EA",
}
LIST = """\
# emoji-test.txt
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F                                  ; fully-qualified     # ☺️ E0.6 smiling face
263A                                       ; unqualified         # ☺ E0.6 smiling face

# group: People & Body
1F44B 1F3FD                                ; fully-qualified     # 👋🏽 E1.0 waving hand: medium skin tone
1F469 200D 2695 FE0F                       ; fully-qualified     # 👩‍⚕️ E4.0 woman health worker
1F469 200D 2695                            ; minimally-qualified # 👩‍⚕ E4.0 woman health worker

# group: Component
1F3FB                                      ; component           # 🏻 E1.0 light skin tone
1F3FC                                      ; fully-qualified     # 🏼 E1.0 as no list has it

# group: Flags
1F1E9 1F1EA                                ; fully-qualified     # 🇩🇪 E0.6 flag: Germany
# Flags subtotal:		275
#EOF
"""


def points(sequence: str) -> tuple[int, ...]:
    return tuple(int(point, 16) for point in sequence.split())


# ---- the list ----------------------------------------------------------------------------------------------


def test_list_has_every_fully_qualified_emoji_once_with_name_and_class() -> None:
    emoji = parse_emoji_list(LIST)
    assert [(one.text, one.name, CLASSES[one.label]) for one in emoji] == [
        ("\U0001f600", "grinning face", "faces"),
        ("\u263a\ufe0f", "smiling face", "faces"),
        ("\U0001f44b\U0001f3fd", "waving hand: medium skin tone", "people"),
        ("\U0001f469\u200d\u2695\ufe0f", "woman health worker", "people"),
        ("\U0001f1e9\U0001f1ea", "flag: Germany", "flags"),
    ]


def test_list_with_an_unknown_group_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(LIST.replace("# group: Flags", "# group: Banners"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.txt: group 'Banners' of 'flag: Germany'"):
        read_emoji_list(path)


def test_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("nothing here\n")
    with pytest.raises(ValueError, match=r"list\.txt: no fully-qualified emoji"):
        read_emoji_list(path)


# ---- variants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variants",
    [
        ("1F44B", "1F44B 1F3FB", "1F44B 1F3FF"),  # skin tones
        ("1F3C3", "1F3C3 200D 2640 FE0F", "1F3C3 1F3FD 200D 2642 FE0F", "1F3C3 200D 27A1 FE0F"),  # gender, direction
        ("1F9D1 200D 2695 FE0F", "1F468 200D 2695 FE0F", "1F469 1F3FB 200D 2695 FE0F"),  # profession
        ("1F9D1", "1F468", "1F469 1F3FB 200D 1F9B0", "1F471 200D 2640 FE0F", "1F9D4 200D 2642 FE0F"),  # hair, beard
        ("1F46D", "1F46B 1F3FB", "1F9D1 200D 1F91D 200D 1F9D1", "1F469 1F3FB 200D 1F91D 200D 1F468 1F3FC"),
        ("1F48F", "1F469 200D 2764 FE0F 200D 1F48B 200D 1F468"),
        ("1F46A", "1F468 200D 1F469 200D 1F466", "1F469 200D 1F469 200D 1F467"),
        ("1F91D", "1F91D 1F3FB", "1FAF1 1F3FB 200D 1FAF2 1F3FC"),
    ],
)
def test_variants_share_a_base(variants: tuple[str, ...]) -> None:
    assert len({base_of(points(variant)) for variant in variants}) == 1


def test_different_emoji_have_different_bases() -> None:
    different = (
        *("1F44B", "1F9D1", "1F9D2", "1F9D1 200D 2695 FE0F", "1F9D1 200D 1F393", "1F48F", "1F491", "1F46A"),
        *("1F468 200D 1F466", "2640 FE0F", "2642 FE0F", "27A1 FE0F", "2764 FE0F", "2764 FE0F 200D 1F525"),
    )
    assert len({base_of(points(one)) for one in different}) == len(different)


# ---- the split ---------------------------------------------------------------------------------------------

TONES = ("", *(chr(tone) for tone in range(0x1F3FB, 0x1F400)))


def many() -> list[Emoji]:
    """40 people in six skin tones each, 100 flags without variants."""
    people = [Emoji(tuple(map(ord, chr(0x1F645 + i) + tone)), f"{i}{tone}", 1) for i in range(40) for tone in TONES]
    return people + [Emoji((0x1F1E6, 0x1F1E6 + i), f"flag {i}", 8) for i in range(100)]


def test_split_keeps_variants_together_and_the_share_of_every_class() -> None:
    emoji = many()
    held_out = choose_held_out(emoji, [one.name.encode() for one in emoji], 0.1, seed=3)
    sides: dict[tuple[int, ...], set[bool]] = {}
    for one, held in zip(emoji, held_out, strict=True):
        sides.setdefault(base_of(one.points), set()).add(held)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(held_out[:240]) == 24  # four persons of six
    assert sum(held_out[240:]) == 10


def test_split_follows_the_seed_and_hardly_moves_with_a_longer_list() -> None:
    emoji = many()
    looks = [one.name.encode() for one in emoji]
    held_out = choose_held_out(emoji, looks, 0.1, seed=0)
    assert held_out == choose_held_out(emoji, looks, 0.1, seed=0)
    assert held_out != choose_held_out(emoji, looks, 0.1, seed=1)

    longer = choose_held_out([*emoji, Emoji((0x2F00,), "new", 8)], [*looks, b"new"], 0.1, seed=0)
    assert sum(a != b for a, b in zip(held_out, longer[:-1], strict=True)) <= 1


def test_equal_pictures_are_on_one_side() -> None:
    """Some flags are another country's; every seed must see them together, also through a chain of equals."""
    emoji = [Emoji((0x1F1E6, 0x1F1E6 + i), f"flag {i}", 8) for i in range(20)]
    emoji += [Emoji((0x1F1E6, 0x1F1E6), "flag 0 again", 8)]  # the same base, another picture: 7's
    looks = [f"{i % 10}".encode() for i in range(20)] + [b"7"]
    for seed in range(20):
        held_out = choose_held_out(emoji, looks, 0.6, seed)
        for i in range(10):
            assert held_out[i] == held_out[i + 10]
        assert held_out[0] == held_out[20] == held_out[7]


def test_a_base_with_very_many_variants_stays_in_training() -> None:
    """Alone it would be a third of what is held out."""
    emoji = [Emoji((0x1F44B, 0x1F3FB), f"wave {i}", 1) for i in range(10)]
    emoji += [Emoji((0x1F500 + i,), f"hand {i}", 1) for i in range(50)]
    for seed in range(10):
        held_out = choose_held_out(emoji, [one.name.encode() for one in emoji], 0.5, seed)
        assert not any(held_out[:10])
        assert sum(held_out) == 30


# ---- pictures ----------------------------------------------------------------------------------------------


def test_compositing_is_the_closed_form() -> None:
    pixels = np.array([[[9, 9, 9, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], dtype=np.uint8)  # alpha 0, 1, 1/5
    laid = np.asarray(on_background(Image.fromarray(pixels), 128))
    assert laid.tolist() == [[[128, 128, 128], [200, 100, 0], [142, 122, 102]]]


@pytest.mark.parametrize("background", [255, 128])
def test_fit_keeps_aspect_and_centre_and_hides_transparent_colours(background: int) -> None:
    picture = np.zeros((128, 136, 4), dtype=np.uint8)
    picture[..., 0] = 255  # red, but nothing of it shows
    assert (fit(Image.fromarray(picture), 64, background) == background).all()

    picture[..., 3] = 255
    square = fit(Image.fromarray(picture), 64, background)
    assert square.shape == (64, 64, 3)
    assert (square[:2] == background).all()
    assert (square[62:] == background).all()
    assert (square[2:62] == [255, 0, 0]).all()  # 136 x 128 -> 64 x 60


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow without libraqm cannot shape sequences")
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_picture_is_the_one_that_a_text_shaper_draws(sequence: str) -> None:
    """Another way to the same glyph: HarfBuzz and FreeType, through Pillow."""
    shaped = Image.new("RGB", (300, 300), "white")
    font = ImageFont.truetype(str(FONT), 109, layout_engine=ImageFont.Layout.RAQM)
    text = "".join(map(chr, points(sequence)))
    ImageDraw.Draw(shaped).text((40, 60), text, font=font, embedded_color=True)

    ours = on_background(EmojiFont(FONT).picture(points(sequence)), 255)
    cut = [image.crop(ImageChops.invert(image).getbbox()) for image in (shaped, ours)]
    assert cut[0].size == cut[1].size
    assert np.abs(np.asarray(cut[0], dtype=int) - np.asarray(cut[1])).max() <= 3  # FreeType's alpha is premultiplied


def test_emoji_that_the_font_lacks_have_no_picture() -> None:
    font = EmojiFont(FONT)
    assert font.picture(points("1F9FF")) is None
    assert font.picture(points("1F1EA 1F1E9")) is None  # both letters, but no such flag
    assert font.picture(points("1F600 200D 1F525")) is None


def test_file_that_is_no_font_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "font.ttf"
    path.write_bytes(b"not a font at all")
    with pytest.raises(EmojiFontError, match=r"font\.ttf: not a font file"):
        EmojiFont(path)


def test_font_without_bitmaps_is_refused_with_a_remedy(tmp_path: Path) -> None:
    font = TTFont(FONT)
    del font["CBDT"], font["CBLC"]
    font.save(tmp_path / "outlines.ttf")
    with pytest.raises(EmojiFontError, match=r"without bitmaps.*fonts-noto-color-emoji"):
        EmojiFont(tmp_path / "outlines.ttf")


# ---- the data set ------------------------------------------------------------------------------------------


def test_data_set_gives_back_what_was_packed(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    images[1, 0, 3] = (255, 0, 51)
    content = pack_split(images, [0, 8], ["grinning face", "flag: São Tomé"], ["a", "b"], {"seed": 5})
    split_file(tmp_path, "heldout").write_bytes(content)
    data = EmojiImages(tmp_path, "heldout")

    assert len(data) == 2
    assert data.classes == list(CLASSES)
    assert data.made_with == {"seed": 5}
    item = data[1]
    assert (item["caption"], item["class_label"]) == ("flag: São Tomé", 8)
    assert item["image"].shape == (3, 4, 4)
    torch.testing.assert_close(item["image"][:, 0, 3], torch.tensor([1.0, -1.0, -0.6]))
    assert (data[0]["image"] == -1).all()


def test_missing_folder_and_foreign_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnavailable, match=r"prepare_emoji\.py --out"):
        EmojiImages(tmp_path)
    split_file(tmp_path, "train").write_bytes(b"something else")
    with pytest.raises(DatasetUnavailable, match="not a file of"):
        EmojiImages(tmp_path)
    with pytest.raises(ValueError, match="'test' is not one of train, heldout"):
        EmojiImages(tmp_path, "test")
