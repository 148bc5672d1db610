"""How long fused attention takes with PyTorch's own kernel, with cuDNN's, and with the one that PyTorch chooses.

    python benchmarks/attention_kernels.py

In the shapes of Stable Diffusion's transformers, 8 images of 64 x 64 latents, 8 heads, as its layers lay them out:
self-attention over three sizes of feature map, and attention to 77 tokens; forward and backward, on a GPU. The error is
that of the output against double precision.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qdiff.evaluation.record import environment
from qdiff.evaluation.timing import median_seconds
from qdiff.evaluation.variants import markdown_table

IMAGES, HEADS, TOKENS = 8, 8, 77
MAPS = ((64 * 64, 40), (32 * 32, 80), (16 * 16, 160))  # positions, channels of a head
KERNELS = {"PyTorch's": SDPBackend.FLASH_ATTENTION, "cuDNN's": SDPBackend.CUDNN_ATTENTION, "chosen": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=20, help="of each; the median counts")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and no CUDA device was found")
    device = torch.device("cuda")
    lines = []
    for dtype in (torch.float16, torch.bfloat16):
        for positions, channels in MAPS:
            for length in (positions, TOKENS):
                found = [
                    measured(kernel, dtype, positions, length, channels, args.repeats) for kernel in KERNELS.values()
                ]
                name = f"{positions} x {length}, {channels} channels"
                lines.append([str(dtype).removeprefix("torch."), name, *(text for pair in found for text in pair)])
    header = ["type", "attention", *(f"{name} {what}" for name in KERNELS for what in ("ms", "error"))]
    print(markdown_table(header, lines))
    print(", ".join(f"{k} {v}" for k, v in environment(device).items()))


def measured(
    kernel: SDPBackend | None, dtype: torch.dtype, positions: int, length: int, channels: int, repeats: int
) -> tuple[str, str]:
    """Milliseconds forward and backward, and the output's relative error."""
    q, grad = heads(positions, channels, dtype, seed=0), heads(positions, channels, dtype, seed=1)
    k, v = (heads(length, channels, dtype, seed=seed) for seed in (2, 3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        try:
            out = F.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:  # no such kernel for this shape, this GPU or this build
            return str(error).splitlines()[0], ""

        def both() -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), leaves, grad)

        each = median_seconds(both, q.device, repeats=repeats)
    return f"{1e3 * each:.3f}", f"{error_of(out.detach(), q, k, v):.6f}"


def heads(length: int, channels: int, dtype: torch.dtype, *, seed: int) -> Tensor:
    """N x A x L x K, as a view of N x L x A x K."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (IMAGES, length, HEADS, channels)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype).transpose(1, 2)


def error_of(out: Tensor, *qkv: Tensor) -> float:
    """Of the first image, against double precision."""
    exact: Callable[..., Tensor] = F.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        right = exact(*(x[:1].double() for x in qkv))
    return ((out[:1].double() - right).norm() / right.norm()).item()


if __name__ == "__main__":
    main()
