"""The latent UNets quantized: what is quantized where, in which units, and the whole way through a calibration."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import AttentionBlock, CrossAttention
from qdiff import attention, primitives
from qdiff.act_ranges import find_act_ranges, update_running_ranges
from qdiff.calibrate import _unit_data, calibrate
from qdiff.calibration_data import CalibrationSet
from qdiff.capture import Frontier, PairedCapture, UnitData
from qdiff.checkpoint import load_quantized, save_packed, save_published
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.inference import lower_precision
from qdiff.memory import Kept, MemoryBudget, MemoryPlan, measure
from qdiff.places import Collector, Scratch, Shelf
from qdiff.progress import source_hashes
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QUANTIZABLE, SplitQuantModule
from qdiff.quant_model import QuantModel, Unit
from qdiff.quantizers import TimedQuantizer, UniformAffineQuantizer

from ..cases import thorough_but
from ..ldm.unets import KINDS, latent_inputs, tiny_latent_unet
from .test_capture import Record, assert_same, observed

W4A8 = QuantConfig(weight_bit=4, act_bit=8, quant_act=True, split=True, weight_range="mse", act_range="mse")
SHORT = CalibrationConfig(iters=30, iters_a=15, batch_size=8, weight_lr=1e-2, range_samples=8, range_order="first")
SAMPLES = 16


def wrapped(kind: str, config: QuantConfig = W4A8) -> QuantModel:
    return QuantModel.from_config(tiny_latent_unet(kind).eval(), config)


def with_grids(kind: str, config: QuantConfig = W4A8) -> QuantModel:
    """Every grid set, rounding to nearest, quantization on."""
    qnn = wrapped(kind, dataclasses.replace(config, weight_range="max", act_range="max"))
    qnn.find_weight_grids()
    find_act_ranges(qnn, latent_inputs(kind, 4, seed=1))
    qnn.set_quant_state(True, True)
    return qnn


def products(unet: nn.Module) -> set[str]:
    """Paths of the quantizers that attention must have, by its kind."""
    names = set()
    for path, module in unet.named_modules():
        if isinstance(module, AttentionBlock):
            names |= {f"{path}.attention.qkv_matmul.act_quantizer_{name}" for name in "qk"}
            names |= {f"{path}.attention.smv_matmul.act_quantizer_{name}" for name in "vw"}
        elif isinstance(module, CrossAttention):
            names |= {f"{path}.act_quantizer_{name}" for name in "qkvw"}
    return names


def softmax_quantizers(qnn: QuantModel) -> list[UniformAffineQuantizer]:
    return [quantizer for path, quantizer in qnn.act_quantizers().items() if path.endswith("act_quantizer_w")]


# What is quantized.


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_and_attention_product_is_quantized(kind: str) -> None:
    unet = tiny_latent_unet(kind)
    layers = {path for path, module in unet.named_modules() if isinstance(module, QUANTIZABLE)}
    expected = products(unet) | {f"{path}.act_quantizer" for path in layers}
    qnn = wrapped(kind)
    assert set(qnn.layers()) == layers
    halves = {f"{path}.act_quantizer_0" for path, m in qnn.layers().items() if isinstance(m, SplitQuantModule)}
    assert halves
    assert set(qnn.act_quantizers()) == expected | halves
    belonging = [id(quantizer) for unit in qnn.units() for quantizer in unit.act_quantizers()]
    assert sorted(belonging) == sorted(map(id, qnn.act_quantizers().values()))


@pytest.mark.parametrize("kind", KINDS)
def test_full_precision_is_unchanged_bit_for_bit(kind: str) -> None:
    inputs = latent_inputs(kind, 3)
    with torch.no_grad():
        expected = tiny_latent_unet(kind).eval()(*inputs)
        assert torch.equal(wrapped(kind)(*inputs), expected)
        qnn = with_grids(kind)
        assert not torch.allclose(qnn(*inputs), expected, atol=1e-3)
        qnn.set_quant_state(False, False)
        assert torch.equal(qnn(*inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_shortcuts_of_the_way_up_are_split_where_the_decoders_feature_ends(kind: str) -> None:
    qnn = wrapped(kind)
    split = {path: layer for path, layer in qnn.layers().items() if isinstance(layer, SplitQuantModule)}
    assert set(split) == {f"output_blocks.{i}.0.skip_connection" for i in range(4)}
    assert "input_blocks.3.0.skip_connection" in qnn.layers()
    flow = qnn.model.begin(*latent_inputs(kind, 1))
    with torch.no_grad():
        for stage in qnn.model.stages():
            if stage.joins:
                assert split.pop(f"{stage.path}.skip_connection").split_channels == flow.h.shape[1]
            qnn.model.advance(stage, flow)
    assert split == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("a_sym", "sm_abit"), [(False, 8), (True, 8), (True, 16)])
def test_softmax_maps_are_unsigned_from_zero(kind: str, a_sym: bool, sm_abit: int) -> None:
    qnn = with_grids(kind, dataclasses.replace(W4A8, a_sym=a_sym, sm_abit=sm_abit))
    maps = softmax_quantizers(qnn)
    assert len(maps) == (8 if kind == "transformer" else 4)
    for quantizer in maps:
        assert quantizer.bounds == (0, 2**sm_abit - 1)
        assert quantizer.zero_point == 0
    others = set(qnn.act_quantizers().values()) - set(maps)
    assert {quantizer.config.n_bits for quantizer in others} == {8}
    assert {quantizer.config.symmetric for quantizer in others} == {a_sym}


def reaching(qnn: QuantModel, inputs: tuple[Tensor, ...], *paths: str) -> list[Tensor]:
    """What the modules at these paths take (a quantizer) or put out (a layer)."""
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        quantizer = "act_quantizer" in path
        return lambda module, args, output: seen.update({path: args[0] if quantizer else output})

    handles = [qnn.model.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    with torch.no_grad():
        qnn(*inputs)
    for handle in handles:
        handle.remove()
    return [seen[path] for path in paths]


def test_attention_over_heads_quantizes_q_and_k_after_scaling() -> None:
    qnn, inputs = with_grids("head_channels"), latent_inputs("head_channels", 2)
    names = ("qkv", "attention.qkv_matmul.act_quantizer_q", "attention.qkv_matmul.act_quantizer_k")
    names += ("attention.smv_matmul.act_quantizer_v", "attention.smv_matmul.act_quantizer_w")
    qkv, *taken, weights = reaching(qnn, inputs, *(f"middle_block.1.{name}" for name in names))
    for made, x, scale in zip(qkv.unflatten(1, (4, 3, 16)).unbind(2), taken, (0.5, 0.5, 1), strict=True):
        assert torch.equal(x, made * scale)  # 16^(-1/4) = 1/2
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 16))


@pytest.mark.parametrize("attention", ["attn1", "attn2"])
def test_transformers_quantize_q_and_k_before_scaling(attention: str) -> None:
    qnn, inputs = with_grids("transformer"), latent_inputs("transformer", 2)
    block = f"middle_block.1.transformer_blocks.0.{attention}"
    layers, quantizers = [f"to_{name}" for name in "qkv"], [f"act_quantizer_{name}" for name in "qkvw"]
    tensors = reaching(qnn, inputs, *(f"{block}.{name}" for name in layers + quantizers))
    for made, x in zip(tensors[:3], tensors[3:6], strict=True):
        assert torch.equal(x.transpose(1, 2).flatten(2), made)
    torch.testing.assert_close(tensors[6].sum(-1), torch.ones(tensors[6].shape[:3]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantizer_of_attention_is_at_work(kind: str) -> None:
    """A coarser grid in any of them changes what the network puts out."""
    qnn, inputs = with_grids(kind), latent_inputs(kind, 2)
    with torch.no_grad():
        before = qnn(*inputs)
        for path in products(tiny_latent_unet(kind)):
            quantizer = qnn.act_quantizers()[path]
            delta, zero_point = quantizer.delta.clone(), quantizer.zero_point.clone()
            quantizer.set_grid(delta * 7, (zero_point / 7).round())
            assert not torch.equal(qnn(*inputs), before), path
            quantizer.set_grid(delta, zero_point)
        assert torch.equal(qnn(*inputs), before)


# Units.


def test_units_of_a_network_with_transformers() -> None:
    units = {unit.path: unit.kind for unit in wrapped("transformer").units()}
    assert list(units)[:4] == ["time_embed.0", "time_embed.2", "input_blocks.0.0", "input_blocks.1.0"]
    assert [(path, kind) for path, kind in units.items() if path.startswith("input_blocks.3.")] == [
        ("input_blocks.3.0", "residual block"),
        ("input_blocks.3.1.proj_in", "layer"),
        ("input_blocks.3.1.transformer_blocks.0", "transformer block"),
        ("input_blocks.3.1.proj_out", "layer"),
    ]
    assert units["input_blocks.2.0.op"] == units["output_blocks.1.2.conv"] == units["out.2"] == "layer"


def test_units_of_a_network_that_resamples_in_residual_blocks() -> None:
    units = {unit.path: unit.kind for unit in wrapped("scale_shift").units()}
    assert units["input_blocks.2.0"] == units["output_blocks.1.2"] == "residual block"
    assert units["middle_block.1"] == "attention block"
    assert set(units.values()) == {"residual block", "attention block", "layer"}


@pytest.mark.parametrize("kind", KINDS)
def test_units_come_in_the_order_of_the_network(kind: str) -> None:
    qnn, ran = wrapped(kind), []
    units = [unit.module for unit in qnn.units()]
    for module in units:
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    with torch.no_grad():
        qnn(*latent_inputs(kind, 1))
    assert units == ran


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_attention_maps_is_known(kind: str) -> None:
    qnn, sample = with_grids(kind), latent_inputs(kind, 1)
    maps = []
    for block in (module for module in qnn.modules() if isinstance(module, BaseQuantBlock)):
        for name, quantizer in block.attention_quantizers().items():
            if name == "w":
                quantizer.register_forward_pre_hook(lambda module, args: maps.append(args[0].numel()))
    with torch.no_grad(), qnn.quant_state(True, True):
        qnn(*sample)
    assert measure(qnn, sample, compact=False).attention_map == 4 * max(maps)


def assert_seen(unit: Unit, data: UnitData, inputs: dict[str, Record], targets: dict[str, Record]) -> None:
    """Inside a transformer tensors lie in memory as rows do, not as in the network: it costs the last bits."""
    one, other = (*data.inputs, data.target), (*inputs[unit.path][0], targets[unit.path][1])
    if unit.stage.chained:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda text: f"{unit.path}: {text}")
    else:
        assert_same(one, other, unit.path)


@pytest.mark.parametrize("kind", KINDS)
def test_units_see_what_they_see_in_the_whole_network(kind: str) -> None:
    """Context included, where there is one."""
    qnn, inputs = with_grids(kind), latent_inputs(kind, 5)
    expected = observed(qnn, inputs, 3, True, True)
    targets_expected = observed(qnn, inputs, 3, False, False)
    capture, paths = PairedCapture(qnn, inputs, act_quant=True, chunk=3), []
    for stage in capture.stages():
        targets = capture.targets(stage)
        for unit in qnn.units_of(stage):
            data = capture.data(unit, targets)
            assert_seen(unit, data, expected, targets_expected)
            paths.append(unit.path)
    assert paths == [unit.path for unit in qnn.units()]


class CountedCapture(PairedCapture):
    """Counts how often a chunk goes through a stage, of both networks."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.runs: Counter[str] = Counter()
        for frontier in (self._quantized, self._full):
            inner = frontier._moved
            frontier._moved = lambda flow, stage, inner=inner: self.runs.update([stage.path]) or inner(flow, stage)


def transformer(depth: int = 2) -> tuple[QuantModel, tuple[Tensor, ...]]:
    """Of oblong feature maps, which no shape of tokens tells."""
    unet = tiny_latent_unet("transformer", transformer_depth=depth)
    qnn = QuantModel.from_config(unet.eval(), dataclasses.replace(W4A8, weight_range="max", act_range="max"))
    x, *others = latent_inputs("transformer", 5)
    inputs = (torch.cat([x, x.flip(0)], dim=3), *others)
    qnn.find_weight_grids()
    find_act_ranges(qnn, inputs)
    qnn.set_quant_state(True, True)
    return qnn, inputs


def change(unit: Unit) -> None:
    """As learning might."""
    for layer in unit.layers():
        for quantizer in layer.act_quantizers():
            quantizer.delta.data *= 1.3


@pytest.fixture(params=[True, False], ids=["targets together", "one after the other"])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is room for the targets of all units of a stage."""
    if not request.param:
        monkeypatch.setattr(MemoryPlan, "together", lambda self, paths: len(paths) == 1)
    return request.param


@pytest.mark.parametrize("act_quant", [False, True])
def test_a_transformers_units_hand_their_rows_on(act_quant: bool, together: bool) -> None:
    """Each chunk goes through its stage once; inputs are what the unit before gives with what it learned."""
    qnn, inputs = transformer()
    targets_expected = observed(qnn, inputs, 2, False, False)
    capture, got = CountedCapture(qnn, inputs, act_quant=act_quant, chunk=2), []
    for stage in capture.stages():
        targets: dict[str, Collector] = {}
        for unit in qnn.units_of(stage):
            data = _unit_data(capture, unit, targets)
            assert len(targets) == (len(qnn.units_of(stage)) - 1 - qnn.units_of(stage).index(unit)) * together
            got.append((unit, UnitData(tuple(x.clone() for x in data.inputs), data.target.clone())))
            change(unit)
    expected = observed(qnn, inputs, 2, True, act_quant)  # by now every unit is changed, as it was for those behind it
    for unit, data in got:
        assert_seen(unit, data, expected, targets_expected)
    chained = [stage.path for stage in qnn.model.stages() if stage.chained]
    assert [len(qnn.units_of(stage)) for stage in qnn.model.stages() if stage.chained] == [4] * 4
    # Of each network 3 chunks on the way; and up to the first unit, whose inputs are collected on the way there.
    assert {path: capture.runs[path] for path in chained} == dict.fromkeys(chained, 2 * 3 + 3)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.usefixtures("together")
def test_both_ways_rows_come_to_the_same_bits(compact: bool) -> None:
    """Handed on, or each unit's collected by a run of its stage, as where a calibration goes on within one."""
    qnn, inputs = transformer()
    handed_on = PairedCapture(qnn, inputs, act_quant=True, chunk=2, compact=compact)
    collected = PairedCapture(qnn, inputs, act_quant=True, chunk=2, compact=compact)
    for stage, _ in zip(handed_on.stages(), collected.stages(), strict=True):
        targets, all_targets = {}, collected.targets(stage)
        for unit in qnn.units_of(stage):
            one, other = _unit_data(handed_on, unit, targets), collected.data(unit, all_targets)
            assert_same((*one.inputs, one.target), (*other.inputs, other.target), unit.path)
            assert one.target.dtype == (torch.float16 if compact else torch.float32)


@pytest.mark.parametrize("names", [{1, 2, 3}, {2, 3}, {0, 2, 3}, {0, 1, 3}, {0, 1}, {3}])
@pytest.mark.usefixtures("together")
def test_of_a_transformer_some_units_are_wanted(names: set[int]) -> None:
    """The same rows, whichever units were learned before."""
    qnn, inputs = transformer()
    expected = observed(qnn, inputs, 2, True, True)
    targets_expected = observed(qnn, inputs, 2, False, False)
    wanted = [u.path for s in qnn.model.stages() if s.chained for i, u in enumerate(qnn.units_of(s)) if i in names]
    capture, seen = PairedCapture(qnn, inputs, act_quant=True, chunk=2, wanted=wanted), []
    for stage in capture.stages():
        targets: dict[str, Collector] = {}
        for unit in (unit for unit in qnn.units_of(stage) if unit.path in wanted):
            data = _unit_data(capture, unit, targets)
            assert_seen(unit, data, expected, targets_expected)
            seen.append(unit.path)
    assert seen == wanted


def step_gradients(qnn: QuantModel, kind: str) -> dict[str, Tensor]:
    """Of a loss of the whole network, of all activation step sizes."""
    deltas = {path: quantizer.delta.requires_grad_() for path, quantizer in qnn.act_quantizers().items()}
    with qnn.quant_state(True, True):
        out = qnn(*latent_inputs(kind, 2))
    return dict(zip(deltas, torch.autograd.grad(out.square().mean(), [*deltas.values()]), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad_ckpt", [False, True])
def test_large_maps_are_learned_from_by_parts(kind: str, grad_ckpt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients; no map of more than one head is ever there."""
    qnn, seen = with_grids(kind), []
    for path, quantizer in qnn.act_quantizers().items():
        if path.endswith("act_quantizer_w"):
            quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    qnn.set_grad_ckpt(grad_ckpt)
    whole = step_gradients(qnn, kind)
    heads = max(seen)
    assert heads > 1
    seen.clear()
    monkeypatch.setattr(attention, "LARGEST_MAP", 1)
    monkeypatch.setattr(attention, "PART_OF_MAP", 1)
    parts = step_gradients(qnn, kind)
    assert set(seen) == {1}
    for path, gradient in whole.items():
        torch.testing.assert_close(parts[path], gradient, rtol=1e-4, atol=1e-6, msg=path)
    seen.clear()
    with torch.no_grad(), qnn.quant_state(True, True):
        qnn(*latent_inputs(kind, 2))
    assert max(seen) == heads


@pytest.mark.parametrize(("bits", "rounded"), [(16, False), (8, True)])
def test_maps_in_16_bits_need_not_be_rounded_while_they_are_learned_from(bits: int, rounded: bool) -> None:
    """Nearly the same gradients without a map in memory; without gradients maps are rounded all the same."""
    qnn, seen = with_grids("transformer", dataclasses.replace(W4A8, sm_abit=bits)), []
    for quantizer in softmax_quantizers(qnn):
        quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))

    block = next(module for module in qnn.modules() if isinstance(module, CrossAttention))
    block.attention_quantizers()["w"].set_grid(torch.tensor(1 / (2**bits - 1)), torch.tensor(0.0))  # all of [0, 1]
    qkv = [torch.randn(2, 4, 24, 8, requires_grad=True) for _ in range(3)]

    def gradients() -> list[Tensor]:
        out = block.attend(*qkv)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), qkv)]

    exact = gradients()
    assert seen
    seen.clear()
    with attention.unrounded_maps(True):
        found = gradients()
        assert bool(seen) == rounded
        seen.clear()
        with torch.no_grad():
            assert torch.equal(block.attend(*qkv), exact[0])
        assert seen
    for one, other in zip(found, exact, strict=True):
        assert torch.equal(one, other) == rounded
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_large_maps_pass_by_parts_while_a_calibration_spares_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values; but what looks at a quantizer sees the whole map."""
    qnn, seen = with_grids(kind), []
    maps = [q for path, q in qnn.act_quantizers().items() if path.endswith("act_quantizer_w")]
    plain = primitives.fake_quantize

    def quantize(x: Tensor, *grid: Any) -> Tensor:
        seen.append(x.shape)
        return plain(x, *grid)

    monkeypatch.setattr(primitives, "fake_quantize", quantize)
    with torch.no_grad(), qnn.quant_state(True, True):
        whole = qnn(*latent_inputs(kind, 2))
        usual = len(seen)
        monkeypatch.setattr(attention, "LARGEST_MAP", 1)
        monkeypatch.setattr(attention, "PART_OF_MAP", 1)
        with attention.sparing():
            parts = qnn(*latent_inputs(kind, 2))
            divided = len(seen) - usual
            for quantizer in maps:
                quantizer.register_forward_pre_hook(lambda module, args: None)
            qnn(*latent_inputs(kind, 2))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert divided > usual
    assert len(seen) - usual - divided == usual


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_is_not_fused_spares_memory_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As :mod:`qdiff.reconstruction` has it for the same bits every time: the same gradients, head by head."""
    qnn, calls = with_grids(kind), []
    plain = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[1])
        return plain(q, k, v)

    def gradient() -> Tensor:
        x, *others = latent_inputs(kind, 2)
        x.requires_grad_()
        return torch.autograd.grad(qnn(x, *others).square().mean(), x)[0]

    qnn.set_quant_state(True, False)
    fused = gradient()
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(attention, "LARGEST_MAP", 1)
    monkeypatch.setattr(attention, "PART_OF_MAP", 1)
    with attention.sparing(unfused=True):
        unfused = gradient()
    torch.testing.assert_close(unfused, fused, rtol=1e-3, atol=1e-6)
    assert set(calls) == {1}


# Calibrating, saving, sampling.


def calibration_set(kind: str) -> CalibrationSet:
    return CalibrationSet(*latent_inputs(kind, SAMPLES, seed=2))


def output_error(qnn: QuantModel, kind: str) -> float:
    """‖quantized − full‖² / ‖full‖² on other samples."""
    inputs = latent_inputs(kind, 8, seed=3)
    with torch.no_grad():
        got = qnn(*inputs)
        with qnn.quant_state(False, False):
            full = qnn(*inputs)
    return float((got - full).square().sum() / full.square().sum())


@pytest.mark.parametrize("kind", thorough_but(["transformer"], KINDS))
def test_targets_come_one_by_one_where_there_is_no_room_for_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits; and rounding variables that waited on the host are back."""
    few = dataclasses.replace(SHORT, iters=3, iters_a=2)
    together, apart = wrapped(kind), wrapped(kind)
    calibrate(together, calibration_set(kind), few)
    asked = []

    def never(plan: MemoryPlan, paths: Sequence[str]) -> bool:
        asked.append(len(paths))
        return len(paths) == 1

    monkeypatch.setattr(MemoryPlan, "together", never)
    calibrate(apart, calibration_set(kind), few, budget=MemoryBudget(gpu_bytes=2**40))
    assert max(asked) == (3 if kind == "transformer" else 2)  # the time embedding has two
    for (name, one), (_, other) in zip(together.state_dict().items(), apart.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_end_to_end(kind: str, tmp_path: Path) -> None:
    """No unit ends worse than rounded to nearest, the network better; both file forms give the same network back."""
    nearest, qnn = wrapped(kind), wrapped(kind)
    calibrate(nearest, calibration_set(kind), SHORT, mode="linear")
    reports = calibrate(qnn, calibration_set(kind), SHORT)
    assert [report.name for report in reports] == [unit.path for unit in qnn.units()] * 2
    assert all(report.loss_after <= report.loss_before for report in reports)
    assert output_error(qnn, kind) < 0.9 * output_error(nearest, kind)

    inputs = latent_inputs(kind, 2, seed=4)
    with torch.no_grad():
        expected = qnn(*inputs)
    for name, save in (("ckpt.safetensors", save_packed), ("ckpt.pth", save_published)):
        save(tmp_path / name, qnn)
        resumed = wrapped(kind)
        load_quantized(tmp_path / name, resumed, quant_act=True)
        with torch.no_grad():
            assert torch.equal(resumed(*inputs), expected), name


@pytest.mark.parametrize("engine", ["fast", "eager"])
@pytest.mark.parametrize("kind", ["transformer", "head_channels"])
def test_steps_of_softmax_maps_in_16_bits_stay(kind: str, engine: str) -> None:
    """Adam moves a step by its rate, which would be many of theirs."""
    learned = {}
    for bits in (8, 16):
        qnn = wrapped(kind, dataclasses.replace(W4A8, act_bit=16 if bits == 16 else 8, sm_abit=bits))
        calibrate(qnn, calibration_set(kind), dataclasses.replace(SHORT, iters=1, iters_a=0, engine=engine))
        before = {path: quantizer.delta.clone() for path, quantizer in qnn.act_quantizers().items()}
        rest = [q for unit in qnn.units() for q in unit.act_quantizers() if q not in unit.learnable_act_quantizers()]
        calibrate(qnn, calibration_set(kind), dataclasses.replace(SHORT, iters=1, iters_a=2, engine=engine))
        learned[bits] = {path for path, q in qnn.act_quantizers().items() if not torch.equal(q.delta, before[path])}
        assert rest == ([] if bits == 8 else softmax_quantizers(qnn))
    assert any(path.endswith("act_quantizer_w") for path in learned[8])
    assert learned[16]
    assert not any(path.endswith("act_quantizer_w") for path in learned[16])


@pytest.mark.parametrize("softmax_only", [False, True])
def test_running_statistics_reach_the_products_of_attention(softmax_only: bool) -> None:
    qnn = with_grids("transformer")
    before = {path: quantizer.delta.clone() for path, quantizer in qnn.act_quantizers().items()}
    config = CalibrationConfig(batch_size=4, running_stat=True, rs_sm_only=softmax_only)
    update_running_ranges(qnn, latent_inputs("transformer", 8, seed=5), config)
    moved = {path for path, quantizer in qnn.act_quantizers().items() if quantizer.delta != before[path]}
    assert moved == {path for path in before if not softmax_only or path.endswith("act_quantizer_w")}


@pytest.mark.parametrize("kind", KINDS)
def test_grids_for_each_timestep(kind: str) -> None:
    config = QuantConfig(4, 8, quant_act=True, timed_ranges="all", timesteps=(1.0, 500.0))
    qnn, (x, _, *context) = wrapped(kind, config), latent_inputs(kind, 6)
    qnn.find_weight_grids()
    t = torch.tensor([1.0, 500.0]).repeat(3)
    find_act_ranges(qnn, (x, t, *context))
    assert all(isinstance(quantizer, TimedQuantizer) for quantizer in qnn.act_quantizers().values())
    assert {quantizer.delta.shape for quantizer in softmax_quantizers(qnn)} == {(2,)}
    assert output_error(qnn, kind) < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_half_precision_stays_near(kind: str, quantized: bool) -> None:
    qnn, inputs = with_grids(kind), latent_inputs(kind, 2)
    qnn.set_quant_state(quantized, False)
    with torch.no_grad():
        expected = qnn(*inputs)
        lower_precision(qnn, "bf16")
        got = qnn(*inputs)
    assert (got - expected).norm() < 0.03 * expected.norm()


def test_a_calibration_depends_on_the_code_of_attention_too() -> None:
    names = source_hashes(wrapped("transformer"))
    unet = {"ldm/modules/attention.py", "ldm/modules/diffusionmodules/openaimodel.py"}
    assert {name for name in names if name.startswith("ldm/")} == unet


def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients() -> None:
    """Only the boundaries of the parts of a transformer block are kept between forward and backward."""
    qnn = with_grids("transformer")
    qnn.learn_rounding()
    unit = next(unit for unit in qnn.units() if unit.kind == "transformer block")
    channels = unit.module.norm1.weight.numel()
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, channels, generator=draws)
    context = torch.randn(2, 5, unit.module.attn2.to_k.weight.shape[1], generator=draws)
    leaves = [q.alpha for layer in unit.layers() for q, _ in layer.weight_quantizers()]
    leaves += [quantizer.delta for quantizer in unit.act_quantizers()]

    def run(grad_ckpt: bool) -> tuple[Tensor, tuple[Tensor, ...], int]:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        qnn.set_grad_ckpt(grad_ckpt)
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = unit.module(x, context)
            bytes_kept = sum(kept.values())
        return out, torch.autograd.grad(out.square().sum(), leaves, allow_unused=True), bytes_kept

    plain, plain_gradients, plain_bytes = run(False)
    saving, saving_gradients, saving_bytes = run(True)
    assert torch.equal(plain, saving)
    assert sum(gradient is not None for gradient in plain_gradients) > len(leaves) // 2
    for a, b in zip(plain_gradients, saving_gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert saving_bytes < plain_bytes / 4


# What is captured.


@pytest.mark.parametrize("filed", [True, False])
def test_timesteps_and_context_are_there_once(filed: bool, tmp_path: Path) -> None:
    """For both networks, whatever else waits where: a context of text takes more than the features of deep stages."""
    qnn, inputs = with_grids("transformer"), latent_inputs("transformer", 4)
    sizes = measure(qnn, tuple(x[:1] for x in inputs), compact=False)
    kept = [Kept(number % 2 == 1, (False,) * len(b.skips), filed) for number, b in enumerate(sizes.boundaries)]
    options = {"chunk": 2, "device": torch.device("cpu"), "shelf": Shelf("partly", compact=False), "kept": kept}
    files = Shelf("partly", compact=False, scratch=Scratch(tmp_path))
    first = Frontier(qnn, inputs, files=files, **options)
    second = Frontier(qnn, inputs, files=files, starts=first.starts, **options)
    for stage in qnn.model.stages():
        for frontier in (first, second):
            frontier.advance(stage)
            for flow, start in zip(frontier._flows, first.starts, strict=True):
                assert flow is None or (flow.t is start.t and flow.context is start.context)
    assert sizes.start == sum(4 * x[0].numel() for x in inputs)
    assert sizes.boundaries[0].trunk == 4 * inputs[0][0].numel()


@pytest.mark.parametrize("kind", ["head_channels", "transformer"])
def test_upsamplings_are_entered_before_they_enlarge(kind: str) -> None:
    """Only these: their units' inputs have the resolution of the stage before."""
    qnn, inputs = with_grids(kind), latent_inputs(kind, 2)
    units = [unit for unit in qnn.units() if unit.entry is not unit.module]
    assert [unit.path for unit in units] == [
        path for path in qnn.layers() if re.search(r"output_blocks.*[12]\.conv$", path)
    ]
    seen = observed(qnn, inputs, 2, False, False)
    for unit in units:
        (x,), out = seen[unit.path]
        assert [2 * side for side in x.shape[2:]] == [*out.shape[2:]]
