"""Every Triton kernel compiles for a GPU, with none there: the interpreter takes more than the compiler does."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qdiff import triton_kernels as kernels

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}


class Launched:
    """Stands for a kernel and notes that it would have been launched."""

    def __init__(self, kernel: Any, names: set[str]):
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return self.launch

    def launch(self, *values: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        self.names.add(self.kernel.__name__)


class Compiled(Launched):
    """Compiles it for what it is launched with."""

    def launch(self, *values: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, values, strict=False)) | named
        assert given.keys() == set(names)
        constants = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr}
        signature = {name: "constexpr" if name in constants else type_of(given[name]) for name in names}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        assert triton.compile(source, target=HOPPER, options=options).asm["cubin"]
        super().launch()


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def stand_ins(monkeypatch: pytest.MonkeyPatch, kind: type[Launched]) -> tuple[set[str], set[str]]:
    """Names of all kernels, and those of the ones that are launched from now on, which come in yet."""
    every, launched = {name for name in vars(kernels) if name.endswith("_kernel")}, set[str]()
    for name in every:
        monkeypatch.setattr(kernels, name, kind(getattr(kernels, name), launched))
    return every, launched


def of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def fake_quantization(dtype: torch.dtype) -> None:
    x, bounds = of(4, 100, dtype=dtype), (of(4, 1), of(4, 1))
    kernels.fake_quantize(x, of(4, 1), *bounds)
    kernels.fake_quantize(x, of(), -8.0, 7.0)
    kernels.fake_quantize_backward(x, x, of(4, 1), *bounds, needs_x=True)
    kernels.fake_quantize_backward(x, x, of(), -8.0, 7.0, needs_x=False)


def elementwise(dtype: torch.dtype) -> None:
    kernels.times_power(of(50), kernels.exponent(of()), torch.float16)
    kernels.times_power(of(50, dtype=torch.float16), of(), torch.float32)
    x = of(3, 2560, dtype=dtype)
    kernels.gated_gelu_backward(kernels.gated_gelu(x), x)


def layer_norm(dtype: torch.dtype) -> None:
    for width in (320, 1280, 4096):
        x, norm = of(5, width, dtype=dtype), (of(width), of(width))
        out, means, rstds = kernels.layer_norm(x, *norm, 1e-5, torch.bfloat16)
        kernels.layer_norm_backward(out, x, norm[0], means, rstds)


def group_norm(dtype: torch.dtype) -> None:
    for side in (2, 32):
        x, norm = of(2, 64, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last), (of(64), of(64))
        _, mean, rstd = kernels.group_norm(x, 32, *norm, 1e-5, True)
        kernels.group_norm_backward(x, x, 32, *norm, mean, rstd, True)


def iteration(dtype: torch.dtype) -> None:
    draws, counter = torch.zeros(7, 4, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    near, out = of(9, 100, dtype=torch.float16), of(4, 100, dtype=dtype)
    kernels.gather_rows(near, draws, counter, out)
    kernels.gather_rows(near, draws, counter, out, far=near, ahead=1)
    for p in (2.0, 2.4):
        kernels.loss_gradient(out, near, draws, counter, of(7), scale=0.1, p=p)
        kernels.loss_gradient(out, out, None, counter, of(7), scale=0.1, p=p)
    weights, grids, tables = [of(6, 18) for _ in range(4)], [of(12) for _ in range(3)], of(7, 4)
    for cut in (0, 9):
        kernels.rounding_step(
            *weights, of(6, 18, dtype=dtype), of(6, 18, dtype=dtype), *grids, tables, counter,
            row=18, inputs=18, cut=cut, eps=1e-8,
        )  # fmt: skip
    kernels.adam_step(*(of(5) for _ in range(4)), tables, counter, eps=1e-8, floor=1e-6)


def attention(dtype: torch.dtype) -> None:
    half = torch.float16 if dtype == torch.float32 else dtype
    for width in (40, 80, 128):
        q, k, v = (of(2, tokens, 8, width, dtype=half).transpose(1, 2) for tokens in (4096, 77, 77))
        kernels.rounded_attention(q, k, v, of(2), of(2), of(2), torch.empty_like(q), scale=0.1)
        rows = kernels.map_rows(q, k, scale=0.1)
        kernels.rounded_attention(q, k, v, of(), of(), of(), torch.empty_like(q).float(), scale=0.1, rows=rows)


PARTS = [fake_quantization, elementwise, layer_norm, group_norm, iteration, attention]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("part", PARTS)
def test_kernels_compile(
    part: Callable[[torch.dtype], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(monkeypatch, Compiled)
    part(dtype)


def test_that_is_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    every, launched = stand_ins(monkeypatch, Launched)
    for part in PARTS:
        part(torch.float32)
    assert launched == every
