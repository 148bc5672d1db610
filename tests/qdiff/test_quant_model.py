"""The wrapped UNet: what is quantized in it, in which units, and how quantization is switched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QUANTIZABLE, QuantModule, SplitQuantModule
from qdiff.quant_model import QuantModel, evaluating, frozen_parameters
from qdiff.quantizers import UniformAffineQuantizer

from .conftest import as_calibrated, noisy_inputs, tiny_unet, with_grids, wrapped

WEIGHT = {"n_bits": 4, "symmetric": False, "channel_wise": True, "scale_method": "max"}
ACT = {"n_bits": 8, "symmetric": False, "channel_wise": False, "scale_method": "max", "leaf_param": True}


# Wrapping.


def test_published_interface() -> None:
    qnn = QuantModel(tiny_unet(), WEIGHT, {**ACT, "always_zero": False}, 16)
    assert qnn.config == QuantConfig(weight_bit=4, act_bit=8, quant_act=True, sm_abit=16)
    layer = qnn.layers()["conv_in"]
    assert layer.weight_quantizer.config.n_bits == 4
    assert layer.weight_quantizer.config.channel_wise
    assert layer.act_quantizer.config.n_bits == 8
    assert isinstance(layer.act_quantizer.delta, nn.Parameter)
    assert qnn.model.mid.attn_1.act_quantizer_w.config.n_bits == 16
    assert qnn.model.mid.attn_1.act_quantizer_q.config.n_bits == 8
    qnn.set_quant_state(True, True)
    assert qnn(*noisy_inputs(2)).shape == (2, 3, 8, 8)  # grids come from the first tensors


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'bits'; known: .*n_bits"):
        QuantModel(tiny_unet(), {"bits": 4}, ACT)


@pytest.mark.parametrize("split", [False, True])
def test_every_layer_and_attention_product_is_quantized(split: bool) -> None:
    unet = tiny_unet()
    layers = {path for path, module in unet.named_modules() if isinstance(module, QUANTIZABLE)}
    attention = {path for path, module in unet.named_modules() if path and hasattr(module, "proj_out")}
    assert {"conv_in", "conv_out", "temb.dense.0"} <= layers
    assert len(attention) == 4
    qnn = wrapped(QuantConfig(split=split))
    assert set(qnn.layers()) == layers
    assert not [m for m in qnn.model.modules() if isinstance(m, QUANTIZABLE)]
    inputs = {f"{path}.act_quantizer" for path in layers}
    halves = {f"{path}.act_quantizer_0" for path, m in qnn.layers().items() if isinstance(m, SplitQuantModule)}
    products = {f"{path}.act_quantizer_{name}" for path in attention for name in "qkvw"}
    assert set(qnn.act_quantizers()) == inputs | halves | products
    assert bool(halves) == split


def test_full_precision_is_unchanged_bit_for_bit() -> None:
    inputs = noisy_inputs(3)
    with torch.no_grad():
        expected = tiny_unet().eval()(*inputs)
        assert torch.equal(wrapped()(*inputs), expected)
        qnn = as_calibrated()
        qnn.set_quant_state(False, False)
        assert torch.equal(qnn(*inputs), expected)


def test_names_are_those_of_the_network_behind_a_prefix() -> None:
    names = set(wrapped().state_dict())
    assert {f"model.{name}" for name in tiny_unet().state_dict()} <= names
    assert "model.mid.attn_1.act_quantizer_w.delta" in names
    assert "model.up.0.block.0.nin_shortcut.weight_quantizer_0.zero_point" in names


def test_other_networks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Sequential is not a UNet .*ddim\.unet\.UNet"):
        QuantModel(nn.Sequential(nn.Linear(2, 2)), WEIGHT, ACT)


def test_wrapping_twice_is_refused() -> None:
    qnn = wrapped()
    for again in (qnn, qnn.model):
        with pytest.raises(ValueError, match="wrapped already"):
            QuantModel(again, WEIGHT, ACT)


@pytest.mark.parametrize("training", [False, True])
def test_mode_of_the_network_is_kept(training: bool) -> None:
    qnn = QuantModel(tiny_unet().train(training), WEIGHT, ACT)
    assert {module.training for module in qnn.modules()} == {training}


# Splits.


def test_only_shortcuts_of_the_way_up_are_split() -> None:
    qnn = wrapped()
    split = {path for path, layer in qnn.layers().items() if isinstance(layer, SplitQuantModule)}
    assert split == {path for path in qnn.layers() if path.startswith("up.") and path.endswith("nin_shortcut")}
    assert "down.1.block.0.nin_shortcut" in qnn.layers()
    assert len(split) == 4


def test_splits_are_cut_where_the_decoders_feature_ends() -> None:
    """What a stage before has put out is the first part of what the shortcut takes in, up to its cut."""
    qnn = wrapped()
    paths = {layer: path for path, layer in qnn.layers().items() if isinstance(layer, SplitQuantModule)}
    cuts: dict[str, tuple[Tensor, Tensor]] = {}

    def at_shortcut(layer: SplitQuantModule, args: tuple[Tensor]) -> None:
        cuts[paths[layer]] = (args[0][:, : layer.split_channels], decoder)

    for layer in paths:
        layer.register_forward_pre_hook(at_shortcut)
    flow = qnn.model.begin(*noisy_inputs(2))
    with torch.no_grad():
        for stage in qnn.model.stages():
            decoder = flow.h
            qnn.model.advance(stage, flow)
    assert len(cuts) == 4
    for path, (first_part, feature) in cuts.items():
        assert torch.equal(first_part, feature), path


# Units.


def run_order(qnn: QuantModel) -> list[nn.Module]:
    """Every layer and block in the order in which a forward pass finishes the first of its work."""
    order: list[nn.Module] = []
    interesting = [m for m in qnn.modules() if isinstance(m, QuantModule | BaseQuantBlock)]
    handles = [m.register_forward_pre_hook(lambda module, args: order.append(module)) for m in interesting]
    with torch.no_grad():
        qnn(*noisy_inputs(1))
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("unet", [{}, {"ch_mult": (1,)}, {"ch_mult": (1, 1, 2), "resamp_with_conv": False}])
def test_units_come_in_the_order_of_the_network(unet: dict[str, Any]) -> None:
    qnn = wrapped(**unet)
    units = [unit.module for unit in qnn.units()]
    assert units == [module for module in run_order(qnn) if module in units]


def test_units_hold_every_quantizer_once() -> None:
    qnn = wrapped()
    units = qnn.units()
    layers = [layer for unit in units for layer in unit.layers()]
    assert sorted(map(id, layers)) == sorted(map(id, qnn.layers().values()))
    quantizers = [quantizer for unit in units for quantizer in unit.act_quantizers()]
    assert sorted(map(id, quantizers)) == sorted(map(id, qnn.act_quantizers().values()))
    assert len({unit.path for unit in units}) == len(units)
    assert all(qnn.model.get_submodule(unit.path) is unit.module for unit in units)
    weights = sum(p.numel() for layer in qnn.layers().values() for p in (layer.weight, layer.bias))
    assert sum(unit.parameter_count() for unit in units) == weights


def test_blocks_are_units_and_so_is_each_remaining_layer() -> None:
    kinds = {unit.path: unit.kind for unit in wrapped().units()}
    layers = {"temb.dense.0", "temb.dense.1", "conv_in", "down.0.downsample.conv", "up.1.upsample.conv", "conv_out"}
    assert {path for path, kind in kinds.items() if kind == "layer"} == layers
    assert {path for path, kind in kinds.items() if kind == "attention block"} == {
        "down.1.attn.0",
        "mid.attn_1",
        "up.1.attn.0",
        "up.1.attn.1",
    }
    others = {kind for path, kind in kinds.items() if ".block" in path or "mid.block" in path}
    assert others == {"residual block"}


# Attention.


def test_attention_products_are_quantized() -> None:
    """Written out: q, k, v and the map after softmax, each on a grid of its own; q and k before they are scaled."""
    qnn = with_grids(QuantConfig(8, 4, quant_act=True, sm_abit=3))
    block = qnn.model.mid.attn_1
    x = torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        got = block(x)
        h = block.norm(x)
        q, k, v = (getattr(block, f"act_quantizer_{n}")(getattr(block, n)(h).flatten(2)) for n in "qkv")
        scores = torch.einsum("ncp,ncr->npr", q, k) / 64**0.5
        weights = block.act_quantizer_w(scores.softmax(2))
        h = torch.einsum("npr,ncr->ncp", weights, v).view(x.shape)
        torch.testing.assert_close(got, x + block.proj_out(h), rtol=1e-4, atol=1e-4)
    assert block.act_quantizer_w.config.n_bits == 3
    assert {getattr(block, f"act_quantizer_{n}").config.n_bits for n in "qkv"} == {4}


@pytest.mark.parametrize("a_sym", [False, True])
def test_softmax_map_follows_the_symmetry_of_the_others(a_sym: bool) -> None:
    qnn = with_grids(QuantConfig(8, 8, quant_act=True, a_sym=a_sym))
    assert {quantizer.config.symmetric for quantizer in qnn.act_quantizers().values()} == {a_sym}


def test_without_activations_products_stay_in_full() -> None:
    qnn = with_grids()
    block = qnn.model.mid.attn_1
    x = torch.randn(2, 64, 4, 4)
    block.set_quant_state(True, False)
    expected = block(x)
    for name in "qkvw":
        getattr(block, f"act_quantizer_{name}").set_grid(torch.tensor(1e9), torch.tensor(0.0))
    assert torch.equal(block(x), expected)
    block.set_quant_state(True, True)
    assert not torch.equal(block(x), expected)


# Switching.


def states(qnn: QuantModel) -> set[tuple[bool, bool]]:
    modules = [m for m in qnn.modules() if isinstance(m, QuantModule | BaseQuantBlock)]
    return {(m.use_weight_quant, m.use_act_quant) for m in modules}


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("act", [False, True])
def test_state_reaches_every_module(weight: bool, act: bool) -> None:
    qnn = with_grids()
    qnn.set_quant_state(weight, act)
    assert states(qnn) == {(weight, act)}
    qnn.set_quant_state(not weight, not act)
    for unit in qnn.units():
        unit.module.set_quant_state(weight, act)
    assert states(qnn) == {(weight, act)}


def test_state_can_be_borrowed() -> None:
    qnn = with_grids()
    qnn.set_quant_state(True, True)
    conv_in = qnn.layers()["conv_in"]
    conv_in.set_quant_state(True, False)
    with qnn.quant_state(False, True):
        assert states(qnn) == {(False, True)}
    assert (conv_in.use_weight_quant, conv_in.use_act_quant) == (True, False)
    assert states(qnn) == {(True, True), (True, False)}
    with pytest.raises(KeyError), qnn.quant_state(False, False):
        raise KeyError
    assert states(qnn) == {(True, True), (True, False)}


def test_weights_and_activations_are_switched_separately() -> None:
    qnn, inputs = with_grids(QuantConfig(4, 4, quant_act=True)), noisy_inputs(2)
    outputs = {}
    for state in ((False, False), (True, False), (False, True), (True, True)):
        with torch.no_grad(), qnn.quant_state(*state):
            outputs[state] = qnn(*inputs)
    pairs = [(a, b) for a in outputs for b in outputs if a < b]
    assert len(pairs) == 6
    assert not [pair for pair in pairs if torch.equal(outputs[pair[0]], outputs[pair[1]])]


def test_baked_and_live_networks_are_the_same_bits() -> None:
    qnn, inputs = as_calibrated(), noisy_inputs(2)
    with torch.no_grad():
        baked = qnn(*inputs)
        for layer in qnn.layers().values():
            layer.unbake()
        assert torch.equal(qnn(*inputs), baked)


def test_weights_calibrated_says_whether_all_are() -> None:
    qnn = with_grids()
    assert not qnn.weights_calibrated()
    qnn.layers()["conv_in"].learn_rounding()
    assert not qnn.weights_calibrated()
    qnn.learn_rounding()
    assert qnn.weights_calibrated()


def test_modes_and_gradients_come_back() -> None:
    qnn = wrapped()
    qnn.train()
    qnn.model.mid.eval()
    qnn.layers()["conv_in"].weight.requires_grad_(False)
    modes = [module.training for module in qnn.modules()]
    wanted = [parameter.requires_grad for parameter in qnn.parameters()]
    with evaluating(qnn), frozen_parameters(qnn):
        assert not any(module.training for module in qnn.modules())
        assert not any(parameter.requires_grad for parameter in qnn.parameters())
    assert [module.training for module in qnn.modules()] == modes
    assert [parameter.requires_grad for parameter in qnn.parameters()] == wanted
    assert len(set(modes)) == len(set(wanted)) == 2


def test_only_quantizers_named_so_are_activation_quantizers() -> None:
    qnn = wrapped()
    everything = [m for m in qnn.modules() if isinstance(m, UniformAffineQuantizer)]
    weights = [quantizer for layer in qnn.layers().values() for quantizer, _ in layer.weight_quantizers()]
    assert len(everything) == len(weights) + len(qnn.act_quantizers())
