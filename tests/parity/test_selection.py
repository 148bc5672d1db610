"""Which samples of a calibration set are taken, and in which order: the cases of ``selection.json``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff.calibration_data import get_train_samples, load_calibration_set

from .conftest import golden_json, parameters

CASES = (golden_json("selection.json") or {"cases": []})["cases"]
SAMPLES = 8  # samples a step of the sets that the file describes


def case_name(case: dict[str, Any] | None) -> str:
    return "absent" if case is None else "{nsteps}steps-st{cali_st}-n{cali_n}-cond{cond:d}".format(**case)


def described_set(case: dict[str, Any]) -> dict[str, list[Tensor]] | Tensor:
    """The set that the file's ``data`` field puts into words."""
    offsets = torch.arange(SAMPLES)
    if case["cali_st"] == 1:
        return offsets.float().reshape(SAMPLES, 1, 1, 1)
    steps = range(case["nsteps"])
    return {
        "xs": [(i + offsets / 100).reshape(SAMPLES, 1, 1, 1) for i in steps],
        "ts": [torch.full((SAMPLES,), 1000.0 - i) for i in steps],
        "cs": [torch.full((SAMPLES, 1, 1), float(i)) for i in steps],
        "ucs": [torch.full((SAMPLES, 1, 1), -float(i)) for i in steps],
    }


def expected_of(case: dict[str, Any]) -> list[Tensor]:
    names = ("selected", "timesteps") if "selected" in case else ("x", "t", "c")
    return [torch.tensor(case[name]) for name in names if name in case]


@pytest.mark.parametrize("case", parameters(CASES, "selection.json"), ids=case_name)
def test_published_interface(case):
    args = SimpleNamespace(custom_steps=case["nsteps"], **{k: case[k] for k in ("cali_st", "cali_n", "cond")})
    got = get_train_samples(args, described_set(case))
    expected = expected_of(case)
    assert len(got) == len(expected)
    for tensor, values in zip(got, expected, strict=True):
        assert torch.equal(tensor.flatten(), values)


@pytest.mark.parametrize("case", parameters(CASES, "selection.json"), ids=case_name)
def test_loading_selects_the_same(case, tmp_path):
    path = tmp_path / "set.pt"
    torch.save(described_set(case), path)
    loaded = load_calibration_set(
        path, cali_st=case["cali_st"], cali_n=case["cali_n"], image_shape=(1, 1, 1), conditional=case["cond"]
    )
    got = [loaded.x, loaded.t] + ([] if loaded.context is None else [loaded.context])
    for tensor, values in zip(got, expected_of(case), strict=True):
        assert torch.equal(tensor.flatten(), values)
