"""The optimisation of one unit: what it learns, what it leaves alone and what it gives back."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import statistics
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.capture import PairedCapture, UnitData, unit_data
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.graphs import holding_garbage
from qdiff.learners import Progress, Schedule, rounding_progress, rounding_schedule
from qdiff.pinned import Arena
from qdiff.places import RING_STRETCHES, STRETCH, Collector, Scratch
from qdiff.primitives import SMALLEST_DELTA
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel, Unit
from qdiff.quantizers import AdaRoundQuantizer
from qdiff.reconstruction import (
    UnitReport,
    _Stage,
    capturing,
    draw_batches,
    fixed_batch_loss,
    reconstruct_activations,
    reconstruct_weights,
    standing_for_many,
    timestep_weights,
)

from .conftest import noisy_inputs, with_grids

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BLOCK, ATTENTION = "up.0.block.0", "mid.attn_1"  # the block's shortcut is split
COARSE = QuantConfig(weight_bit=3, act_bit=4, quant_act=True, split=True)  # there is something to learn
FAST = CalibrationConfig(iters=60, iters_a=60, batch_size=8, weight_lr=3e-2, lr=4e-3)


def unit_and_data(path: str, samples: int = 20, *, act_quant: bool = False) -> tuple[QuantModel, Unit, UnitData]:
    qnn = with_grids(COARSE)
    capture = PairedCapture(qnn, noisy_inputs(samples), act_quant=act_quant, chunk=samples)
    for stage in capture.stages():
        for unit in qnn.units_of(stage):
            if unit.path == path:
                return qnn, unit, capture.data(unit, capture.targets(stage))
    raise AssertionError(path)


def alphas(unit: Unit) -> dict[str, Tensor]:
    return {
        f"{index}{suffix}": getattr(layer, f"weight_quantizer{suffix}").alpha.detach().clone()
        for index, layer in enumerate(unit.layers())
        for suffix, _ in layer.parts()
    }


def steps(unit: Unit) -> list[float]:
    return [quantizer.delta.item() for quantizer in unit.act_quantizers()]


def changed(**values: Any) -> CalibrationConfig:
    return dataclasses.replace(FAST, **values)


def loss(unit: Unit, data: UnitData, p: float) -> float:
    """On all samples, written out."""
    with torch.no_grad():
        difference = (unit.module(*data.inputs) - data.target).double().abs() ** p
    return (difference.sum() / difference.numel() * difference.shape[1]).item()


# Weights.


@pytest.mark.parametrize("path", [BLOCK, ATTENTION, "temb.dense.0"])
def test_learned_rounding_is_better_than_nearest(path: str) -> None:
    _, unit, data = unit_and_data(path)
    unit.module.set_quant_state(True, False)
    before = loss(unit, data, 2.0)
    report = reconstruct_weights(unit, data, FAST, seed=0)
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(loss(unit, data, 2.0), rel=1e-4)
    assert report.loss_after < 0.9 * report.loss_before


def test_what_is_learned_is_used_hard() -> None:
    _, unit, data = unit_and_data(BLOCK)
    nearest = [layer.codes() for layer in unit.layers()]
    reconstruct_weights(unit, data, FAST, seed=0)
    moved = 0
    for layer, before in zip(unit.layers(), nearest, strict=True):
        for (quantizer, part), codes, old in zip(layer.weight_quantizers(), layer.codes(), before, strict=True):
            assert isinstance(quantizer, AdaRoundQuantizer)
            assert not quantizer.soft
            scaled = part / quantizer.delta
            hard = scaled.floor() + (quantizer.alpha >= 0) + quantizer.zero_point
            assert torch.equal(codes, hard.clamp(0, 7).to(torch.uint8))
            moved += (codes != old).sum().item()
        assert layer.baked_weight is not None
        assert torch.equal(layer.baked_weight, layer.quantized_weight())
        assert torch.equal(layer.effective_weight(), layer.baked_weight)
    assert moved > 0


def test_soft_rounding_starts_at_full_precision() -> None:
    """The loss of soft rounding, before anything is learned, is that of the weights themselves: none."""
    _, unit, data = unit_and_data("conv_in")  # its input is not quantized, nor is anything before it
    unit.module.set_quant_state(True, False)
    nearest = fixed_batch_loss(unit, data, p=2.0)
    unit.module.learn_rounding()
    assert fixed_batch_loss(unit, data, p=2.0) == pytest.approx(nearest, rel=1e-6)
    unit.module.weight_quantizer.soft = True
    assert fixed_batch_loss(unit, data, p=2.0) < 0.3 * nearest  # what the ends of the grid clip is left


def test_no_iterations_leave_round_to_nearest() -> None:
    _, unit, data = unit_and_data(BLOCK)
    expected = [layer.quantized_weight() for layer in unit.layers()]
    report = reconstruct_weights(unit, data, changed(iters=0), seed=0)
    assert report.iterations == 0
    assert report.loss_after == report.loss_before
    assert all(torch.equal(layer.baked_weight, w) for layer, w in zip(unit.layers(), expected, strict=True))


@pytest.fixture
def every_loss_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was learned counts as better, so that it is there to be looked at."""
    losses = itertools.count(0, -1)
    monkeypatch.setattr("qdiff.reconstruction.fixed_batch_loss", lambda *_, **__: float(next(losses)))
    monkeypatch.setattr("qdiff.reconstruction.DIVERGED", -math.inf)


@pytest.mark.usefixtures("every_loss_falls")
@pytest.mark.parametrize("engine", ["fast", "eager"])
def test_one_iteration_moves_by_the_rate(engine: str) -> None:
    """Adam's first step is the rate, whatever the gradient."""
    _, unit, data = unit_and_data("conv_in")
    start = alphas(with_learnable_rounding(unit))["0"]
    reconstruct_weights(unit, data, changed(iters=1, weight_lr=0.01, engine=engine), seed=0)
    moves = (alphas(unit)["0"] - start).abs()
    still = moves == 0  # clipped by the grid's ends
    assert still.float().mean() < 0.2
    torch.testing.assert_close(moves[~still], torch.full_like(moves[~still], 0.01), rtol=0.05, atol=0)


def with_learnable_rounding(unit: Unit) -> Unit:
    for layer in unit.layers():
        layer.learn_rounding()
    return unit


# The regulariser, alone: with inputs of zeros a layer's output does not depend on its weights.


def without_input(data: UnitData) -> UnitData:
    return UnitData(tuple(torch.zeros_like(x) for x in data.inputs), torch.zeros_like(data.target))


def shortcut_alone() -> tuple[Unit, UnitData]:
    """A split shortcut as a unit of its own."""
    qnn, unit, data = unit_and_data(BLOCK)
    layer = qnn.model.get_submodule(f"{BLOCK}.nin_shortcut")
    target = torch.zeros(len(data), layer.weight.shape[0], *data.target.shape[2:])
    return Unit(f"{BLOCK}.nin_shortcut", layer, unit.stage), UnitData(data.inputs[:1], target)


def test_regulariser_covers_both_halves_of_a_split_layer() -> None:
    unit, data = shortcut_alone()
    start = alphas(with_learnable_rounding(unit))
    reconstruct_weights(unit, without_input(data), changed(iters=5, warmup=0.0, weight_lr=0.01, beta_start=2.0), seed=0)
    end = alphas(unit)
    assert set(start) == {"0", "0_0"}
    for name, alpha in start.items():
        undecided = (alpha.abs() > 0.05) & (alpha.abs() < 2)
        assert undecided.sum() > 20
        assert ((end[name] - alpha)[undecided].sign() == alpha[undecided].sign()).all(), name  # away from a half


@pytest.mark.usefixtures("every_loss_falls")
@pytest.mark.parametrize(("warmup", "moves"), [(0.0, 10), (0.5, 6), (0.95, 1)])
def test_regulariser_rests_during_the_warm_up(warmup: float, moves: int) -> None:
    """Of 10 iterations, counted from 1, those from ``warmup`` on move the rounding variables, by at most the rate."""
    unit, data = shortcut_alone()
    start = alphas(with_learnable_rounding(unit))
    report = reconstruct_weights(unit, without_input(data), changed(iters=10, warmup=warmup, weight_lr=1e-3), seed=0)
    assert [point.iteration for point in report.trace] == list(range(1, 11))
    betas = [point.temperature for point in report.trace if point.rounding_loss]
    assert len(betas) == moves
    first = max(1, -(-warmup * 10 // 1))
    expected = [20 - 18 * (i - warmup * 10) / (10 - warmup * 10) for i in range(int(first), 11)]
    assert betas == pytest.approx(expected, abs=1e-4)
    assert (alphas(unit)["0"] - start["0"]).abs().max() <= 1.1e-3 * moves


def test_regulariser_decides_what_reconstruction_leaves_open() -> None:
    unit, data = shortcut_alone()
    config = changed(iters=150, warmup=0.0, weight_lr=0.1)
    reconstruct_weights(unit, without_input(data), config, seed=0)
    undecided = torch.cat([alpha.flatten().abs() < 2 for alpha in alphas(unit).values()])
    assert undecided.float().mean() < 0.05


# Step sizes.


@pytest.mark.parametrize("path", [BLOCK, ATTENTION, "conv_in", "temb.dense.1"])
def test_learned_steps_are_better_than_min_max(path: str) -> None:
    _, unit, data = unit_and_data(path, act_quant=True)
    unit.module.set_quant_state(True, True)
    before = loss(unit, data, FAST.p)
    report = reconstruct_activations(unit, data, FAST, seed=0)
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(loss(unit, data, FAST.p), rel=1e-4)
    assert report.loss_after < 0.995 * report.loss_before


@pytest.mark.parametrize("path", [BLOCK, ATTENTION])
def test_every_step_size_of_a_unit_learns_and_nothing_else(path: str) -> None:
    qnn, unit, data = unit_and_data(path, act_quant=True)
    before, state = steps(unit), copy.deepcopy(qnn.state_dict())
    reconstruct_activations(unit, data, changed(iters_a=3), seed=0)
    assert len(before) == {BLOCK: 5, ATTENTION: 8}[path]
    assert all(a != b for a, b in zip(before, steps(unit), strict=True))
    different = {name for name, tensor in qnn.state_dict().items() if not torch.equal(tensor, state[name])}
    own = {id(quantizer) for quantizer in unit.act_quantizers()}
    assert different == {f"model.{name}.delta" for name, q in qnn.act_quantizers().items() if id(q) in own}


def test_only_the_units_rounding_learns() -> None:
    qnn, unit, data = unit_and_data(BLOCK)
    state = copy.deepcopy(qnn.state_dict())
    reconstruct_weights(unit, data, changed(iters=3), seed=0)
    after = qnn.state_dict()
    assert not [name for name in state if not torch.equal(after[name], state[name])]
    assert all(name.startswith(f"model.{BLOCK}.") and name.endswith(".alpha") for name in after.keys() - state.keys())


def test_rate_of_the_steps_decays_along_a_cosine() -> None:
    """A step size far too large shrinks at every iteration, each time by about the rate."""
    _, unit, data = unit_and_data("conv_in", act_quant=True)
    quantizer = unit.module.act_quantizer
    start = 10 * quantizer.delta.item()
    moves = []
    for iterations in (1, 8):
        quantizer.set_grid(torch.tensor(start), quantizer.zero_point)
        reconstruct_activations(unit, data, changed(iters_a=iterations, lr=1e-3, batch_size=20), seed=0)
        moves.append(start - quantizer.delta.item())
    assert moves[0] == pytest.approx(1e-3, rel=1e-2)
    assert moves[1] == pytest.approx(4.5e-3, rel=0.05)  # the sum of (1 + cos(k π / 8)) / 2 over k = 0 … 7


def test_step_sizes_stay_positive() -> None:
    _, unit, data = unit_and_data("conv_in", act_quant=True)
    reconstruct_activations(unit, data, changed(iters_a=5, lr=100.0), seed=0)
    assert unit.module.act_quantizer.delta.item() >= SMALLEST_DELTA


@pytest.mark.parametrize(("phase", "exponent"), [("weights", 2.0), ("activations", 3.0)])
@pytest.mark.parametrize("engine", ["fast", "eager"])
def test_exponent_of_what_is_minimized(phase: str, exponent: float, engine: str) -> None:
    """Quadratic for weights, ``p`` for activations: the first iteration's loss, over the whole set."""
    _, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
    config = changed(iters=1, iters_a=1, p=3.0, batch_size=len(data), engine=engine)
    if phase == "weights":
        with_learnable_rounding(unit)
        set_soft(unit, True)
    unit.module.set_quant_state(True, phase == "activations")
    expected = loss(unit, data, exponent)
    if phase == "weights":
        set_soft(unit, False)
    report = PHASES[phase][0](unit, data, config, seed=0)
    assert report.trace[0].loss == pytest.approx(expected, rel=1e-4)


def set_soft(unit: Unit, soft: bool) -> None:
    for layer in unit.layers():
        for quantizer, _ in layer.weight_quantizers():
            quantizer.soft = soft


def test_exponent_of_the_activation_loss_is_the_configs() -> None:
    _, unit, data = unit_and_data(BLOCK, act_quant=True)
    unit.module.set_quant_state(True, True)
    for p in (2.0, 3.0):
        report = reconstruct_activations(unit, data, changed(iters_a=0, p=p), seed=0)
        assert report.loss_before == report.loss_after == pytest.approx(loss(unit, data, p), rel=1e-4)


# What both phases share.

PHASES = {"weights": (reconstruct_weights, alphas), "activations": (reconstruct_activations, steps)}


def learn(phase: str, seed: int = 0, *, train: bool = False, **changes: Any) -> tuple[QuantModel, Unit, Any]:
    qnn, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
    qnn.train(train)
    function, result = PHASES[phase]
    function(unit, data, changed(iters=4, iters_a=4, **changes), seed=seed)
    return qnn, unit, result(unit)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a) if isinstance(a, dict) else a == b


@pytest.mark.parametrize("phase", PHASES)
def test_a_seed_fixes_the_result(phase: str) -> None:
    torch.manual_seed(1)
    first = learn(phase)[2]
    torch.manual_seed(2)  # must not matter
    assert same(first, learn(phase)[2])
    assert not same(first, learn(phase, seed=1)[2])
    assert not same(first, learn(phase, batch_size=5)[2])


@pytest.mark.parametrize("phase", PHASES)
def test_global_randomness_is_left_alone(phase: str) -> None:
    _, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
    before = torch.random.get_rng_state()
    PHASES[phase][0](unit, data, changed(iters=2, iters_a=2), seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("phase", PHASES)
def test_dropout_is_off_and_the_mode_comes_back(phase: str) -> None:
    qnn, _, in_training = learn(phase, train=True)
    assert all(module.training for module in qnn.modules() if not isinstance(module, AdaRoundQuantizer))
    assert same(in_training, learn(phase)[2])


@pytest.mark.parametrize("phase", PHASES)
def test_gradients_do_not_leak(phase: str) -> None:
    qnn, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
    wanted = {name: parameter.requires_grad for name, parameter in qnn.named_parameters()}
    assert wanted["model.conv_in.weight"]
    PHASES[phase][0](unit, data, changed(iters=2, iters_a=2), seed=0)
    after = {name: parameter.requires_grad for name, parameter in qnn.named_parameters()}
    assert {name: after[name] for name in wanted} == wanted
    assert not any(after[name] for name in after.keys() - wanted.keys())  # rounding variables
    assert all(parameter.grad is None for parameter in qnn.parameters())


@pytest.mark.parametrize("phase", PHASES)
def test_report(phase: str) -> None:
    _, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
    report = PHASES[phase][0](unit, data, changed(iters=3, iters_a=2), seed=0)
    assert (report.name, report.kind, report.phase) == (BLOCK, "residual block", phase)
    assert report.iterations == {"weights": 3, "activations": 2}[phase]
    assert report.parameters == sum(p.numel() for m in unit.layers() for p in (m.weight, m.bias))
    assert 0 < report.loop_seconds < report.seconds
    looks_took = report.look_seconds * report.iterations  # at each
    assert 0 < report.iteration_seconds * (report.iterations - 1) < report.loop_seconds - looks_took
    assert looks_took > 0
    assert all(isinstance(m, QuantModule) for m in unit.layers())


def test_loss_is_reported_on_evenly_spaced_samples() -> None:
    _, unit, _ = unit_and_data("temb.dense.1")
    data = UnitData((torch.randn(640, 128),), torch.randn(640, 128))
    chosen = torch.tensor([i * 639 // 63 for i in range(64)])
    expected = loss(unit, UnitData((data.inputs[0][chosen],), data.target[chosen]), 2.0)
    assert fixed_batch_loss(unit, data, p=2.0) == pytest.approx(expected, rel=1e-4)


# Batches.


@pytest.mark.parametrize(("samples", "batch", "iterations"), [(10, 4, 5), (7, 3, 7), (64, 32, 6), (5, 2, 1)])
def test_every_sample_once_an_epoch(samples: int, batch: int, iterations: int) -> None:
    draws = draw_batches(samples, batch, iterations, seed=0)
    assert draws.shape == (iterations, batch)
    flat = draws.flatten()
    for start in range(0, len(flat), samples):
        epoch = flat[start : start + samples]
        assert len(epoch.unique()) == len(epoch)
        assert len(epoch) < samples or epoch.unique().tolist() == list(range(samples))


def test_batches_depend_on_the_seed_only() -> None:
    first = draw_batches(50, 8, 20, seed=3)
    assert torch.equal(first, draw_batches(50, 8, 20, seed=3))
    assert not torch.equal(first, draw_batches(50, 8, 20, seed=4))
    assert not torch.equal(first[:6].flatten()[:40], torch.arange(40))
    assert torch.equal(first[:5], draw_batches(50, 8, 5, seed=3))


def test_epochs_are_shuffled_anew() -> None:
    first, second, third = draw_batches(40, 8, 15, seed=0).view(3, 40)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_noisy_timesteps_can_be_drawn_more_often() -> None:
    t = torch.tensor([5.0, 900.0, 5.0, 40.0])
    weights = timestep_weights(t, 9.0)
    assert weights.tolist() == pytest.approx([1, 9, 1, 3])
    draws = draw_batches(4, 3, 2000, seed=0, weights=weights)
    assert draws.shape == (2000, 3)
    shares = draws.flatten().bincount(minlength=4) / 6000
    assert shares.tolist() == pytest.approx([1 / 14, 9 / 14, 1 / 14, 3 / 14], abs=0.02)
    assert torch.equal(draws, draw_batches(4, 3, 2000, seed=0, weights=weights))
    assert not torch.equal(draws, draw_batches(4, 3, 2000, seed=1, weights=weights))


def test_alike_is_as_published() -> None:
    assert timestep_weights(torch.tensor([1.0, 2.0]), 1.0) is None
    assert timestep_weights(None, 4.0) is None
    assert timestep_weights(torch.tensor([7.0, 7.0]), 4.0).tolist() == [1, 1]
    assert timestep_weights(torch.tensor([7.0, 8.0]), 4.0).tolist() == [1, 4]


def test_what_is_drawn_is_what_is_learned_from() -> None:
    """With nearly all weight on one timestep, that one ends with less loss than it does with all alike."""
    losses = []
    for noisy_weight in (1.0, 1e6):
        _, unit, data = unit_and_data(BLOCK)
        reconstruct_weights(unit, data, changed(noisy_weight=noisy_weight), seed=0)
        noisiest = data.t == data.t.max()
        rows = UnitData(tuple(x[noisiest] for x in data.inputs), data.target[noisiest])
        losses.append(loss(unit, rows, 2.0))
    assert losses[1] < losses[0]


def test_a_batch_is_at_most_the_set() -> None:
    assert draw_batches(3, 8, 4, seed=0).sort(1).values.tolist() == [[0, 1, 2]] * 4
    assert draw_batches(3, 8, 0, seed=0).shape == (0, 3)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", "tf32"), ("tf32", "tf32"), ("fp32", "fp32")])
def test_whole_networks_run_in_tf32_at_the_least(precision: str, expected: str) -> None:
    """Targets in bfloat16 would carry its rounding."""
    config = changed(precision=json.loads(f'"{precision}"'), iters=7)  # as read from a file
    assert capturing(config) == dataclasses.replace(config, precision=expected)


# Two paths, one computation.

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("path", [BLOCK, ATTENTION, "conv_in", "temb.dense.1"])
def test_both_paths_agree(phase: str, path: str, device: str) -> None:
    """After 50 iterations, regulariser included, within 1e-4 of the loss.

    On a GPU the two add up in other orders, and a small batch of coarse activations magnifies that: a rounding falls
    the other way, Adam divides by what is left of a gradient. How far is measured: the oracle against itself, with
    inputs that differ by 1e-7. Where that is more than 1e-4, the paths may differ as much.
    """
    what = phase, path, torch.device(device)
    eager, fast = fifty_iterations("eager", *what), fifty_iterations("fast", *what)
    others = [] if device == "cpu" else [fifty_iterations("eager", *what, nudged=seed) for seed in range(1, 7)]

    def same(value: Callable[[UnitReport], list[float]], least: float) -> None:
        expected = torch.tensor(value(eager))
        changes = [((torch.tensor(value(other)) - expected) / expected).abs() for other in others]
        spread = max((change.max().item() for change in changes if len(change)), default=0.0)
        assert value(fast) == pytest.approx(value(eager), rel=max(least, 3 * spread))

    same(lambda report: [report.loss_after], 1e-4)
    same(lambda report: [point.loss for point in report.trace], 1e-4)
    for a, b in zip(fast.trace, eager.trace, strict=True):
        assert a.iteration == b.iteration
        assert a.rounding_loss == pytest.approx(b.rounding_loss, rel=1e-4)
        assert a.temperature == b.temperature
        assert a.settled == pytest.approx(b.settled, abs=1e-3)
    # Later on Adam magnifies what rounds differently, in step sizes that hardly matter.
    same(lambda report: [*report.trace[0].steps], 1e-3)
    if path in ("conv_in", "temb.dense.1") or phase == "weights":  # nothing there magnifies
        assert fast.loss_after == pytest.approx(eager.loss_after, rel=1e-4)


def fifty_iterations(engine: str, phase: str, path: str, device: torch.device, *, nudged: int = 0) -> UnitReport:
    """One unit from one seed.

    Args:
        nudged: seed of a relative change of all inputs by about 1e-7; 0 leaves them as they are.
    """
    qnn, unit, data = unit_and_data(path, act_quant=phase == "activations")
    qnn.to(device)
    generator = torch.Generator().manual_seed(nudged)

    def nudge(x: Tensor) -> Tensor:
        return x * (1 + 1e-7 * torch.randn(x.shape, generator=generator)) if nudged and x.is_floating_point() else x

    data = UnitData(tuple(map(nudge, data.inputs)), data.target, t=data.t).near(device)
    config = changed(iters=50, iters_a=50, engine=engine, precision="fp32", round_weight=0.1)
    return PHASES[phase][0](unit, data, config, seed=0)


def test_trace_sees_roundings_settle() -> None:
    unit, data = shortcut_alone()
    report = reconstruct_weights(unit, without_input(data), changed(iters=150, warmup=0.2, weight_lr=0.1), seed=0)
    assert len(report.trace) == 19  # every eighth iteration, and the last
    assert report.trace[0].rounding_loss == 0
    assert report.trace[0].settled < 0.3
    assert report.trace[-1].settled > 0.9
    assert report.trace[-1].temperature == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("iterations", "looks"),
    [
        (3, [1, 2, 3]),
        (20, list(range(1, 21))),
        (21, [*range(2, 21, 2), 21]),
        (200, list(range(10, 201, 10))),
        (205, [*range(20, 201, 20), 205]),  # from 11 on in whole tens, the length of a recorded graph
    ],
)
def test_about_twenty_looks(iterations: int, looks: list[int]) -> None:
    _, unit, data = unit_and_data("temb.dense.1", samples=4, act_quant=True)
    report = reconstruct_activations(unit, data, changed(iters_a=iterations, batch_size=2, lr=1e-6), seed=0)
    assert [point.iteration for point in report.trace] == looks


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_progress_of_rounding(weight: float) -> None:
    alphas = [torch.tensor([-9.0, 0.0, 9.0]), torch.tensor([[9.0]])]  # down, undecided, up and up
    found = rounding_progress(alphas, 2.0, weight)
    assert found == Progress(weight, 2.0, 0.75, (), finite=True)
    alphas[1].fill_(math.nan)
    assert not rounding_progress(alphas, 2.0, weight).finite


def test_iterations_that_stand_for_many_are_rarely_looked_at() -> None:
    _, unit, data = unit_and_data("temb.dense.1", samples=4, act_quant=True)
    with standing_for_many():
        report = reconstruct_activations(unit, data, changed(iters_a=200, batch_size=2, lr=1e-6), seed=0)
    assert [point.iteration for point in report.trace] == [50, 100, 150, 200]


# Where learning fails.


def poisoned(monkeypatch: pytest.MonkeyPatch, times: int) -> list[float]:
    """The first ``times`` optimisations of a unit see NaN after a few iterations. Returns the rates of all of them."""
    rates: list[float] = []
    make = rounding_schedule

    def watched(config: CalibrationConfig, iterations: int, rate: float, device: torch.device) -> Schedule:
        rates.append(rate)
        schedule = make(config, iterations, rate, device)
        if len(rates) <= times:
            schedule.rows[3][0] = math.nan
        return schedule

    monkeypatch.setattr("qdiff.reconstruction.rounding_schedule", watched)
    return rates


def test_not_a_number_is_tried_again_at_a_tenth_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = poisoned(monkeypatch, 1)
    _, unit, data = unit_and_data(BLOCK)
    report = reconstruct_weights(unit, data, FAST, seed=0)
    assert rates == pytest.approx([FAST.weight_lr, FAST.weight_lr / 10])
    assert report.outcome == "learned at a tenth of the rate"
    assert "not a number" in report.note
    assert report.loss_after < report.loss_before


@pytest.mark.parametrize("engine", ["fast", "eager"])
def test_what_fails_twice_keeps_round_to_nearest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, engine: str
) -> None:
    rates = poisoned(monkeypatch, 2)
    _, unit, data = unit_and_data(BLOCK)
    nearest = [codes for layer in unit.layers() for codes in layer.codes()]
    report = reconstruct_weights(unit, data, changed(engine=engine), seed=0)
    assert len(rates) == 2
    assert report.outcome == "kept"
    assert report.loss_after == report.loss_before
    assert all(map(torch.equal, nearest, (codes for layer in unit.layers() for codes in layer.codes())))
    assert all(torch.isfinite(alpha).all() for alpha in alphas(unit).values())
    assert BLOCK in caplog.text


@pytest.mark.parametrize("engine", ["fast", "eager"])
@pytest.mark.parametrize(("phase", "changes"), [("weights", {"weight_lr": 30.0}), ("activations", {"lr": 3.0})])
def test_never_worse_than_before(phase: str, changes: dict[str, float], engine: str) -> None:
    """A rate far too high ends in chaos; the unit stays as it was."""
    _, unit, data = unit_and_data("conv_in", act_quant=phase == "activations")
    before = steps(unit)
    report = PHASES[phase][0](unit, data, changed(iters=5, iters_a=5, warmup=0.9, engine=engine, **changes), seed=0)
    assert report.outcome == "kept"
    assert report.note
    assert report.loss_after == report.loss_before
    assert steps(unit) == before


@pytest.mark.parametrize(("times", "diverges"), [(99, False), (101, True)])
@pytest.mark.parametrize("size", [1e-3, 10.0])
def test_a_hundred_times_the_loss_before_is_too_much(
    monkeypatch: pytest.MonkeyPatch, times: float, diverges: bool, size: float
) -> None:
    _, unit, data = unit_and_data("temb.dense.1", act_quant=True)
    data = UnitData(data.inputs, data.target + size)
    unit.module.set_quant_state(True, True)
    before = loss(unit, data, FAST.p) / times
    monkeypatch.setattr("qdiff.reconstruction.fixed_batch_loss", lambda *_, **__: before)
    report = reconstruct_activations(unit, data, changed(iters_a=1, lr=1e-9, batch_size=len(data)), seed=0)
    assert report.trace[0].loss == pytest.approx(times * before, rel=1e-3)
    assert report.outcome == ("kept" if diverges else "learned")
    assert report.note.count("the loss grew to") == (2 if diverges else 0)
    assert report.loop_seconds < report.seconds


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_enlarged_waits_as_it_was_before(phase: str) -> None:
    """An upsampling's inputs take a quarter of the convolution's, and teach it the same, to the bit."""
    results = []
    for enlarged in (False, True):
        _, unit, data = unit_and_data("up.1.upsample.conv", act_quant=phase == "activations")
        (x,) = data.inputs
        assert x[0].numel() * 4 == data.target[0].numel()
        assert unit.entry is not unit.module
        if enlarged:
            unit = dataclasses.replace(unit, upsampler=None)
            data = UnitData((F.interpolate(x, scale_factor=2.0, mode="nearest"),), data.target)
        report = PHASES[phase][0](unit, data, changed(), seed=0)
        assert report.outcome == "learned"
        results.append((report.loss_after, PHASES[phase][1](unit)))
    (small_loss, small), (large_loss, large) = results
    assert small_loss == large_loss
    if phase == "weights":
        assert all(torch.equal(alpha, large[name]) for name, alpha in small.items())
    else:
        assert small == large


# On a GPU every iteration is the replay of a CUDA graph.


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("phase", PHASES)
def test_graphs_learn_what_single_iterations_learn(phase: str) -> None:
    """Data on the host is fed iteration by iteration, data on the device through graphs."""
    results = []
    for resident in (False, True):
        qnn, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
        qnn.cuda()
        data = data.near(torch.device("cuda")) if resident else data
        report = PHASES[phase][0](unit, data, changed(precision="fp32"), seed=0)
        results.append((report.loss_after, PHASES[phase][1](unit)))
    (eager_loss, eager), (graph_loss, graph) = results
    assert graph_loss == pytest.approx(eager_loss, rel=0.02)
    if phase == "activations":  # a step that hardly matters can go its own way, see test_both_paths_agree
        assert statistics.median(abs(a / b - 1) for a, b in zip(graph, eager, strict=True)) < 0.02
    else:
        agreeing = [((graph[name] >= 0) == (alpha >= 0)).float().mean() for name, alpha in eager.items()]
        assert min(agreeing) > 0.98


def in_three_places(data: UnitData, folder: Path, pinned: int) -> UnitData:
    """A few rows on the GPU, some in pinned memory, the others in a file."""
    near, ring = 5, RING_STRETCHES * STRETCH * FAST.batch_size
    arena, scratch = Arena(2**26), Scratch(folder)
    collectors = []
    for tensors in (data.inputs, (data.target,)):
        collector = Collector(len(data), near, compact=False, pinned=pinned, ring=ring, scratch=scratch, arena=arena)
        collector.add(tuple(x.cuda() for x in tensors))
        collectors.append(collector)
    return unit_data(*collectors, data.t)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pinned", [0, 4, 100])
@pytest.mark.parametrize("phase", PHASES)
def test_rows_of_a_file_are_read_ahead_of_the_graphs(phase: str, pinned: int, tmp_path: Path) -> None:
    """Where rows lie changes nothing but time."""
    results = []
    for spread in (False, True):
        qnn, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
        qnn.cuda()
        data = in_three_places(data, tmp_path, pinned) if spread else data.near(torch.device("cuda"))
        report = PHASES[phase][0](unit, data, changed(precision="fp32", deterministic=True), seed=0)
        results.append((report.loss_after, [point.loss for point in report.trace]))
    (near_loss, near_trace), (spread_loss, spread_trace) = results
    assert spread_loss == pytest.approx(near_loss, rel=1e-3)
    assert spread_trace == pytest.approx(near_trace, rel=1e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("phase", PHASES)
def test_rows_of_a_file_are_gone_with_the_unit(phase: str, tmp_path: Path) -> None:
    """Not only when garbage is collected: the next unit's rows need the room."""
    qnn, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
    qnn.cuda()
    data = in_three_places(data, tmp_path, 4)
    near = weakref.ref(data.target)
    with holding_garbage():
        PHASES[phase][0](unit, data, changed(), seed=0)
        del data
        assert near() is None


def test_what_reads_ahead_does_not_keep_the_stage_that_it_reads_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qdiff.reconstruction.side_stream", lambda *_, **__: None)
    scratch = Scratch(tmp_path)
    collectors = [Collector(9, 2, compact=False, pinned=3, ring=90, scratch=scratch) for _ in range(2)]
    for collector in collectors:
        collector.add((torch.randn(9, 4),))
    data = unit_data(*collectors)
    learner = SimpleNamespace(schedule=SimpleNamespace(counter=torch.zeros(1)))
    loop = SimpleNamespace(data=data, device=torch.device("cpu"), learner=learner, config=FAST, batch=3)
    loop.draws = draw_batches(9, 3, 20, seed=0)
    stage = _Stage(loop)
    assert stage.reader is not None
    stage.reader.need(1)
    stage.reader.close()
    gone = weakref.ref(stage)
    with holding_garbage():
        del stage
        assert gone() is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("phase", PHASES)
def test_lower_precision_learns_as_well(phase: str, precision: str) -> None:
    losses = []
    for kind in ("fp32", precision):
        qnn, unit, data = unit_and_data(BLOCK, act_quant=phase == "activations")
        qnn.cuda()
        report = PHASES[phase][0](unit, data.near(torch.device("cuda")), changed(precision=kind), seed=0)
        losses.append(report.loss_after)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
