"""The published names for one unit: they do what the whole calibration does to that unit."""

from __future__ import annotations

import importlib

import pytest
import torch

import qdiff
from qdiff.calibrate import calibrate, find_act_ranges
from qdiff.calibration_data import CalibrationSet
from qdiff.config import CalibrationConfig
from qdiff.published import unit_of
from qdiff.reconstruction import reconstruct_weights
from tests.qdiff.conftest import SMALL, noisy_inputs, wrapped


def test_the_names_are_importable() -> None:
    for name in ("block_reconstruction", "layer_reconstruction", "resume_cali_model", "get_train_samples"):
        assert callable(getattr(qdiff, name))


def test_block_reconstruction_lowers_the_weight_loss_of_that_block_only() -> None:
    qnn = wrapped(**SMALL)
    qnn.find_weight_grids()
    untouched = {path: type(layer.weight_quantizer) for path, layer in qnn.layers().items()}
    report = qdiff.block_reconstruction(qnn, qnn.model.mid.block_1, noisy_inputs(12), batch_size=5, iters=30, lr=1e-3)
    assert report.name == "mid.block_1"
    assert report.phase == "weights"
    changed = {path for path, layer in qnn.layers().items() if type(layer.weight_quantizer) is not untouched[path]}
    assert changed == {path for path in untouched if path.startswith("mid.block_1.")}


def test_it_is_the_same_optimisation_as_in_a_calibration() -> None:
    """The first unit's input is the same however it is captured, so its rounding must be too."""
    x, t = noisy_inputs(12)
    options = CalibrationConfig(iters=20, batch_size=4, seed=3)
    whole, single = wrapped(**SMALL), wrapped(**SMALL)
    seeds = []

    def spy(unit, data, config, *, seed):
        seeds.append(seed)
        return reconstruct_weights(unit, data, config, seed=seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("qdiff.calibrate"), "reconstruct_weights", spy)
        whole.config = type(whole.config)(**whole.config.to_dict() | {"quant_act": False})
        calibrate(whole, CalibrationSet(x, t), options)
    single.find_weight_grids()
    first = single.units()[0].module
    qdiff.layer_reconstruction(single, first, (x, t), batch_size=4, iters=20, seed=seeds[0])
    learned = whole.units()[0].module.weight_quantizer.alpha
    assert torch.equal(first.weight_quantizer.alpha, learned)


def test_activations() -> None:
    qnn = wrapped(**SMALL)
    qnn.find_weight_grids()
    qnn.bake()
    inputs = noisy_inputs(12)
    find_act_ranges(qnn, inputs)
    before = {path: q.delta.clone() for path, q in qnn.act_quantizers().items()}
    report = qdiff.block_reconstruction(qnn, qnn.model.mid.block_2, inputs, 4, 10, act_quant=True, lr=1e-4)
    assert report.phase == "activations"
    moved = {path for path, q in qnn.act_quantizers().items() if not torch.equal(q.delta, before[path])}
    assert moved == {path for path in before if path.startswith("mid.block_2.")}


@pytest.mark.parametrize("option", [{"opt_mode": "fisher_diag"}, {"asym": False}])
def test_options_that_would_be_ignored_are_refused(option: dict) -> None:
    qnn = wrapped(**SMALL)
    with pytest.raises(ValueError, match="only opt_mode='mse' with asym=True"):
        qdiff.block_reconstruction(qnn, qnn.model.mid.block_1, noisy_inputs(2), **option)


def test_a_module_that_is_no_unit_is_named() -> None:
    qnn = wrapped(**SMALL)
    assert unit_of(qnn, qnn.model.mid.attn_1).path == "mid.attn_1"
    with pytest.raises(ValueError, match="GroupNorm is not a unit"):
        unit_of(qnn, qnn.model.norm_out)
