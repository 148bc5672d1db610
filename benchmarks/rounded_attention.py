"""How long attention with a rounded softmax map takes while sampling: with the map in memory, and rounded in passing.

    python benchmarks/rounded_attention.py [--tune]

In the shapes of Stable Diffusion's transformers, 10 images of 64 x 64 latents with guidance, 8 heads, float16, a map of
16 bits; on a GPU. Errors are those of the output against double precision, which rounds the map to the same grid. With
--tune the kernel runs with other blocks too, in self-attention.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qdiff import fused, triton_kernels
from qdiff.evaluation.record import environment
from qdiff.evaluation.timing import median_seconds
from qdiff.evaluation.variants import markdown_table

IMAGES, HEADS, TOKENS, TOP = 20, 8, 77, 2.0**16 - 1
MAPS = ((64 * 64, 40), (32 * 32, 80))  # positions, channels of a head; smaller maps stay in the GPU's cache
BLOCKS = tuple(itertools.product((64, 128), (64, 128), (4, 8), (2, 3)))  # as triton_kernels._ATTENTION has them
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=20, help="of each; the median counts")
    parser.add_argument("--tune", action="store_true", help="try other blocks")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and no CUDA device was found")
    device = torch.device("cuda")
    lines = []
    for positions, channels in MAPS:
        for length in (positions, TOKENS):
            q, k, v = (heads(n, channels, seed) for seed, n in enumerate((positions, length, length)))
            delta = torch.tensor(1 / TOP, device=device)
            grid = delta, torch.zeros_like(delta), torch.full_like(delta, TOP)
            for name, attend in ways(grid, channels, tune=args.tune and length == positions):
                try:
                    each = median_seconds(functools.partial(attend, q, k, v), device, repeats=args.repeats)
                except triton_kernels.triton.OutOfResources:
                    continue
                error = error_of(attend(q, k, v), q, k, v, delta.double())
                lines.append([f"{positions} x {length}, {channels}", name, f"{1e3 * each:.3f}", f"{error:.6f}"])
    print(markdown_table(["positions x tokens, channels", "map", "ms", "error"], lines))
    print(", ".join(f"{k} {v}" for k, v in environment(device).items()))


def ways(grid: tuple[Tensor, Tensor, Tensor], channels: int, *, tune: bool) -> Iterator[tuple[str, Attention]]:
    """Names and functions."""
    scale = channels**-0.5

    def with_map(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).mul_(scale).softmax(dim=3)
        return fused.fake_quantize(weights.float(), grid[0], 0.0, TOP).half() @ v

    def passing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused.rounded_attention(q, k, v, *grid, scale=scale)

    yield "in memory", with_map
    yield "in passing", passing
    width = 64 if channels <= 64 else 128
    chosen = triton_kernels._ATTENTION[width]
    for blocks in BLOCKS if tune else ():
        triton_kernels._ATTENTION[width] = blocks
        yield "in passing, blocks of {} x {}, {} warps, {} stages".format(*blocks), passing
    triton_kernels._ATTENTION[width] = chosen


def heads(length: int, channels: int, seed: int) -> Tensor:
    """N x A x L x K, as a view of N x L x A x K."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (IMAGES, length, HEADS, channels)
    return torch.randn(shape, device="cuda", generator=generator).half().transpose(1, 2)


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor) -> float:
    """Of the first image."""
    q, k, v = (x[0].double() for x in (q, k, v))
    weights = (q @ k.mT * q.shape[2] ** -0.5).softmax(dim=2)
    right = (weights / delta).round().clamp(0, TOP) * delta @ v
    return ((out[0].double() - right).norm() / right.norm()).item()


if __name__ == "__main__":
    main()
