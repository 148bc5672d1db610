"""Attention in half precision: gradients of any size, no overflow, the same with activations computed twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from qdiff import fused
from qdiff.attention import attention, half_precision

TF32_STEP = 2**-10


def inputs(*sizes: float, seed: int = 0) -> list[Tensor]:
    """q of 24 positions, k and v of 40, as large as asked for."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 24, 8), (2, 3, 40, 8), (2, 3, 40, 8))
    return [
        (size * torch.randn(shape, generator=generator)).requires_grad_()
        for size, shape in zip(sizes, shapes, strict=True)
    ]


def gradients(qkv: list[Tensor], grad: Tensor, run: object = attention) -> list[Tensor]:
    out = run(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def exact(qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    double = [x.detach().double().requires_grad_() for x in qkv]
    return [x.float() for x in gradients(double, grad.double(), F.scaled_dot_product_attention)]


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e5])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1e6, 1e-6, 1e6), (1e-5, 1e5, 1e-9), (0.01, 0.01, 3)])
def test_values_and_gradients_of_any_size(sizes: tuple[float, ...], size: float) -> None:
    qkv = inputs(*sizes)
    grad = size * torch.randn(2, 3, 24, 8, generator=torch.Generator().manual_seed(1))
    with half_precision(True):
        found = gradients(qkv, grad)
    for name, value, right in zip(("out", "q", "k", "v"), found, exact(qkv, grad), strict=True):
        assert value.dtype is torch.float32
        assert (value - right).abs().max() <= 4 * TF32_STEP * right.abs().max(), name


def test_it_is_float16_that_computes() -> None:
    qkv, grad = inputs(1, 1, 1), torch.ones(2, 3, 24, 8)
    plain = gradients(qkv, grad, F.scaled_dot_product_attention)
    with half_precision(True):
        halves = gradients(qkv, grad)
    assert not any(torch.equal(a, b) for a, b in zip(plain, halves, strict=True))


def test_elsewhere_it_is_attention_as_pytorch_has_it() -> None:
    qkv, grad = inputs(1, 1, 1), torch.ones(2, 3, 24, 8)
    plain = gradients(qkv, grad, F.scaled_dot_product_attention)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(qkv, grad), strict=True))
    with half_precision(True):
        assert torch.equal(plain[0], attention(*(x.detach() for x in qkv)))
        with torch.no_grad():
            assert torch.equal(plain[0], attention(*qkv))
        with half_precision(False):
            assert torch.equal(plain[0], attention(*qkv).detach())


def test_nothing_but_zeros() -> None:
    qkv = [torch.zeros_like(x).requires_grad_() for x in inputs(1, 1, 1)]
    with half_precision(True):
        found = gradients(qkv, torch.zeros(2, 3, 24, 8))
    assert all(bool((x == 0).all()) for x in found)


def test_computed_twice_it_is_the_same() -> None:
    qkv, grad = inputs(1, 2, 3), torch.randn(2, 3, 24, 8, generator=torch.Generator().manual_seed(1))
    with half_precision(True):
        once = gradients(qkv, grad)
        twice = gradients(qkv, grad, lambda *x: checkpoint(attention, *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_powers_of_two_are_exact_where_one_factor_would_not_be() -> None:
    x = torch.tensor([1.5 * 2.0**-100, -(2.0**-120)])
    raised = fused.times_power(x, torch.tensor(200.0), torch.float32)
    assert torch.equal(raised, torch.tensor([1.5 * 2.0**100, -(2.0**80)]))
    assert fused.exponent(torch.tensor([3.0, -5.0])) == 3
    assert fused.exponent(torch.zeros(2)) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_as_part_of_a_graph_on_a_gpu(kernel: str) -> None:
    """By either kernel that PyTorch may choose."""
    chosen = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[kernel]
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = [torch.randn(4, 3, 256, 32, device="cuda", generator=generator).requires_grad_() for _ in range(3)]
    grad = 1e-8 * torch.randn(4, 3, 256, 32, device="cuda", generator=generator)
    right = exact(qkv, grad)
    with half_precision(True), sdpa_kernel(chosen):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as ran:
            gradients(qkv, grad)
        assert any(f"_{kernel}_attention" in event.name for event in ran.events())
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            gradients(qkv, grad)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = gradients(qkv, grad)
    for x in found:
        x.zero_()
    graph.replay()
    for value, expected in zip(found, right, strict=True):
        assert (value - expected).abs().max() <= 4 * TF32_STEP * expected.abs().max()
