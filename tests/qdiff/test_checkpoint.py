"""Both checkpoint formats: back bit for bit, as small as promised, and errors that name the flag."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddim.config import load_config
from ddim.unet import UNet
from qdiff.calibrate import find_act_ranges
from qdiff.checkpoint import (
    FORMAT,
    CheckpointError,
    load_quantized,
    pack_bits,
    packed_bytes,
    packed_length,
    read_info,
    read_output_scale,
    read_state,
    resume_cali_model,
    save_packed,
    save_published,
    size_report,
    unpack_bits,
)
from qdiff.config import QuantConfig
from qdiff.output_scale import OutputScale
from qdiff.quant_model import QuantModel

from .conftest import SMALL, as_calibrated, noisy_inputs, properties, tiny_unet, wrapped

REPOSITORY = Path(__file__).resolve().parents[2]
FORMS = {"published": (save_published, "ckpt.pth"), "packed": (save_packed, "ckpt.safetensors")}
W4A8 = QuantConfig(weight_bit=4, act_bit=8, quant_act=True, split=True)
small, fresh_small = partial(as_calibrated, **SMALL), partial(wrapped, **SMALL)
INFO = {"model_config": {"model": {"ch": 32}}, "calibration": {"iters": 3}}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model in one of the two forms."""

    def save(form: str, qnn: QuantModel) -> Path:
        function, name = FORMS[form]
        function(tmp_path / name, qnn, info=INFO)
        return tmp_path / name

    return save


def output(qnn: QuantModel) -> Tensor:
    with torch.no_grad():
        return qnn(*noisy_inputs(3))


def codes(qnn: QuantModel) -> list[Tensor]:
    return [part for layer in qnn.layers().values() for part in layer.codes()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# Packing.


@properties
@given(st.integers(2, 8), st.data())
def test_packed_integers_come_back(n_bits: int, data) -> None:
    values = data.draw(st.lists(st.integers(0, 2**n_bits - 1), max_size=50))
    packed = pack_bits(torch.tensor(values, dtype=torch.uint8), n_bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_length(len(values), n_bits) == math.ceil(len(values) * n_bits / 8)
    assert unpack_bits(packed, n_bits, len(values)).tolist() == values


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_packed_bits_are_one_string_lowest_first(n_bits: int) -> None:
    """As ``docs/formats.md`` says, so that other programs can read it."""
    values = [(37 * i + 11) % 2**n_bits for i in range(13)]
    number = sum(value << (n_bits * i) for i, value in enumerate(values))
    expected = number.to_bytes(math.ceil(13 * n_bits / 8), "little")
    assert bytes(pack_bits(torch.tensor(values, dtype=torch.uint8), n_bits).tolist()) == expected


@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_more_integers_than_are_unpacked_at_once(n_bits: int) -> None:
    codes = torch.randint(2**n_bits, (3 * 2**17 * 8 // n_bits + 5,), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, n_bits), n_bits, len(codes)), codes)


def test_two_four_bit_values_share_a_byte() -> None:
    assert pack_bits(torch.tensor([[0x3, 0xA], [0xF, 0x1]], dtype=torch.uint8), 4).tolist() == [0xA3, 0x1F]


# Back bit for bit.


@pytest.mark.parametrize("quant_act", [False, True], ids=["weights", "activations"])
@pytest.mark.parametrize("a_sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("form", FORMS)
def test_resumed_model_is_the_saved_one(saved, form: str, split: bool, a_sym: bool, quant_act: bool) -> None:
    config = QuantConfig(4, 8, quant_act=quant_act, a_sym=a_sym, split=split)
    qnn = as_calibrated(config)
    expected = output(qnn)
    path = saved(form, qnn)
    assert torch.equal(output(qnn), expected)  # saving changed nothing
    fresh = wrapped(config, seed=7)  # whose own weights must not matter
    load_quantized(path, fresh, quant_act=quant_act)
    assert equal(codes(fresh), codes(qnn))
    assert torch.equal(output(fresh), expected)
    assert all(layer.baked_weight is not None for layer in fresh.layers().values())  # or every step would round anew
    assert packed_bytes(fresh, info=INFO) == packed_bytes(qnn, info=INFO)


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("form", FORMS)
def test_every_width_comes_back(saved, form: str, n_bits: int) -> None:
    config = QuantConfig(n_bits, split=True)
    qnn = as_calibrated(config, **SMALL)
    path = saved(form, qnn)
    fresh = wrapped(config, seed=7, **SMALL)
    load_quantized(path, fresh, quant_act=False)
    assert torch.equal(output(fresh), output(qnn))


@pytest.mark.parametrize("form", FORMS)
def test_round_to_nearest_comes_back(saved, form: str) -> None:
    """Ties included: these weights are halves of steps."""
    qnn = wrapped(W4A8)
    for layer in qnn.layers().values():
        rows = layer.weight.data.flatten(1)
        rows.copy_(torch.randint(-14, 17, rows.shape) / 2)
        for _, part in layer.parts():
            part.data[:, 0], part.data[:, -1] = 8, -7
    qnn.find_weight_grids()
    assert {q.delta.unique().item() for m in qnn.layers().values() for q, _ in m.weight_quantizers()} == {1}
    find_act_ranges(qnn, noisy_inputs(4))
    qnn.bake()
    qnn.set_quant_state(True, True)
    expected, before = output(qnn), codes(qnn)
    path = saved(form, qnn)
    assert equal(codes(qnn), before)
    fresh = wrapped(W4A8, seed=7)
    load_quantized(path, fresh, quant_act=True)
    assert equal(codes(fresh), before)
    assert torch.equal(output(fresh), expected)


@pytest.mark.parametrize("form", FORMS)
def test_zero_points_beyond_the_grid_come_back(saved, form: str) -> None:
    """The searched range of a channel of one sign does not hold zero, and z lies outside of [0, 2^b - 1]."""
    config = dataclasses.replace(W4A8, weight_range="mse")
    qnn = wrapped(config)
    with torch.no_grad():
        qnn.layers()["conv_in"].weight.abs_().add_(30)
    qnn.find_weight_grids()
    find_act_ranges(qnn, noisy_inputs(4))
    qnn.set_quant_state(True, True)
    qnn.learn_rounding()
    assert qnn.layers()["conv_in"].weight_quantizer.zero_point.min() < -255
    path = saved(form, qnn)
    fresh = wrapped(config, seed=7)
    load_quantized(path, fresh, quant_act=True)
    assert torch.equal(output(fresh), output(qnn))


@pytest.mark.parametrize("form", FORMS)
def test_activations_may_be_left_out(saved, form: str) -> None:
    qnn = as_calibrated(W4A8)
    path = saved(form, qnn)
    fresh = wrapped(W4A8, seed=7)
    load_quantized(path, fresh, quant_act=False)
    qnn.set_quant_state(True, False)
    assert torch.equal(output(fresh), output(qnn))


@pytest.mark.parametrize("form", FORMS)
def test_weights_to_go_on_from(saved, form: str) -> None:
    """``--resume_w``: the full-precision weights stay, as targets, and activation grids are not taken."""
    qnn = as_calibrated(W4A8)
    path = saved(form, qnn)
    fresh = wrapped(W4A8)
    load_quantized(path, fresh, quant_act=True, weights_only=True, keep_full_precision=True)
    assert equal(codes(fresh), codes(qnn))
    assert fresh.weights_calibrated()
    assert not any(quantizer.ready for quantizer in fresh.act_quantizers().values())
    assert {(m.use_weight_quant, m.use_act_quant) for m in fresh.layers().values()} == {(True, False)}
    with fresh.quant_state(False, False), torch.no_grad():
        assert torch.equal(output(fresh), tiny_unet().eval()(*noisy_inputs(3)))
    with qnn.quant_state(True, False):
        assert torch.equal(output(fresh), output(qnn))


def test_weights_to_go_on_from_must_be_the_same_networks(saved) -> None:
    path = saved("packed", as_calibrated(W4A8))
    with pytest.raises(CheckpointError, match=r"not roundings of this .*--ckpt"):
        load_quantized(path, wrapped(W4A8, seed=7), quant_act=False, keep_full_precision=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_full_precision_weights_are_not_needed(saved, form: str) -> None:
    """Neither read, nor kept beside the quantized ones, which take their place."""
    qnn = as_calibrated(dataclasses.replace(W4A8, split=True))
    path = saved(form, qnn)
    fresh = wrapped(dataclasses.replace(W4A8, split=True))
    for parameter in fresh.parameters():
        parameter.data.fill_(float("nan"))
    load_quantized(path, fresh, quant_act=True)
    assert torch.equal(output(fresh), output(qnn))
    for layer in fresh.layers().values():
        assert layer.weight.data_ptr() == layer.baked_weight.data_ptr()
        assert torch.equal(layer.baked_weight, layer.quantized_weight())
    assert not any(".alpha" in name for name in fresh.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_loading_into_a_model_that_holds_another(saved, form: str) -> None:
    qnn = as_calibrated(W4A8)
    path = saved(form, qnn)
    other = as_calibrated(W4A8, seed=7)
    output(other)
    load_quantized(path, other, quant_act=True)
    assert torch.equal(output(other), output(qnn))


def test_the_published_name_resumes_too(saved) -> None:
    qnn = as_calibrated(W4A8)
    fresh = wrapped(W4A8, seed=7)
    resume_cali_model(fresh, saved("published", qnn), noisy_inputs(2), True)
    assert torch.equal(output(fresh), output(qnn))


def test_scalars_of_a_published_file_may_have_an_axis(tmp_path: Path, saved) -> None:
    qnn = as_calibrated(W4A8)
    state = torch.load(saved("published", qnn), weights_only=True)
    torch.save({name: t.reshape(1) if "act_quantizer" in name else t for name, t in state.items()}, tmp_path / "x.pth")
    fresh = wrapped(W4A8, seed=7)
    load_quantized(tmp_path / "x.pth", fresh, quant_act=True)
    assert torch.equal(output(fresh), output(qnn))
    assert packed_bytes(fresh) == packed_bytes(qnn)


def test_a_state_dictionary_one_level_down_is_found(tmp_path: Path, saved) -> None:
    qnn = as_calibrated(W4A8)
    state = torch.load(saved("published", qnn), weights_only=True)
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "x.pth")
    assert read_state(tmp_path / "x.pth").keys() == state.keys()


# What only packed files can say: timed ranges, a split input, an output scale.


TIMESTEPS = (3.0, 90.0, 700.0)
SPLIT_INPUT = dataclasses.replace(W4A8, split_input=True)
SCALE = OutputScale(TIMESTEPS, (1.01, 0.99, 1.02), (0.5, 1.25, 1.5))


def timed(which: str = "all", *, a_sym: bool = False, **unet: Any) -> QuantModel:
    """Calibrated, with grids of their own at each timestep."""
    return as_calibrated(dataclasses.replace(W4A8, a_sym=a_sym, timed_ranges=which, timesteps=TIMESTEPS), **unet)


def format_version(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[FORMAT])["format_version"]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("a_sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("which", ["input", "all"])
def test_timed_ranges_come_back(saved, which: str, a_sym: bool, scaled: bool) -> None:
    qnn = timed(which, a_sym=a_sym)
    qnn.output_scale = copy.deepcopy(SCALE) if scaled else None
    path = saved("packed", qnn)
    assert format_version(path) == 2
    info = read_info(path)
    assert info.quant == qnn.config
    fresh = wrapped(info.quant, seed=7)  # as the file says, no flag needed
    load_quantized(path, fresh, quant_act=True)
    assert torch.equal(output(fresh), output(qnn))
    assert packed_bytes(fresh, info=INFO) == packed_bytes(qnn, info=INFO)
    load_quantized(path, fresh, quant_act=False)
    qnn.set_quant_state(True, False)
    assert torch.equal(output(fresh), output(qnn))


@pytest.mark.parametrize("mean", [False, True])
def test_an_output_scale_comes_back(saved, mean: bool) -> None:
    qnn = as_calibrated(W4A8)
    plain = output(qnn)
    maps = torch.randn(2, len(TIMESTEPS), *plain.shape[1:]).half().float()
    qnn.output_scale = OutputScale(TIMESTEPS, SCALE.weights, SCALE.activations, *(maps if mean else ()))
    path = saved("packed", qnn)
    assert format_version(path) == 2
    fresh = wrapped(W4A8, seed=7)
    load_quantized(path, fresh, quant_act=True)
    assert fresh.output_scale.tables.keys() == qnn.output_scale.tables.keys()
    for name, table in qnn.output_scale.tables.items():
        assert torch.equal(fresh.output_scale.tables[name], table), name
    assert torch.equal(output(fresh), output(qnn))
    load_quantized(path, fresh, quant_act=True, correct_scale=False)
    assert fresh.output_scale is None
    assert torch.equal(output(fresh), plain)
    assert not torch.equal(output(qnn), plain)


def test_an_output_scale_of_weights_alone_comes_back(saved) -> None:
    config = dataclasses.replace(W4A8, quant_act=False)
    qnn = small(config)
    qnn.output_scale = OutputScale(TIMESTEPS, (1.01, 0.99, 1.02))
    path = saved("packed", qnn)
    fresh = fresh_small(config, seed=7)
    load_quantized(path, fresh, quant_act=False)
    assert fresh.output_scale.activations is None
    assert torch.equal(output(fresh), output(qnn))


def test_going_on_from_weights_leaves_the_scale_behind(saved) -> None:
    """It was measured with other activations."""
    qnn = small(W4A8)
    qnn.output_scale = copy.deepcopy(SCALE)
    path = saved("packed", qnn)
    fresh = fresh_small(W4A8)
    load_quantized(path, fresh, quant_act=True, weights_only=True, keep_full_precision=True)
    assert fresh.output_scale is None


def test_loading_takes_an_earlier_scale_away(saved) -> None:
    for form in FORMS:
        path = saved(form, small(W4A8))
        fresh = fresh_small(W4A8)
        fresh.output_scale = copy.deepcopy(SCALE)
        load_quantized(path, fresh, quant_act=True)
        assert fresh.output_scale is None


def test_files_without_any_of_it_are_as_before(saved) -> None:
    """An earlier release can read them: nothing in the header is new."""
    path = saved("packed", small(W4A8))
    assert format_version(path) == 1
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        names = set(file.keys())
    fields = {"weight_bit", "act_bit", "quant_act", "a_sym", "split", "sm_abit", "weight_range", "act_range"}
    assert header["quant"].keys() == fields
    assert header["index"].keys() == {"layers", "full", "act"}
    assert names == {"codes", "delta", "zero_point", "bias", "full", "act_delta", "act_zero_point"}
    assert read_output_scale(path) is None
    assert json.loads((saved("published", small(W4A8)).with_suffix(".json")).read_text())["quant"].keys() == fields


@pytest.mark.parametrize("name", ["w4a8-published", "w8a8"])
def test_bundled_files_of_version_one_still_load(name: str) -> None:
    path = REPOSITORY / "models" / "pixel" / "fashion_mnist" / f"{name}.safetensors"
    info = read_info(path)
    qnn = QuantModel.from_config(copy.deepcopy(network("bundled")), info.quant)
    load_quantized(path, qnn, quant_act=True)
    assert all(quantizer.ready for quantizer in qnn.act_quantizers().values())
    assert qnn.output_scale is None


def test_the_published_format_refuses_what_it_cannot_say(saved, tmp_path: Path) -> None:
    for qnn in (timed(**SMALL), small(SPLIT_INPUT)):
        with pytest.raises(CheckpointError, match=r"no place for activation ranges that .* or a split input; save the"):
            saved("published", qnn)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["none", "input", "all"])
def test_a_split_input_comes_back(saved, which: str) -> None:
    timesteps = () if which == "none" else TIMESTEPS
    qnn = as_calibrated(dataclasses.replace(SPLIT_INPUT, timed_ranges=which, timesteps=timesteps))
    path = saved("packed", qnn)
    assert format_version(path) == 2
    assert read_info(path).quant == qnn.config
    fresh = wrapped(qnn.config, seed=7)
    load_quantized(path, fresh, quant_act=True)
    assert torch.equal(output(fresh), output(qnn))
    assert packed_bytes(fresh, info=INFO) == packed_bytes(qnn, info=INFO)


@pytest.mark.parametrize("theirs", [False, True])
def test_with_and_without_a_split_input(saved, theirs: bool) -> None:
    path = saved("packed", small(dataclasses.replace(W4A8, split_input=theirs)))
    message = refused(path, dataclasses.replace(W4A8, split_input=not theirs))
    assert ("with --split_input; add it" if theirs else "without --split_input; leave it out") in message
    load_quantized(path, fresh_small(dataclasses.replace(W4A8, split_input=not theirs)), quant_act=False)


def test_the_published_format_takes_timed_networks_without_their_activations(saved) -> None:
    qnn = timed(**SMALL)
    qnn.config = dataclasses.replace(qnn.config, quant_act=False)
    qnn.set_quant_state(True, False)
    fresh = fresh_small(dataclasses.replace(W4A8, quant_act=False), seed=7)
    load_quantized(saved("published", qnn), fresh, quant_act=False)
    assert torch.equal(output(fresh), output(qnn))


@pytest.mark.parametrize("ours", ["none", "input"])
def test_other_timed_ranges(saved, ours: str) -> None:
    path = saved("packed", timed(**SMALL))
    timesteps = () if ours == "none" else TIMESTEPS
    config = dataclasses.replace(W4A8, timed_ranges=ours, timesteps=timesteps)
    assert f"with --timed_ranges all, not {ours}" in refused(path, config)
    load_quantized(path, fresh_small(config), quant_act=False)  # where they do not matter


def test_ranges_of_other_timesteps(saved) -> None:
    path = saved("packed", timed(**SMALL))
    config = dataclasses.replace(W4A8, timed_ranges="all", timesteps=(3.0, 90.0, 800.0))
    assert "other timesteps" in refused(path, config)


def test_a_damaged_scale_is_named(saved) -> None:
    qnn = small(W4A8)
    qnn.output_scale = copy.deepcopy(SCALE)
    path = saved("packed", qnn)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {"scale_weights": torch.tensor([1.0, -1.0, 1.0])}, path, metadata)
    assert "--no_correct_scale" in refused(path, W4A8)
    load_quantized(path, fresh_small(W4A8), quant_act=True, correct_scale=False)


# What is in the files.


@pytest.mark.parametrize("quant_act", [False, True])
def test_published_file_holds_what_published_files_hold(saved, quant_act: bool) -> None:
    qnn = as_calibrated(dataclasses.replace(W4A8, quant_act=quant_act))
    state = torch.load(saved("published", qnn), weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    expected = {f"model.{name}" for name in tiny_unet().state_dict()}
    for path, layer in qnn.layers().items():
        for suffix, _ in layer.parts():
            expected |= {f"model.{path}.weight_quantizer{suffix}.{name}" for name in ("alpha", "delta", "zero_point")}
    if quant_act:
        expected |= {f"model.{path}.{name}" for path in qnn.act_quantizers() for name in ("delta", "zero_point")}
    assert state.keys() == expected
    full = tiny_unet().state_dict()
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in full.items())


@pytest.mark.parametrize("form", FORMS)
def test_a_file_describes_itself(saved, form: str) -> None:
    config = QuantConfig(5, 6, quant_act=True, a_sym=True, split=True, sm_abit=16)
    info = read_info(saved(form, as_calibrated(config)))
    assert info.quant == config
    assert info.model_config == INFO["model_config"]
    assert info.calibration == INFO["calibration"]
    assert info.versions["torch"] == torch.__version__
    assert {"qdiff", "python"} <= info.versions.keys()


def test_facts_of_the_published_form_are_optional(saved) -> None:
    path = saved("published", as_calibrated(W4A8))
    os.unlink(path.with_suffix(".json"))
    assert read_info(path) is None
    load_quantized(path, wrapped(W4A8), quant_act=True)


def test_packed_zero_points_are_integers_of_32_bits(saved) -> None:
    tensors = load_file(saved("packed", as_calibrated(W4A8)))
    assert tensors["codes"].dtype == torch.uint8
    assert tensors["zero_point"].dtype == tensors["act_zero_point"].dtype == torch.int32


def test_the_same_model_gives_the_same_bytes(saved) -> None:
    first, again = (saved("packed", as_calibrated(W4A8)).read_bytes() for _ in range(2))
    assert first == again
    assert first != packed_bytes(as_calibrated(W4A8, seed=7), info=INFO)


@cache
def network(name: str) -> UNet:
    return (
        tiny_unet() if name == "tiny" else UNet.from_config(load_config(REPOSITORY / "configs" / "fashion_mnist.yml"))
    )


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("name", ["tiny", "bundled"])
def test_packed_file_is_as_small_as_promised(name: str, n_bits: int) -> None:
    """1.03 x (weights at their bits + the rest in fp32 + scales and zero points) + 50 bytes a tensor of the network."""
    full = network(name).state_dict()
    qnn = QuantModel.from_config(copy.deepcopy(network(name)), dataclasses.replace(W4A8, weight_bit=n_bits))
    qnn.find_weight_grids()
    for quantizer in qnn.act_quantizers().values():
        quantizer.set_grid(torch.rand(()), torch.tensor(3.0))
    quantized = {f"{path}.weight" for path in qnn.layers()}
    scales = sum(q.delta.numel() for layer in qnn.layers().values() for q, _ in layer.weight_quantizers())
    content = (
        sum(full[key].numel() for key in quantized) * n_bits / 8
        + sum(tensor.numel() for key, tensor in full.items() if key not in quantized) * 4
        + (scales + len(qnn.act_quantizers())) * 8
    )
    packed = packed_bytes(qnn, info=INFO)
    assert len(packed) <= 1.03 * content + 50 * len(full)


def test_size_report_compares_with_the_same_network_in_full() -> None:
    values = sum(tensor.numel() for tensor in tiny_unet().state_dict().values())
    report = size_report(as_calibrated(W4A8), 100_000)
    assert f"{4 * values / 1e5:.1f} times smaller than fp32" in report
    assert f"{2 * values / 1e5:.1f} times smaller than fp16" in report
    assert f"{4 * values / 2**20:.2f} MiB" in report


# Errors. Each names the file and the flag that mends it.


def refused(path: Path, config: QuantConfig, **unet: Any) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_quantized(path, wrapped(config, **SMALL | unet), quant_act=True)
    assert str(path.parent / path.stem) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    assert "no such calibrated checkpoint" in refused(tmp_path / name, W4A8)
    with pytest.raises(CheckpointError, match="no such"):
        read_info(tmp_path / name)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("form", FORMS)
def test_truncated_file(saved, form: str, share: float) -> None:
    path = saved(form, small(W4A8))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cut short" in refused(path, W4A8)


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
def test_a_file_of_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    refused(tmp_path / name, W4A8)


@pytest.mark.parametrize("unet", [{"ch_mult": (1, 1)}, {"num_res_blocks": 2}, {"attn_resolutions": (8,)}, {"ch": 64}])
@pytest.mark.parametrize("form", FORMS)
def test_other_architecture(saved, form: str, unet: dict[str, Any]) -> None:
    message = refused(saved(form, small(W4A8)), W4A8, **unet)
    assert "another architecture" in message
    assert "--config" in message
    assert len(message) < 600  # not a wall of names


@pytest.mark.parametrize(("theirs", "ours"), [(4, 8), (8, 4), (3, 4), (4, 3), (7, 8), (8, 7), (2, 8)])
@pytest.mark.parametrize("facts", [True, False], ids=["json", "no_json"])
@pytest.mark.parametrize("form", FORMS)
def test_other_weight_bits(saved, form: str, facts: bool, theirs: int, ours: int) -> None:
    path = saved(form, small(dataclasses.replace(W4A8, weight_bit=theirs)))
    if not facts:
        path.with_suffix(".json").unlink(missing_ok=True)
    assert f"--weight_bit {theirs}" in refused(path, dataclasses.replace(W4A8, weight_bit=ours))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("flag", "theirs", "ours"), [("act_bit", 8, 6), ("sm_abit", 8, 16)])
def test_other_activation_bits(saved, form: str, flag: str, theirs: int, ours: int) -> None:
    path = saved(form, small(W4A8))
    config = dataclasses.replace(W4A8, **{flag: ours})
    assert f"--{flag} {theirs}" in refused(path, config)
    load_quantized(path, fresh_small(config), quant_act=False)  # where they do not matter


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("facts", [True, False], ids=["json", "no_json"])
@pytest.mark.parametrize("form", FORMS)
def test_with_and_without_split(saved, form: str, facts: bool, split: bool) -> None:
    path = saved(form, small(dataclasses.replace(W4A8, split=split)))
    if not facts:
        path.with_suffix(".json").unlink(missing_ok=True)
    message = refused(path, dataclasses.replace(W4A8, split=not split))
    assert ("with --split; add" if split else "without --split; leave") in message


@pytest.mark.parametrize("facts", [True, False], ids=["json", "no_json"])
@pytest.mark.parametrize("form", FORMS)
def test_without_activations(saved, form: str, facts: bool) -> None:
    path = saved(form, small(dataclasses.replace(W4A8, quant_act=False)))
    if not facts:
        path.with_suffix(".json").unlink(missing_ok=True)
    message = refused(path, W4A8)
    assert "without activations; leave --quant_act out" in message
    assert "--resume_w" in message
    load_quantized(path, fresh_small(W4A8), quant_act=True, weights_only=True, keep_full_precision=True)


@pytest.mark.parametrize("a_sym", [False, True])
@pytest.mark.parametrize("facts", [True, False], ids=["json", "no_json"])
@pytest.mark.parametrize("form", FORMS)
def test_other_symmetry(saved, form: str, facts: bool, a_sym: bool) -> None:
    path = saved(form, small(dataclasses.replace(W4A8, a_sym=a_sym)))
    if not facts:
        path.with_suffix(".json").unlink(missing_ok=True)
    message = refused(path, dataclasses.replace(W4A8, a_sym=not a_sym))
    assert "--a_sym" in message
    assert ("add" if a_sym else "leave") in message
    load_quantized(path, fresh_small(dataclasses.replace(W4A8, a_sym=not a_sym)), quant_act=False)


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("writer", ["torch", "torch_old", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, saved, writer: str) -> None:
    path = saved("published", small(W4A8))
    state = {"model.conv_in.weight": torch.zeros(1), "bomb": Bomb(tmp_path / "exploded")}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=writer == "torch")
    message = refused(path, W4A8)
    assert not (tmp_path / "exploded").exists()
    assert writer == "pickle" or "refused: it holds more than tensors" in message


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["plain", "prefixed", "nested", "safetensors"])
def test_full_precision_file(tmp_path: Path, kind: str, split: bool) -> None:
    state = tiny_unet(**SMALL).state_dict()
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.ckpt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "prefixed":
        torch.save({f"model.{name}": tensor for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state} if kind == "nested" else state, path)
    assert "--ckpt" in refused(path, dataclasses.replace(W4A8, split=split))


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {"a": 1}, 5], ids=["tensor", "list", "dict", "int"]
)
def test_file_of_other_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "ckpt.pth")
    assert "expected a dictionary of tensors" in refused(tmp_path / "ckpt.pth", W4A8)


@pytest.mark.parametrize("lost", ["mid.attn_1.act_quantizer_w.delta", "conv_in.act_quantizer.zero_point"])
def test_a_lost_activation_grid(saved, lost: str) -> None:
    path = saved("published", small(W4A8))
    state = torch.load(path, weights_only=True)
    del state[f"model.{lost}"]
    torch.save(state, path)
    assert lost in refused(path, W4A8)


@pytest.mark.parametrize("facts", ["{", "[]", "{}", '{"quant": {"weight_bit": 1}}', '{"quant": {"colour": 4}}', "\xff"])
def test_facts_that_cannot_be_read(saved, facts: str) -> None:
    path = saved("published", small(W4A8))
    path.with_suffix(".json").write_text(facts, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"ckpt\.json"):
        read_info(path)


def test_a_file_of_a_later_release(tmp_path: Path, saved) -> None:
    path = saved("packed", small(W4A8))
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[FORMAT])
    metadata["format_version"] = 3
    save_file(load_file(path), path, {FORMAT: json.dumps(metadata)})
    assert "format version 3; this release reads up to 2" in refused(path, W4A8)


@pytest.mark.parametrize("form", FORMS)
def test_an_earlier_file_survives_a_failed_write(saved, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(form, small(W4A8))
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saved(form, small(W4A8, seed=7))
    assert path.read_bytes() == before
    assert not [name for name in os.listdir(path.parent) if "part" in name]
