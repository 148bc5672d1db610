"""The command on a real font: one cut down to a few glyphs, and the whole one where the machine has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.data.emoji import CLASSES, EmojiImages
from ldm.data.emoji_list import base_of

from .conftest import load_script

script = load_script("prepare_emoji")
FONT = Path(__file__).resolve().parents[1] / "data" / "emoji" / "NotoColorEmoji-subset.ttf"
LIST = """\
# group: Smileys & Emotion
1F600 ; fully-qualified # 😀 E1.0 grinning face
2764 FE0F ; fully-qualified # ❤️ E0.6 red heart
2764 FE0F 200D 1F525 ; fully-qualified # ❤️‍🔥 E13.1 heart on fire
1FAE8 ; fully-qualified # 🫨 E15.0 shaking face
# group: People & Body
1F44B ; fully-qualified # 👋 E0.6 waving hand
1F44B 1F3FD ; fully-qualified # 👋🏽 E1.0 waving hand: medium skin tone
1F9D1 200D 2695 FE0F ; fully-qualified # 🧑‍⚕️ E12.1 health worker
# group: Flags
1F1E9 1F1EA ; fully-qualified # 🇩🇪 E0.6 flag: Germany
"""


@pytest.fixture
def emoji_test(tmp_path: Path) -> Path:
    path = tmp_path / "emoji-test.txt"
    path.write_text(LIST, encoding="utf-8")
    return path


def test_a_few_emoji_become_a_data_set(emoji_test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    command = ["--font", str(FONT), "--emoji_test", str(emoji_test), "--heldout", "0.4", "--background", "grey"]
    assert script.main([*command, "--out", str(out)]) == 0
    assert "1 of 8 emoji are not in the font: shaking face" in capsys.readouterr().out

    train, held_out = EmojiImages(out), EmojiImages(out, "heldout")
    assert len(train) + len(held_out) == 7
    assert len(held_out) == 2  # 0.4 of three faces and of three people, one each; of one flag none
    assert train.images.shape[1:] == (3, 64, 64)
    assert train.captions[-1] == "flag: Germany"
    assert CLASSES[train.labels[-1]] == "flags"
    assert train.made_with["background"] == "grey"
    corners = train.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 128).all()
    assert all(image.float().std() > 10 for image in train.images)
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width == 24 * 64

    again = tmp_path / "again"
    assert script.main([*command, "--out", str(again)]) == 0
    for name in ("train.safetensors", "heldout.safetensors", "contact_sheet.png"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.skipif(
    not (script.FONT.is_file() and script.EMOJI_TEST.is_file()),
    reason="needs Debian's fonts-noto-color-emoji and unicode-data",
)
def test_the_whole_font(tmp_path: Path) -> None:
    assert script.main(["--out", str(tmp_path)]) == 0
    train, held_out = EmojiImages(tmp_path), EmojiImages(tmp_path, "heldout")
    assert len(train) + len(held_out) > 3000
    assert 0.04 < len(held_out) / (len(train) + len(held_out)) < 0.06
    assert set(train.labels.tolist()) == set(held_out.labels.tolist()) == set(range(len(CLASSES)))

    bases = [{base_of([ord(point) for point in text]) for text in data.emoji} for data in (train, held_out)]
    assert not bases[0] & bases[1]
    assert not {image.numpy().tobytes() for image in train.images} & {i.numpy().tobytes() for i in held_out.images}
    assert torch.isfinite(train[0]["image"]).all()


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--font", r"nowhere: no such file; .*apt-get install fonts-noto-color-emoji.*--font FILE"),
        ("--emoji_test", r"nowhere: no such file; .*apt-get install unicode-data.*--emoji_test FILE"),
    ],
)
def test_missing_file_names_the_package_and_the_flag(
    flag: str, says: str, emoji_test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--font": str(FONT), "--emoji_test": str(emoji_test)} | {flag: str(tmp_path / "nowhere")}
    words = [word for pair in files.items() for word in pair]
    with pytest.raises(SystemExit) as end:
        script.main([*words, "--out", str(tmp_path / "set")])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert re.search(says, message), message
    assert not (tmp_path / "set").exists()


def test_nothing_held_out_is_refused(emoji_test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script.main(["--font", str(FONT), "--emoji_test", str(emoji_test), "--out", str(tmp_path / "set")])
    assert end.value.code == 2
    assert "--heldout 0.05: holds out 0 of 7 emoji" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
