"""What reaches each unit and what should leave it, against hooks on runs of the whole network."""

from __future__ import annotations

import errno
import itertools
import random
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from qdiff import places
from qdiff.calibrate import find_act_ranges
from qdiff.capture import Frontier, PairedCapture, UnitData
from qdiff.config import QuantConfig
from qdiff.graphs import holding_garbage
from qdiff.memory import Kept, measure
from qdiff.pinned import Arena
from qdiff.places import Collector, Scratch, Shelf
from qdiff.quant_model import QuantModel

from .conftest import noisy_inputs, with_grids

SAMPLES = 7
Record = tuple[tuple[Tensor, ...], Tensor]


def observed(qnn: QuantModel, inputs: tuple[Tensor, ...], chunk: int, weight: bool, act: bool) -> dict[str, Record]:
    """Inputs and output of every unit when the whole network runs, by hooks."""
    seen: dict[str, list[Record]] = {}

    def watch(path: str):
        return lambda module, args, output: seen.setdefault(path, []).append((args, output.clone()))

    handles = [unit.entry.register_forward_hook(watch(unit.path)) for unit in qnn.units()]
    with torch.no_grad(), qnn.quant_state(weight, act):
        for part in zip(*(x.split(chunk) for x in inputs), strict=True):
            qnn(*part)
    for handle in handles:
        handle.remove()
    joined = {}
    for path, records in seen.items():
        arguments = tuple(torch.cat(column) for column in zip(*(args for args, _ in records), strict=True))
        joined[path] = (arguments, torch.cat([output for _, output in records]))
    return joined


def rows(collector: Collector) -> tuple[Tensor, ...]:
    parts = collector.parts()
    assert all(len(x) == 0 for x in (*parts.far, *parts.filed))
    return parts.near


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], path: str) -> None:
    assert len(got) == len(expected), path
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b), path


@pytest.mark.parametrize("chunk", [SAMPLES, 3, 1, 100])
@pytest.mark.parametrize("act_quant", [False, True])
def test_units_see_what_they_see_in_the_whole_network(chunk: int, act_quant: bool) -> None:
    """Inputs from the quantized network, targets from full precision, for every unit, however it is chunked."""
    qnn, inputs = with_grids(), noisy_inputs(SAMPLES)
    expected_inputs = observed(qnn, inputs, chunk, True, act_quant)
    expected_targets = observed(qnn, inputs, chunk, False, False)
    different = 0
    capture = PairedCapture(qnn, inputs, act_quant=act_quant, chunk=chunk)
    paths = []
    for stage in capture.stages():
        targets = capture.targets(stage)
        for unit in qnn.units_of(stage):
            data = capture.data(unit, targets)
            assert_same(data.inputs, expected_inputs[unit.path][0], unit.path)
            assert torch.equal(data.target, expected_targets[unit.path][1]), unit.path
            different += not all(map(torch.equal, data.inputs, expected_targets[unit.path][0]))
            paths.append(unit.path)
    assert paths == [unit.path for unit in qnn.units()]
    assert different == len(paths) - 2  # all but the first layers of the two ways in: time and image


def test_inputs_follow_what_earlier_units_have_become() -> None:
    """The second layer of the time embedding lies in the stage of the first: it sees the first as it is now."""
    qnn, inputs = with_grids(), noisy_inputs(SAMPLES)
    first, second = qnn.units()[:2]
    capture = PairedCapture(qnn, inputs, act_quant=False, chunk=SAMPLES)
    stage = next(capture.stages())
    assert first.stage == second.stage == stage
    targets, before = capture.targets(stage), rows(capture.inputs(second))[0]
    first.module.learn_rounding()
    first.module.weight_quantizer.alpha.data.neg_()
    after = rows(capture.inputs(second))[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, observed(qnn, inputs, SAMPLES, True, False)[second.path][0][0])
    assert torch.equal(rows(targets[second.path])[0], observed(qnn, inputs, SAMPLES, False, False)[second.path][1])


def test_a_changed_unit_changes_what_the_next_stages_get() -> None:
    qnn, inputs = with_grids(), noisy_inputs(SAMPLES)
    capture = PairedCapture(qnn, inputs, act_quant=False, chunk=3)
    got = {}
    for stage in capture.stages():
        for unit in qnn.units_of(stage):
            got[unit.path] = rows(capture.inputs(unit))
            for layer in unit.layers():
                layer.learn_rounding()
                layer.weight_quantizer.alpha.data.neg_()
    expected = observed(qnn, inputs, 3, True, False)  # by now every unit is changed, as it was for those behind it
    for path, arguments in got.items():
        assert_same(arguments, expected[path][0], path)


def test_the_networks_state_is_left_as_it_was() -> None:
    qnn, inputs = with_grids(), noisy_inputs(SAMPLES)
    qnn.set_quant_state(False, True)
    capture = PairedCapture(qnn, inputs, act_quant=False, chunk=3)
    for stage in capture.stages():
        capture.targets(stage)
        for unit in qnn.units_of(stage):
            capture.inputs(unit)
        assert {(layer.use_weight_quant, layer.use_act_quant) for layer in qnn.layers().values()} == {(False, True)}
    assert not any(module._forward_hooks for module in qnn.modules())


def test_nothing_captured_asks_for_gradients() -> None:
    qnn, inputs = with_grids(), noisy_inputs(2)
    capture = PairedCapture(qnn, inputs, act_quant=True, chunk=2)
    stage = next(capture.stages())
    collected = [*capture.targets(stage).values(), *(capture.inputs(unit) for unit in qnn.units_of(stage))]
    tensors = [x for collector in collected for x in rows(collector)]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_frontier_at_the_end_holds_the_output() -> None:
    qnn, inputs = with_grids(), noisy_inputs(SAMPLES)
    frontier = Frontier(qnn, inputs, chunk=3, device=torch.device("cpu"), shelf=Shelf("host", compact=False))
    with torch.no_grad(), qnn.quant_state(True, True):
        for stage in qnn.model.stages():
            frontier.advance(stage)
        expected = torch.cat([qnn(x, t) for x, t in zip(inputs[0].split(3), inputs[1].split(3), strict=True)])
    assert torch.equal(torch.cat([flow.h for flow in frontier._flows]), expected)


def test_targets_are_handed_out_once() -> None:
    """They move the full-precision network on: asking again would give those of the next stage."""
    qnn, inputs = with_grids(), noisy_inputs(2)
    capture = PairedCapture(qnn, inputs, act_quant=False, chunk=2)
    stage = next(capture.stages())
    capture.targets(stage)
    with pytest.raises(RuntimeError, match="already"):
        capture.targets(stage)


def test_collecting_inputs_does_not_move_on() -> None:
    qnn, inputs = with_grids(), noisy_inputs(3)
    capture = PairedCapture(qnn, inputs, act_quant=False, chunk=2)
    unit = qnn.units_of(next(capture.stages()))[1]
    assert_same(rows(capture.inputs(unit)), rows(capture.inputs(unit)), unit.path)


def test_activation_ranges_are_found_in_network_order() -> None:
    """Each from the first tensor it sees, with every earlier quantizer at work: one forward pass, no hooks."""
    qnn, inputs = with_grids(QuantConfig(4, 4, quant_act=True, split=True)), noisy_inputs(SAMPLES)
    find_act_ranges(qnn, inputs)
    seen = observed(qnn, inputs, SAMPLES, True, True)
    for unit in qnn.units():
        if unit.kind == "layer":
            (x,) = seen[unit.path][0]
            spread = x.max().clamp(min=0) - x.min().clamp(max=0)
            assert unit.module.act_quantizer.delta.item() == pytest.approx(spread.item() / 15), unit.path


def test_rows_are_those_of_every_argument() -> None:
    data = UnitData((torch.arange(12).view(6, 2), torch.arange(6)), torch.arange(6) * 10)
    assert len(data) == 6
    (features, embedding), target = data.rows(torch.tensor([4, 1]), torch.device("cpu"))
    assert features.tolist() == [[8, 9], [2, 3]]
    assert embedding.tolist() == [4, 1]
    assert target.tolist() == [40, 10]


def test_rows_of_a_tail_follow() -> None:
    """A set in two places gives the batches of one in one place."""
    whole = torch.randn(9, 4, 3, 3), torch.arange(9.0), torch.randn(9, 2)
    parts = [UnitData(tuple(x[a:b] for x in whole[:2]), whole[2][a:b]) for a, b in ((0, 5), (5, 9))]
    data = UnitData(parts[0].inputs, parts[0].target, parts[1])
    assert len(data) == 9
    for index in ([0, 8, 4, 5], [1, 2], [6, 5]):
        inputs, target = data.rows(torch.tensor(index), torch.device("cpu"))
        for got, expected in zip((*inputs, target), whole, strict=True):
            assert torch.equal(got, expected[index])


ON_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


def kept_in_part(qnn: QuantModel, share: float) -> list[Kept]:
    """By chance, before each stage."""
    draw = random.Random(7)
    device = next(qnn.parameters()).device
    sizes = measure(qnn, tuple(x[:1].to(device) for x in noisy_inputs(1)), compact=True)
    some = []
    for boundary in sizes.boundaries:
        trunk = draw.random() < share
        skips = tuple(trunk and draw.random() < share for _ in boundary.skips)
        filed = trunk and draw.random() < 0.5
        in_files = tuple(
            kept and (draw.random() < 0.5 if size else filed) for kept, size in zip(skips, boundary.skips, strict=True)
        )
        some.append(Kept(trunk, skips, filed, in_files if draw.random() < 0.7 else ()))
    return some


class Places:
    """A frontier that keeps everything where it computes, and one that keeps some of it, on the host and in files."""

    def __init__(self, device: str, share: float, folder: Path):
        self.qnn, self.device = with_grids(QuantConfig(4, split=True)).to(device), torch.device(device)
        self.kept, self.scratch = kept_in_part(self.qnn, share), Scratch(folder)
        self.arena = Arena(2**24) if device == "cuda" else None
        files = Shelf("partly", compact=True, scratch=self.scratch)
        options = {"chunk": 2, "device": self.device}
        host = Shelf("partly", compact=True, arena=self.arena)
        self.frontiers = (
            Frontier(self.qnn, noisy_inputs(7), shelf=Shelf("gpu", compact=True), **options),
            Frontier(self.qnn, noisy_inputs(7), shelf=host, kept=self.kept, files=files, **options),
        )

    def collectors(self) -> tuple[Collector, Collector]:
        spread = {"near": 1, "pinned": 2, "scratch": self.scratch, "arena": self.arena} if self.arena else {"near": 7}
        return Collector(7, 7, compact=False), Collector(7, compact=False, **spread)

    def assert_same(self, *collectors: Collector) -> None:
        here, there = (collector.parts() for collector in collectors)
        for number, whole in enumerate(here.near):
            rows = torch.cat([part[number].to(self.device) for part in there[:3]])
            assert torch.equal(rows, whole)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_what_is_computed_anew_is_what_was_kept(device: str, share: float, tmp_path: Path) -> None:
    """To the bit, in half precision too, on both sides of a unit, whatever is kept, on the host or in files."""
    made = Places(device, share, tmp_path)
    stages = made.qnn.model.stages()
    for number, stage in enumerate(stages, 1):
        units = made.qnn.units_of(stage)
        for unit in units:
            pairs = zip(made.frontiers, made.collectors(), strict=True)
            made.assert_same(*(f.inputs(unit, collector) for f, collector in pairs))
        collectors = {unit.path: made.collectors() for unit in units}
        for which, frontier in enumerate(made.frontiers):
            frontier.outputs(stage, units, lambda unit, of=collectors, which=which: of[unit.path][which])
        for pair in collectors.values():
            made.assert_same(*pair)
        if number < len(stages):
            assert made.kept[number].filed <= any(places.is_filed(x) for x in made.frontiers[1].waiting())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_what_is_collected_on_the_way_is_what_reaches_a_unit(device: str, share: float, tmp_path: Path) -> None:
    made = Places(device, share, tmp_path)
    stages = made.qnn.model.stages()
    for stage, after in itertools.pairwise(stages):
        unit = next(iter(made.qnn.units_of(after)), None)
        collectors = made.collectors()
        for frontier, collector in zip(made.frontiers, collectors, strict=True):
            frontier.advance(stage, None if unit is None else (unit, collector))
        if unit is not None:
            made.assert_same(*collectors)
            made.assert_same(collectors[0], made.frontiers[1].inputs(unit, made.collectors()[1]))


def test_a_disk_that_fills_up_meanwhile_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may use it too. What was to wait there is computed anew."""
    qnn, inputs = with_grids(QuantConfig(4, split=True)), noisy_inputs(5)
    options = {"chunk": 2, "device": torch.device("cpu")}
    boundaries = measure(qnn, tuple(x[:1] for x in inputs), compact=False).boundaries
    filed = [Kept(True, (True,) * len(b.skips), True, (True,) * len(b.skips)) for b in boundaries]
    scratch = Scratch(tmp_path)
    frontiers = (
        Frontier(qnn, inputs, shelf=Shelf("gpu", compact=False), **options),
        Frontier(
            qnn,
            inputs,
            shelf=Shelf("partly", compact=False),
            kept=filed,
            files=Shelf("partly", compact=False, scratch=scratch),
            **options,
        ),
    )
    store, calls = scratch.store, []

    def full_now_and_then(x: Tensor) -> places.Filed:
        calls.append(x)
        if len(calls) % 5 == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
        return store(x)

    monkeypatch.setattr(scratch, "store", full_now_and_then)
    for stage in qnn.model.stages():
        outputs = [
            f.outputs(stage, qnn.units_of(stage), lambda unit: Collector(5, 5, compact=False)) for f in frontiers
        ]
        for unit in qnn.units_of(stage):
            pairs = zip(*(out[unit.path].parts().near for out in outputs), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert len(calls) > 20
    assert caplog.text.count("is computed anew from now on") == 1
    monkeypatch.setattr(scratch, "store", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    broken = Frontier(
        qnn, inputs, shelf=Shelf("partly", compact=False), kept=filed, files=frontiers[1]._files, **options
    )
    with pytest.raises(OSError, match="Input/output"):
        broken.advance(qnn.model.stages()[0])


def test_stages_come_in_order() -> None:
    qnn = with_grids(QuantConfig(4))
    frontier = Frontier(qnn, noisy_inputs(2), chunk=2, device=torch.device("cpu"), shelf=Shelf("gpu", compact=False))
    with pytest.raises(RuntimeError, match="not the next stage"):
        frontier.advance(qnn.model.stages()[1])


def test_data_go_with_their_unit() -> None:
    """Not at some later collection of garbage: the next unit's need the room."""
    qnn = with_grids(QuantConfig(4, split=True))
    capture = PairedCapture(qnn, noisy_inputs(4), act_quant=False, chunk=4)
    stage = next(capture.stages())
    (unit, *_) = qnn.units_of(stage)
    with holding_garbage():
        data = capture.data(unit, capture.targets(stage))
        gone = [weakref.ref(x) for x in (data, data.target, *data.inputs)]
        del data
        assert all(reference() is None for reference in gone)


def test_inputs_are_collected_on_the_way_and_only_those_that_are_wanted() -> None:
    """A stage runs once for the way on, whatever is collected; a unit after the first of its stage takes a run more."""
    qnn, inputs = with_grids(QuantConfig(4, split=True)), noisy_inputs(6)
    expected = observed(qnn, inputs, 3, True, False)
    paths = [unit.path for unit in qnn.units()]
    wanted = {"temb.dense.1", "down.0.block.0", "up.0.block.0", "conv_out"}
    capture = PairedCapture(qnn, inputs, act_quant=False, chunk=3, wanted=wanted)
    frontier, runs = capture._quantized, []
    inner = frontier._moved
    frontier._moved = lambda flow, stage: runs.append(stage.path) or inner(flow, stage)
    for stage in capture.stages():
        for unit in qnn.units_of(stage):
            if unit.path in wanted:
                assert_same(rows(capture.inputs(unit)), expected[unit.path][0], unit.path)
    assert set(paths) > wanted
    stages = [stage.path for stage in qnn.model.stages()]
    further = {"temb": 1, **{path: 1 for path in wanted if path in stages}}  # up to the unit
    assert Counter(runs) == {path: 2 * (1 + further.get(path, 0)) for path in stages}  # of 2 chunks


def test_features_make_room_for_a_units_rows() -> None:
    """They move together where the arena has room but in pieces; what reaches the units stays the same."""
    qnn, inputs = with_grids(QuantConfig(4, split=True)), noisy_inputs(6)
    expected = observed(qnn, inputs, 2, True, False)
    capture = PairedCapture(qnn, inputs, act_quant=False, chunk=2)
    arena = capture._storage.arena = Arena(2**20, pinned=False)
    settled = 0
    for stage in capture.stages():
        for unit in qnn.units_of(stage):
            assert_same(rows(capture.inputs(unit)), expected[unit.path][0], unit.path)
        tensors = {id(x): x for frontier in (capture._quantized, capture._full) for x in frontier.waiting()}
        moved, gaps = {}, []
        for key, x in tensors.items():  # as on a GPU: into the arena, here with a gap after each
            moved[key] = x if arena.holds(x) else laid_out_like(arena, x)
            gaps.append(arena.empty((512,), torch.uint8))
        tensors.clear()
        capture._quantized.replace(moved), capture._full.replace(moved)
        moved.clear(), gaps.clear()
        if arena.longest < arena.free_bytes:
            capture._make_room(arena.longest + 1)
            assert arena.longest == arena.free_bytes
            settled += 1
    assert settled > 10


def laid_out_like(arena: Arena, x: Tensor) -> Tensor:
    return torch.as_strided(arena.empty((x.numel(),), x.dtype), x.shape, x.stride()).copy_(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_in_two_places_on_a_gpu() -> None:
    """A batch of rows of the device and of pinned memory is what it is of one tensor."""
    device, x = torch.device("cuda"), torch.randn(9, 6, 2, 2).half()
    tail = UnitData((x[4:].pin_memory(),), x[4:].pin_memory(), pinned=True)
    data = UnitData((x[:4].to(device),), x[:4].to(device), tail)
    index = torch.tensor([8, 0, 3, 4, 8])
    (got,), target = data.rows(index, device)
    assert got.device.type == "cuda"
    assert torch.equal(got.cpu(), x[index].float())
    assert torch.equal(target, got)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_data_move_to_a_gpu() -> None:
    data = UnitData((torch.ones(4, 3),), torch.zeros(4, 5)).near(torch.device("cuda"))
    assert {data.target.device.type, data.inputs[0].device.type} == {"cuda"}
    assert data.inputs[0].sum() == 12
