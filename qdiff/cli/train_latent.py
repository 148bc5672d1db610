"""Flags and results that the training scripts of the latent models share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.training import PRECISIONS, TrainOptions, encode_weights, weights_for_file
from qdiff.files import write_atomically

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # of the parameters in the file


def add_training_flags(parser: argparse.ArgumentParser, *, steps: int, batch_size: int, lr: float, ema: float) -> None:
    """Flags of :class:`~ldm.training.TrainOptions` and of the files; the keywords are this script's defaults."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file with a section 'model'")
    parser.add_argument("--data", type=Path, required=True, help="folder with train and heldout.safetensors")
    parser.add_argument("-l", "--logdir", type=Path, required=True, help="folder for everything that is written")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"length of the whole run ({steps})")
    length.add_argument(
        "--for_minutes", type=float, help="the same as time: steps are counted from the speed of the first"
    )
    parser.set_defaults(usual_steps=steps)
    parser.add_argument("--minutes", type=float, help="stop this invocation in time, to be resumed")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=lr, help="highest learning rate (%(default)s)")
    parser.add_argument("--ema", type=float, default=ema, help="decay of the averaged weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="bf16: mixed precision")
    parser.add_argument("--weights", choices=tuple(DTYPES), default="fp16", help="type in the file (%(default)s)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss (GPU only; takes a minute)")
    parser.add_argument("--resume", action="store_true", help="go on from LOGDIR/last.ckpt")


def options_from(args: argparse.Namespace) -> TrainOptions:
    """The options that parsed flags stand for.

    Raises:
        ValueError: a value that makes no sense.
    """
    steps = args.usual_steps if args.steps is None and args.for_minutes is None else args.steps
    return TrainOptions(
        steps=steps,
        for_minutes=args.for_minutes,
        batch_size=args.batch_size,
        lr=args.lr,
        ema=args.ema,
        seed=args.seed,
        minutes=args.minutes,
        precision=args.precision,
        compile=args.compile,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def device_and_layout(options: TrainOptions) -> dict[str, Any]:
    """Keywords of ``.to()`` for a model to be trained."""
    # Compiled code prefers channels last; eager group norm would convert back at every layer.
    compiled = options.compile and torch.device(options.device).type == "cuda"
    return {"device": options.device, "memory_format": torch.channels_last if compiled else torch.contiguous_format}


def save_results(
    folder: Path,
    model: nn.Module,
    facts: Mapping[str, Any],
    losses: list[list[float]],
    *,
    dtype: str,
    pictures: Mapping[str, bytes],
) -> None:
    """Write weights and facts: in the header of ``model.safetensors``, and with the losses as ``train.json``.

    Args:
        model: its weights are written as they are now, parameters as ``dtype``, a key of :data:`DTYPES`.
        losses: [step, mean loss since the row before].
        pictures: name and content of further files.
    """
    facts = {**facts, "torch": torch.__version__, "parameters": sum(p.numel() for p in model.parameters())}
    write_atomically(folder / "model.safetensors", encode_weights(weights_for_file(model, DTYPES[dtype]), facts))
    write_atomically(folder / "train.json", (json.dumps({**facts, "losses": losses}, indent=1) + "\n").encode())
    for name, content in pictures.items():
        write_atomically(folder / name, content)
