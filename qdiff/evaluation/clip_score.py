"""Whether images show their prompts, in the eyes of CLIP (Hessel et al. 2021, "CLIPScore").

The score of an image is 100 max(cos, 0) of its embedding and its prompt's: the scale that text-to-image papers report.
The paper's own is 2.5 max(cos, 0), a fortieth of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.modules.encoders.tokenizers import quiet_hub, reach_hub
from qdiff.evaluation.errors import EvaluationError
from qdiff.evaluation.image_sets import ImageSet, as_bytes
from qdiff.evaluation.scores import over_parts

MODEL = "openai/clip-vit-base-patch16"


class ClipJudge:
    """A CLIP model of transformers with its tokenizer and its way of preparing images."""

    def __init__(self, source: str, device: torch.device):
        """Reads a folder, or what the hub's cache has under a name, or fetches it from there.

        Raises:
            EvaluationError: it is not to be had.
        """
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise EvaluationError(f"the CLIP score needs the package transformers ({error})") from None
        trouble = ""
        with quiet_hub():
            for only_local in (True,) if os.path.isdir(source) else (True, False):
                try:
                    if not only_local:
                        reach_hub()
                    options: dict[str, Any] = {"local_files_only": only_local}
                    self._model = CLIPModel.from_pretrained(source, **options).eval().requires_grad_(False).to(device)
                    self._tokenizer = CLIPTokenizer.from_pretrained(source, **options)
                    self._prepare = CLIPImageProcessor.from_pretrained(source, **options)
                except Exception as error:  # a missing folder, no network, a damaged file: the remedy is the same
                    trouble = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    continue
                self.device, self.name = device, source
                return
        raise EvaluationError(
            f"the CLIP model {source} is neither here nor to be had from the hub ({trouble}). Without network, name a "
            "folder that has its config.json, model.safetensors, preprocessor_config.json and tokenizer with --clip"
        )

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """N x C x H x W and N prompts -> N float64 in [0, 100]. Prompts are cut at the model's length."""
        pixels = self._prepare(list(as_bytes(images).expand(-1, 3, -1, -1)), return_tensors="pt")["pixel_values"]
        words = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        found: Any = self._model(pixel_values=pixels.to(self.device), **words.to(self.device))
        cosines = (found.image_embeds.double() * found.text_embeds.double()).sum(1)  # both have length 1
        return 100 * cosines.clamp(min=0).cpu()


def clip_score(judge: ClipJudge, images: ImageSet, prompts: Sequence[str], *, batch_size: int) -> dict[str, Any] | None:
    """Mean score of images of these prompts, one for each; of several processes only the first gets it."""

    def work(start: int, part: Tensor) -> Tensor:
        return judge.scores(part, prompts[start : start + len(part)])

    found = over_parts(images, batch_size, work, "CLIP")
    if found is None:
        return None
    scores = torch.cat(found)
    return {"mean": float(scores.mean()), "std": float(scores.std(correction=0))}
