"""Where the golden data lies and which cases it holds.

The tests in this folder read cases, sizes and configs from the files, so that any folder of the same layout can be
given (``QDIFF_GOLDEN=DIR``); parts of it that are absent are skipped. Without the whole data the cut in ``tests/data``
is used: same files, same key names, fewer entries.
"""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
CUT = REPOSITORY / "tests" / "data" / "golden"


@cache
def golden_root() -> Path:
    """``QDIFF_GOLDEN`` where it is set, else the whole data beside the repository, else the cut inside it."""
    default = "../shared/golden"
    root = REPOSITORY / os.environ.get("QDIFF_GOLDEN", default)
    if not root.is_dir():
        if "QDIFF_GOLDEN" in os.environ:
            raise pytest.UsageError(f"QDIFF_GOLDEN: there is no folder {root}")
        root = CUT
    return root


@cache
def golden_json(name: str) -> Any:
    """Parsed ``name`` (``.json`` or ``.json.gz``, relative to the golden folder), or None where it is absent."""
    path = golden_root() / name
    if not path.is_file():
        return None
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)


@cache
def golden_keys(name: str) -> tuple[str, ...]:
    """Names of the tensors in a safetensors file; empty where it is absent."""
    path = golden_root() / name
    if not path.is_file():
        return ()
    with safe_open(path, "pt") as file:
        return tuple(file.keys())


def golden_path(name: str) -> Path:
    """A file of the golden folder; the calling test is skipped where it is absent."""
    path = golden_root() / name
    if not path.is_file():
        pytest.skip(f"{name} is not in {golden_root()}")
    return path


def golden_tensors(name: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file; the calling test is skipped where it is absent."""
    return load_file(golden_path(name))


def parameters(values: list[Any], missing: str) -> list[Any]:
    """Values for ``pytest.mark.parametrize``; where there are none, one that is skipped and says what is missing."""
    return values or [pytest.param(None, marks=pytest.mark.skip(reason=f"no {missing} in {golden_root()}"))]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))
