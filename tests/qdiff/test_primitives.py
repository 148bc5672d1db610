"""The arithmetic of fake quantization, against closed forms and a brute-force search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdiff import primitives
from qdiff.primitives import (
    annealed_beta,
    fake_quantize,
    integer_bounds,
    observed_range,
    range_to_grid,
    reconstruction_loss,
    reconstruction_slope,
    rectified_sigmoid,
    rounding_regularizer,
    rounding_variable,
    search_grid,
)

from .conftest import properties

BITS = st.integers(2, 16)
VALUES = st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=2, max_size=30).map(torch.tensor)


@pytest.mark.parametrize("n_bits", range(2, 17))
def test_integer_bounds(n_bits: int) -> None:
    assert integer_bounds(n_bits, symmetric=False) == (0, 2**n_bits - 1)
    assert integer_bounds(n_bits, symmetric=True) == (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)


def grid_of(x: Tensor, n_bits: int, symmetric: bool) -> tuple[Tensor, Tensor, float, float]:
    """δ, z and the shifted bounds of the min-max grid."""
    delta, zero = range_to_grid(*observed_range(x, channel_wise=False), n_bits, symmetric=symmetric)
    lo, hi = integer_bounds(n_bits, symmetric)
    return delta, zero, lo - zero.item(), hi - zero.item()


@properties
@given(VALUES, BITS, st.booleans())
def test_min_max_grid_is_within_half_a_step_everywhere(x: Tensor, n_bits: int, symmetric: bool) -> None:
    delta, _, lo, hi = grid_of(x, n_bits, symmetric)
    got = fake_quantize(x, delta, lo, hi)
    slack = 1e-6 * x.abs().max()  # of float32 itself
    assert ((got - x).abs() <= delta / 2 + slack).all()


@properties
@given(VALUES, BITS, st.booleans())
def test_quantizing_twice_changes_nothing(x: Tensor, n_bits: int, symmetric: bool) -> None:
    delta, _, lo, hi = grid_of(x, n_bits, symmetric)
    once = fake_quantize(x, delta, lo, hi)
    assert torch.equal(fake_quantize(once, delta, lo, hi), once)


@properties
@given(VALUES, st.floats(1, 100, width=32), BITS, st.booleans())
def test_integers_stay_on_the_grid(x: Tensor, beyond: float, n_bits: int, symmetric: bool) -> None:
    delta, zero, lo, hi = grid_of(x, n_bits, symmetric)
    got = fake_quantize(x * beyond, delta, lo, hi)
    integers = (got.double() / delta.double()).round() + zero
    smallest, largest = integer_bounds(n_bits, symmetric)
    assert integers.min() >= smallest
    assert integers.max() <= largest
    assert torch.equal(((integers - zero) * delta.double()).float(), got)


@properties
@given(VALUES, BITS, st.booleans())
def test_zero_stays_zero(x: Tensor, n_bits: int, symmetric: bool) -> None:
    delta, _, lo, hi = grid_of(x, n_bits, symmetric)
    assert fake_quantize(torch.zeros(1), delta, lo, hi).item() == 0


def test_values_beyond_the_grid_are_clamped_to_its_ends() -> None:
    x = torch.tensor([-100.0, -0.6, 0.4, 100.0])
    assert fake_quantize(x, torch.tensor(1.0), -2, 5).tolist() == [-2, -1, 0, 5]


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert fake_quantize(x, torch.tensor(1.0), -8, 7).tolist() == [0, 2, 2, 0, -2]


def test_input_is_left_alone() -> None:
    x = torch.randn(5)
    before = x.clone()
    fake_quantize(x, torch.tensor(0.3), -2, 3)
    assert torch.equal(x, before)


# Gradients.


@properties
@given(VALUES, st.floats(0.125, 8, width=32), st.integers(-20, 0), st.integers(1, 20))
def test_gradients_are_those_of_learned_step_sizes(x: Tensor, step: float, lo: int, hi: int) -> None:
    """LSQ: inside the grid d/dx = 1 and d/dδ = round(x/δ) - x/δ; outside d/dx = 0 and d/dδ the bound."""
    x, delta = x.clone().requires_grad_(), torch.tensor(step, requires_grad=True)
    upstream = torch.linspace(-1, 2, len(x))
    fake_quantize(x, delta, lo, hi).backward(upstream)

    scaled = x.detach().double() / step
    rounded = (x.detach() / step).round().double()
    inside = (rounded >= lo) & (rounded <= hi)
    expected = torch.where(inside, rounded - scaled, rounded.clamp(lo, hi)) * upstream
    torch.testing.assert_close(x.grad, inside * upstream)
    assert delta.grad.item() == pytest.approx(expected.sum().item(), rel=1e-4, abs=1e-5 * scaled.abs().max().item())


@properties
@given(VALUES, st.floats(0.125, 8, width=32))
def test_with_and_without_gradients_the_same_bits(x: Tensor, step: float) -> None:
    delta = torch.tensor(step)
    with_gradients = fake_quantize(x.clone().requires_grad_(), delta, -7, 8)
    assert torch.equal(with_gradients.detach(), fake_quantize(x, delta, -7, 8))


@pytest.mark.parametrize("as_tensors", [False, True])
def test_gradients_at_the_ends_of_the_grid(as_tensors: bool) -> None:
    """Where torch.clamp would decide, and releases of torch differ: these values are rounded, not clamped."""
    lo, hi = (torch.tensor([-2.0]), torch.tensor([1.0])) if as_tensors else (-2, 1)
    x = torch.tensor([-2.5, -2.0, -1.75, 1.25, 1.5, 1.75], requires_grad=True)  # 1.5 is rounded to 2 and clamped
    delta = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, delta, lo, hi).backward(torch.tensor([1.0, 10, 100, 1000, 10000, 100000]))
    assert x.grad.tolist() == [1, 10, 100, 1000, 0, 0]
    assert delta.grad.item() == 0.5 - 25 - 250 + 10000 + 100000


@pytest.mark.parametrize("wanted", ["x", "delta"])
def test_gradients_of_one_are_those_of_both(wanted: str) -> None:
    values = {"x": torch.randn(5), "delta": torch.tensor(0.4)}
    both = {name: value.clone().requires_grad_() for name, value in values.items()}
    fake_quantize(**both, lo=-3, hi=3).square().sum().backward()
    values[wanted].requires_grad_()
    fake_quantize(**values, lo=-3, hi=3).square().sum().backward()
    assert torch.equal(values[wanted].grad, both[wanted].grad)


def test_gradients_of_a_step_size_for_each_channel() -> None:
    x, delta = torch.randn(4, 3, 2, 2), torch.rand(4, 1, 1, 1) + 0.1
    together = delta.clone().requires_grad_()
    fake_quantize(x, together, -3, 3).square().sum().backward()
    for channel in range(4):
        own = delta[channel].clone().requires_grad_()
        fake_quantize(x[channel], own, -3, 3).square().sum().backward()
        torch.testing.assert_close(together.grad[channel], own.grad)


# Ranges.


def test_observed_range_of_tensor_and_channels() -> None:
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(torch.stack(observed_range(x, channel_wise=False)), torch.stack([x.min(), x.max()]))
    lowest, highest = observed_range(x, channel_wise=True)
    assert lowest.shape == highest.shape == (4, 1, 1, 1)
    assert torch.equal(lowest, x.amin((1, 2, 3), keepdim=True))
    assert torch.equal(highest, x.amax((1, 2, 3), keepdim=True))


@pytest.mark.parametrize(
    ("lowest", "highest", "options", "delta", "zero"),
    [
        (-1.0, 2.0, {"symmetric": False}, 0.2, 5),
        (1.0, 3.0, {"symmetric": False}, 0.2, 0),  # widened down to zero: the top is not clipped
        (-3.0, -1.0, {"symmetric": False}, 0.2, 15),
        (-1.4, 0.7, {"symmetric": True}, 0.2, 0),
        (-0.7, 1.4, {"symmetric": True}, 0.2, 0),
        (0.1, 3.0, {"symmetric": False, "always_zero": True}, 0.2, 0),
        (-1.0, 3.0, {"symmetric": False, "always_zero": True}, 0.2, 0),
        (0.0, 0.0, {"symmetric": False}, 1e-8, 0),
    ],
)
def test_range_to_grid_of_four_bits(lowest, highest, options, delta, zero) -> None:
    got = range_to_grid(torch.tensor(lowest), torch.tensor(highest), 4, **options)
    assert got[0].item() == pytest.approx(delta, rel=1e-6)
    assert got[1].item() == zero


def brute_force(x: np.ndarray, n_bits: int, symmetric: bool, always_zero: bool) -> list[tuple[float, float, float]]:
    """``(score, δ, z)`` of all 80 shrunk ranges, in float64 apart from δ itself."""
    lo, hi = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if symmetric else (0, 2**n_bits - 1)
    found = []
    for percent in range(100, 20, -1):
        lowest, highest = x.min() * percent / 100, x.max() * percent / 100
        if symmetric:
            delta, zero = max(abs(lowest), abs(highest)) / hi, 0.0
        elif always_zero:
            delta, zero = highest / hi, 0.0
        else:
            delta = (highest - lowest) / hi
            zero = float(np.rint(-lowest / delta))
        delta = float(np.float32(delta))
        integers = np.clip(np.rint(x / delta) + zero, lo, hi)
        found.append((np.mean(np.abs((integers - zero) * delta - x) ** 2.4), delta, zero))
    return found


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "always_zero"])
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (6, 40), (3, 20, 1)])
def test_search_finds_what_brute_force_finds(n_bits: int, kind: str, shape: tuple[int, ...]) -> None:
    options = {"symmetric": kind == "symmetric", "always_zero": kind == "always_zero"}
    x = torch.randn(shape) ** 3 + 0.2
    x = x.abs() if kind == "always_zero" else x
    delta, zero = search_grid(x, n_bits, channel_wise=True, **options)
    assert delta.shape == zero.shape == (shape[0],) + (1,) * (len(shape) - 1)
    for row, d, z in zip(x.flatten(1).double().numpy(), delta.flatten(), zero.flatten(), strict=True):
        candidates = brute_force(row, n_bits, **options)
        score, *_ = min(candidates, key=lambda found: found[0])
        nearest = min(candidates, key=lambda found: abs(found[1] - d.item()))
        assert nearest[1:] == (pytest.approx(d.item(), rel=1e-6), z.item())
        assert nearest[0] == pytest.approx(score, rel=1e-5)
    whole = search_grid(x, n_bits, channel_wise=False, **options)
    as_one_row = search_grid(x.reshape(1, -1), n_bits, channel_wise=True, **options)
    assert [w.item() for w in whole] == [w.item() for w in as_one_row]
    assert whole[0].shape == ()


def test_search_beats_min_max_where_there_is_an_outlier() -> None:
    x = torch.cat([torch.randn(200), torch.tensor([30.0])])
    delta, _ = search_grid(x, 4, symmetric=False, channel_wise=False)
    assert delta < range_to_grid(x.min(), x.max(), 4, symmetric=False)[0]


def test_search_keeps_the_first_of_equals() -> None:
    """-1 lies on the grid of δ = 1 and, as its lowest integer, on that of δ = 1/2, half the range."""
    delta, _ = search_grid(torch.tensor([-1.0, 0.0]), 2, symmetric=True, channel_wise=False)
    assert delta.item() == 1


def test_search_does_not_widen_the_range_to_zero() -> None:
    x = 5 + torch.rand(100)
    delta, zero = search_grid(x, 4, symmetric=False, channel_wise=False)
    assert delta.item() <= (x.max() - x.min()).item() / 15 * 1.0001
    assert zero.item() < 0


def test_search_in_slices_is_the_same_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch space is that of the slices, not of the tensor."""
    x = torch.randn(7, 9)
    whole = search_grid(x, 4, symmetric=False, channel_wise=True)
    search, rows = primitives._search_rows, []

    def watched(part: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        rows.append(len(part))
        return search(part, *args)

    monkeypatch.setattr(primitives, "_search_rows", watched)
    monkeypatch.setattr(primitives, "_SEARCH_BYTES", 2 * 9 * 4)
    sliced = search_grid(x, 4, symmetric=False, channel_wise=True)
    assert rows == [2, 2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


@pytest.mark.parametrize("together", [1, 3 * 7 * 9, 2**16])
def test_candidates_tried_together_are_the_same_search(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, three at a time and all 80; ties go to the first of them, of a row with NaN none is taken."""
    x = torch.randn(7, 9)
    x[2] = 0
    x[4, 3] = math.nan
    x[5] = torch.arange(-8, 1) / 8  # many grids of 8 bits hold these exactly
    for n_bits, symmetric in ((4, False), (8, True)):
        whole = search_grid(x, n_bits, symmetric=symmetric, channel_wise=True)
        with monkeypatch.context() as patch:
            patch.setattr(primitives, "_SEARCH_TOGETHER", together)
            found = search_grid(x, n_bits, symmetric=symmetric, channel_wise=True)
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))
        assert (found[0][4], found[1][4]) == (1, 0)
    assert torch.equal(found[0][2], torch.tensor([primitives.SMALLEST_DELTA]))


def test_constant_tensors_get_a_usable_grid() -> None:
    for value in (0.0, 2.5):
        delta, zero = search_grid(torch.full((1, 6), value), 8, symmetric=False, channel_wise=True)
        assert (delta > 0).all()
        assert torch.isfinite(zero).all()


# Learned rounding.


def test_rectified_sigmoid_closed_form() -> None:
    alpha = torch.linspace(-8, 8, 101)
    expected = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in alpha.tolist()]
    torch.testing.assert_close(rectified_sigmoid(alpha), torch.tensor(expected), rtol=0, atol=1e-6)
    assert rectified_sigmoid(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


@properties
@given(
    st.floats(
        0,
        0.9999,
    )
)
def test_rounding_variable_inverts_the_rectified_sigmoid(fraction: float) -> None:
    alpha = rounding_variable(torch.tensor(fraction))
    assert rectified_sigmoid(alpha).item() == pytest.approx(fraction, abs=1e-6)


@pytest.mark.parametrize("beta", [20.0, 7.5, 2.0])
def test_regularizer_closed_form(beta: float) -> None:
    assert rounding_regularizer(torch.tensor([-9.0, 9.0]), beta).item() == 0
    assert rounding_regularizer(torch.zeros(3), beta).item() == pytest.approx(3)
    alpha = rounding_variable(torch.tensor([0.1, 0.8]))
    assert rounding_regularizer(alpha, beta).item() == pytest.approx(2 - 0.8**beta - 0.6**beta, rel=1e-5)


def test_regularizer_pushes_away_from_a_half() -> None:
    alpha = rounding_variable(torch.tensor([0.3, 0.7])).requires_grad_()
    rounding_regularizer(alpha, 2.0).backward()
    assert alpha.grad[0] > 0 > alpha.grad[1]  # descent lowers the first and raises the second


@properties
@given(st.integers(1, 5000), st.fractions(0, Fraction(9, 10)), st.data())
def test_beta_is_flat_then_linear(iterations: int, warmup: Fraction, data) -> None:
    iteration = data.draw(st.integers(0, iterations))
    got = annealed_beta(iteration, iterations, start=20, end=2, warmup=float(warmup))
    first = warmup * iterations
    expected = 20 if iteration < first else 20 - 18 * (iteration - first) / (iterations - first)
    assert got == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (2, 3, 4, 4)])
def test_reconstruction_loss_sums_channels_and_averages_the_rest(p: float, shape: tuple[int, ...]) -> None:
    prediction, target = torch.randn(shape), torch.randn(shape)
    difference = np.abs(prediction.double().numpy() - target.double().numpy()) ** p
    expected = difference.sum() / (difference.size / shape[1])
    assert reconstruction_loss(prediction, target, p).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4, 3.0])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (2, 3, 4, 5)])
def test_reconstruction_slope_is_the_gradient_of_the_loss(p: float, shape: tuple[int, ...]) -> None:
    prediction, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
    expected = reconstruction_loss(prediction, target, p)
    (gradient,) = torch.autograd.grad(expected, prediction)
    value, slope = reconstruction_slope(prediction.detach(), target, p)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(slope, gradient)


def test_reconstruction_is_quadratic_unless_told_otherwise() -> None:
    prediction, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(reconstruction_loss(prediction, target), reconstruction_loss(prediction, target, 2.0))
    for got, expected in zip(
        reconstruction_slope(prediction, target), reconstruction_slope(prediction, target, 2.0), strict=True
    ):
        assert torch.equal(got, expected)


def unlike_tensors() -> Iterator[Tensor]:
    """Of 8192 values: bounded and unbounded, one-sided, with outliers, constant, sparse, and with what is no number."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(8192, generator=generator)
    yield from (normal, normal**3, 5 * torch.rand(8192, generator=generator) + 3, F.silu(3 * normal))
    yield from (normal.view(64, 128).softmax(1), torch.ones(8192), normal[:16].repeat(512))
    yield normal * (torch.rand(8192, generator=generator) > 0.99)
    for odd in (50.0, math.nan, math.inf, -math.inf):
        yield torch.cat([normal[:5], torch.tensor([odd]), normal[6:]])


@pytest.mark.parametrize("n_bits", [4, 8, 16])
@pytest.mark.parametrize(("symmetric", "always_zero"), [(False, False), (True, False), (False, True)])
def test_leaving_out_candidates_leaves_the_best(
    n_bits: int, symmetric: bool, always_zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid found with a part of the values looked at first is that of all candidates, and found with less work."""
    work, scores = [], primitives._scores

    def counted(rows: Tensor, delta: Tensor, *rest: object) -> Tensor:
        work[-1] += rows.numel() * len(delta)
        return scores(rows, delta, *rest)

    monkeypatch.setattr(primitives, "_scores", counted)
    for x in unlike_tensors():
        found = []
        for least in (x.numel(), x.numel() + 1):
            monkeypatch.setattr(primitives, "_SEARCH_PRUNED", least)
            work.append(0)
            found.append(search_grid(x, n_bits, symmetric=symmetric, channel_wise=False, always_zero=always_zero))
        pruned, whole = found
        assert all(torch.equal(a, b) or bool(a.isnan() & b.isnan()) for a, b in zip(pruned, whole, strict=True))
    assert n_bits == 4 or sum(work[::2]) < 0.85 * sum(work[1::2])  # coarse grids are more alike
    assert all(less < 1.1 * all_ for less, all_ in zip(work[::2], work[1::2], strict=True))
