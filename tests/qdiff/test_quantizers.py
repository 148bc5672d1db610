"""Quantizers: when a grid is set, how it moves, saves and loads, and how learned rounding starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff.config import QuantConfig, QuantizerConfig
from qdiff.quantizers import (
    AdaRoundQuantizer,
    UniformAffineQuantizer,
    check_grid,
    dequantize_codes,
    integer_codes,
)

from .conftest import properties


def set_to(delta: float, zero: float, n_bits: int = 4, **options: Any) -> UniformAffineQuantizer:
    quantizer = UniformAffineQuantizer(n_bits, **options)
    quantizer.set_grid(torch.tensor(delta), torch.tensor(zero))
    return quantizer


# The grid.


def test_grid_comes_from_the_first_tensor_and_stays() -> None:
    quantizer = UniformAffineQuantizer(4)
    assert not quantizer.ready
    first = torch.linspace(-1, 2, 50)
    quantizer(first)
    assert quantizer.ready
    assert quantizer.delta.item() == pytest.approx(0.2)
    assert quantizer.zero_point.item() == 5
    assert quantizer(torch.tensor([-100.0, 100.0])).tolist() == pytest.approx([-1, 2])


def test_a_grid_that_was_set_is_not_searched_for() -> None:
    quantizer = set_to(0.5, 3)
    assert quantizer(torch.tensor([-9.0, 0.6, 9.0])).tolist() == [-1.5, 0.5, 6]


def test_set_grid_copies() -> None:
    delta = torch.tensor(0.5)
    quantizer = UniformAffineQuantizer(4)
    quantizer.set_grid(delta, torch.tensor(0.0))
    delta.fill_(7)
    assert quantizer.delta.item() == 0.5


@pytest.mark.parametrize("scale_method", ["max", "mse"])
def test_channels_have_grids_of_their_own(scale_method: str) -> None:
    x = torch.randn(3, 4, 2, 2) * torch.tensor([1.0, 10, 100]).view(3, 1, 1, 1)
    whole = UniformAffineQuantizer(4, channel_wise=True, scale_method=scale_method)
    got = whole(x)
    assert whole.delta.shape == whole.zero_point.shape == (3, 1, 1, 1)
    for channel in range(3):
        assert torch.equal(got[channel], UniformAffineQuantizer(4, scale_method=scale_method)(x[channel]))


def test_symmetric_grid_is_signed_and_has_no_zero_point() -> None:
    quantizer = UniformAffineQuantizer(4, symmetric=True)
    quantizer(torch.tensor([-0.7, 0.3]))
    assert quantizer.delta.item() == pytest.approx(0.1)
    assert quantizer.zero_point.item() == 0
    assert quantizer(torch.tensor([-9.0, 9.0])).tolist() == pytest.approx([-0.8, 0.7])


@pytest.mark.parametrize("scale_method", ["max", "mse"])
def test_always_zero_grid_is_unsigned_without_zero_point(scale_method: str) -> None:
    quantizer = UniformAffineQuantizer(4, always_zero=True, scale_method=scale_method)
    x = torch.linspace(0.2, 1.5, 40)
    quantizer(x)
    assert quantizer.zero_point.item() == 0
    assert quantizer(torch.tensor([-1.0])).item() == 0
    if scale_method == "max":
        assert quantizer.delta.item() == pytest.approx(0.1)


def test_sixteen_bits_leave_a_map_almost_alone() -> None:
    x = torch.rand(1000)
    assert (UniformAffineQuantizer(16, always_zero=True)(x) - x).abs().max() < 1e-5


# Moving averages.


@pytest.mark.parametrize("symmetric", [False, True])
def test_running_range_averages_minimum_and_maximum(symmetric: bool) -> None:
    quantizer = UniformAffineQuantizer(8, symmetric=symmetric)
    batches = [torch.randn(20) * scale for scale in (1, 5, 2)]
    lowest, highest = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        lowest, highest = 0.95 * lowest + 0.05 * batch.min(), 0.95 * highest + 0.05 * batch.max()
    for batch in batches:
        quantizer.update_range(batch)
    expected = torch.maximum(-lowest, highest) / 127 if symmetric else (highest - lowest) / 255
    torch.testing.assert_close(quantizer.delta, expected)
    assert quantizer.zero_point.item() == (0 if symmetric else round((-lowest / expected).item()))


def test_a_new_grid_forgets_the_average() -> None:
    quantizer = UniformAffineQuantizer(8)
    quantizer.update_range(torch.tensor([-100.0, 100.0]))
    quantizer.find_grid(torch.tensor([-1.0, 1.0]))
    quantizer.update_range(torch.tensor([-1.0, 1.0]))
    assert quantizer.delta.item() == pytest.approx(2 / 255)


# As state.


def test_state_is_step_size_and_zero_point() -> None:
    assert set(UniformAffineQuantizer().state_dict()) == {"delta", "zero_point"}
    learnable = UniformAffineQuantizer(leaf_param=True)
    assert [name for name, _ in learnable.named_parameters()] == ["delta"]
    assert not learnable.delta.requires_grad
    assert not list(UniformAffineQuantizer().parameters())


@pytest.mark.parametrize("leaf_param", [False, True])
@pytest.mark.parametrize("channel_wise", [False, True])
def test_grid_moves_with_the_module(leaf_param: bool, channel_wise: bool) -> None:
    quantizer = UniformAffineQuantizer(4, leaf_param=leaf_param, channel_wise=channel_wise)
    x = torch.randn(3, 5)
    expected = quantizer(x)
    quantizer.double()
    got = quantizer(x.double())
    assert got.dtype == quantizer.delta.dtype == quantizer.zero_point.dtype == torch.float64
    torch.testing.assert_close(got.float(), expected)
    assert quantizer.to("meta")(x.double().to("meta")).is_meta  # nothing of it stayed behind


def test_a_copy_is_independent() -> None:
    quantizer = set_to(0.5, 3)
    other = copy.deepcopy(quantizer)
    other.set_grid(torch.tensor(2.0), torch.tensor(0.0))
    assert quantizer(torch.tensor([0.6])).item() == 0.5
    assert other(torch.tensor([1.6])).item() == 2


@pytest.mark.parametrize("leaf_param", [False, True])
@pytest.mark.parametrize("channel_wise", [False, True])
def test_state_dict_round_trip(leaf_param: bool, channel_wise: bool) -> None:
    options = {"leaf_param": leaf_param, "channel_wise": channel_wise}
    x = torch.randn(3, 5)
    quantizer = UniformAffineQuantizer(4, **options)
    expected = quantizer(x)
    fresh = UniformAffineQuantizer(4, **options, grid_shape=(3, 1) if channel_wise else ())
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.ready
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("ready", [False, True])
def test_a_scalar_may_be_stored_with_an_axis(shape: tuple[int, ...], ready: bool) -> None:
    """Published files hold both; what is loaded has no axis, whatever the quantizer held before."""
    quantizer = set_to(2.0, 1.0) if ready else UniformAffineQuantizer(4)
    quantizer.load_state_dict({"delta": torch.full(shape, 0.5), "zero_point": torch.full(shape, 3.0)})
    assert quantizer.delta.shape == quantizer.zero_point.shape == ()
    assert quantizer(torch.tensor([-9.0, 9.0])).tolist() == [-1.5, 6]


def test_a_grid_of_another_shape_is_refused() -> None:
    quantizer = UniformAffineQuantizer(4, channel_wise=True, grid_shape=(3, 1))
    whole = UniformAffineQuantizer(4)
    for refusing in (quantizer, whole):
        with pytest.raises(RuntimeError, match="size mismatch"):
            refusing.load_state_dict({"delta": torch.ones(4, 1), "zero_point": torch.zeros(4, 1)})


def test_a_grid_that_is_missing_is_named() -> None:
    quantizer = UniformAffineQuantizer(4)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "zero_point"'):
        quantizer.load_state_dict({"delta": torch.tensor(0.5)})
    other = UniformAffineQuantizer(4)
    other.load_state_dict({}, strict=False)
    assert not other.ready


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"n_bits": 8}, "8 bits, asymmetric, max"),
        ({"n_bits": 4, "symmetric": True, "channel_wise": True}, "4 bits, symmetric, max, per channel"),
        ({"n_bits": 16, "always_zero": True, "scale_method": "mse"}, "16 bits, z = 0, mse"),
    ],
)
def test_a_printed_network_says_what_its_grids_are(options: dict[str, Any], shown: str) -> None:
    assert UniformAffineQuantizer(**options).extra_repr() == shown


# Learned rounding.


def learned(weight: torch.Tensor, n_bits: int = 4) -> tuple[UniformAffineQuantizer, AdaRoundQuantizer]:
    grid = UniformAffineQuantizer(n_bits, channel_wise=True)
    grid.find_grid(weight)
    return grid, AdaRoundQuantizer(grid, weight)


@properties
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_rounding_starts_at_the_weight_and_hard_at_the_nearest(seed: int, n_bits: int) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    grid, quantizer = learned(weight, n_bits)
    assert torch.equal(quantizer(weight), grid(weight))
    quantizer.soft = True
    inside = (weight / grid.delta + grid.zero_point).clamp(*grid.bounds)  # the ends may lie just beyond the grid
    torch.testing.assert_close(quantizer(weight), (inside - grid.zero_point) * grid.delta, rtol=1e-5, atol=1e-6)


@properties
@given(st.lists(st.integers(-14, 15), min_size=3, max_size=20), st.integers(-3, 3))
def test_ties_go_the_way_of_rounding_to_nearest(halves: list[int], exponent: int) -> None:
    """On a grid of step 1 (times a power of two) half of these lie between two integers."""
    weight = torch.tensor([[-7.0, 8.0, *(half / 2 for half in halves)]]) * 2.0**exponent
    grid, quantizer = learned(weight)
    assert grid.delta.item() == 2.0**exponent
    assert torch.equal(quantizer(weight), grid(weight))
    assert torch.equal(integer_codes(quantizer, weight), integer_codes(grid, weight))


def test_only_rounding_learns() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    _, quantizer = learned(weight)
    assert [name for name, _ in quantizer.named_parameters()] == ["alpha"]
    assert set(quantizer.state_dict()) == {"alpha", "delta", "zero_point"}
    assert not quantizer.alpha.requires_grad
    quantizer.soft = True
    quantizer.alpha.requires_grad_(True)
    quantizer(weight).sum().backward()
    assert not weight.grad.any()  # floor() passes nothing on
    sigmoid = torch.sigmoid(quantizer.alpha.detach())
    integers = (weight / quantizer.delta + quantizer.zero_point).detach()
    inside = (integers > 0) & (integers < 15)
    torch.testing.assert_close(
        quantizer.alpha.grad[inside], (quantizer.delta * 1.2 * sigmoid * (1 - sigmoid))[inside], rtol=1e-4, atol=1e-6
    )
    assert inside.float().mean() > 0.5


def test_soft_rounding_is_clamped_to_the_grid() -> None:
    grid = UniformAffineQuantizer(2, channel_wise=True, grid_shape=(1, 1))
    grid.set_grid(torch.ones(1, 1), torch.ones(1, 1))
    weight = torch.tensor([[-5.0, 0.25, 9.0]])
    quantizer = AdaRoundQuantizer(grid, weight)
    assert quantizer(weight).tolist() == [[-1, 0, 2]]
    quantizer.soft = True
    assert quantizer(weight).tolist() == [[-1, pytest.approx(0.25), 2]]


@properties
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from(["max", "mse"]), st.booleans())
def test_codes_stand_for_the_weight_exactly(seed: int, n_bits: int, scale_method: str, rounding: bool) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) + 0.5
    grid = UniformAffineQuantizer(n_bits, channel_wise=True, scale_method=scale_method)
    grid.find_grid(weight)
    quantizer = AdaRoundQuantizer(grid, weight) if rounding else grid
    if rounding:
        quantizer.alpha.data.neg_()
    codes = integer_codes(quantizer, weight)
    assert codes.dtype == torch.uint8
    assert codes.max().item() < 2**n_bits
    assert torch.equal(dequantize_codes(codes, grid.delta, grid.zero_point), quantizer(weight))


@pytest.mark.parametrize("step", [0.1, 0.3, 1 / 127])
def test_codes_of_weights_on_the_grid(step: float) -> None:
    """Divided by the step they are whole numbers after rounding only; codes are of the same division as the weights."""
    grid = set_to(step, 128, n_bits=8, channel_wise=True)
    weight = torch.arange(-128, 128) * torch.tensor(step)
    quantizer = AdaRoundQuantizer(grid, weight)
    codes = integer_codes(quantizer, weight)
    assert torch.equal(codes, torch.arange(256).to(torch.uint8))
    assert torch.equal(dequantize_codes(codes, grid.delta, grid.zero_point), quantizer(weight))


def test_only_the_published_rounding_mode() -> None:
    grid = set_to(1.0, 0.0)
    AdaRoundQuantizer(grid, torch.zeros(2), "learned_hard_sigmoid")
    with pytest.raises(ValueError, match="learned_hard_sigmoid"):
        AdaRoundQuantizer(grid, torch.zeros(2), "nearest")


# Grids from files.


@pytest.mark.parametrize(
    ("delta", "zero_point"),
    [
        (torch.tensor(0.5), torch.tensor(3.0)),
        (torch.tensor(0.5), torch.tensor([3])),  # with an axis, as integers
        (torch.ones(1000, 1), torch.zeros(1000, 1)),
        (torch.tensor([[1e-3], [1e3]]).half(), torch.tensor([[-200.0], [2.0**31 - 1]], dtype=torch.float64)),
    ],
)
def test_grids_that_files_may_hold(delta: torch.Tensor, zero_point: torch.Tensor) -> None:
    check_grid(delta, zero_point)


@pytest.mark.parametrize(
    ("delta", "zero_point", "message"),
    [
        ([1.0, 1.0], [0.0], "2 step sizes and 1 zero points"),
        ([1.0], [0.0, 0.0], "1 step sizes and 2 zero points"),
        ([1], [0.0], "step sizes are torch.int64"),
        ([1.0], [True], "zero points torch.bool"),
        ([1.0], [1j], "zero points torch.complex64"),
        ([1.0, 0.0], [0.0, 0.0], "the step size 0.0 is not"),
        ([1.0, -0.5], [0.0, 0.0], "the step size -0.5 is not"),
        ([float("inf"), 1.0], [0.0, 0.0], "the step size inf is not"),
        ([1.0, 2.0, float("nan")], [0.0, 0.0, 0.0], "the step size nan is not"),
        (-2.0, 0.0, "the step size -2.0 is not"),
        ([1.0, 1.0], [0.0, 0.5], "the zero point 0.5 is no whole number"),
        ([1.0, 1.0], [0.0, float("nan")], "the zero point nan is"),
        ([1.0, 1.0], [float("-inf"), 0.0], "the zero point -inf is"),
        ([1.0, 1.0], [0.0, 2.0**31], "the zero point 2147483648.0 is"),
        (1.0, 2.0**40, "the zero point 1099511627776.0 is"),
        (1.0, -(2.0**31), "the zero point -2147483648.0 is"),
    ],
)
def test_grids_that_are_none(delta: Any, zero_point: Any, message: str) -> None:
    """The message names the first value that is wrong."""
    with pytest.raises(ValueError, match=message):
        check_grid(torch.tensor(delta), torch.tensor(zero_point))


# Their configs.


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_bits": 1}, "n_bits=1"),
        ({"n_bits": 17}, "n_bits=17"),
        ({"scale_method": "median"}, "choose one of max, mse"),
        ({"n_bit": 4}, "unknown quantizer parameter 'n_bit'; known: .*n_bits"),
    ],
)
def test_impossible_quantizers_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerConfig.from_params(params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"weight_bit": 1}, "weight_bit=1: choose one of 2, "),
        ({"weight_bit": 16}, "weight_bit=16"),
        ({"act_bit": 12}, "act_bit=12.*8, 16"),
        ({"sm_abit": 32}, "sm_abit=32"),
        ({"act_range": "min"}, "act_range='min'"),
    ],
)
def test_impossible_quantizations_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**params)
