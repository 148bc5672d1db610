"""Cut the whole golden data down to what the repository carries (``tests/data/golden``, at most 7 MB).

    python tests/make_golden_cut.py SOURCE

File and key names stay, so that the same tests run on both and find fewer entries in the cut: small files whole, and
of each miniature UNet one up-path residual block and one attention or transformer block, with their weights and, for
variants with quantized activations, their checkpoint entries and stored inputs and outputs.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

TARGET = Path(__file__).resolve().parent / "data" / "golden"
LIMIT_BYTES = 7_000_000

WHOLE = (
    "quantizers.json",
    "quantizers.safetensors",
    "adaround.json",
    "adaround.safetensors",
    "samplers.json",
    "samplers.safetensors",
    "selection.json",
    "manifests/*.json.gz",
)

# Where the widths allow it, residual blocks whose two input halves differ in width: swapped halves then show.
KEPT_UNITS = {
    "ddim": ("up.0.block.0", "up.1.attn.1"),
    "ldm_beds": ("output_blocks.3.0", "output_blocks.3.1"),
    "ldm_churches": ("output_blocks.2.0", "output_blocks.2.1"),
    "sd": ("output_blocks.2.0", "output_blocks.2.1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut the whole golden data down to what the repository carries.")
    parser.add_argument("source", type=Path, help="folder of the whole golden data")
    source = parser.parse_args().source
    if not (source / "samplers.json").is_file():
        parser.error(f"{source} holds no golden data (no samplers.json)")
    shutil.rmtree(TARGET, ignore_errors=True)
    for pattern in WHOLE:
        for path in sorted(source.glob(pattern)):
            copy(path, TARGET / path.relative_to(source))
    for family, units in KEPT_UNITS.items():
        cut_family(source / "unets" / family, TARGET / "unets" / family, units)
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{TARGET}: {size / 1e6:.2f} MB")
    if size > LIMIT_BYTES:
        raise SystemExit(f"more than {LIMIT_BYTES / 1e6:.0f} MB")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())  # not shutil.copy: the source may be read-only, and its mode would follow


def cut_family(source: Path, target: Path, units: tuple[str, ...]) -> None:
    """The JSON files, and of each tensor file what belongs to the kept units."""
    for path in sorted(source.glob("*.json")):
        copy(path, target / path.name)
    cut(source / "model.safetensors", target, tuple(f"weights.{unit}." for unit in units))
    for path in sorted(source.glob("*.units.safetensors")):
        cut(path, target, tuple(f"model.{unit}." for unit in units))
        variant = path.with_name(path.name.replace(".units", ""))
        cut(variant, target, tuple(f"checkpoint.model.{unit}." for unit in units))


def cut(source: Path, target: Path, prefixes: tuple[str, ...]) -> None:
    kept = {name: tensor for name, tensor in load_file(source).items() if name.startswith(prefixes)}
    if not all(any(name.startswith(prefix) for name in kept) for prefix in prefixes):
        raise SystemExit(f"{source} has no tensors under one of {', '.join(prefixes)}")
    save_file(kept, target / source.name)


if __name__ == "__main__":
    main()
