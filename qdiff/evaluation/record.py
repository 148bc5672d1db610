"""Where and with what a figure was measured, and files of figures that grow entry by entry."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ddim import untrusted
from qdiff.files import write_atomically
from qdiff.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def environment(device: torch.device | str) -> dict[str, str]:
    """Device, versions and commit, as plain text."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "qdiff": __version__,
        "commit": commit(),
    }


def device_name(device: torch.device | str) -> str:
    """The model of the GPU, or of the processor with the number of threads that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def commit(root: Path = ROOT) -> str:
    """Short hash of the checked-out commit, with ``+`` where files differ from it; ``unknown`` outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def read_json(path: Path) -> dict[str, Any]:
    """A file of figures; an empty one where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = untrusted.read_json(path)
    except untrusted.UntrustedFileError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a file of figures; remove it or name another")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The file is whole or as it was."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
