"""Quantized miniatures of every family: resumed from a published checkpoint, rounded to nearest, and unit by unit.

With quantized activations the outputs of whole networks prove little either way: a value on a rounding edge that falls
the other way spreads as far as a mistake does. There each unit is fed its stored input.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff import primitives
from qdiff.calibrate import calibrate
from qdiff.calibration_data import CalibrationSet
from qdiff.config import CalibrationConfig

from . import quantized
from .conftest import golden_keys, golden_tensors, relative_error
from .quantized import UNIT, WITH_ACTIVATIONS_END_TO_END, WITHOUT_ACTIVATIONS

resumed = cache(quantized.resumed)


def has_activations(folder: str, variant: str) -> bool:
    return quantized.facts(folder, variant)["act_bit"] is not None


def tolerance(folder: str, variant: str) -> float:
    return WITH_ACTIVATIONS_END_TO_END if has_activations(folder, variant) else WITHOUT_ACTIVATIONS


def variant_cases(tensor: str) -> list[Any]:
    return [quantized.case(*found) for found in quantized.variants_with(tensor)] or [quantized.NONE_OF_TWO]


@pytest.mark.parametrize(("folder", "variant"), variant_cases("resumed.output"))
def test_resumed_output(folder: str, variant: str) -> None:
    qnn, complete = resumed(folder, variant)
    assert complete == {unit.path for unit in qnn.units()}
    expected = golden_tensors(f"unets/{folder}/{variant}.safetensors")["resumed.output"]
    with torch.no_grad():
        got = qnn(*quantized.network_inputs(folder))
    assert relative_error(got, expected) < tolerance(folder, variant)


# Round to nearest.


def slipped_range_to_grid(
    lowest: Tensor, highest: Tensor, n_bits: int, *, symmetric: bool, always_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """As published: the range of positive values runs from min to max, with zero at the grid's lower end.

    The latent families' softmax maps are positive and never symmetric: theirs is like that in every variant.
    """
    if symmetric:
        return RIGHT_RANGE_TO_GRID(lowest, highest, n_bits, symmetric=True)
    delta = ((highest - lowest) / (2**n_bits - 1)).clamp(min=1e-8)
    zero_point = torch.zeros_like(delta) if always_zero else (-lowest.clamp(max=0) / delta).round()
    return delta, zero_point


RIGHT_RANGE_TO_GRID = primitives.range_to_grid


@pytest.mark.parametrize(("folder", "variant"), variant_cases("nearest.output"))
def test_nearest_output(folder: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_activations(folder, variant):
        monkeypatch.setattr(primitives, "range_to_grid", slipped_range_to_grid)
    qnn, complete = quantized.wrapped(folder, variant)
    if not complete:
        pytest.skip(f"the folder holds a part of {folder}'s weights only")
    x, t, *context = quantized.network_inputs(folder, "input.calibration_")
    config = CalibrationConfig(range_samples=len(x), range_order="first")
    calibrate(qnn, CalibrationSet(x, t, *context), config, mode="linear")
    with torch.no_grad():
        got = qnn(*quantized.network_inputs(folder))
    expected = golden_tensors(f"unets/{folder}/{variant}.safetensors")["nearest.output"]
    assert relative_error(got, expected) < tolerance(folder, variant)


# Unit by unit.


def stored_units(folder: str, variant: str) -> list[str]:
    """Paths of the units whose output is stored, without the leading ``model.``."""
    keys = golden_keys(f"unets/{folder}/{variant}.units.safetensors")
    return sorted(key.removeprefix("model.").removesuffix(".output") for key in keys if key.endswith(".output"))


def unit_cases() -> list[Any]:
    found = [
        quantized.case(folder, variant, path)
        for folder, variant in quantized.all_variants()
        for path in stored_units(folder, variant)
    ]
    return found or [quantized.NONE_OF_THREE]


@pytest.mark.parametrize(("folder", "variant", "path"), unit_cases())
def test_unit_output_for_the_stored_input(folder: str, variant: str, path: str) -> None:
    qnn, complete = resumed(folder, variant)
    assert path in complete, "its weights or its checkpoint entries are not stored"
    tensors = golden_tensors(f"unets/{folder}/{variant}.units.safetensors")
    inputs = quantized.unit_inputs(tensors, path)
    with torch.no_grad():
        got = qnn.model.get_submodule(path)(*inputs)
    assert relative_error(got, tensors[f"model.{path}.output"]) < UNIT


def whole_unit_cases() -> list[Any]:
    found = [
        quantized.case(folder, variant)
        for folder, variant in quantized.variants_with("resumed.output")
        if stored_units(folder, variant)
    ]
    return found or [quantized.NONE_OF_TWO]


@pytest.mark.parametrize(("folder", "variant"), whole_unit_cases())
def test_units_of_the_network_are_the_stored_ones(folder: str, variant: str) -> None:
    qnn, _ = resumed(folder, variant)
    assert sorted(unit.path for unit in qnn.units()) == stored_units(folder, variant)
