"""Learned rounding: initial alpha, soft and hard outputs, regulariser, temperature and loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff.primitives import annealed_beta, reconstruction_loss, rectified_sigmoid
from qdiff.quantizers import AdaRoundQuantizer, UniformAffineQuantizer, dequantize_codes, integer_codes

from .conftest import golden_json, golden_tensors, parameters
from .quantized import NONE_OF_TWO

RELATIVE = 1e-6
JSON, TENSORS = "adaround.json", "adaround.safetensors"


def section(name: str) -> Any:
    return (golden_json(JSON) or {}).get(name) or {}


def cases() -> list[Any]:
    return [pytest.param(case, id=case["case"]) for case in section("cases")]


def close(got: Tensor, expected: Tensor) -> None:
    """Relative to the largest value: soft outputs cross zero, where a relative tolerance of each means nothing."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= RELATIVE * expected.abs().max()


def learned(case: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[AdaRoundQuantizer, dict[str, Tensor]]:
    """The quantizer on the stored grid, and the case's tensors without their prefix."""
    prefix = case["case"] + "."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    grid = UniformAffineQuantizer(case["n_bits"], channel_wise=True)
    grid.set_grid(own["delta"], own["zero_point"])
    return AdaRoundQuantizer(grid, own["weight"]), own


@pytest.mark.parametrize("case", parameters(cases(), JSON))
def test_grid_of_the_weight(case: dict[str, Any]) -> None:
    _, own = learned(case, golden_tensors(TENSORS))
    grid = UniformAffineQuantizer(case["n_bits"], channel_wise=True)
    grid.find_grid(own["weight"])
    assert torch.equal(grid.zero_point, own["zero_point"])
    torch.testing.assert_close(grid.delta, own["delta"], rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("case", parameters(cases(), JSON))
def test_initial_rounding(case: dict[str, Any]) -> None:
    quantizer, own = learned(case, golden_tensors(TENSORS))
    close(quantizer.alpha, own["alpha"])
    assert torch.equal(quantizer(own["weight"]), own["hard_output"])
    quantizer.soft = True
    close(quantizer(own["weight"]), own["soft_output"])


@pytest.mark.parametrize("case", parameters(cases(), JSON))
def test_perturbed_rounding(case: dict[str, Any]) -> None:
    quantizer, own = learned(case, golden_tensors(TENSORS))
    quantizer.alpha += own["perturbation"]
    assert not torch.equal(own["hard_output_perturbed"], own["hard_output"])
    assert torch.equal(quantizer(own["weight"]), own["hard_output_perturbed"])
    codes = integer_codes(quantizer, own["weight"])
    assert torch.equal(dequantize_codes(codes, own["delta"], own["zero_point"]), own["hard_output_perturbed"])
    close(rectified_sigmoid(quantizer.alpha), own["soft_targets_perturbed"])
    quantizer.soft = True
    close(quantizer(own["weight"]), own["soft_output_perturbed"])


def regularisers() -> list[Any]:
    return [
        pytest.param(case, beta, id=f"{case['case']}-beta{beta}")
        for case in section("cases")
        for beta in case["regulariser_perturbed"]
    ]


@pytest.mark.parametrize(("case", "beta"), regularisers() or [NONE_OF_TWO])
def test_regulariser_of_the_perturbed_rounding(case: dict[str, Any], beta: str) -> None:
    quantizer, own = learned(case, golden_tensors(TENSORS))
    quantizer.alpha += own["perturbation"]
    assert quantizer.regularizer(float(beta)).item() == pytest.approx(case["regulariser_perturbed"][beta], rel=RELATIVE)


@pytest.mark.parametrize("iteration", parameters(list(section("temperature").get("at", {})), "temperatures"))
def test_temperature(iteration: str) -> None:
    schedule = section("temperature")
    ends = {name: schedule[name] for name in ("start", "end", "warmup")}
    got = annealed_beta(int(iteration), schedule["iterations"], **ends)
    assert got == pytest.approx(schedule["at"][iteration], rel=RELATIVE)


@pytest.mark.parametrize("name", parameters(list(section("reconstruction_loss")), "losses"))
def test_reconstruction_loss(name: str) -> None:
    tensors = golden_tensors(TENSORS)
    got = reconstruction_loss(tensors["loss.pred"], tensors["loss.target"], float(name.removeprefix("p")))
    assert got.item() == pytest.approx(section("reconstruction_loss")[name], rel=RELATIVE)
