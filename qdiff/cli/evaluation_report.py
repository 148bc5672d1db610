"""What an evaluation found, as a table for people and as a record for files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qdiff.evaluation.record import environment, write_json
from qdiff.evaluation.variants import markdown_table

# Score -> what it is called when Inception's features make it, and when a small network's do.
TITLES = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "inception_score": "Inception Score",
    "class_score": "class score",
    "kid": "KID",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
    "psnr": "PSNR, dB",
    "lpips": "LPIPS",
    "group": "group agrees with the caption",
    "named": "thing agrees with the caption",
    "base": "thing or a variant agrees",
    "pairs": "pairs",
    "identical": "identical pairs",
}


def table(record: Mapping[str, Any]) -> str:
    """The scores, one a line, under what they are of."""
    rows = [[TITLES[name], *_cells(value)] for name, value in record["metrics"].items()]
    lines = [f"{record['images']}: {record['count']} images"]
    if record.get("reference"):
        lines.append(f"compared with {record['reference']}")
    if record.get("features"):
        lines.append(f"features of {record['features']}")
    if record.get("paired"):
        lines.append(f"paired with {record['paired']}")
    return "\n".join(lines) + (f"\n\n{markdown_table(['score', 'value', ''], rows)}" if rows else "")


def _cells(value: float | Mapping[str, float]) -> tuple[str, str]:
    """The value, and what else is known of it."""
    if not isinstance(value, Mapping):
        return (f"{value:.5f}" if isinstance(value, float) else str(value)), ""
    if "std" in value:
        return f"{value['mean']:.5f}", f"± {value['std']:.5f}"
    return f"{value['mean']:.5f}", f"worst {value['worst']:.5f}, image {value['worst_image']}"


def surroundings(device: torch.device) -> dict[str, str]:
    """Device, versions and commit, with the version of what computes the scores."""
    try:
        scores = {"torch_fidelity": version("torch-fidelity")}
    except PackageNotFoundError:
        scores = {"torch_fidelity": "none"}
    return environment(device) | scores


def write(record: Mapping[str, Any], json_file: Path | None, append: Path | None) -> None:
    """To a file of its own, and to the end of a file of JSON lines."""
    if json_file is not None:
        write_json(json_file, dict(record))
    if append is not None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with append.open("a", encoding="utf-8") as file:
            file.write(line)
