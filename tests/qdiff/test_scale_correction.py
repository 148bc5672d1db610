"""The output's scale: what is fitted, looked up between timesteps, and applied when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdiff import scale_correction
from qdiff.calibrate import calibrate
from qdiff.calibration_data import CalibrationSet
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.output_scale import OutputScale
from qdiff.quant_model import QuantModel
from qdiff.scale_correction import fit_output_scale

from .conftest import SMALL, as_calibrated, noisy_inputs, wrapped

W4A8 = QuantConfig(4, 8, quant_act=True, split=True)
TIMESTEPS = (3.0, 50.0, 700.0)
A_STEP = 4


def data() -> CalibrationSet:
    """Noisiest first, as sets are."""
    x, _ = noisy_inputs(A_STEP * len(TIMESTEPS))
    return CalibrationSet(x, torch.tensor(TIMESTEPS[::-1]).repeat_interleave(A_STEP))


def output(qnn: QuantModel, t: Tensor | None = None) -> Tensor:
    x, _ = noisy_inputs(3, seed=4)
    with torch.no_grad():
        return qnn(x, torch.tensor(TIMESTEPS) if t is None else t)


# Looking up.


def test_linear_in_between_and_constant_beyond() -> None:
    scale = OutputScale((10, 20, 40), (1.0, 2.0, 4.0), (1.0, 0.5, 0.5))
    t = torch.tensor([0.0, 10, 12.5, 20, 30, 40, 999])
    torch.testing.assert_close(scale.at(t, act_quant=False), torch.tensor([1, 1, 1.25, 2, 3, 4, 4]))
    torch.testing.assert_close(scale.at(t, act_quant=True), torch.tensor([1, 1, 0.875, 0.5, 0.5, 0.5, 0.5]))


def test_one_timestep_is_for_all() -> None:
    assert OutputScale((500,), (1.5,)).at(torch.tensor([0.0, 500, 999]), act_quant=False).tolist() == [1.5] * 3


def test_each_sample_is_divided_by_its_own_scale() -> None:
    scale = OutputScale((0, 100), (1.0, 2.0))
    got = scale.correct(torch.ones(3, 2, 2, 2), torch.tensor([0.0, 50, 100]), act_quant=False)
    torch.testing.assert_close(got[:, 0, 0, 0], torch.tensor([1, 1 / 1.5, 0.5]))
    assert got.dtype == torch.float32
    assert scale.correct(torch.ones(1, 1, dtype=torch.float16), torch.zeros(1), act_quant=False).dtype == torch.float16


def test_scales_that_were_not_fitted_are_missed() -> None:
    with pytest.raises(ValueError, match="no output scale was fitted with quantized activations"):
        OutputScale((1, 2), (1.0, 1.0)).at(torch.ones(1), act_quant=True)


@pytest.mark.parametrize(
    ("timesteps", "weights", "message"),
    [
        ((), (), "at least one"),
        ((2, 1), (1.0, 1.0), "must ascend"),
        ((1, 2), (1.0,), "one positive scale"),
        ((1, 2), (1.0, 0.0), "one positive scale"),
        ((1, 2), (1.0, float("nan")), "one positive scale"),
    ],
)
def test_impossible_tables(timesteps: tuple, weights: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutputScale(timesteps, weights)


# Fitting.


class Scaled(QuantModel):
    """Its output, quantized, is the full-precision one times a factor of the timestep."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with self.quant_state(False, False):
            full = self.model(x, t)
        if not self.use_weight_quant:
            return full
        return full * ((1.3 if self.use_act_quant else 1.1) + t / 10_000).view(-1, 1, 1, 1)


def scaled(config: QuantConfig = W4A8) -> QuantModel:
    qnn = wrapped(config, **SMALL)
    qnn.find_weight_grids()
    qnn.__class__ = Scaled
    return qnn


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_scale_of_a_scaled_network_is_its_factor(chunk: int) -> None:
    scale = fit_output_scale(scaled(), data(), chunk=chunk)
    assert scale.timesteps.tolist() == list(TIMESTEPS)
    added = torch.tensor(TIMESTEPS) / 10_000
    torch.testing.assert_close(scale.weights, 1.1 + added)
    torch.testing.assert_close(scale.activations, 1.3 + added)


def test_without_quantized_activations_there_is_one_table() -> None:
    scale = fit_output_scale(scaled(QuantConfig(4, split=True)), data())
    assert scale.activations is None
    torch.testing.assert_close(scale.weights, 1.1 + torch.tensor(TIMESTEPS) / 10_000)


def test_what_remains_is_orthogonal_to_the_full_output() -> None:
    """The property of least squares, and why no other factor comes closer."""
    qnn, samples = as_calibrated(W4A8), data()
    scale = fit_output_scale(qnn, samples)
    with torch.no_grad():
        quantized = qnn(samples.x, samples.t)
        with qnn.quant_state(False, False):
            full = qnn(samples.x, samples.t)
    rest = quantized - full * scale.at(samples.t, act_quant=True).view(-1, 1, 1, 1)
    for step in TIMESTEPS:
        own = samples.t == step
        assert abs((rest[own] * full[own]).sum()) < 1e-3 * full[own].square().sum()
    assert (scale.weights != 1).all()


def test_the_network_is_left_as_it_was() -> None:
    qnn = as_calibrated(W4A8, **SMALL)
    qnn.train()
    qnn.output_scale = before = OutputScale((0,), (3.0,), (3.0,))
    first, second = fit_output_scale(qnn, data()), fit_output_scale(qnn, data())
    assert torch.equal(first.activations, second.activations)
    assert (first.weights < 2).all()  # measured without the scale that was there
    assert qnn.output_scale is before
    assert all(module.training for module in qnn.modules() if module is not before)
    assert {(m.use_weight_quant, m.use_act_quant) for m in (qnn, *qnn.layers().values())} == {(True, True)}


def test_a_network_without_its_full_precision_weights_is_refused() -> None:
    qnn = as_calibrated(W4A8, **SMALL)
    for layer in qnn.layers().values():
        layer.weight.data = layer.baked_weight.clone()
    with pytest.raises(ValueError, match="no full-precision weights"):
        fit_output_scale(qnn, data())


def test_an_output_of_the_other_sign_has_no_scale() -> None:
    qnn = scaled()
    original = Scaled.forward
    qnn.__class__ = type(
        "Negated", (Scaled,), {"forward": lambda s, x, t: original(s, x, t) * (-1 if s.use_weight_quant else 1)}
    )
    with pytest.raises(ValueError, match="no scale fits"):
        fit_output_scale(qnn, data())


# Applying.


def test_the_output_is_divided_only_while_quantized() -> None:
    qnn = as_calibrated(W4A8, **SMALL)
    plain = dict.fromkeys(((True, True), (True, False), (False, False)))
    for state in plain:
        with qnn.quant_state(*state):
            plain[state] = output(qnn)
    qnn.output_scale = OutputScale((0,), (2.0,), (4.0,))
    for state, factor in (((True, True), 4), ((True, False), 2), ((False, False), 1)):
        with qnn.quant_state(*state):
            assert torch.equal(output(qnn) * factor, plain[state])
    qnn.output_scale = None
    assert torch.equal(output(qnn), plain[True, True])


def test_correcting_twice_changes_nothing_more() -> None:
    """A corrected network's own scale is 1."""
    qnn = as_calibrated(W4A8, **SMALL)
    samples = data()
    qnn.output_scale = fit_output_scale(qnn, samples)
    with torch.no_grad():
        corrected = qnn(samples.x, samples.t)
        with qnn.quant_state(False, False):
            full = qnn(samples.x, samples.t)
    for step in TIMESTEPS:
        own = samples.t == step
        assert ((corrected[own] * full[own]).sum() / full[own].square().sum()).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("mode", ["linear", "qdiff"])
@pytest.mark.parametrize("quant_act", [False, True])
def test_a_calibration_fits_the_scale_at_its_end(mode: str, quant_act: bool) -> None:
    config = QuantConfig(4, 8, quant_act=quant_act, split=True)
    options = CalibrationConfig(iters=1, iters_a=1, batch_size=4, correct_scale=True)
    qnn = wrapped(config, **SMALL)
    calibrate(qnn, data(), options, mode=mode)
    expected = fit_output_scale(qnn, data())
    assert torch.equal(qnn.output_scale.weights, expected.weights)
    assert (qnn.output_scale.activations is not None) == quant_act
    before = output(qnn)
    qnn.output_scale = None
    assert not torch.equal(output(qnn), before)


def test_without_being_asked_a_calibration_has_no_scale() -> None:
    qnn = wrapped(QuantConfig(4, split=True), **SMALL)
    qnn.output_scale = OutputScale((0,), (2.0,))
    calibrate(qnn, None, CalibrationConfig(), mode="linear")
    assert qnn.output_scale is None


def test_fitting_needs_samples() -> None:
    with pytest.raises(ValueError, match="calibration samples are needed"):
        calibrate(wrapped(QuantConfig(4), **SMALL), None, CalibrationConfig(correct_scale=True), mode="linear")


def test_the_published_state_does_not_change() -> None:
    qnn = as_calibrated(W4A8, **SMALL)
    names = qnn.state_dict().keys()
    qnn.output_scale = OutputScale((0,), (2.0,), (4.0,))
    assert qnn.state_dict().keys() == names


def test_a_corrected_network_compiles_as_one_graph() -> None:
    qnn = as_calibrated(W4A8, **SMALL)
    qnn.output_scale = fit_output_scale(qnn, data())
    torch._dynamo.reset()
    compiled = torch.compile(qnn, backend="eager", fullgraph=True)
    assert torch.equal(output(compiled), output(qnn))


# The mean error.


class Shifted(QuantModel):
    """Its output, quantized, is a multiple of the full-precision one, and a map that depends on the timestep."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with self.quant_state(False, False):
            full = self.model(x, t)
        if not self.use_weight_quant:
            return full
        pixels = torch.linspace(-1, 1, full[0].numel()).view(full.shape[1:])
        return full * 1.2 + pixels * (1 + t.view(-1, 1, 1, 1) / 100)


def test_scale_and_mean_error_are_told_apart() -> None:
    qnn, samples = scaled(), data()
    qnn.__class__ = Shifted
    scale = fit_output_scale(qnn, samples, mean=True, chunk=5)
    for table, mean in ((scale.weights, scale.weights_mean), (scale.activations, scale.activations_mean)):
        torch.testing.assert_close(table, torch.full_like(table, 1.2), rtol=1e-4, atol=0)
        pixels = torch.linspace(-1, 1, mean[0].numel()).view(mean.shape[1:])
        for t, own in zip(TIMESTEPS, mean, strict=True):
            torch.testing.assert_close(own, pixels * (1 + t / 100), rtol=2e-3, atol=2e-3)
    qnn.set_quant_state(True, True)
    quantized = qnn(samples.x, samples.t)
    with qnn.quant_state(False, False):
        full = qnn(samples.x, samples.t)
    torch.testing.assert_close(scale.correct(quantized, samples.t, act_quant=True), full, rtol=5e-3, atol=5e-3)
    assert torch.equal(scale.weights_mean, scale.weights_mean.half().float())  # nothing is lost in a file


def test_a_mean_error_of_chance_is_none() -> None:
    """Errors without a mean leave maps far smaller than the averages of so few samples."""
    samples = data()
    sums = scale_correction._Sums(1, torch.device("cpu"))
    torch.manual_seed(0)
    full = torch.randn(24, *samples.x.shape[1:])
    noise = 0.1 * torch.randn_like(full)
    sums.add(torch.zeros(24, dtype=torch.long), full, full + noise, maps=True)
    _, mean = sums.fit()
    assert mean.square().mean() < 0.2 * noise.mean(0).square().mean()


def test_one_sample_has_no_mean_error() -> None:
    sums = scale_correction._Sums(1, torch.device("cpu"))
    full = torch.randn(1, 1, 4, 4)
    sums.add(torch.zeros(1, dtype=torch.long), full, full * 1.5 + 1, maps=True)
    assert sums.fit()[1].count_nonzero() == 0


def test_between_timesteps_the_map_is_too() -> None:
    maps = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    scale = OutputScale((0, 100), (1.0, 2.0), weights_mean=maps)
    output = torch.full((3, 1, 2, 2), 4.0)
    corrected = scale.correct(output, torch.tensor([0.0, 50.0, 999.0]), act_quant=False)
    assert corrected[:, 0, 0, 0].tolist() == pytest.approx([4.0, 3.5 / 1.5, 1.5])


def test_maps_of_another_size_are_refused() -> None:
    scale = OutputScale((0,), (1.0,), weights_mean=torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="1x2x2, not 1x4x4"):
        scale.correct(torch.zeros(1, 1, 4, 4), torch.zeros(1), act_quant=False)
    with pytest.raises(ValueError, match="one map for each of the 2 timesteps"):
        OutputScale((0, 1), (1.0, 1.0), weights_mean=torch.zeros(1, 1, 2, 2))


def test_calibration_fits_the_mean_error_when_asked() -> None:
    qnn = wrapped(W4A8, **SMALL)
    options = CalibrationConfig(correct_scale=True, correct_mean=True)
    calibrate(qnn, data(), options, mode="linear")
    assert qnn.output_scale.activations_mean.shape == (len(TIMESTEPS), *data().x.shape[1:])
    with pytest.raises(ValueError, match="correct_mean needs correct_scale"):
        CalibrationConfig(correct_mean=True)
