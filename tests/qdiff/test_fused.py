"""The Triton kernels against the PyTorch they stand for: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.attention import gated_gelu
from qdiff import fused, primitives
from qdiff.act_ranges import find_act_ranges, update_running_ranges
from qdiff.attention import half_precision, sparing
from qdiff.config import CalibrationConfig, QuantConfig, TimedRanges
from qdiff.inference import lower_precision
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_model import QuantModel
from qdiff.quantizers import UniformAffineQuantizer
from qdiff.reconstruction import reconstruct_activations, reconstruct_weights

from ..ldm.unets import latent_inputs, tiny_latent_unet

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
needs_kernels = pytest.mark.skipif(not fused.available(DEVICE), reason="run by test_kernels_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the other tests here run the kernels")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    """The rest of this file in a process of its own: Triton decides how kernels run when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


def feature(*shape: int, channels_last: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def gradients(function, x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Output and gradients in x and the parameters, for one fixed gradient of the output."""
    leaves = [leaf.detach().clone().requires_grad_(True) for leaf in (x, *parameters)]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_equal(fast: list[Tensor], plain: list[Tensor]) -> None:
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize(
    "x", [feature(3, 8, 5, 7), feature(3, 8, 5, 7, channels_last=False), feature(5, 37)], ids="abc"
)
@pytest.mark.parametrize("bounds", [(-8.0, 7.0), (-3.0, 12.0), (2.0, 17.0)])
def test_fake_quantize(x: Tensor, bounds: tuple[float, float]) -> None:
    delta = torch.tensor(0.13, device=DEVICE)
    fast = gradients(lambda x, d: primitives.fake_quantize(x, d, *bounds), x, delta)
    with fused.plain_pytorch():
        plain = gradients(lambda x, d: primitives.fake_quantize(x, d, *bounds), x, delta)
    assert torch.equal(fast[0], plain[0])
    assert_equal(fast, plain)


@needs_kernels
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("layout", ["contiguous", "heads last", "with gaps"])
@pytest.mark.parametrize("exponent", [0, -7, 1, 130, -70, 300, -300])
def test_powers_of_two(exponent: int, layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """To the bit, whatever is too large or too small for the types on the way."""
    x = feature(2, 3, 50, 8)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "heads last" else x.contiguous()
    x = (x if layout != "with gaps" else x[:, :, ::2]).to(dtypes[0])
    power = torch.tensor(float(exponent), device=DEVICE)
    fast = fused.times_power(x, power, dtypes[1])
    with fused.plain_pytorch():
        plain = fused.times_power(x, power, dtypes[1])
    assert torch.equal(plain, torch.ldexp(x.double(), power).to(dtypes[1]))
    assert fast.dtype is dtypes[1]
    assert torch.equal(fast, plain)
    assert layout != "heads last" or fast.stride() == x.stride()


@needs_kernels
@pytest.mark.parametrize(
    ("largest", "exponent"),
    [(0.0, 0), (1.0, 0), (-1.5, 1), (0.3, -1), (2.0**-100, -100), (3e-45, -126), (3e38, 128), (float("inf"), 128)],
)
def test_exponents(largest: float, exponent: int) -> None:
    x = torch.tensor([[0.0, largest], [largest / 3, -largest / 2]], device=DEVICE)
    assert fused.exponent(x).item() == exponent
    with fused.plain_pytorch():
        assert fused.exponent(x).item() == (exponent if math.isfinite(largest) else math.inf)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 700, 18), (1, 1, 2)])
def test_gated_gelu(shape: tuple[int, ...]) -> None:
    """Also where the gate is far from 0, and of a tensor with gaps."""
    x = 4 * feature(*shape)
    for piece in (x, x[:, ::2]):
        assert fused.can_gate(piece)
        assert_equal(gradients(fused.gated_gelu, piece), gradients(gated_gelu, piece))
    with fused.plain_pytorch():
        assert not fused.can_gate(x)


@needs_kernels
def test_gated_gelu_in_bfloat16() -> None:
    """Rounded once, at the end."""
    x = (4 * feature(3, 70, 18)).bfloat16()
    assert fused.can_gate(x)
    fast, exact = gradients(fused.gated_gelu, x), gradients(gated_gelu, x.float())
    assert all(a.dtype is torch.bfloat16 for a in fast)
    for a, b in zip(fast, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-6, atol=1e-5)


def layer_norm_of(width: int, *, frozen: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(width).to(DEVICE).requires_grad_(not frozen)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * feature(width))
        norm.bias.copy_(feature(2, width)[1])
    return norm


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 70, 18), (1, 1, 2), (5, 320), (3, 2049)])
def test_layer_norm(shape: tuple[int, ...]) -> None:
    """As near to double precision as PyTorch, also far from zero, and of a tensor with gaps."""
    norm, x = layer_norm_of(shape[-1]), feature(*shape)
    exact = copy.deepcopy(norm).double()
    assert fused._can_normalise(norm, x)
    for near_or_far in (x, 0.1 * x + 100, torch.cat([x, x], dim=-2)[..., ::2, :]):
        fast = gradients(lambda x: fused.layer_norm(norm, x, for_products=False), near_or_far)
        plain, right = gradients(norm, near_or_far), gradients(exact, near_or_far.double())
        for a, b, c in zip(fast, plain, right, strict=True):
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 2e-6


@needs_kernels
@pytest.mark.parametrize("for_products", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_under_autocast(dtype: torch.dtype, for_products: bool) -> None:
    norm, x = layer_norm_of(48), feature(2, 9, 48).to(dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out, grad = gradients(lambda x: fused.layer_norm(norm, x, for_products=for_products), x)
    right, right_grad = gradients(norm, x.float())
    assert (out.dtype, grad.dtype) == (torch.bfloat16 if for_products else torch.float32, dtype)
    step = 2**-7 if for_products else 1e-5
    torch.testing.assert_close(out.float(), right, rtol=step, atol=1e-5)
    torch.testing.assert_close(grad.float(), right_grad, rtol=2**-6, atol=2**-6)


@needs_kernels
def test_layer_norms_that_learn_or_are_not_plain_are_left_to_pytorch() -> None:
    x = feature(2, 5, 16)
    others = layer_norm_of(16, frozen=False), nn.LayerNorm((5, 16)), nn.LayerNorm(16, elementwise_affine=False)
    for norm in others:
        assert not fused._can_normalise(norm.to(DEVICE), x)
        assert torch.equal(fused.layer_norm(norm, x, for_products=True), norm(x))
    with torch.no_grad():
        assert fused._can_normalise(others[0], x)
    assert not fused._can_normalise(layer_norm_of(16), x[:0])
    with fused.plain_pytorch():
        assert not fused._can_normalise(layer_norm_of(16), x)


@needs_kernels
@pytest.mark.parametrize("x", [feature(3, 8, 5, 7), feature(5, 37)], ids="ab")
def test_fake_quantize_with_bounds_on_the_device(x: Tensor) -> None:
    delta, lo, hi = (torch.tensor(value, device=DEVICE) for value in (0.13, -3.0, 12.0))
    assert fused.can_fake_quantize(x, delta, lo)
    fast = gradients(lambda x, d: primitives.fake_quantize(x, d, lo, hi), x, delta)
    numbers = gradients(lambda x, d: primitives.fake_quantize(x, d, -3.0, 12.0), x, delta)
    assert all(map(torch.equal, fast, numbers))
    with fused.plain_pytorch():
        plain = gradients(lambda x, d: primitives.fake_quantize(x, d, lo, hi), x, delta)
    assert torch.equal(fast[0], plain[0])
    assert_equal(fast, plain)


@needs_kernels
def test_fake_quantize_with_a_grid_for_each_row() -> None:
    x = feature(4, 8, 5, 3)
    delta = torch.tensor([0.1, 0.2, 0.05, 0.4], device=DEVICE).view(4, 1, 1, 1)
    lo = torch.tensor([-8.0, 0.0, -3.0, 4.0], device=DEVICE).view(4, 1, 1, 1)
    assert fused.can_fake_quantize(x, delta, lo)
    fast = gradients(lambda x, d: primitives.fake_quantize(x, d, lo, lo + 15), x, delta)
    with fused.plain_pytorch():
        plain = gradients(lambda x, d: primitives.fake_quantize(x, d, lo, lo + 15), x, delta)
    assert torch.equal(fast[0], plain[0])
    assert_equal(fast, plain)


@needs_kernels
def test_quantizers_use_the_kernel_and_take_slices() -> None:
    """A slice of a channels-last feature, as a split shortcut quantizes it, has gaps in memory."""
    quantizer = UniformAffineQuantizer(4, symmetric=True, leaf_param=True).to(DEVICE)
    x = feature(2, 12, 4, 4)
    quantizer.find_grid(x)
    for part in (x[:, :5], x[:, 5:], x.flatten(2), x.flatten(2).transpose(1, 2)):
        with fused.plain_pytorch():
            expected = quantizer(part)
        assert torch.equal(quantizer(part), expected)


@needs_kernels
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("channels", "groups", "size"), [(8, 4, (5, 7)), (24, 2, (9, 6)), (32, 32, (4, 4))])
@pytest.mark.parametrize("whole", [True, False])
def test_group_norm(
    channels: int, groups: int, size: tuple[int, int], silu: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far from zero mean, whole groups or tiles that do not divide the feature."""
    from qdiff import triton_kernels

    monkeypatch.setattr(triton_kernels, "_NORM_WHOLE", 1024 if whole else 1)
    monkeypatch.setattr(triton_kernels, "_NORM_ROWS", 16)
    monkeypatch.setattr(triton_kernels, "_NORM_WIDTH", 4)
    norm = nn.GroupNorm(groups, channels, eps=1e-6).to(DEVICE).requires_grad_(False)
    norm.weight.normal_(generator=None)
    norm.bias.normal_(generator=None)
    x = feature(3, channels, *size) * 2 + 5
    fast = gradients(lambda x: fused.group_norm(norm, x, silu=silu), x)
    with fused.plain_pytorch():
        plain = gradients(lambda x: fused.group_norm(norm, x, silu=silu), x)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=3e-5)


def heads(*shape: int, seed: int = 0, last: bool = True, dtype: torch.dtype = torch.float16) -> Tensor:
    """N x A x P x K as layers give it, heads (or channels of a head) one after the other."""
    images, count, positions, width = shape
    order = (images, positions, count, width) if last else (images, count, width, positions)
    x = torch.randn(order, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.transpose(1, 2) if last else x.transpose(2, 3)


def rounded_by_map(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    """In double precision, with the map."""
    q, k, v, delta, lo, hi = (x.double() for x in (q, k, v, delta, lo, hi))
    delta, lo, hi = (x.view(-1, 1, 1, 1) for x in (delta, lo, hi))
    weights = (scale * q @ k.transpose(2, 3)).softmax(dim=3)
    return (weights / delta).round().clamp(lo, hi) * delta @ v


def distance(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("positions", "tokens", "width", "last"),
    [(130, 130, 40, True), (70, 77, 40, True), (65, 65, 72, False), (3, 1, 5, True)],
)
def test_attention_rounds_in_passing(
    positions: int, tokens: int, width: int, last: bool, bits: int, dtype: torch.dtype
) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies matrices of the bytes of bfloat16")
    q = heads(2, 3, positions, width, last=last, dtype=dtype)
    k, v = (heads(2, 3, tokens, width, seed=seed, last=last, dtype=dtype) for seed in (1, 2))
    top = 2.0**bits - 1
    grid = torch.tensor(0.5 / top), torch.tensor(0.0), torch.tensor(top)  # the highest values of the map are cut off
    grid = tuple(x.to(DEVICE) for x in grid)
    out = fused.rounded_attention(q, k, v, *grid, scale=width**-0.5)
    right = rounded_by_map(q, k, v, *grid, scale=width**-0.5)
    assert distance(out, right) < (1e-3 if dtype == torch.float16 else 8e-3)  # the type's rounding of the map
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    if positions > 100 and bits == 8:
        assert distance(right, (width**-0.5 * q.double() @ k.double().mT).softmax(3) @ v.double()) > 0.02  # it rounds


@needs_kernels
def test_attention_rounds_each_image_to_its_own_grid() -> None:
    q, k, v = (heads(3, 2, 20, 16, seed=seed) for seed in range(3))
    delta, lo, hi = (
        torch.tensor(x, device=DEVICE) for x in ([0.05, 0.3, 0.004], [0.0, -1.0, 3.0], [15.0, 14.0, 200.0])
    )
    out = fused.rounded_attention(q, k, v, delta, lo, hi, scale=1.0)
    assert distance(out, rounded_by_map(q, k, v, delta, lo, hi, scale=1.0)) < 2e-3


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "bits", "timed"),
    [("transformer", 16, "all"), ("head_channels", 8, "none")],
)
def test_networks_in_half_precision_round_maps_in_passing(
    kind: str, bits: int, timed: TimedRanges, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_LARGE_MAP", 1)
    calls: list[int] = []
    kernel = fused.rounded_attention
    monkeypatch.setattr(fused, "rounded_attention", lambda *x, **named: (calls.append(1), kernel(*x, **named))[1])
    inputs = [x.to(DEVICE) for x in latent_inputs(kind, 2)]
    config = QuantConfig(weight_bit=8, act_bit=16, quant_act=True, sm_abit=bits, timed_ranges=timed)
    unet = tiny_latent_unet(kind, channel_mult=(1,), attention_resolutions=(1,)).eval()
    qnn = QuantModel.from_config(unet, config.at_timesteps(inputs[1].tolist())).to(DEVICE)
    with fused.plain_pytorch():
        qnn.find_weight_grids()
        find_act_ranges(qnn, tuple(inputs))
    qnn.set_quant_state(True, True)
    lower_precision(qnn, "fp16")
    maps = [block for block in qnn.modules() if isinstance(block, BaseQuantBlock) and block.attention_quantizers()]

    def output() -> tuple[Tensor, int]:
        calls.clear()
        with torch.no_grad():
            return qnn(*inputs), len(calls)

    fast, count = output()
    assert count == len(maps) > 1
    with fused.plain_pytorch():
        plain, count = output()
    assert count == 0
    assert distance(fast, plain) < 4e-3
    with sparing():
        assert output()[1] == 0
    handle = maps[0].attention_quantizers()["w"].register_forward_pre_hook(lambda *_: None)
    assert output()[1] == len(maps) - 1
    handle.remove()
    q = heads(1, 1, 4, 16).requires_grad_()
    assert not fused.can_round_in_passing(q, q, q)
    assert fused.can_round_in_passing(q.detach(), q.detach(), q.detach())
    assert not fused.can_round_in_passing(*[q.detach().float()] * 3)


@needs_kernels
@pytest.mark.parametrize("kind", ["transformer", "head_channels"])
def test_ranges_of_maps_are_averaged_in_passing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_LARGE_MAP", 1)
    calls: list[int] = []
    kernel = fused.attention_setting_its_grid
    monkeypatch.setattr(
        fused, "attention_setting_its_grid", lambda *x, **named: (calls.append(1), kernel(*x, **named))[1]
    )
    unet = tiny_latent_unet(kind, channel_mult=(1,), attention_resolutions=(1,)).eval()
    qnn = QuantModel.from_config(unet, QuantConfig(8, 16, quant_act=True, sm_abit=8))
    inputs = tuple(x.to(DEVICE) for x in latent_inputs(kind, 4))
    with fused.plain_pytorch():
        qnn.to(DEVICE).find_weight_grids()
        find_act_ranges(qnn, tuple(x[:1] for x in inputs))
    by_graph = DEVICE.type == "cuda"
    monkeypatch.setattr("qdiff.act_ranges._WORTH_RECORDING", 1)
    other, config = copy.deepcopy(qnn), CalibrationConfig(batch_size=1 if by_graph else 2)
    with half_precision(True), sparing():
        update_running_ranges(qnn, inputs, config)
    maps = {path for path in qnn.act_quantizers() if path.endswith("_w")}
    expected = (3 if by_graph else 2) * len(maps)  # two batches and, of four, one more that is recorded
    assert len(calls) == expected
    with fused.plain_pytorch():
        update_running_ranges(other, inputs, config)
    assert len(calls) == expected
    for (path, quantizer), plain in zip(qnn.act_quantizers().items(), other.act_quantizers().values(), strict=True):
        assert not quantizer.averages
        torch.testing.assert_close(quantizer.delta, plain.delta, rtol=5e-3, atol=0, msg=path)


@needs_kernels
def test_norms_that_learn_are_left_to_autograd() -> None:
    norm = nn.GroupNorm(2, 8).to(DEVICE)
    out = fused.group_norm(norm, feature(2, 8, 3, 3), silu=True)
    assert torch.autograd.grad(out.sum(), norm.weight)[0].abs().sum() > 0


@needs_kernels
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_batches_and_their_loss(p: float) -> None:
    from qdiff import triton_kernels

    source, target = feature(9, 6, 4, 4), feature(9, 5, 4, 4) * 0.3
    draws = torch.tensor([[1, 2, 3], [8, 0, 4]], device=DEVICE)
    counter, losses = torch.ones(1, dtype=torch.long, device=DEVICE), torch.zeros(2, device=DEVICE)
    batch = torch.empty(3, 96, device=DEVICE)
    triton_kernels.gather_rows(fused.rows_view(source).half(), draws, counter, batch)
    rows = fused.from_rows(batch, (6, 4, 4))
    assert torch.equal(rows, source[draws[1]].half().float())

    prediction = rows[:, :5]
    value, slope = primitives.reconstruction_slope(prediction, target[draws[1]], p)
    got = triton_kernels.loss_gradient(
        fused.rows_view(prediction), fused.rows_view(target), draws, counter, losses, scale=5 / 240, p=p
    )
    torch.testing.assert_close(fused.from_rows(got, (5, 4, 4)), slope, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, torch.tensor([0.0, value.item()], device=DEVICE), rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("length", [7, 9000])  # of a row: less than what one program takes at once, and more
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_batches_from_two_places(length: int, dtype: torch.dtype) -> None:
    """The first rows on the device, the others in host memory; a batch with rows of both, more tasks than programs."""
    from qdiff import triton_kernels

    rows = torch.randn(9, length).to(dtype)
    near, far = rows[:4].to(DEVICE), rows[4:].clone()
    far = far.pin_memory() if DEVICE.type == "cuda" else far
    draws = torch.stack([torch.arange(30) % 9, torch.arange(30).flip(0) % 9]).to(DEVICE)
    counter = torch.zeros(1, dtype=torch.long, device=DEVICE)
    for ahead, iteration in ((0, 0), (1, 1), (2, 1)):  # beyond the last one it is the last
        out = torch.full((30, length), float("nan"), device=DEVICE)
        triton_kernels.gather_rows(near, draws, counter, out, far=far, ahead=ahead)
        assert torch.equal(out.cpu(), rows[draws[iteration].cpu()].float())


@needs_kernels
@pytest.mark.parametrize("path", ["up.0.block.0", "mid.attn_1"])
def test_units_learn_the_same_with_kernels(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole optimisation, split shortcut and regulariser included."""
    samples, iterations = 6, 3
    if INTERPRETED:  # which runs one program after the other: few large ones are faster
        from qdiff import triton_kernels

        samples, iterations = 2, 2
        monkeypatch.setattr(triton_kernels, "_ELEMENTS", 2**16)
        monkeypatch.setattr(triton_kernels, "_NORM_ROWS", 1024)
        monkeypatch.setattr(triton_kernels, "_NORM_WHOLE", 4096)
    from .test_reconstruction import FAST, unit_and_data

    for function in (reconstruct_weights, reconstruct_activations):
        reports = []
        for engine in ("fast", "eager"):
            with fused.plain_pytorch():
                qnn, unit, data = unit_and_data(path, samples, act_quant=function is reconstruct_activations)
            qnn.to(DEVICE)
            config = changed_config(FAST, engine, iterations)
            reports.append(function(unit, data.near(DEVICE), config, seed=0))
        assert reports[0].loss_after == pytest.approx(reports[1].loss_after, rel=1e-4)
        for a, b in zip(reports[0].trace, reports[1].trace, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-4)
            assert a.rounding_loss == pytest.approx(b.rounding_loss, rel=1e-4)


def changed_config(config: CalibrationConfig, engine: str, iterations: int) -> CalibrationConfig:
    return dataclasses.replace(
        config, iters=iterations, iters_a=iterations, batch_size=2, engine=engine, precision="fp32", round_weight=0.1
    )
