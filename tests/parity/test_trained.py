"""The published code's result on a trained model: resumed here, it makes the stored outputs, whole and unit by unit.

And a guard of quality, on inputs from the same folder: a short calibration of a few units must bring their error down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.pretrained import load_weights
from qdiff.calibration_data import load_calibration_set
from qdiff.capture import PairedCapture, UnitData
from qdiff.checkpoint import load_quantized
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.quant_model import QuantModel, Unit
from qdiff.reconstruction import fixed_batch_loss, reconstruct_activations, reconstruct_weights

from .conftest import golden_json, golden_keys, golden_path, golden_tensors, parameters, relative_error
from .quantized import UNIT, WITHOUT_ACTIVATIONS, unit_inputs
from .test_unet_full_precision import unet_from_golden

FOLDER = "trained"
QUANT = QuantConfig(weight_bit=4, act_bit=8, quant_act=True, a_sym=True, split=True)  # as its checkpoint was made
ROWS_A_STEP = 8
OUTPUT_ERROR_WITHIN = 0.05
BATCH = 32
UNITS = f"{FOLDER}/w4a8.units.safetensors"


def trained() -> list[Any]:
    return [FOLDER] if golden_json(f"{FOLDER}/config.json") else []


def full_precision_model() -> torch.nn.Module:
    model = unet_from_golden(golden_json(f"{FOLDER}/config.json")).eval()
    load_weights(golden_path(f"{FOLDER}/model.safetensors"), model)
    return model


@cache
def resumed() -> QuantModel:
    qnn = QuantModel.from_config(unet_from_golden(golden_json(f"{FOLDER}/config.json")).eval(), QUANT)
    load_quantized(golden_path(f"{FOLDER}/published_format_w4a8.pth"), qnn, quant_act=True)
    return qnn


def evaluate(qnn: QuantModel, tensors: dict[str, Tensor], *, act_quant: bool) -> Tensor:
    batches = zip(tensors["x"].split(BATCH), tensors["t"].split(BATCH), strict=True)
    with torch.no_grad(), qnn.quant_state(True, act_quant):
        return torch.cat([qnn(x, t) for x, t in batches])


def output_error(output: Tensor, full_precision: Tensor) -> Tensor:
    """‖quantized − full‖² / ‖full‖² of each step's rows."""
    output, full_precision = (x.double().view(-1, ROWS_A_STEP, *x.shape[1:]) for x in (output, full_precision))
    return (output - full_precision).square().flatten(1).sum(1) / full_precision.square().flatten(1).sum(1)


@pytest.mark.parametrize("folder", parameters(trained(), "trained model"))
def test_weights_only_output(folder: str) -> None:
    tensors = golden_tensors(f"{folder}/evaluation.safetensors")
    assert relative_error(evaluate(resumed(), tensors, act_quant=False), tensors["w4a32"]) < WITHOUT_ACTIVATIONS


@pytest.mark.parametrize("folder", parameters(trained(), "trained model"))
def test_output_error_with_activations_step_by_step(folder: str) -> None:
    tensors = golden_tensors(f"{folder}/evaluation.safetensors")
    got = output_error(evaluate(resumed(), tensors, act_quant=True), tensors["full_precision"])
    expected = output_error(tensors["w4a8"], tensors["full_precision"])
    torch.testing.assert_close(got, expected, rtol=OUTPUT_ERROR_WITHIN, atol=0)


def stored_units() -> list[str]:
    return sorted(k.removeprefix("model.").removesuffix(".output") for k in golden_keys(UNITS) if k.endswith(".output"))


@pytest.mark.parametrize("path", parameters(stored_units(), "units of the trained model"))
def test_unit_output_for_the_stored_input(path: str) -> None:
    tensors = golden_tensors(UNITS)
    with torch.no_grad():
        got = resumed().model.get_submodule(path)(*unit_inputs(tensors, path))
    assert relative_error(got, tensors[f"model.{path}.output"]) < UNIT


@pytest.mark.parametrize("name", parameters([UNITS] if stored_units() else [], "units of the trained model"))
def test_units_of_the_network_are_the_stored_ones(name: str) -> None:
    assert sorted(unit.path for unit in resumed().units()) == stored_units()


# A guard of quality: a short calibration of a layer, of attention and of a block with a split shortcut. Activations
# have 4 bits in it: with 8 there is little to learn.

STEPS, SAMPLES, LEARNED_ON = 4, 24, 16  # of a step's samples the last ones show whether what was learned holds for them
SHORT = CalibrationConfig(iters=80, iters_a=80, batch_size=16, weight_lr=1e-2, lr=1e-2)
WEIGHTS_LEFT, ACTIVATIONS_LEFT = 0.96, 0.88  # shares of the loss; a short calibration leaves 0.94 and 0.82 or less


def by_sample(data: UnitData) -> tuple[UnitData, UnitData]:
    """Samples to learn from, and others of the same timesteps."""
    learned = torch.arange(len(data)) % SAMPLES < LEARNED_ON
    halves = (which.nonzero().squeeze(1) for which in (learned, ~learned))
    first, second = (UnitData(*data.rows(index, data.target.device)) for index in halves)
    return first, second


def share_left(unit: Unit, learn: Callable[[], Any], judge: UnitData, *, act_quant: bool, p: float) -> float:
    """The loss on other samples after learning, as a share of that before."""
    unit.module.set_quant_state(True, act_quant)
    before = fixed_batch_loss(unit, judge, p=p)
    learn()
    unit.module.set_quant_state(True, act_quant)
    return fixed_batch_loss(unit, judge, p=p) / before


@pytest.mark.parametrize("folder", parameters(trained(), "trained model"))
def test_short_calibration_brings_the_error_of_other_samples_down(folder: str) -> None:
    model = full_precision_model()
    shape = (model.in_channels, model.image_size, model.image_size)
    data = load_calibration_set(
        golden_path(f"{folder}/calibration_set.pt"), cali_st=STEPS, cali_n=SAMPLES, image_shape=shape
    )
    qnn = QuantModel.from_config(model, QuantConfig(weight_bit=4, act_bit=4, quant_act=True, split=True))
    qnn.find_weight_grids()
    chosen = ("conv_in", "mid.attn_1", f"up.{len(model.up) - 1}.block.0")
    capture = PairedCapture(qnn, (data.x, data.t), act_quant=False, chunk=len(data))
    for stage in capture.stages():
        if stage.path not in chosen:
            continue
        (unit,) = qnn.units_of(stage)
        learned, judge = by_sample(capture.data(unit, capture.targets(stage)))
        weights = partial(reconstruct_weights, unit, learned, SHORT, seed=0)
        assert share_left(unit, weights, judge, act_quant=False, p=2.0) < WEIGHTS_LEFT, stage.path
        unit.module.set_quant_state(True, True)
        unit.module(*learned.inputs)  # sets the ranges
        steps = partial(reconstruct_activations, unit, learned, SHORT, seed=0)
        assert share_left(unit, steps, judge, act_quant=True, p=SHORT.p) < ACTIVATIONS_LEFT, stage.path
        if stage.path == chosen[-1]:
            return
