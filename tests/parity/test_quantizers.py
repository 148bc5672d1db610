"""The uniform quantizer, case by case, against the stored step sizes, zero points and outputs.

The published code has slips that are put right here and not matched. Those cases are tested twice: the stored numbers
against the slip written out below, so that the case is known to be read as it was meant; and the quantizer against
the rule that it documents, written out below by other means than it uses.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qdiff.quantizers import UniformAffineQuantizer

from .conftest import golden_json, golden_keys, golden_tensors, parameters

RELATIVE = 1e-6
JSON, TENSORS = "quantizers.json", "quantizers.safetensors"
SLIPS = (r".*\.mse\.sym", r"(positive|softmax)\..*\.max\.asym(\..*)?")
RUNNING = r"running\.(asym|sym)\.(\d+)\.delta"
RUNNING_BITS = 8  # what the file does not say

Grid = tuple[Tensor, Tensor, Tensor]
"""delta, zero point, output"""


def cases(slipped: bool) -> list[Any]:
    content = golden_json(JSON) or {"cases": []}
    chosen = [case for case in content["cases"] if is_slip(case["case"]) == slipped]
    return [pytest.param(case, id=case["case"]) for case in chosen]


def is_slip(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in SLIPS)


def quantizer_of(case: dict[str, Any]) -> UniformAffineQuantizer:
    names = ("n_bits", "symmetric", "channel_wise", "scale_method", "always_zero")
    return UniformAffineQuantizer(**{name: case[name] for name in names})


def assert_grid(got: Grid, expected: Grid) -> None:
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=RELATIVE, atol=0)
    torch.testing.assert_close(got[2], expected[2], rtol=RELATIVE, atol=0)


def stored(tensors: dict[str, Tensor], name: str) -> Grid:
    return tensors[f"{name}.delta"], tensors[f"{name}.zero_point"], tensors[f"{name}.output"]


def compute(quantizer: UniformAffineQuantizer, x: Tensor) -> Grid:
    output = quantizer(x)
    return quantizer.delta.detach(), quantizer.zero_point, output


@pytest.mark.parametrize("case", parameters(cases(slipped=False), JSON))
def test_quantizer_matches(case: dict[str, Any]) -> None:
    tensors = golden_tensors(TENSORS)
    assert_grid(compute(quantizer_of(case), tensors[case["input"]]), stored(tensors, case["case"]))


# Where the published code slips.


@pytest.mark.parametrize("case", parameters(cases(slipped=True), JSON))
def test_stored_numbers_are_those_of_the_slip(case: dict[str, Any]) -> None:
    tensors = golden_tensors(TENSORS)
    slip = slipped_search if case["scale_method"] == "mse" else slipped_min_max
    got = by_channel(slip, tensors[case["input"]], case)
    assert_grid(got, stored(tensors, case["case"]))


@pytest.mark.parametrize("case", parameters(cases(slipped=True), JSON))
def test_documented_rule_instead_of_the_slip(case: dict[str, Any]) -> None:
    x = golden_tensors(TENSORS)[case["input"]]
    rule = documented_search if case["scale_method"] == "mse" else documented_min_max
    assert_grid(compute(quantizer_of(case), x), by_channel(rule, x, case))


def by_channel(rule, x: Tensor, case: dict[str, Any]) -> Grid:
    """Apply a rule for flat arrays to the whole tensor or to each slice of its first axis."""
    if not case["channel_wise"]:
        delta, zero, output = rule(x.numpy().ravel(), case)
        return torch.tensor(delta), torch.tensor(zero), torch.from_numpy(output).view(x.shape)
    columns = zip(*(rule(row.numpy().ravel(), case) for row in x), strict=True)
    deltas, zeros, outputs = (np.stack(column) for column in columns)
    shape = (-1,) + (1,) * (x.dim() - 1)
    return (
        torch.from_numpy(deltas).view(shape),
        torch.from_numpy(zeros).view(shape),
        torch.from_numpy(outputs).view(x.shape),
    )


Flat = tuple[np.float32, np.float32, np.ndarray]


def rounded(x: np.ndarray, delta: np.float32, zero: float, lo: int, hi: int) -> np.ndarray:
    return ((np.clip(np.rint(x / delta) + np.float32(zero), lo, hi) - np.float32(zero)) * delta).astype(np.float32)


def slipped_min_max(x: np.ndarray, case: dict[str, Any]) -> Flat:
    """From min to max although zero lies outside, with zero at the grid's lower end: the top is clipped."""
    top = 2 ** case["n_bits"] - 1
    delta = np.float32((float(x.max()) - float(x.min())) / top)
    return delta, np.float32(0), rounded(x, delta, 0, 0, top)


def documented_min_max(x: np.ndarray, case: dict[str, Any]) -> Flat:
    """The range of positive values starts at zero and nothing is clipped."""
    top = 2 ** case["n_bits"] - 1
    assert x.min() >= 0
    delta = x.max() / np.float32(top)
    return delta, np.float32(0), rounded(x, delta, 0, 0, top)


def slipped_search(x: np.ndarray, case: dict[str, Any]) -> Flat:
    """Searched as if unsigned on a grid of half the size; the result used on the signed grid, zero point and all."""
    half = 2 ** (case["n_bits"] - 1)
    best = (np.inf, np.float32(1), 0)
    for step in range(80):
        lowest, highest = float(x.min()) * (1 - step * 0.01), float(x.max()) * (1 - step * 0.01)
        delta = np.float32((highest - lowest) / (2 * half - 1))
        zero = np.rint(np.float32(-lowest) / delta)
        error = np.abs(x - rounded(x, delta, zero, 0, half - 2))
        best = min(best, (float(np.mean(error**2.4)), delta, zero), key=lambda found: found[0])
    _, delta, zero = best
    return delta, np.float32(zero), rounded(x, delta, zero, -half, half - 1)


def documented_search(x: np.ndarray, case: dict[str, Any]) -> Flat:
    """Every shrunk range is tried on the symmetric grid on which the result is used."""
    half = 2 ** (case["n_bits"] - 1)
    best = (np.inf, np.float32(1))
    for step in range(80):
        delta = np.float32(np.abs(x).max() * (1 - step * 0.01) / (half - 1))
        error = np.abs(x - rounded(x, delta, 0, -half, half - 1))
        best = min(best, (float(np.mean(error**2.4)), delta), key=lambda found: found[0])
    return best[1], np.float32(0), rounded(x, best[1], 0, -half, half - 1)


# Moving averages of the range.


def running_kinds() -> list[str]:
    return sorted({found.group(1) for key in golden_keys(TENSORS) if (found := re.fullmatch(RUNNING, key))})


@pytest.mark.parametrize("kind", parameters(running_kinds(), "running ranges"))
def test_running_range_batch_by_batch(kind: str) -> None:
    tensors = golden_tensors(TENSORS)
    quantizer = UniformAffineQuantizer(RUNNING_BITS, symmetric=kind == "sym", scale_method="max")
    compared = 0
    for number in range(sum(key.startswith("running.input.") for key in tensors)):
        batch = tensors[f"running.input.{number}"]
        quantizer.update_range(batch)
        if f"running.{kind}.{number}.delta" in tensors:
            assert_grid(compute(quantizer, batch), stored(tensors, f"running.{kind}.{number}"))
            compared += 1
    assert compared == sum(key.startswith(f"running.{kind}.") and key.endswith(".delta") for key in tensors)
