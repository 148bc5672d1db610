"""Miniature text-to-image models on disk, in the style of Stable Diffusion and of the LAION-400M model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.modules.encoders.tokenizers import write_clip_tokenizer
from qdiff.cli import make_calibration_data, make_random_checkpoint
from qdiff.cli.txt2img import main

from .latent_models import config_of

STEPS, SAMPLES, ITERATIONS = 4, 3, 2
SIDE = 16  # pixels; two for each of a latent's
PROMPT = "a puppy wearing a hat"
MERGES = [("a", "t</w>"), ("p", "u"), ("h", "at</w>"), ("c", "at</w>")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "puppy", "hat", "cat", "wearing", "dog"]
WIDTH, TOKENS = 12, 24


def text_config(kind: str) -> dict[str, Any]:
    """A whole config, of the kind ``sd`` or ``laion``."""
    config = copy.deepcopy(config_of("churches"))
    params = config["model"]["params"]
    params |= {"conditioning_key": "crossattn", "cond_stage_key": "txt", "use_ema": False, "scale_factor": 0.18215}
    params |= {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 100}
    params.pop("scale_by_std")
    unet = params["unet_config"]["params"]
    for key in ("use_scale_shift_norm", "resblock_updown"):
        unet.pop(key)
    unet |= {"num_heads": 4, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": WIDTH}
    unet |= {"use_checkpoint": True, "legacy": False}
    if kind == "sd":
        numbers = {"vocab_size": 514 + len(MERGES), "hidden_size": WIDTH, "intermediate_size": 24}
        numbers |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": TOKENS}
        encoder: dict[str, Any] = {"max_length": TOKENS, "text_config": numbers}
    else:
        encoder = {"n_embed": WIDTH, "n_layer": 2, "vocab_size": len(WORDS), "max_seq_len": TOKENS, "head_width": 4}
    name = "FrozenCLIPEmbedder" if kind == "sd" else "BERTEmbedder"
    params["cond_stage_config"] = {"target": f"ldm.modules.encoders.modules.{name}", "params": encoder}
    return config


@dataclass(frozen=True)
class TextMiniature:
    """A model's files, and the flags of the documented commands, small numbers in the places of large ones."""

    kind: str
    folder: Path

    @property
    def ckpt(self) -> Path:
        return self.folder / "sd-v1-4.ckpt"

    @property
    def config(self) -> Path:
        return self.folder / "v1-inference.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def calibration_set(self) -> Path:
        return self.folder / "cali.pt"

    @property
    def files(self) -> list[str]:
        return ["--config", str(self.config), "--ckpt", str(self.ckpt), "--tokenizer", str(self.tokenizer)]

    def flags(self, *more: object, prompt: str | None = PROMPT, plms: bool = True) -> list[str]:
        what = ["--prompt", prompt] if prompt is not None else []
        sampler = ["--plms"] if plms else []
        quick = ["--ddim_steps", str(STEPS), "--n_samples", str(SAMPLES), "--device", "cpu"]
        return [*what, *sampler, "--cond", *quick, *self.files, *map(str, more)]

    def calibration_flags(self) -> list[str]:
        quick = ["--cali_iters", "6", "--cali_iters_a", "3", "--cali_batch_size", "4"]
        return [*quick, "--cali_st", "2", "--cali_n", "4", "--cali_data_path", str(self.calibration_set)]


def make_text_miniature(kind: str, parent: Path) -> TextMiniature:
    """Config, tokenizer, random weights and calibration set, each by its command."""
    tiny = TextMiniature(kind, parent / kind)
    tiny.folder.mkdir()
    tiny.config.write_text(yaml.safe_dump(text_config(kind)))
    if kind == "sd":
        write_clip_tokenizer(tiny.tokenizer, MERGES)
    else:
        tiny.tokenizer.mkdir()
        (tiny.tokenizer / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    make_random_checkpoint.main(["--config", str(tiny.config), "--out", str(tiny.ckpt)])
    prompts = tiny.folder / "prompts.txt"
    prompts.write_text("a cat\na puppy wearing a hat\n\n  a dog\n")
    words = ["--from-file", str(prompts), "--plms", "--ddim_steps", str(STEPS), "-n", "6", "--batch_size", "4"]
    make_calibration_data.main([*words, *tiny.files, "--device", "cpu", "--out", str(tiny.calibration_set)])
    return tiny


def draw(flags: list[str], out: Path, *more: object) -> Path:
    """Run the command and return the run folder it made."""
    main([*flags, "--outdir", str(out), *map(str, more)])
    (folder,) = out.iterdir()
    return folder
