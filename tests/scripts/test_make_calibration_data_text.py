"""The command that makes calibration sets, for text-to-image models: prompts of a file, or captions of COCO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qdiff.cli.make_calibration_data import main

from .text_models import STEPS, TextMiniature

CAPTIONS = ["A cat.", "a puppy\nwearing  a hat", "  ", "a dog"]
COCO = {
    "info": {"description": "COCO 2014 Dataset"},
    "images": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg"}],
    "licenses": [],
    "annotations": [{"image_id": 391895, "id": n, "caption": caption} for n, caption in enumerate(CAPTIONS)],
}
HALF_A_CHARACTER = "the caption of annotation 0 has half a character"


def flags(tiny: TextMiniature, prompts: Path, out: Path) -> list[str]:
    sampler = ["--plms", "--ddim_steps", str(STEPS), "-n", "4", "--batch_size", "2", "--steps", "2"]
    return ["--from-file", str(prompts), *sampler, *tiny.files, "--device", "cpu", "--out", str(out)]


def test_captions_of_coco_are_prompts(text, tmp_path: Path) -> None:
    """The same set as from a file of these prompts, empty ones left out, the first again when they are used up."""
    tiny = text("sd")
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    (tmp_path / "prompts.txt").write_text("A cat.\na puppy wearing a hat\n\na dog\n")
    for name in ("captions.json", "prompts.txt"):
        main(flags(tiny, tmp_path / name, tmp_path / f"{name}.pt"))
    assert (tmp_path / "captions.json.pt").read_bytes() == (tmp_path / "prompts.txt.pt").read_bytes()
    content = torch.load(tmp_path / "captions.json.pt", weights_only=True)
    assert {name: len(steps) for name, steps in content.items()} == {"xs": 2, "ts": 2, "cs": 2, "ucs": 2}
    embeddings = content["cs"][0]
    assert torch.allclose(embeddings[0], embeddings[3], atol=1e-5)
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)
    assert content["cs"][0].data_ptr() == content["cs"][1].data_ptr()


def test_other_prompts_are_another_set(text, tmp_path: Path, failing, monkeypatch) -> None:
    from qdiff.recording import Recording

    tiny, prompts = text("sd"), tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    original = Recording.mark

    def stop(self: Recording, indices: range) -> None:
        original(self, indices)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "mark", stop)
        assert failing(*flags(tiny, prompts, tmp_path / "set.pt"), main=main).status == 130
    prompts.write_text("a cat\na dog\na hat\n")
    failure = failing(*flags(tiny, prompts, tmp_path / "set.pt"), main=main)
    assert failure.status == 2
    assert "those of another set: prompts is" in failure.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"annotations": [', ["is not JSON", "line 1 column 18"]),
        ('["a cat"]', ["has no list of annotations"]),
        ('{"annotations": {"caption": "a cat"}}', ["has no list of annotations"]),
        ('{"annotations": [{"caption": "a cat"}, {"category_id": 3}]}', ["annotation 1 has no caption"]),
        ('{"annotations": [{"caption": 3}]}', ["annotation 0 has no caption"]),
        ('{"annotations": [{"caption": "\\ud800"}]}', [HALF_A_CHARACTER]),
        ('{"annotations": []}', ["holds no prompt"]),
    ],
)
def test_malformed_captions(text, tmp_path: Path, failing, content: str, words: list[str]) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    failure = failing(*flags(text("sd"), path, tmp_path / "set.pt"), main=main)
    assert failure.status == 2
    (message,) = failure.message.strip().splitlines()
    assert f"--from-file {path}" in message
    for word in words:
        assert word in message
    if not any(word in ("holds no prompt", HALF_A_CHARACTER) for word in words):  # the others are about the structure
        assert 'expected COCO captions, {"annotations": [{"caption": "..."}]}; prompts, one a line, go in a' in message
    assert not (tmp_path / "set.pt").exists()
