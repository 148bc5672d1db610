"""Layers with quantized weights and inputs, whole and split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qdiff.primitives import range_to_grid, search_grid
from qdiff.quant_layer import QuantModule, SignedInputQuantModule, SplitQuantModule
from qdiff.quantizers import AdaRoundQuantizer

WEIGHT = {"n_bits": 4, "channel_wise": True}
ACT = {"n_bits": 8, "leaf_param": True}

LAYERS = {
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 7, 7)),
    "conv_strided": (lambda: nn.Conv2d(6, 4, 3, stride=2, dilation=2, groups=2, bias=False), (2, 6, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 1), (2, 6, 11)),
    "linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "linear_tokens": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape)


def nearest(weight: Tensor, n_bits: int) -> Tensor:
    """Round to nearest per output channel, written out."""
    rows = weight.detach().flatten(1)
    lowest, highest = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    delta = (highest - lowest) / (2**n_bits - 1)
    zero = (-lowest / delta).round()
    return ((((rows / delta).round() + zero).clamp(0, 2**n_bits - 1) - zero) * delta).view(weight.shape)


def test_takes_over_the_parameters(layer_and_input) -> None:
    layer, _ = layer_and_input
    module = QuantModule(layer, WEIGHT, ACT)
    assert module.weight is layer.weight
    assert module.bias is layer.bias


def test_computes_what_the_layer_did(layer_and_input) -> None:
    layer, x = layer_and_input
    module = QuantModule(layer, WEIGHT, ACT)
    assert torch.equal(module(x), layer(x))
    module.find_weight_grid()
    module.bake()
    assert torch.equal(module(x), layer(x))  # until quantization is switched on


def test_weight_is_rounded_channel_by_channel(layer_and_input) -> None:
    layer, x = layer_and_input
    module = QuantModule(layer, WEIGHT, ACT)
    module.find_weight_grid()
    module.set_quant_state(True, False)
    got = module(x)
    assert not torch.equal(got, layer(x))
    layer.weight.data = nearest(layer.weight, 4)
    torch.testing.assert_close(got, layer(x))


def test_input_is_rounded_as_a_whole(layer_and_input) -> None:
    layer, x = layer_and_input
    module = QuantModule(layer, WEIGHT, {**ACT, "n_bits": 4})
    module.set_quant_state(False, True)
    got = module(x)
    assert torch.equal(got, layer(nearest(x.reshape(1, -1), 4).view(x.shape)))
    assert not torch.equal(got, layer(x))


def test_baked_and_live_are_the_same_bits(layer_and_input) -> None:
    layer, x = layer_and_input
    module = QuantModule(layer, WEIGHT, ACT)
    module.find_weight_grid()
    module.set_quant_state(True, True)
    module(x)
    for learn in (False, True):
        if learn:
            module.learn_rounding()
            module.weight_quantizer.alpha.data.neg_()
        live = module(x)
        module.bake()
        assert torch.equal(module(x), live)
        module.unbake()
        assert torch.equal(module(x), live)


@pytest.mark.parametrize("change", ["find_weight_grid", "learn_rounding", "load_state_dict"])
def test_a_change_of_the_weight_invalidates_what_was_baked(change: str) -> None:
    module = QuantModule(nn.Linear(6, 5), WEIGHT, ACT)
    module.find_weight_grid()
    module.set_quant_state(True, False)
    module.bake()
    other = QuantModule(nn.Linear(6, 5), WEIGHT, ACT)
    other.find_weight_grid()
    module.weight.data = other.weight.data.clone()
    if change == "load_state_dict":
        module.load_state_dict(other.state_dict())
    else:
        getattr(module, change)()
    assert torch.equal(module.effective_weight(), module.quantized_weight())


def test_learned_rounding_keeps_grid_and_starts_at_the_nearest() -> None:
    module = QuantModule(nn.Conv2d(6, 5, 3), WEIGHT, ACT)
    module.find_weight_grid()
    before, delta = module.quantized_weight(), module.weight_quantizer.delta.clone()
    module.learn_rounding()
    assert isinstance(module.weight_quantizer, AdaRoundQuantizer)
    assert torch.equal(module.weight_quantizer.delta, delta)
    assert torch.equal(module.quantized_weight(), before)
    module.weight_quantizer.alpha.data.fill_(3)
    module.learn_rounding()  # does not start again
    assert (module.weight_quantizer.alpha == 3).all()


def test_rounding_quantizers_are_those_of_both_halves_once_learned() -> None:
    module = SplitQuantModule(nn.Conv2d(6, 5, 3), WEIGHT, ACT, split_channels=4)
    module.find_weight_grid()
    with pytest.raises(RuntimeError, match="learn_rounding"):
        module.rounding_quantizers()
    module.learn_rounding()
    (decoder, first), (encoder, second) = module.rounding_quantizers()
    assert (decoder, encoder) == (module.weight_quantizer, module.weight_quantizer_0)
    assert (first.shape[1], second.shape[1]) == (4, 2)


def test_what_was_baked_moves_and_is_not_saved() -> None:
    module = QuantModule(nn.Linear(6, 5), WEIGHT, ACT)
    module.find_weight_grid()
    module.bake()
    module.double()
    assert module.baked_weight.dtype == torch.float64
    assert set(module.state_dict()) == {
        "weight",
        "bias",
        *(
            f"{quantizer}.{name}"
            for quantizer in ("weight_quantizer", "act_quantizer")
            for name in ("delta", "zero_point")
        ),
    }


def test_other_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="got ConvTranspose2d"):
        QuantModule(nn.ConvTranspose2d(2, 2, 3), WEIGHT, ACT)
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        QuantModule(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), WEIGHT, ACT)


# Split shortcuts. The halves differ in width and in range, so that one taken for the other shows.

DECODER, ENCODER = 4, 6


def shortcut(**weight_options) -> tuple[nn.Conv2d, SplitQuantModule, Tensor]:
    layer = nn.Conv2d(DECODER + ENCODER, 5, 1)
    with torch.no_grad():
        layer.weight[:, DECODER:] *= 20
    x = torch.cat([torch.randn(3, DECODER, 4, 4) * 30, torch.randn(3, ENCODER, 4, 4) - 2], dim=1)
    module = SplitQuantModule(layer, WEIGHT | weight_options, ACT, split_channels=DECODER)
    module.find_weight_grid()
    return layer, module, x


def test_split_layer_computes_what_the_layer_did() -> None:
    layer, module, x = shortcut()
    assert torch.equal(module(x), layer(x))


@pytest.mark.parametrize("scale_method", ["max", "mse"])
def test_plain_weight_quantizer_has_the_decoders_channels(scale_method: str) -> None:
    layer, module, _ = shortcut(scale_method=scale_method)
    halves = layer.weight[:, :DECODER], layer.weight[:, DECODER:]
    for quantizer, half in zip((module.weight_quantizer, module.weight_quantizer_0), halves, strict=True):
        if scale_method == "max":
            lowest, highest = half.amin((1, 2, 3), keepdim=True), half.amax((1, 2, 3), keepdim=True)
            delta, zero = range_to_grid(lowest, highest, 4, symmetric=False)
        else:
            delta, zero = search_grid(half, 4, symmetric=False, channel_wise=True)
        assert torch.equal(quantizer.delta, delta)
        assert torch.equal(quantizer.zero_point, zero)
    if scale_method == "max":
        expected = torch.cat([nearest(half, 4) for half in halves], dim=1)
        torch.testing.assert_close(module.quantized_weight(), expected)


def test_plain_input_quantizer_has_the_decoders_channels() -> None:
    _, module, x = shortcut()
    module.set_quant_state(False, True)
    module(x)
    decoder, encoder = x[:, :DECODER], x[:, DECODER:]
    assert module.act_quantizer.delta.item() == pytest.approx((decoder.max() - decoder.min()).item() / 255)
    assert module.act_quantizer_0.delta.item() == pytest.approx(
        (encoder.max().clamp(min=0) - encoder.min()).item() / 255
    )
    expected = torch.cat([module.act_quantizer(decoder), module.act_quantizer_0(encoder)], dim=1)
    assert torch.equal(module.quantize_input(x), expected)


def test_split_layer_learns_both_halves() -> None:
    _, module, _ = shortcut()
    module.learn_rounding()
    assert module.weight_quantizer.alpha.shape == (5, DECODER, 1, 1)
    assert module.weight_quantizer_0.alpha.shape == (5, ENCODER, 1, 1)
    assert len(module.weight_quantizers()) == len(module.act_quantizers()) == 2


@pytest.mark.parametrize("channels", [0, 10, 11, -1])
def test_a_cut_must_lie_inside(channels: int) -> None:
    with pytest.raises(ValueError, match=f"split_channels={channels}: must lie inside the 10 input channels"):
        SplitQuantModule(nn.Conv2d(10, 5, 1), WEIGHT, ACT, split_channels=channels)


# Integers in, integers out.


def modules_with_codes() -> list[QuantModule]:
    plain = QuantModule(nn.Conv2d(6, 5, 3), WEIGHT, ACT)
    plain.find_weight_grid()
    made = [plain, shortcut()[1]]
    for module in made:
        module.learn_rounding()
        for quantizer, _ in module.weight_quantizers():
            quantizer.alpha.data = torch.randn_like(quantizer.alpha)
    return made


def parts_of(module: QuantModule) -> list[tuple[Tensor, Tensor, Tensor]]:
    quantizers = [quantizer for quantizer, _ in module.weight_quantizers()]
    return [(c, q.delta, q.zero_point.int()) for c, q in zip(module.codes(), quantizers, strict=True)]


@pytest.mark.parametrize("which", [0, 1], ids=["plain", "split"])
@pytest.mark.parametrize("keep", [False, True])
def test_codes_bring_the_quantized_weight_back(which: int, keep: bool) -> None:
    module = modules_with_codes()[which]
    expected, full, codes = module.quantized_weight(), module.weight.detach().clone(), module.codes()
    parts = parts_of(module)
    module.unbake()
    module.find_weight_grid()
    if not keep:
        module.weight.data = torch.randn_like(module.weight)  # is not needed
    module.load_codes(parts, keep_full_precision=keep)
    assert torch.equal(module.baked_weight, expected)
    assert torch.equal(module.quantized_weight(), expected)
    assert torch.equal(module.weight, full if keep else expected)
    assert all(torch.equal(a, b) for a, b in zip(module.codes(), codes, strict=True))
    assert all(isinstance(quantizer, AdaRoundQuantizer) == keep for quantizer, _ in module.weight_quantizers())


@pytest.mark.parametrize("which", [0, 1], ids=["plain", "split"])
def test_codes_of_other_weights_are_refused(which: int) -> None:
    module = modules_with_codes()[which]
    parts = parts_of(module)
    codes, delta, _ = parts[-1]
    steps = torch.where(codes[-1, -1] < 8, 3, -3)  # away from the grid's ends, where clamping would hide them
    with torch.no_grad():
        module.weight[-1, -1] += steps * delta[-1].squeeze()
    with pytest.raises(ValueError, match="not roundings of this full-precision"):
        module.load_codes(parts, keep_full_precision=True)


# An input split at zero.


def signed(method: str = "max", *, symmetric: bool = False) -> SignedInputQuantModule:
    layer = nn.Conv2d(3, 5, 3, padding=1)
    module = SignedInputQuantModule(layer, WEIGHT, ACT | {"scale_method": method, "symmetric": symmetric})
    module.set_quant_state(False, True)
    return module


def test_parts_of_a_split_input_add_up_to_it() -> None:
    module, x = signed(), torch.randn(2, 3, 8, 8)
    module.set_quant_state(False, False)
    assert torch.equal(module(x), nn.functional.conv2d(x, module.weight, module.bias, padding=1))
    assert torch.equal(x.clamp(max=0) + x.clamp(min=0), x)


@pytest.mark.parametrize("symmetric", [False, True])
def test_negative_and_positive_values_have_a_grid_each(symmetric: bool) -> None:
    """From zero to the end of their side, whatever the other quantizers are."""
    module, x = signed(symmetric=symmetric), torch.randn(2, 3, 8, 8)
    x[x > 0] *= 3
    got = module.quantize_input(x)
    below, above = -x.min() / 255, x.max() / 255
    torch.testing.assert_close(module.act_quantizer.delta.detach(), below)
    torch.testing.assert_close(module.act_quantizer_positive.delta.detach(), above)
    expected = torch.where(x < 0, (x / below).round() * below, (x / above).round() * above)
    torch.testing.assert_close(got, expected)
    assert (got == 0).sum() < 20  # few values round to the zero in the middle


def test_splitting_the_input_quarters_its_error() -> None:
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    whole = QuantModule(nn.Conv2d(3, 5, 3), WEIGHT, ACT)
    error = [(module.quantize_input(x) - x).square().mean().item() for module in (signed(), whole)]
    assert error[0] == pytest.approx(error[1] / 4, rel=0.05)


def test_an_input_of_one_sign_is_quantized_too() -> None:
    x = torch.rand(2, 3, 8, 8) + 1
    for method in ("max", "mse"):
        module = signed(method)
        torch.testing.assert_close(module.quantize_input(x), x, atol=x.max().item() / 255, rtol=0)
        assert module.quantize_input(x).isfinite().all()


def test_both_step_sizes_of_a_split_input_learn() -> None:
    module, x = signed(), torch.randn(2, 3, 8, 8)
    module(x)
    assert module.act_quantizers() == [module.act_quantizer, module.act_quantizer_positive]
    steps = [quantizer.delta.requires_grad_(True) for quantizer in module.act_quantizers()]
    gradients = torch.autograd.grad(module(x).square().sum(), steps)
    assert all(gradient != 0 for gradient in gradients)
