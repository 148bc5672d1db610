"""Speed on a CPU, as ratios within one run: fake-quantized steps, the range search, loading the bundled checkpoint.

    python benchmarks/cpu_speed.py [--threads 2]

Variants are timed in turn, round after round, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ddim.config import load_config
from qdiff.evaluation.variants import from_packed, full_precision
from qdiff.primitives import search_grid

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "fashion_mnist.yml"
CHECKPOINT = ROOT / "models" / "pixel" / "fashion_mnist" / "w4a8.safetensors"


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    config = load_config(CONFIG)
    models = {
        "full precision": full_precision(config),
        "W4A32": from_packed(CHECKPOINT, config, quant_act=False),
        "W4A8": from_packed(CHECKPOINT, config),
    }
    x = torch.randn(args.batch_size, config.data.channels, config.data.image_size, config.data.image_size)
    t = torch.full((args.batch_size,), 400.0)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds + 1):
        for name, model in models.items():
            times[name].append(seconds(lambda m=model: m(x, t)))
    base = times["full precision"][1:]
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values[1:], base, strict=True)]
        print(
            f"{name:15} a step of {args.batch_size}: {1e3 * statistics.median(values[1:]):7.1f} ms, "
            f"{statistics.median(ratios):.3f} x full precision"
        )
    weight = torch.randn(320, 320, 3, 3)
    searches = [seconds(lambda: search_grid(weight, 4, symmetric=False, channel_wise=True)) for _ in range(3)]
    print(f"range search, 320x320x3x3, 4 bits: {min(searches):.2f} s (first call {searches[0]:.2f} s)")
    print(f"loading and resuming the bundled checkpoint: {seconds(lambda: from_packed(CHECKPOINT, config)):.2f} s")


if __name__ == "__main__":
    main()
