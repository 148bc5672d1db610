"""The whole calibration: its phases in their order, what each of them sees, and what it leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff.calibrate import UnitProgress, calibrate, find_act_ranges, range_rows
from qdiff.calibration_data import CalibrationSet
from qdiff.capture import PairedCapture
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.quant_model import QuantModel
from qdiff.quantizers import UniformAffineQuantizer

from .conftest import SMALL, calibration_set, noisy_inputs, wrapped

pipeline = importlib.import_module("qdiff.calibrate")  # qdiff.calibrate itself is the function of that name

SAMPLES = 10
W4A4 = QuantConfig(weight_bit=4, act_bit=4, quant_act=True, split=True)
SHORT = CalibrationConfig(iters=2, iters_a=2, batch_size=4, range_samples=6, seed=5)


def run(config: QuantConfig = W4A4, calibration: CalibrationConfig = SHORT, **options: Any) -> QuantModel:
    qnn = wrapped(config, **SMALL)
    calibrate(qnn, calibration_set(SAMPLES), calibration, **options)
    return qnn


def state(qnn: QuantModel) -> dict[str, Tensor]:
    return copy.deepcopy(qnn.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Order.


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a calibration does, in its order; the reconstructions do nothing else."""
    seen: list[str] = []

    def watch(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(QuantModel, "find_weight_grids", "weight grids")
    watch(pipeline, "find_act_ranges", "activation ranges")
    watch(pipeline, "update_running_ranges", "running ranges")
    for name in ("reconstruct_weights", "reconstruct_activations"):
        original = getattr(pipeline, name)

        def watched(unit, data, config, *, seed, original=original, name=name):
            seen.append(f"{name.removeprefix('reconstruct_')} of {unit.path}")
            return original(unit, data, config, seed=seed)

        monkeypatch.setattr(pipeline, name, watched)
    return seen


def unit_events(phase: str) -> list[str]:
    return [f"{phase} of {unit.path}" for unit in wrapped(**SMALL).units()]


def test_weights_of_all_units_then_ranges_then_steps_of_all_units(events: list[str]) -> None:
    run()
    assert events == ["weight grids", *unit_events("weights"), "activation ranges", *unit_events("activations")]


def test_running_ranges_come_before_the_steps(events: list[str]) -> None:
    run(calibration=dataclasses.replace(SHORT, running_stat=True))
    middle = ["activation ranges", "running ranges"]
    assert events == ["weight grids", *unit_events("weights"), *middle, *unit_events("activations")]


def test_weights_only(events: list[str]) -> None:
    run(QuantConfig(4))
    assert events == ["weight grids", *unit_events("weights")]


def test_weights_that_are_done_are_left_alone(events: list[str]) -> None:
    qnn = run(QuantConfig(4, 4, split=True))
    codes = [layer.codes() for layer in qnn.layers().values()]
    events.clear()
    qnn.config = W4A4
    calibrate(qnn, calibration_set(SAMPLES), SHORT, weights_done=True)
    assert events == ["activation ranges", *unit_events("activations")]
    for layer, before in zip(qnn.layers().values(), codes, strict=True):
        assert all(map(torch.equal, layer.codes(), before))


@pytest.mark.parametrize("quant_act", [False, True])
def test_linear_mode_only_rounds(events: list[str], quant_act: bool) -> None:
    qnn = run(dataclasses.replace(W4A4, quant_act=quant_act), mode="linear")
    assert events == ["weight grids"] + ["activation ranges"] * quant_act
    expected = wrapped(W4A4, **SMALL)
    expected.find_weight_grids()
    for layer, own in zip(qnn.layers().values(), expected.layers().values(), strict=True):
        assert torch.equal(layer.effective_weight(), own.quantized_weight())
    assert not qnn.weights_calibrated()


def test_linear_weights_need_no_samples() -> None:
    qnn = wrapped(QuantConfig(4), **SMALL)
    assert calibrate(qnn, None, SHORT, mode="linear") == []
    assert all(layer.baked_weight is not None for layer in qnn.layers().values())


@pytest.mark.parametrize(("config", "mode"), [(QuantConfig(4), "qdiff"), (W4A4, "linear"), (W4A4, "qdiff")])
def test_what_needs_samples_says_so(config: QuantConfig, mode: str) -> None:
    with pytest.raises(ValueError, match="calibration samples are needed"):
        calibrate(wrapped(config, **SMALL), None, SHORT, mode=mode)


# What each phase sees.


def test_each_phase_captures_from_the_network_as_quantized_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = []

    class Watched(PairedCapture):
        def __init__(self, qnn: QuantModel, inputs: tuple[Tensor, ...], *, act_quant: bool, **options: Any):
            phases.append(act_quant)
            assert all(map(torch.equal, inputs, noisy_inputs(SAMPLES)))
            super().__init__(qnn, inputs, act_quant=act_quant, **options)

    monkeypatch.setattr(pipeline, "PairedCapture", Watched)
    run()
    assert phases == [False, True]


def test_units_are_calibrated_on_inputs_from_quantized_units_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unit's data, compared with hooks on whole networks at the moment it is calibrated."""
    data = calibration_set(SAMPLES)
    checked = []
    for name, act_quant in (("reconstruct_weights", False), ("reconstruct_activations", True)):
        original = getattr(pipeline, name)

        def watched(unit, unit_data, config, *, seed, original=original, act_quant=act_quant):
            seen = {}
            for key, state in (("quantized", (True, act_quant)), ("full", (False, False))):
                hook = unit.module.register_forward_hook(
                    lambda module, args, output, key=key: seen.update({key: (args, output)})
                )
                with torch.no_grad(), qnn.quant_state(*state):
                    qnn(data.x, data.t)
                hook.remove()
            assert all(map(torch.equal, unit_data.inputs, seen["quantized"][0])), unit.path
            assert torch.equal(unit_data.target, seen["full"][1]), unit.path
            checked.append(unit.path)
            return original(unit, unit_data, config, seed=seed)

        monkeypatch.setattr(pipeline, name, watched)
    qnn = wrapped(W4A4, **SMALL)
    calibrate(qnn, data, SHORT)
    assert checked == [unit.path for unit in qnn.units()] * 2


@pytest.mark.parametrize("order", ["first", "random"])
def test_ranges_come_from_some_samples(order: str) -> None:
    config = dataclasses.replace(SHORT, range_order=order)
    rows = range_rows(SAMPLES, config)
    assert len(rows) == len(rows.unique()) == 6
    assert rows.max() < SAMPLES
    assert (rows.tolist() == list(range(6))) == (order == "first")
    assert torch.equal(rows, range_rows(SAMPLES, config))
    assert len(range_rows(4, config)) == 4
    qnn = run(calibration=config, mode="linear")
    x = noisy_inputs(SAMPLES)[0][rows]
    assert qnn.layers()["conv_in"].act_quantizer.delta.item() == pytest.approx((x.max() - x.min()).item() / 15)


def test_ranges_of_another_seed_come_from_other_samples() -> None:
    other = dataclasses.replace(SHORT, seed=6)
    assert range_rows(SAMPLES, SHORT).tolist() != range_rows(SAMPLES, other).tolist()


def test_a_quantizer_that_sees_nothing_is_an_error() -> None:
    qnn = wrapped(W4A4, **SMALL)
    qnn.model.act_quantizer_q = UniformAffineQuantizer()
    with pytest.raises(RuntimeError, match="no activation reached the quantizer act_quantizer_q"):
        find_act_ranges(qnn, noisy_inputs(2))


# Running statistics.


@pytest.mark.parametrize("softmax_only", [False, True])
def test_running_ranges_reach_the_quantizers(softmax_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    updated: list[UniformAffineQuantizer] = []
    update = UniformAffineQuantizer.update_range
    monkeypatch.setattr(UniformAffineQuantizer, "update_range", lambda self, x: (updated.append(self), update(self, x)))
    config = dataclasses.replace(SHORT, running_stat=True, rs_sm_only=softmax_only)
    qnn = run(calibration=config, mode="linear")
    chosen = {
        path: q for path, q in qnn.act_quantizers().items() if path.endswith("act_quantizer_w") or not softmax_only
    }
    assert {id(quantizer) for quantizer in updated} == {id(quantizer) for quantizer in chosen.values()}
    assert "mid.attn_1.act_quantizer_w" in chosen
    batches = [4, 4, 2]  # the last partial one too
    assert len(updated) == len(batches) * len(chosen)
    assert not any(quantizer._forward_pre_hooks for quantizer in qnn.act_quantizers().values())


def test_running_range_of_the_input_is_the_average_over_batches() -> None:
    qnn = run(calibration=dataclasses.replace(SHORT, running_stat=True), mode="linear")
    parts = noisy_inputs(SAMPLES)[0].split(4)
    lowest, highest = parts[0].min(), parts[0].max()
    for part in parts[1:]:
        lowest, highest = 0.95 * lowest + 0.05 * part.min(), 0.95 * highest + 0.05 * part.max()
    quantizer = qnn.layers()["conv_in"].act_quantizer
    assert quantizer.delta.item() == pytest.approx((highest - lowest).item() / 15)
    assert quantizer.zero_point.item() == round((-lowest / quantizer.delta).item())


def test_only_softmax_needs_running_statistics() -> None:
    with pytest.raises(ValueError, match="rs_sm_only needs running_stat"):
        CalibrationConfig(rs_sm_only=True)


# What comes out.


def test_reports_and_progress() -> None:
    progress: list[UnitProgress] = []
    qnn = wrapped(W4A4, **SMALL)
    reports = calibrate(qnn, calibration_set(SAMPLES), SHORT, on_unit=progress.append)
    assert [p.report for p in progress] == reports
    assert [p.index for p in progress] == list(range(len(reports)))
    assert {p.total for p in progress} == {len(reports)} == {2 * len(qnn.units())}
    for report, unit in zip(reports, qnn.units() * 2, strict=True):
        assert (report.name, report.kind, report.parameters) == (unit.path, unit.kind, unit.parameter_count())
        assert report.iterations == 2
        assert 0 <= report.loss_after < float("inf")
        assert report.loss_before > 0
        assert report.seconds > 0
    assert [report.phase for report in reports] == ["weights"] * len(qnn.units()) + ["activations"] * len(qnn.units())


@pytest.mark.parametrize("quant_act", [False, True])
def test_afterwards_the_network_is_quantized_as_asked(quant_act: bool) -> None:
    qnn = run(dataclasses.replace(W4A4, quant_act=quant_act))
    flags = {(layer.use_weight_quant, layer.use_act_quant) for layer in qnn.layers().values()}
    assert flags == {(True, quant_act)}
    assert qnn.weights_calibrated()
    for layer in qnn.layers().values():
        assert torch.equal(layer.baked_weight, layer.quantized_weight())


def test_a_seed_fixes_everything() -> None:
    torch.manual_seed(1)
    first = state(run())
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = wrapped(W4A4, **SMALL)
    again.train()  # dropout must stay off all the same
    calibrate(again, calibration_set(SAMPLES), SHORT)
    assert all(module.training for module in again.model.children())
    assert same(first, state(again))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not same(first, state(run(calibration=dataclasses.replace(SHORT, seed=6))))


def test_calibrating_again_starts_anew() -> None:
    config = dataclasses.replace(SHORT, running_stat=True)
    qnn = run(calibration=config)
    first = state(qnn)
    calibrate(qnn, calibration_set(SAMPLES), config)
    assert same(first, state(qnn))


def test_units_draw_from_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    original = pipeline._unit_seed
    monkeypatch.setattr(pipeline, "_unit_seed", lambda *args: (seeds.append(original(*args)), seeds[-1])[1])
    qnn = run()
    assert len(set(seeds)) == len(seeds) == 2 * len(qnn.units())


def test_full_precision_weights_are_kept() -> None:
    """They are the targets of a second phase, and part of the published format."""
    qnn = run()
    fresh = wrapped(W4A4, **SMALL)
    for layer, own in zip(qnn.layers().values(), fresh.layers().values(), strict=True):
        assert torch.equal(layer.weight, own.weight)


def test_context_goes_to_the_network_too() -> None:
    x, t = noisy_inputs(2)
    context = torch.randn(2, 3, 4)
    assert len(CalibrationSet(x, t).inputs()) == 2
    assert CalibrationSet(x, t, context).inputs()[2] is context


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"iters": -1}, "iters=-1"),
        ({"iters_a": -1}, "iters_a=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"range_samples": 0}, "range_samples=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"p": -1.0}, "p=-1.0"),
        ({"warmup": 1.0}, "warmup=1.0"),
    ],
)
def test_impossible_calibrations_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**params)
