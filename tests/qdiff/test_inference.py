"""Networks made ready to sample: other precisions, compiled, in batches of one size, as a graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models.diffusion.sampling import guided
from qdiff import fused, inference
from qdiff.act_ranges import find_act_ranges
from qdiff.config import QuantConfig
from qdiff.inference import (
    FixedBatch,
    GraphedModel,
    InferenceConfig,
    InferenceError,
    InFloat32,
    lower_precision,
    prepare,
    why_not_compiled,
)
from qdiff.output_scale import OutputScale
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizers import UniformAffineQuantizer

from ..ldm.unets import CHANNELS as LATENT_CHANNELS
from ..ldm.unets import CONTEXT as WIDTH
from ..ldm.unets import SIZE as LATENT_SIZE
from ..ldm.unets import TOKENS, latent_inputs, tiny_latent_unet
from .conftest import CHANNELS, SIZE, SMALL, as_calibrated, noisy_inputs, tiny_unet, with_grids

NO_TRITON = torch.cuda.is_available() and why_not_compiled("cuda") is not None
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = (4, CHANNELS, SIZE, SIZE)


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().sum() / b.square().sum()).item()


class Layer(nn.Module):
    """Mixes pixels and timestep; remembers the batches it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x, t))
        return torch.tanh(self.conv(x) + t.reshape(-1, 1, 1, 1) / 1000)


# Half precision.


@pytest.mark.parametrize("quant", [None, QuantConfig(4, split=True), QuantConfig(4, 8, True, True, True)])
@torch.no_grad()
def test_bf16_is_near_full_precision(quant: QuantConfig | None) -> None:
    model = tiny_unet().eval() if quant is None else as_calibrated(quant)
    x, t = noisy_inputs(4)
    exact = model(x, t)
    out = prepare(model, InferenceConfig("bf16"), shape=SHAPE, device="cpu")(x, t)
    assert out.dtype == torch.float32
    # 8 bits of mantissa in each operand; with 8-bit activations roundings near a tie move too
    assert 0 < relative_error(out, exact) < (1e-2 if quant is not None and quant.quant_act else 5e-4)


@torch.no_grad()
def test_what_is_held_in_which_type() -> None:
    model = as_calibrated(QuantConfig(4, 8, True, True, True))
    weights = {path: layer.effective_weight().clone() for path, layer in model.layers().items()}
    grids = {path: q.delta.item() for path, q in model.act_quantizers().items()}
    lower_precision(model, "bf16")
    for path, layer in model.layers().items():
        in_full = path.startswith("temb")
        assert layer.weight.dtype == (torch.float32 if in_full else torch.bfloat16), path
        assert torch.equal(layer.weight, weights[path.replace("module.", "")].to(layer.weight.dtype)), path
        assert not hasattr(layer, "weight_quantizer")  # nor its rounding variables, as large as the weight in fp32
        assert layer.baked_weight is None
    quantizers = [m for m in model.modules() if isinstance(m, UniformAffineQuantizer)]
    assert sorted(q.delta.item() for q in quantizers) == sorted(grids.values())
    assert {q.delta.dtype for q in quantizers} == {torch.float32}
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert {m.weight.dtype for m in norms} == {torch.float32}
    assert sum(isinstance(m, InFloat32) for m in model.modules()) > len(norms)


@torch.no_grad()
def test_each_layer_gets_grid_points_rounded_once() -> None:
    """x / δ is worked out in fp32, whatever type x comes in: the integers are those of fp32."""
    model = with_grids(QuantConfig(8, 8, True, True))
    x, t = noisy_inputs(2)
    lower_precision(model, "bf16")
    layer = model.layers()["down.0.block.0.conv2"]
    quantizer = layer.act_quantizer.module
    seen: list[tuple[Tensor, Tensor]] = []
    layer.act_quantizer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model(x, t)
    ((value, out),) = seen
    integers = (value.float() / quantizer.delta).round().clamp(-128, 127)
    assert torch.equal(out, (integers * quantizer.delta).to(out.dtype))
    assert value.dtype == torch.float32  # not rounded between the normalisation and the grid


def test_full_precision_changes_nothing() -> None:
    model = as_calibrated()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prepare(model, InferenceConfig(), shape=SHAPE, device="cpu") is model
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_autocast_means_full_on_a_cpu() -> None:
    assert InferenceConfig("autocast", True).on("cpu") == InferenceConfig("full", True)
    assert InferenceConfig("autocast").on("cuda").precision == "autocast"
    assert InferenceConfig("bf16").on("cpu").precision == "bf16"
    model = tiny_unet(**SMALL).eval()
    assert prepare(model, InferenceConfig("autocast"), shape=SHAPE, device="cpu") is model


def test_a_quantized_network_in_full_state_stays_unquantized() -> None:
    """Weights that are not being quantized are not sealed as quantized ones."""
    model = as_calibrated(**SMALL)
    model.set_quant_state(False, False)
    original = model.layers()["conv_in"].weight.detach().clone()
    lower_precision(model, "bf16")
    assert torch.equal(model.layers()["conv_in"].weight, original.bfloat16())


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="full, autocast, fp16, bf16"):
        InferenceConfig("fp8")
    with pytest.raises(InferenceError, match="needs a network"):
        prepare(lambda x, t: x, InferenceConfig("bf16"), shape=SHAPE, device="cpu")
    with pytest.raises(ValueError, match="needs a GPU"):
        prepare(lambda x, t: x, InferenceConfig(), shape=SHAPE, device="cpu", cuda_graph=True)


# Batches of one size.


def test_smaller_batches_are_filled_up_with_their_last_row() -> None:
    model = Layer()
    fixed = FixedBatch(model, 4)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([5.0, 6.0, 7.0])
    out = fixed(x, t)
    ((filled, times),) = model.seen
    assert torch.equal(filled, torch.cat([x, x[2:]]))
    assert times.tolist() == [5, 6, 7, 7]
    torch.testing.assert_close(out, model(x, t))
    assert not out.requires_grad
    with pytest.raises(ValueError, match="batch of 5"):
        fixed(torch.zeros(5, 1, 8, 8), torch.zeros(5))


# Compiling.


@pytest.mark.parametrize(
    "options",
    [
        {"a_sym": True},
        pytest.param({"a_sym": False}, marks=pytest.mark.thorough),
        {"timed_ranges": "all", "split_input": True},
    ],
    ids=str,
)
def test_the_network_compiles_in_one_piece(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Quantized attention, split shortcuts, tables of timesteps included, and once for all sizes of batches."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(inputs))
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    monkeypatch.setattr(inference, "why_not_compiled", lambda device: None)
    times = [1.0, 400.0, 900.0]
    model = as_calibrated(QuantConfig(4, 8, quant_act=True, split=True, **options).at_timesteps(times))
    means = torch.randn(3, *SHAPE[1:])
    model.output_scale = OutputScale(times, [1.0, 1.01, 1.02], [1.0, 0.99, 1.01], means, means)
    assert any(type(layer) is not QuantModule for layer in model.layers().values())  # a split one
    x, t = noisy_inputs(4)
    with torch.no_grad():
        expected = model(x, t)
    compiled = prepare(model, InferenceConfig(compile=True), shape=SHAPE, device="cpu")
    torch.testing.assert_close(compiled(x, t), expected)
    torch.testing.assert_close(compiled(x[:3], t[:3]), expected[:3], atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


class Block(nn.Module):
    """A convolution between two quantizers: what a compiler fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = QuantModule(nn.Conv2d(1, 4, 3, padding=1))
        self.layer.find_weight_grid()
        self.layer.bake()
        self.layer.set_quant_state(True, True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(torch.tanh(x) + t.reshape(-1, 1, 1, 1) / 1000).mean(1, keepdim=True)


@pytest.mark.skipif(why_not_compiled("cpu") is not None, reason="torch.compile is not possible here")
def test_compiled_code_computes_the_same() -> None:
    torch.manual_seed(0)
    model = Block().eval()
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 300.0)
    with torch.no_grad():
        expected = model(x, t)
    compiled = prepare(model, InferenceConfig(compile=True), shape=x.shape, device="cpu")
    for size in (4, 2):
        torch.testing.assert_close(compiled(x[:size], t[:size]), expected[:size], atol=1e-6, rtol=1e-5)


def test_what_cannot_be_compiled_is_explained() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return x if x.sum().item() > 0 and torch._dynamo.graph_break() else -x

    with pytest.raises(InferenceError, match="run without it"):
        prepare(model, InferenceConfig(compile=True), shape=(1, 1, 2, 2), device="cpu")


def test_a_mistake_of_the_model_is_not_called_one_of_the_compiler() -> None:
    with inference._compiling(True), pytest.raises(ZeroDivisionError):
        _ = 1 / 0


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inference.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "headers" in why_not_compiled("cpu")
    assert str(tmp_path) in why_not_compiled("cuda")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in why_not_compiled("cpu")
    with pytest.raises(InferenceError, match="C\\+\\+ compiler"):
        prepare(Layer(), InferenceConfig(compile=True), shape=(1, 1, 8, 8), device="cpu")


def test_a_model_that_cannot_be_captured_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(inference, "GraphedModel", refuse)
    model = Layer()
    with pytest.warns(UserWarning, match="not permitted"):
        assert inference._graphed(model, (2, 1, 8, 8), torch.device("cpu"), required=False) is model
    with pytest.raises(RuntimeError, match="not permitted"):
        inference._graphed(model, (2, 1, 8, 8), torch.device("cpu"), required=True)


# Networks with a context.

LATENT_SHAPE, CONTEXT = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), (TOKENS, WIDTH)


def conditional_unet(quant: QuantConfig | None) -> nn.Module:
    """A latent UNet with transformers, in full precision or as calibrated, in evaluation mode."""
    unet = tiny_latent_unet("transformer").eval()
    if quant is None:
        return unet
    model = QuantModel.from_config(unet, quant)
    model.find_weight_grids()
    model.learn_rounding()
    find_act_ranges(model, latent_inputs("transformer", 8, seed=1))
    model.set_quant_state(True, quant.quant_act)
    return model.eval()


@pytest.mark.parametrize("quant", [pytest.param(None, marks=pytest.mark.thorough), QuantConfig(4, 8, True, split=True)])
@torch.no_grad()
def test_a_context_goes_through_half_precision_and_compilation(
    quant: QuantConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, graphs = torch.compile, []
    backend = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    model, inputs = conditional_unet(quant), latent_inputs("transformer", 4)
    exact = model(*inputs)
    other = model(inputs[0], inputs[1], inputs[2].flip(0))
    moved = relative_error(other, exact)
    run = prepare(
        model, InferenceConfig("bf16", compile=True), shape=(4, *LATENT_SHAPE), device="cpu", context_shape=CONTEXT
    )
    for size in (4, 3):  # the smaller batch is filled up, its context too
        out = run(*(part[:size] for part in inputs))
        assert out.dtype == torch.float32
        assert 0 < relative_error(out, exact[:size]) < (2e-2 if quant else 5e-4)
        assert relative_error(out, other[:size]) > moved / 4
    assert len(graphs) == 1


@pytest.mark.parametrize("compile", [False, True])
@torch.no_grad()
def test_maps_of_16_bits_can_stay_unrounded(monkeypatch: pytest.MonkeyPatch, compile: bool) -> None:
    """Attention is fused then, compiled or not, and what comes out is as good as the same."""
    compile_, graphs = torch.compile, []
    backend = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    model, inputs = conditional_unet(QuantConfig(4, 8, True, split=True, sm_abit=16)), latent_inputs("transformer", 4)
    exact = model(*inputs)
    maps = [q for path, q in model.act_quantizers().items() if path.endswith("act_quantizer_w")]
    rounded = []
    for quantizer in maps:
        monkeypatch.setattr(quantizer, "forward", lambda x: rounded.append(x) or x)
    config = InferenceConfig("bf16", compile=compile, unrounded_maps=True)
    run = prepare(model, config, shape=(4, *LATENT_SHAPE), device="cpu", context_shape=CONTEXT)
    out = run(*inputs)
    assert maps
    assert not rounded
    assert 0 < relative_error(out, exact) < 2e-2
    assert len(graphs) == compile
    for node in (node for graph in graphs for node in graph.graph.nodes):
        assert "softmax" not in str(node.target)


def test_maps_of_8_bits_cannot_stay_unrounded() -> None:
    config = InferenceConfig(unrounded_maps=True)
    for model in (conditional_unet(QuantConfig(4, 8, True, split=True)), conditional_unet(None)):
        with pytest.raises(InferenceError, match="no softmax maps in 16 bits"):
            prepare(model, config, shape=(4, *LATENT_SHAPE), device="cpu", context_shape=CONTEXT)
    with pytest.raises(InferenceError, match="only a network"):
        prepare(lambda x, t: x, config, shape=(4, 3, 8, 8), device="cpu")


@torch.no_grad()
def test_the_doubled_batch_of_guidance_has_one_size() -> None:
    """Classifier-free guidance calls the network on two rows an image; the last, smaller batch of it as well."""
    seen = []

    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.append((len(x), len(t), len(context)))
        return x * context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1)

    x, t, cond = latent_inputs("transformer", 3)
    uncond = torch.zeros_like(cond)
    for images in (3, 2):
        exact = guided(model, cond[:images], uncond[:images], 2.5)(x[:images], t[:images])
        fixed = guided(FixedBatch(model, 6), cond[:images], uncond[:images], 2.5)(x[:images], t[:images])
        assert torch.equal(fixed, exact)
        assert seen[-1] == (6, 6, 6)


# On a GPU.


@pytest.mark.gpu
@needs_gpu
def test_a_captured_model_computes_the_same() -> None:
    torch.manual_seed(0)
    model = Layer().cuda()
    graphed = FixedBatch(GraphedModel(model, (4, 1, 8, 8), torch.device("cuda")), 4)
    for size in (4, 3):
        x, t = torch.randn(size, 1, 8, 8, device="cuda"), torch.full((size,), 7.0, device="cuda")
        torch.testing.assert_close(graphed(x, t), model(x, t))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(NO_TRITON, reason="torch.compile is not possible here")
@pytest.mark.parametrize("precision", ["full", "autocast", "fp16", "bf16"])
@pytest.mark.parametrize("compile", [False, True])
def test_every_way_of_running_agrees_on_a_gpu(precision: inference.Precision, compile: bool) -> None:
    model = as_calibrated(QuantConfig(4, 8, True, True, True)).cuda()
    x, t = (part.cuda() for part in noisy_inputs(4))
    with torch.no_grad(), inference.tf32(False):
        expected = copy.deepcopy(model)(x, t)
        run = prepare(model, InferenceConfig(precision, compile), shape=SHAPE, device="cuda", cuda_graph=compile)
        for size in (4, 3):
            # Sums in another order or type move activations over rounding edges, which W4A8 sees.
            bound = {"full": 1e-3, "bf16": 3e-2}.get(precision, 1e-2)
            assert relative_error(run(x[:size], t[:size]), expected[:size]) < bound


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(NO_TRITON, reason="torch.compile is not possible here")
@pytest.mark.parametrize("precision", ["full", "fp16", "bf16"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_network_reads_the_context_of_each_call(
    precision: inference.Precision, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_LARGE_MAP", 1)  # in half precision no map is in memory
    model = conditional_unet(QuantConfig(4, 8, True, split=True)).cuda()
    inputs = [part.cuda() for part in latent_inputs("transformer", 4)]
    other = [inputs[0], inputs[1], inputs[2].flip(0)]
    with torch.no_grad(), inference.tf32(False):
        expected = [copy.deepcopy(model)(*batch) for batch in (inputs, other)]
        run = prepare(
            model,
            InferenceConfig(precision, compile),
            shape=(4, *LATENT_SHAPE),
            device="cuda",
            context_shape=CONTEXT,
            cuda_graph=True,
        )
        bound = {"full": 1e-3, "bf16": 3e-2}.get(precision, 1e-2)
        for size in (4, 3):
            for batch, exact in zip((inputs, other), expected, strict=True):
                assert relative_error(run(*(part[:size] for part in batch)), exact[:size]) < bound
