"""The emoji of a colour font as a data set: pictures, their names as captions, nine classes.

``scripts/prepare_emoji.py`` makes the folder. One safetensors file a split holds ``images`` (N x H x W x 3 uint8) and
``labels`` (N int64); its header holds, as JSON under ``about``, the captions, the emoji themselves, the names of the
classes and how the set was made, so that a file explains itself and captions cannot be of other images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import save
from torch.utils.data import Dataset

from ddim.datasets import DatasetUnavailable
from ddim.untrusted import UntrustedFileError, open_safetensors, parse_json, reason

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

# Unicode's groups → the names of the classes, in the order of their indices.
CLASS_OF_GROUP = {
    "Smileys & Emotion": "faces",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
CLASSES = tuple(CLASS_OF_GROUP.values())

# Captions of well-known emoji, to look at what a model makes of texts: while it is trained and in its demo.
PROMPTS = (
    *("red heart", "smiling cat with heart-eyes", "dog face", "thumbs up: medium skin tone"),
    *("hamburger", "rocket", "soccer ball", "flag: Japan"),
)


class EmojiImages(Dataset[dict[str, Any]]):
    """One split of a prepared folder, in memory. Items have the keys that configs of latent models name:
    ``image`` (3 x H x W float32 in [-1, 1]), ``caption`` (str) and ``class_label`` (int).

    Attributes:
        images: N x 3 x H x W uint8, for who wants the whole set on a GPU.
        labels: N int64, indices into ``classes``.
        captions, emoji: N names, N sequences of code points as text.
        classes: names of the classes.
        made_with: background, seed, font and so on, as the script recorded them.
    """

    def __init__(self, folder: str | Path, split: Split = "train"):
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        path = split_file(folder, split)
        if not path.is_file():
            raise DatasetUnavailable(f"{path}: no such file; scripts/prepare_emoji.py --out {folder} makes it")
        try:
            with open_safetensors(path) as file:
                about = parse_json((file.metadata() or {})["about"])
                if set(file.keys()) != {"images", "labels"}:
                    raise UntrustedFileError(f"it holds {len(file.keys())} tensors")
                self.images = file.get_tensor("images").permute(0, 3, 1, 2).contiguous()  # N, H, W, 3 -> N, 3, H, W
                self.labels: torch.Tensor = file.get_tensor("labels")
            self.captions: list[str] = about["captions"]
            self.emoji: list[str] = about["emoji"]
            self.classes: list[str] = about["classes"]
            self.made_with: dict[str, Any] = about["made_with"]
            self._check()
        except (UntrustedFileError, KeyError, TypeError, RuntimeError) as error:
            raise DatasetUnavailable(f"{path}: not a file of scripts/prepare_emoji.py ({reason(error)})") from None

    def _check(self) -> None:
        count = len(self.images)
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            raise UntrustedFileError("images and labels of another type or number")
        for name in ("captions", "emoji", "classes"):
            texts = getattr(self, name)
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UntrustedFileError(f"its {name} are no list of texts")
        if len(self.captions) != count or len(self.emoji) != count:
            raise UntrustedFileError(f"{len(self.captions)} captions and {len(self.emoji)} emoji of {count} images")
        if not bool(((self.labels >= 0) & (self.labels < len(self.classes))).all()):
            raise UntrustedFileError("labels of no class")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self.images[index].float() / 127.5 - 1,
            "caption": self.captions[index],
            "class_label": int(self.labels[index]),
        }


def split_file(folder: str | Path, split: Split) -> Path:
    """Where a prepared folder keeps a split."""
    return Path(folder) / f"{split}.safetensors"


def pack_split(
    images: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str],
    emoji: Sequence[str],
    made_with: Mapping[str, Any],
) -> bytes:
    """The content of a split's file; see the top of this module."""
    about = {"captions": captions, "emoji": emoji, "classes": CLASSES, "made_with": made_with}
    tensors = {"images": np.ascontiguousarray(images), "labels": np.array(labels, dtype=np.int64)}
    # One entry: safetensors writes several in an order that changes from run to run; equal sets shall be equal files.
    return save(tensors, metadata={"about": json.dumps(about, ensure_ascii=False)})
