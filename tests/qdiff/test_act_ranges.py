"""First activation ranges: at once, in pieces, and one for each timestep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from qdiff.act_ranges import find_act_ranges, range_rows, update_running_ranges
from qdiff.calibrate import calibrate
from qdiff.calibration_data import CalibrationSet
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.graphs import recorded
from qdiff.quant_model import QuantModel
from qdiff.quantizers import RangeObserver, TimedQuantizer, UniformAffineQuantizer

from .conftest import SMALL, noisy_inputs, tiny_unet, wrapped

TIMESTEPS = (2.0, 60.0, 900.0)
A_STEP = 5
PLAIN = QuantConfig(4, 8, quant_act=True, split=True)
TIMED = dataclasses.replace(PLAIN, timed_ranges="all", timesteps=TIMESTEPS)
INPUT = dataclasses.replace(TIMED, timed_ranges="input")


def inputs() -> tuple[Tensor, Tensor]:
    """Noisiest first, and wider the noisier."""
    x, _ = noisy_inputs(A_STEP * len(TIMESTEPS))
    t = torch.tensor(TIMESTEPS[::-1]).repeat_interleave(A_STEP)
    return x * (1 + t / 100).view(-1, 1, 1, 1), t


def ranged(config: QuantConfig, rows: Tensor | None = None, chunk: int = 256, **unet: object) -> QuantModel:
    qnn = wrapped(config, **SMALL | unet)
    qnn.find_weight_grids()
    find_act_ranges(qnn, inputs(), rows, chunk=chunk)
    qnn.set_quant_state(True, True)
    return qnn


def grids(qnn: QuantModel) -> dict[str, tuple[Tensor, Tensor]]:
    return {path: (q.delta.detach().clone(), q.zero_point.clone()) for path, q in qnn.act_quantizers().items()}


def output(qnn: QuantModel, x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return qnn(x, t)


# Which quantizers are timed.


def test_which_quantizers_have_grids_of_their_own() -> None:
    assert wrapped(PLAIN).timed_quantizers() == {}
    assert list(wrapped(INPUT).timed_quantizers()) == ["conv_in.act_quantizer"]
    qnn = wrapped(TIMED)
    assert qnn.timed_quantizers().keys() == qnn.act_quantizers().keys()
    assert {"mid.attn_1.act_quantizer_w", "temb.dense.0.act_quantizer"} <= qnn.timed_quantizers().keys()
    assert any(path.endswith(".act_quantizer_0") for path in qnn.timed_quantizers())  # halves of split shortcuts
    assert {q.delta.shape for q in qnn.timed_quantizers().values()} == {(len(TIMESTEPS),)}


def test_a_split_input_is_timed_in_both_parts() -> None:
    qnn = wrapped(dataclasses.replace(INPUT, split_input=True))
    assert list(qnn.timed_quantizers()) == ["conv_in.act_quantizer", "conv_in.act_quantizer_positive"]
    assert len(qnn.act_quantizers()) == len(wrapped(PLAIN).act_quantizers()) + 1
    assert set(qnn.units()[2].act_quantizers()) == set(qnn.timed_quantizers().values())


def test_timed_ranges_need_timesteps() -> None:
    with pytest.raises(ValueError, match="needs timesteps"):
        wrapped(QuantConfig(quant_act=True, timed_ranges="all"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"timed_ranges": "some"}, "timed_ranges='some'"),
        ({"timed_ranges": "all", "timesteps": (3, 1)}, "must ascend"),
        ({"timed_ranges": "all", "timesteps": (1, 1)}, "must ascend"),
        ({"timesteps": (1, 2)}, "without timed_ranges"),
    ],
)
def test_impossible_configurations(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**params)


def test_timesteps_of_a_set() -> None:
    _, t = inputs()
    assert dataclasses.replace(TIMED, timesteps=()).at_timesteps(t.tolist()) == TIMED
    assert PLAIN.at_timesteps(t.tolist()) == PLAIN
    assert QuantConfig(timed_ranges="all", timesteps=[1, 2]).timesteps == (1.0, 2.0)  # as JSON gives it back


# Ranges of each timestep.


@pytest.mark.parametrize("a_sym", [False, True])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_grids_of_a_timestep_are_those_of_its_samples_alone(method: str, a_sym: bool) -> None:
    config = dataclasses.replace(TIMED, act_range=method, a_sym=a_sym)
    timed = grids(ranged(config))
    x, t = inputs()
    for group, timestep in enumerate(TIMESTEPS):
        own = t == timestep
        plain = wrapped(dataclasses.replace(PLAIN, act_range=method, a_sym=a_sym), **SMALL)
        plain.find_weight_grids()
        find_act_ranges(plain, (x[own], t[own]))
        for path, (delta, zero) in grids(plain).items():
            torch.testing.assert_close(timed[path][0][group], delta, rtol=1e-5, atol=0, msg=path)
            assert timed[path][1][group] == zero, path


def test_ranges_follow_the_timestep() -> None:
    deltas = ranged(INPUT).model.conv_in.act_quantizer.delta
    assert (deltas.diff() > 0).all()
    x, t = inputs()
    own = x[t == TIMESTEPS[1]]
    assert deltas[1].item() == pytest.approx((own.max() - own.min()).item() / 255)


def test_only_the_input_is_timed() -> None:
    """The other quantizers have the ranges that they would have without, from the rows that were asked for."""
    rows = torch.tensor([0, 7, 14])
    timed, plain = grids(ranged(INPUT, rows)), grids(ranged(PLAIN, rows))
    assert timed["conv_in.act_quantizer"][0].shape == (3,)
    early = ("temb.dense.0.act_quantizer", "temb.dense.1.act_quantizer")  # what the image does not reach
    assert all(torch.equal(timed[path][0], plain[path][0]) for path in early)
    assert all(timed[path][0].shape == () for path in plain if path != "conv_in.act_quantizer")


def test_a_timestep_without_samples_is_refused() -> None:
    qnn = wrapped(dataclasses.replace(TIMED, timesteps=(2.0, 60.0, 300.0, 900.0)), **SMALL)
    with pytest.raises(ValueError, match="no calibration sample is near timestep 300"):
        find_act_ranges(qnn, inputs())


def test_mixed_batches_are_single_timesteps_side_by_side() -> None:
    qnn = ranged(TIMED)
    x, t = inputs()
    h = torch.randn(len(x), 32, 8, 8)
    quantizer = qnn.model.down[0].block[0].conv1.act_quantizer
    qnn.clock.set(t)
    mixed = quantizer(h)
    for timestep in TIMESTEPS:
        own = t == timestep
        qnn.clock.set(t[own])
        assert torch.equal(quantizer(h[own]), mixed[own])
    qnn.clock.set(t.flip(0))
    assert not torch.equal(quantizer(h), mixed)


@pytest.mark.parametrize("a_sym", [False, True])
def test_equal_grids_are_one_grid(a_sym: bool) -> None:
    """A timed network whose groups agree computes exactly what the plain one does."""
    plain = ranged(dataclasses.replace(PLAIN, a_sym=a_sym))
    timed = wrapped(dataclasses.replace(TIMED, a_sym=a_sym), **SMALL)
    timed.find_weight_grids()
    for path, quantizer in timed.act_quantizers().items():
        quantizer.set_grid(*grids(plain)[path])
    timed.set_quant_state(True, True)
    x, t = inputs()
    assert torch.equal(output(timed, x, t), output(plain, x, t))


def test_a_forward_pass_leaves_no_timesteps_behind() -> None:
    qnn = ranged(TIMED)
    output(qnn, *inputs())
    with pytest.raises(RuntimeError, match=r"clock\.set"):
        qnn.model.conv_in(inputs()[0])


def test_a_unit_alone_takes_its_timesteps_from_the_clock() -> None:
    qnn = ranged(TIMED)
    x, t = inputs()
    seen = {}
    unit = next(unit for unit in qnn.units() if unit.path == "conv_in")
    hook = unit.module.register_forward_hook(lambda module, args, out: seen.update(out=out))
    output(qnn, x, t)
    hook.remove()
    unit.clock.set(t)
    with torch.no_grad():
        assert torch.equal(unit.module(x), seen["out"])
    assert unit.clock is qnn.clock


def test_timed_networks_compile_as_one_graph() -> None:
    qnn = ranged(TIMED)
    torch._dynamo.reset()
    compiled = torch.compile(qnn, backend="eager", fullgraph=True)
    assert torch.equal(output(compiled, *inputs()), output(qnn, *inputs()))


# A whole set, in pieces.


@pytest.mark.parametrize("config", [PLAIN, INPUT, TIMED], ids=["plain", "input", "all"])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_pieces_give_the_ranges_of_the_whole(config: QuantConfig, method: str) -> None:
    """With so many bits that an activation that falls the other way, in batches of another size, changes little."""
    config = dataclasses.replace(config, act_bit=16, sm_abit=16, act_range=method)
    whole = grids(ranged(config))
    for chunk in (4, 1):
        for path, (delta, _) in grids(ranged(config, chunk=chunk)).items():
            torch.testing.assert_close(delta, whole[path][0], rtol=1e-3, atol=0, msg=path)


@pytest.mark.parametrize("config", [PLAIN, TIMED], ids=["plain", "all"])
@pytest.mark.parametrize("chunk", [256, 5])
def test_ranges_are_those_of_the_network_with_all_quantizers_on(config: QuantConfig, chunk: int) -> None:
    """Exactly: the finished network, run on the same batches, fills each grid from end to end."""
    config = dataclasses.replace(config, act_bit=3, sm_abit=3)
    qnn = ranged(config, chunk=chunk, ch_mult=(1, 2))
    x, t = inputs()
    seen: list[dict[str, RangeObserver]] = []  # a group each
    for path, quantizer in qnn.act_quantizers().items():

        def observe(quantizer: UniformAffineQuantizer, args: tuple[Tensor, ...], path: str = path) -> None:
            seen[-1].setdefault(path, RangeObserver(quantizer.config, len(x))).add(args[0], 1)

        quantizer.register_forward_pre_hook(observe)
    for own in (t == step for step in TIMESTEPS) if config.timed else [t > 0]:
        seen.append({})
        for part in zip(x[own].split(chunk), t[own].split(chunk), strict=True):
            output(qnn, *part)
    for group, observers in enumerate(seen):
        assert observers.keys() == qnn.act_quantizers().keys()
        for path, quantizer in qnn.act_quantizers().items():
            delta, zero = observers[path].grid()
            assert torch.equal(quantizer.delta.flatten()[group], delta), path
            assert torch.equal(quantizer.zero_point.flatten()[group], zero), path


def test_pieces_leave_the_network_as_they_found_it() -> None:
    qnn = ranged(TIMED, chunk=2)
    assert not any(q._forward_pre_hooks for q in qnn.act_quantizers().values())
    with pytest.raises(RuntimeError, match=r"clock\.set"):
        qnn.clock.rows(1)
    assert all(quantizer.ready for quantizer in qnn.act_quantizers().values())


@pytest.mark.parametrize("chunk", [2, 256])
def test_a_quantizer_out_of_reach_is_named(chunk: int) -> None:
    qnn = wrapped(PLAIN, **SMALL)
    qnn.model.act_quantizer_q = UniformAffineQuantizer()
    with pytest.raises(RuntimeError, match="no activation reached the quantizer act_quantizer_q"):
        find_act_ranges(qnn, inputs(), chunk=chunk)


def test_rows_of_the_whole_set() -> None:
    assert range_rows(7, CalibrationConfig(range_samples=None)).tolist() == list(range(7))
    assert len(range_rows(100, CalibrationConfig())) == 64


def test_a_search_sees_the_same_values_however_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdiff.quantizers.SEARCH_VALUES", 60)
    config = dataclasses.replace(UniformAffineQuantizer().config, scale_method="mse")
    x = torch.randn(6, 3, 5, 4) ** 3
    seen = []
    for pieces in ((x,), x.split(2), x.split(1)):
        observer = RangeObserver(config, samples=6)
        for piece in pieces:
            observer.add(piece, len(piece))
        assert sum(len(values) for values in observer._values) == 60
        seen.append(observer.grid())
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    heads = RangeObserver(config, samples=6)
    heads.add(x.reshape(12, 30), 6)  # two heads a sample
    assert torch.equal(heads.grid()[0], seen[0][0])


@pytest.mark.parametrize(("width", "seen"), [(2**15, 2**15), (2**15 + 1, 2**15), (2**17, 2**15)])
def test_a_search_sees_all_values_up_to_131072(width: int, seen: int) -> None:
    config = dataclasses.replace(UniformAffineQuantizer().config, scale_method="mse")
    observer = RangeObserver(config, samples=4)
    x = torch.randn(4, 1, width)
    for sample in x:
        observer.add(sample, 1)
    assert [len(values) for values in observer._values] == [seen] * 4
    if seen == width:  # in their order: the sums of the search are those of the whole tensor
        assert torch.equal(torch.cat(observer._values), x.flatten())


def test_minimum_and_maximum_are_all_that_a_min_max_grid_keeps() -> None:
    observer = RangeObserver(UniformAffineQuantizer().config, samples=4)
    observer.add(torch.randn(4, 1000), 4)
    assert not observer._values


def test_an_observer_of_few_values_finds_the_quantizers_own_grid() -> None:
    x = torch.randn(4, 3, 8, 8) ** 3
    for method in ("max", "mse"):
        for symmetric in (False, True):
            quantizer = UniformAffineQuantizer(8, symmetric, scale_method=method)
            quantizer.find_grid(x)
            observer = RangeObserver(quantizer.config, samples=4)
            for piece in x.split(3):
                observer.add(piece, len(piece))
            delta, zero = observer.grid()
            torch.testing.assert_close(delta, quantizer.delta, rtol=1e-6, atol=0)
            assert zero == quantizer.zero_point


@pytest.mark.parametrize("method", ["max", "mse"])
def test_positive_tensors_are_not_clipped_by_min_max(method: str) -> None:
    """SiLU outputs and softmax maps: the grid reaches the top; only the search may shrink it."""
    x = torch.rand(4, 10) * 3.4 + 1
    observer = RangeObserver(dataclasses.replace(UniformAffineQuantizer().config, scale_method=method), samples=4)
    observer.add(x, 4)
    delta, zero = observer.grid()
    top = (255 - zero) * delta
    if method == "max":
        assert zero == 0
        assert top.item() == pytest.approx(x.max().item())
    else:
        assert zero < 0  # the searched range starts at the minimum
        assert top.item() == pytest.approx(x.max().item(), rel=0.02)


# With the rest of a calibration.


def test_running_ranges_leave_timed_quantizers_alone() -> None:
    qnn = ranged(INPUT)
    before = grids(qnn)
    update_running_ranges(qnn, inputs(), CalibrationConfig(batch_size=4, running_stat=True))
    after = grids(qnn)
    assert torch.equal(before["conv_in.act_quantizer"][0], after["conv_in.act_quantizer"][0])
    assert sum(not torch.equal(before[path][0], after[path][0]) for path in before) > len(before) / 2


def test_running_ranges_are_read_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end: a GPU that is asked for a number in between has nothing to do meanwhile. The same ranges."""
    at_once, later = ranged(INPUT), ranged(INPUT)
    config = CalibrationConfig(batch_size=4, running_stat=True)
    original, read, number = UniformAffineQuantizer.update_range, [], Tensor.item
    with monkeypatch.context() as patch:
        patch.setattr(UniformAffineQuantizer, "update_range", lambda self, x: (original(self, x), self.settle()))
        update_running_ranges(at_once, inputs(), config)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "item", lambda self: (read.append("number"), number(self))[1])
        patch.setattr(UniformAffineQuantizer, "update_range", lambda self, x: (read.append("batch"), original(self, x)))
        update_running_ranges(later, inputs(), config)
    assert "number" not in read[: len(read) - read[::-1].index("batch")]
    assert "number" in read
    before, after = grids(at_once), grids(later)
    assert all(torch.equal(a, b) for path in before for a, b in zip(before[path], after[path], strict=True))
    assert torch.equal(output(at_once, *inputs()), output(later, *inputs()))
    assert all(type(q._shifted[0]) is float for q in later.act_quantizers().values() if q.delta.dim() == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("room", [True, False])
def test_running_ranges_by_a_graph(monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    """Eight batches, of which the last is smaller; nothing stays in the graph's memory."""

    def no_room(work: Callable[[], object], device: torch.device) -> None:
        recorded(work, device)
        raise torch.OutOfMemoryError

    found, config = [], CalibrationConfig(batch_size=2, running_stat=True)
    for worth in (8, 9):
        record = mock.Mock(wraps=recorded if room else no_room)
        monkeypatch.setattr("qdiff.act_ranges._WORTH_RECORDING", worth)
        monkeypatch.setattr("qdiff.act_ranges.recorded", record)
        qnn = ranged(PLAIN).cuda()
        update_running_ranges(qnn, inputs(), config)
        assert record.called == (worth == 8)
        torch.cuda.empty_cache()
        found.append(grids(qnn))
    for path, grid in found[0].items():
        torch.testing.assert_close(grid, found[1][path], rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", [INPUT, TIMED], ids=["input", "all"])
def test_round_to_nearest_with_timed_ranges(config: QuantConfig) -> None:
    qnn = wrapped(config, **SMALL)
    calibrate(qnn, CalibrationSet(*inputs()), CalibrationConfig(range_samples=None), mode="linear")
    expected = ranged(config)
    assert torch.equal(output(qnn, *inputs()), output(expected, *inputs()))


def test_timed_input_ranges_serve_an_almost_clean_image_better() -> None:
    """Why they are there: one range wide enough for the noisiest step is coarse for the others."""
    x, t = inputs()
    clean = t == TIMESTEPS[0]
    errors = {}
    for name, config in (("plain", PLAIN), ("input", INPUT)):  # in a batch of clean images
        quantizer = ranged(dataclasses.replace(config, act_bit=4)).model.conv_in.act_quantizer
        if isinstance(quantizer, TimedQuantizer):
            quantizer.clock.set(t[clean])
        errors[name] = (quantizer(x[clean]) - x[clean]).square().mean().item()
    assert errors["input"] < 0.1 * errors["plain"]


def test_step_sizes_of_a_group_learn_from_its_samples_only() -> None:
    qnn = ranged(TIMED)
    quantizer = qnn.model.conv_in.act_quantizer
    quantizer.delta.requires_grad_(True)
    x, t = inputs()
    middle = t == TIMESTEPS[1]
    qnn.clock.set(t[middle])
    (gradient,) = torch.autograd.grad((quantizer(x[middle]) - 1).square().sum(), quantizer.delta)
    plain = UniformAffineQuantizer.from_config(quantizer.config)
    plain.set_grid(quantizer.delta[1], quantizer.zero_point[1])
    plain.delta.requires_grad_(True)
    (expected,) = torch.autograd.grad((plain(x[middle]) - 1).square().sum(), plain.delta)
    assert gradient[0] == gradient[2] == 0
    torch.testing.assert_close(gradient[1], expected)


def test_wrapping_leaves_full_precision_alone() -> None:
    x, t = inputs()
    with torch.no_grad():
        assert torch.equal(wrapped(TIMED, **SMALL)(x, t), tiny_unet(**SMALL).eval()(x, t))
