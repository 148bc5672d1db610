"""What an inspected model shows, against closed forms and against the same done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdiff.calibration_data import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.evaluation.inspection import (
    Inputs,
    UnitLoss,
    estimate_errors,
    layer_sensitivities,
    observe_activations,
    read_unit_losses,
    split_error,
    thinned,
    trajectory_errors,
)
from tests.qdiff.conftest import noisy_inputs, tiny_unet, with_grids

TIMES = torch.tensor([900.0, 50.0, 1.0])


@pytest.fixture
def inputs() -> Inputs:
    x, _ = noisy_inputs(12)
    return Inputs.of(CalibrationSet(x, TIMES.flip(0).repeat(4)), "cpu")


def test_inputs_are_ordered_by_timestep_and_thinned_evenly(inputs: Inputs) -> None:
    assert inputs.timesteps.tolist() == TIMES.tolist()
    assert torch.equal(inputs.t, TIMES.repeat_interleave(4))
    assert torch.equal(inputs.timesteps[inputs.group], inputs.t)
    few = inputs.first(2)
    assert few.t.tolist() == TIMES.repeat_interleave(2).tolist()
    assert torch.equal(few.x[0], inputs.x[0])
    assert torch.equal(few.x[1], inputs.x[3])  # the last of the first timestep: of a conditional set the other kind
    assert inputs.mean_by_step(inputs.t).tolist() == TIMES.tolist()


def test_error_is_split_into_a_map_and_a_spread() -> None:
    torch.manual_seed(0)
    full = torch.randn(4000, 1, 3, 3)
    mean = torch.linspace(-0.2, 0.2, 9).view(1, 3, 3)
    group = torch.arange(2).repeat_interleave(2000)
    noise = 0.1 * torch.randn_like(full)
    size = full.square().mean()
    errors = split_error(mean + noise, full, torch.tensor([9.0, 1.0]), group)
    assert errors.bias == pytest.approx([(mean.square().mean() / size).item()] * 2, rel=0.08)
    assert errors.variance == pytest.approx([0.01 / size.item()] * 2, rel=0.08)

    by_chance = torch.cat(
        [split_error(noise[i : i + 4], full[i : i + 4], TIMES[:1], group[:4]).bias for i in range(990)]
    )
    assert abs(by_chance.mean()) < 0.01 * errors.variance[0]  # four samples each: 1/4 of the variance, not subtracted

    assert split_error(0.3 * full, full, TIMES[:2], group).scale == pytest.approx([1.3, 1.3])
    with pytest.raises(ValueError, match="two samples"):
        split_error(noise[:2], full[:2], TIMES[:2], torch.tensor([0, 1]))


def test_ranges_and_halves_are_those_of_the_inputs(inputs: Inputs) -> None:
    unet = tiny_unet().eval()
    qnn = with_grids(QuantConfig(4, 8, quant_act=True, split=True))
    cuts = dict(qnn.adapter.shortcuts(unet))
    found = observe_activations(qnn, inputs, cuts, batch_size=3)
    assert found.ranges.keys() == qnn.layers().keys()
    for step, x in enumerate(inputs.x.split(4)):  # what the first layer sees are the inputs themselves
        expected = torch.tensor([x.min(), *x.flatten().quantile(torch.tensor([0.01, 0.5, 0.99])), x.max()])
        assert torch.allclose(found.ranges["conv_in"][step], expected)

    assert [s.path for s in found.shortcuts] == list(cuts)
    for shortcut in found.shortcuts:
        weight = qnn.layers()[shortcut.path].weight
        assert torch.equal(shortcut.decoder_weight, weight[:, : cuts[shortcut.path]].flatten())
        assert torch.equal(shortcut.encoder_weight, weight[:, cuts[shortcut.path] :].flatten())
        assert shortcut.unlikeness >= 1
    assert qnn.use_weight_quant
    assert qnn.use_act_quant  # as they were


def test_sensitivity_is_the_error_with_one_layer_quantized(inputs: Inputs) -> None:
    qnn = with_grids(QuantConfig(3, 8, quant_act=True, split=True))
    done: list[str] = []
    found = layer_sensitivities(qnn, inputs, batch_size=5, on_layer=done.append)
    assert [s.path for s in found] == done
    assert {s.path for s in found if s.kind == "layer"} == qnn.layers().keys()
    assert {s.path for s in found if s.kind == "products"} == {
        "down.1.attn.0",
        "mid.attn_1",
        "up.1.attn.0",
        "up.1.attn.1",
    }

    unet = tiny_unet().eval()
    with torch.no_grad():
        full = unet(inputs.x, inputs.t)
        layer = qnn.layers()["mid.block_1.conv1"]
        unet.mid.block_1.conv1.weight.copy_(layer.quantized_weight())
        difference = unet(inputs.x, inputs.t) - full
    shares = [(d.square().mean() / f.square().mean()).item() for d, f in zip(difference.split(4), full.split(4))]  # noqa: B905
    (own,) = (s for s in found if s.path == "mid.block_1.conv1")
    assert own.weight == pytest.approx(sum(shares) / 3, rel=1e-3)
    assert own.activation is not None
    weights_only = layer_sensitivities(with_grids(QuantConfig(3)), inputs.first(1))
    assert all(s.kind == "layer" and s.activation is None for s in weights_only)


def test_errors_of_estimate_and_trajectory(inputs: Inputs) -> None:
    qnn = with_grids(QuantConfig(4, 8, quant_act=True))
    errors = estimate_errors(qnn, inputs, batch_size=5)
    assert list(errors) == ["weights", "weights and activations"]
    with torch.no_grad():
        quantized = qnn(inputs.x, inputs.t)
        with qnn.quant_state(False, False):
            full = qnn(inputs.x, inputs.t)
    for step, (q, f) in enumerate(zip(quantized.split(4), full.split(4), strict=True)):
        # Mean square = bias² as it is seen + biased variance; bias and variance are corrected for chance.
        total = ((q - f).square().mean() / f.square().mean()).item()
        assert errors["weights and activations"].total[step].item() == pytest.approx(total, rel=1e-3)

    def sample(model, indices, on_step):
        x = inputs.x[list(indices)]
        for k, t in enumerate((9.0, 4.0)):
            on_step(k, t, x)
            x = x - 0.1 * model(x, torch.full((len(x),), t))
        return x

    with torch.no_grad():
        paths = trajectory_errors(qnn, sample, range(3))
    assert paths["weights"].timesteps.tolist() == [9, 4, 0]
    assert paths["weights"].total[0] == 0  # both begin with the same noise
    assert 0 < paths["weights"].total[1] < paths["weights"].total[2]


def test_thinning_keeps_what_is_short_and_halves_at_most_too_much() -> None:
    assert torch.equal(thinned(torch.arange(6.0).view(2, 3), 6), torch.arange(6.0))
    assert 50 < len(thinned(torch.arange(101.0), 100)) <= 100


def test_losses_are_read_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(
        "2026-01-01 10:00:00 conv_in, weights: loss 0.5 -> 0.1 (1.0 s)\n"
        "2026-01-01 10:00:01 mid.block_1, weights: loss 2e-05 -> 1e-06 (1.0 s); kept: it grew\n"
        "2026-01-01 10:00:02 conv_in, activations: loss 0.3 -> 0.2 (1.0 s)\n"
        "2026-01-01 11:00:00 conv_in, weights: loss 0.5 -> 0.2 (1.0 s)\n"
        "something else, weights: loss of sleep -> coffee\n"
    )
    assert read_unit_losses(log) == [
        UnitLoss("conv_in", "weights", 0.5, 0.2),
        UnitLoss("mid.block_1", "weights", 2e-05, 1e-06),
        UnitLoss("conv_in", "activations", 0.3, 0.2),
    ]
