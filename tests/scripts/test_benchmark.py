"""The benchmarks on miniature networks: that every part of the time is accounted for, and what the files hold."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qdiff.config import CalibrationConfig
from qdiff.evaluation.record import commit, environment
from qdiff.evaluation.timing import in_turn, linear_fit, median_seconds, ratio, seconds_of_process
from qdiff.quant_model import Unit

from .conftest import load_script

benchmark = load_script("benchmark")
QUICK = ["--random_weights", "--iters", "2", "--iters_a", "2", "--cali_st", "2", "--cali_n", "4", "--batch_size", "4"]
QUICK += ["--device", "cpu"]


@pytest.fixture
def run(miniature, tmp_path, capsys):
    """Runs a subcommand on the miniature and returns its file and what it printed."""

    def run(command: str, *words: str, model: bool = True) -> tuple[dict, str]:
        config = ["--config", str(miniature.config)] if model else []
        path = tmp_path / "figures.json"
        assert benchmark.main([command, *config, *words, "--json", str(path)]) == 0
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_memory_between_units_counts(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the process, where half a gigabyte is in use while data are captured and not while a unit learns."""
    capture = benchmark.CALIBRATION.PairedCapture.inputs

    def large(self: Any, unit: Unit) -> Any:
        torch.ones(2**27)
        return capture(self, unit)

    monkeypatch.setattr(benchmark.CALIBRATION.PairedCapture, "inputs", large)
    figures, said = run("calibration", *QUICK)
    assert figures["peak_host_bytes"] - figures["learning_host_bytes"] > 2**28
    assert f"{figures['peak_host_bytes'] / 2**30:.2f} GiB of host memory" in said


def test_calibration_is_divided_into_its_parts(run) -> None:
    figures, said = run("calibration", *QUICK)
    assert {"device", "torch", "cuda", "python", "commit"} <= figures["environment"].keys()
    assert figures["whole"] == pytest.approx(sum(figures[part] for part in benchmark.Breakdown.PARTS))
    assert all(figures[part] > 0 for part in benchmark.Breakdown.PARTS)
    phases = [unit["phase"] for unit in figures["units"]]
    assert phases.count("weights") == phases.count("activations") > 5
    for phase in ("weights", "activations"):
        assert figures[phase] == pytest.approx(sum(u["seconds"] for u in figures["units"] if u["phase"] == phase))
    assert not figures["extrapolated"]
    assert "ms an iteration" in said
    assert "up.0.block.0" in said


@pytest.mark.parametrize("phase", ["weights", "activations"])
def test_one_phase_alone(run, phase: str) -> None:
    figures, said = run("calibration", *QUICK, "--phase", phase)
    other = {"weights": "activations", "activations": "weights"}[phase]
    assert {unit["phase"] for unit in figures["units"]} == {phase}
    assert figures[phase] > 0 == figures[other]
    assert figures["ranges"] > 0
    assert f"Only {phase} were learned." in said


def test_what_is_stopped_leaves_what_it_has_measured(run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "KEEP_EVERY", 0.0)
    keep, kept = benchmark.keep_facts, []

    def stop_later(*words: object) -> object:
        kept.append(keep(*words))
        if len(kept) == 3:
            raise KeyboardInterrupt
        return kept[-1]

    monkeypatch.setattr(benchmark, "keep_facts", stop_later)
    with pytest.raises(SystemExit):
        run("calibration", *QUICK)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["units"]) == 3
    assert figures["finished"] is False
    assert figures["weights"] == pytest.approx(sum(unit["seconds"] for unit in figures["units"]))
    monkeypatch.undo()
    assert run("calibration", *QUICK)[0]["finished"]


def test_a_sample_of_units_stands_for_all(run) -> None:
    whole, _ = run("calibration", *QUICK)
    figures, said = run("calibration", *QUICK, "--units", "3")
    learned = {unit["name"] for unit in figures["units"] if unit["iterations"]}
    names = list(dict.fromkeys(unit["name"] for unit in whole["units"]))
    assert learned == {names[0], names[round((len(names) - 1) / 2)], names[-1]}
    assert figures["extrapolated"]
    assert f"3 of {len(names)} units" in said


def test_extrapolation_multiplies_what_was_learned() -> None:
    reports = [benchmark.UnitReport(n, "layer", "weights", 1, 5, 1.0, 1.0, 2.0) for n in "abcd"]
    parts = benchmark.Breakdown(setup=1.0, weights=4.0, capture=3.0, reports=reports, skipped=frozenset("bd"))
    whole = parts.extrapolated()
    assert (whole.weights, whole.capture, whole.total) == (8.0, 3.0, 12.0)


def test_iterations_are_extrapolated_from_those_that_ran() -> None:
    def report(name: str, phase: str, each: float) -> object:
        return benchmark.UnitReport(name, "layer", phase, 1, 10, 1.0, 1.0, 3.0, iteration_seconds=each)

    def looked_at(report: object) -> object:
        return dataclasses.replace(report, look_seconds=0.5, trace=(None,) * 4)

    reports = [report("a", "weights", 0.2), report("b", "weights", 0.1), report("a", "activations", 0.05)]
    parts = benchmark.Breakdown(setup=1.0, weights=6.0, activations=3.0, reports=reports)
    whole = parts.extrapolated({"weights": 100, "activations": None})
    assert (whole.setup, whole.weights, whole.activations) == (1.0, 6.0 + 0.2 * 90 + 0.1 * 90, 3.0)
    looked = dataclasses.replace(parts, reports=[looked_at(reports[0]), *reports[1:]])
    assert looked.extrapolated({"weights": 100}).weights == whole.weights + 0.5 * (20 - 4)
    half = dataclasses.replace(parts, skipped=frozenset("b")).extrapolated({"weights": 100})
    assert half.weights == (6.0 + 0.2 * 90) * 3 / 2  # two of three reports stand for all
    assert parts.extrapolated().total == parts.total


def test_skipping_units_is_undone() -> None:
    before = benchmark.CALIBRATION.reconstruct_weights
    with benchmark.only([]):
        assert benchmark.CALIBRATION.reconstruct_weights is not before
    assert benchmark.CALIBRATION.reconstruct_weights is before


def test_profile_names_what_runs(run) -> None:
    figures, said = run("calibration", *QUICK, "--units", "1", "--profile")
    assert any("mm" in kernel["name"] for kernel in figures["kernels"])  # the first unit is a linear layer
    assert "All kernels:" in said
    assert "an iteration, which takes" not in said


def test_profile_of_chosen_units(run) -> None:
    figures, said = run("calibration", *QUICK, "--only_units", "mid.attn_1", "temb.dense.0", "--profile")
    learned = [(unit["name"], unit["phase"]) for unit in figures["units"] if unit["iterations"]]
    assert [(unit["name"], unit["phase"]) for unit in figures["unit_kernels"]] == learned
    assert {name for name, _ in learned} == {"mid.attn_1", "temb.dense.0"}
    assert figures["extrapolated"]
    for name, phase in learned:
        assert f"{name}, {phase}: kernels take " in said
    each = {unit["name"]: unit["kernels"] for unit in figures["unit_kernels"]}
    assert any("linear" in kernel["name"] or "addmm" in kernel["name"] for kernel in each["temb.dense.0"])
    whole = {kernel["name"]: kernel["calls"] for kernel in figures["kernels"]}
    times = {(unit["name"], unit["phase"]): unit["iterations"] for unit in figures["units"]}
    for name, calls in whole.items():
        parts = (
            kernel["calls"] * times[unit["name"], unit["phase"]]
            for unit in figures["unit_kernels"]
            for kernel in unit["kernels"]
            if kernel["name"] == name
        )
        assert calls == pytest.approx(sum(parts))


def test_a_unit_that_is_not_there_is_named(capsys) -> None:
    words = ["calibration", *QUICK, "--only_units", "mid.attn_2"]
    with pytest.raises(SystemExit):
        benchmark.main([*words, "--config", str(benchmark.FASHION)])
    assert "no unit is called mid.attn_2; the nearest are mid.attn_1" in capsys.readouterr().err


def test_a_precision_that_is_not_there(run, capsys) -> None:
    word = "fp8" if "precision" in {f.name for f in benchmark.dataclasses.fields(CalibrationConfig)} else "bf16"
    with pytest.raises(SystemExit) as caught:
        run("calibration", *QUICK, "--cali_precision", word)
    assert caught.value.code == 2
    assert word in capsys.readouterr().err


def test_the_set_is_noised_as_the_forward_process_does(miniature) -> None:
    args = benchmark.make_parser().parse_args(["calibration", "--config", str(miniature.config), *QUICK])
    network = benchmark.network_of(args)
    data = benchmark.calibration_set(args, network, samples=500)
    assert data.x.shape == (1000, 3, 8, 8)
    assert data.t.tolist() == sorted(data.t.tolist(), reverse=True)
    alpha_bar = benchmark.alphas_cumprod(benchmark.make_betas(network.config.diffusion))
    for t in data.t.unique():
        a = alpha_bar[int(t)].item()
        assert data.x[data.t == t].var().item() == pytest.approx(a / 3 + 1 - a, rel=0.02)  # of uniform images: 1/3


def test_steps_in_every_precision(run) -> None:
    names = [v.name for v in benchmark.variants(torch.device("cpu"))]
    assert {"full fp32", "full bf16", "w4a8 fp32", "w4a8 bf16", "w4a32 bf16"} <= set(names)
    plain = [name for name in names if "compiled" not in name]
    figures, said = run("step", "--device", "cpu", "--batch_sizes", "2", "3", "--repeats", "2", "--variants", *plain)
    assert [(r["variant"], r["batch_size"]) for r in figures["rows"]] == [(n, size) for size in (2, 3) for n in plain]
    assert all(row["ms"] > 0 and row["graph_ms"] is None and row["ratio"] is None for row in figures["rows"])
    assert "w4a8 bf16" in said


def test_maps_stay_unrounded_where_they_have_16_bits(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "why_not_compiled", lambda device: None)
    some, more = (benchmark.variants(torch.device("cpu"), bits) for bits in (8, 16))
    assert [v.inference.unrounded_maps for v in more if v not in some] == [True]
    assert not any(v.inference.unrounded_maps for v in some)


def test_what_a_step_consists_of(run) -> None:
    words = ["--device", "cpu", "--batch_sizes", "2", "--repeats", "1", "--variants", "full fp32", "--profile"]
    figures, said = run("step", *words)
    kernels = figures["rows"][0]["kernels"]
    assert [k["seconds"] for k in kernels] == sorted((k["seconds"] for k in kernels), reverse=True)
    assert any("conv" in k["name"] and k["calls"] >= 1 for k in kernels)
    assert "full fp32, batch 2: kernels take" in said
    assert "all: convolution or matrix product" in said


KERNELS = {
    "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32": "convolution or matrix product",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT": "convolution or matrix product",
    "triton_red_fused__softmax_clamp_mul_round_3": "softmax, with what is rounded there",
    "triton_poi_fused_convolution_clamp_7": "made by torch.compile: norms, rounding, sums",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>": "attention without a map",
    "Memcpy DtoD": "other",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kinds_of_kernels(name: str) -> None:
    assert benchmark.kind_of_kernel(name) == KERNELS[name]


@pytest.mark.parametrize("kind", ["beds", "churches", "classes"])
def test_latent_networks_are_calibrated_and_extrapolated(kind: str, latent, tmp_path, capsys) -> None:
    path, config = tmp_path / "figures.json", latent(kind).folder / "config.yaml"
    more = ["--flags", "church"] if kind == "churches" else []
    words = ["calibration", "--config", str(config), *QUICK, "--full_iters", "20", "--full_iters_a", "10", *more]
    assert benchmark.main([*words, "--json", str(path)]) == 0
    figures, said = json.loads(path.read_text()), capsys.readouterr().out
    assert "An extrapolation, not a measurement: 2 + 2 iterations a unit ran" in said
    assert "the table has the time of 20 + 10" in said
    assert figures["extrapolated"]
    assert figures["whole"] == pytest.approx(sum(figures[part] for part in benchmark.Breakdown.PARTS))
    learned = [unit for unit in figures["units"] if unit["iterations"]]
    for phase, further in (("weights", 18), ("activations", 8)):
        mine = [unit for unit in learned if unit["phase"] == phase]
        looks = min(20, 2 + further) - 2
        expected = sum(
            unit["seconds"] + further * unit["iteration_seconds"] + looks * unit["look_seconds"] for unit in mine
        )
        assert figures[phase] == pytest.approx(expected)
    assert figures["measured_s"] < figures["whole"]


def config_of(kind: str, latent, text) -> Path:
    return text(kind).config if kind in ("sd", "laion") else latent(kind).folder / "config.yaml"


@pytest.mark.parametrize("kind", ["churches", "classes", "sd", "laion"])
def test_latent_networks_make_steps(kind: str, latent, text, tmp_path) -> None:
    path, config = tmp_path / "figures.json", config_of(kind, latent, text)
    words = ["step", "--config", str(config), *(["--flags", "church"] * (kind == "churches"))]
    words += ["--device", "cpu", "--batch_sizes", "2", "--repeats", "1"]
    assert benchmark.main([*words, "--variants", "full fp32", "w4a8 fp32", "w4a8 bf16", "--json", str(path)]) == 0
    assert [row["ms"] > 0 for row in json.loads(path.read_text())["rows"]] == [True] * 3


def test_a_latent_network_is_as_published(latent, text) -> None:
    def network(kind: str, *more: str) -> object:
        words = ["calibration", "--config", str(config_of(kind, latent, text)), *QUICK, *more]
        args = benchmark.make_parser().parse_args(words)
        return benchmark.network_of(args), args

    beds, _ = network("beds")
    assert (beds.quant.a_sym, beds.quant.act_range, beds.quant.weight_range) == (True, "max", "mse")
    assert (beds.quant.split, beds.options) == (False, {"range_order": "first", "running_stat": True})
    churches, _ = network("churches", "--flags", "church")
    assert (churches.quant.a_sym, churches.quant.act_range) == (False, "mse")
    assert churches.options == {"range_order": "first"}
    texts, args = network("sd")
    assert (texts.quant.split, texts.quant.sm_abit, texts.quant.a_sym) == (True, 16, False)
    assert texts.options == {"range_samples": 16, "running_stat": True}
    assert texts.context_shape == (24, 12)
    data = benchmark.calibration_set(args, texts, samples=3)
    assert data.context.shape == (12, 24, 12)  # 2 timesteps, with a condition and without
    one, other = beds.make(random=True), beds.make(random=True)
    assert one is not other
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(p.abs().sum() > 0 for p in one.parameters())  # the last layers of blocks too
    beds.forget()
    assert all(p.is_meta for p in beds.diffusion.model.diffusion_model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), beds.make(random=True).parameters(), strict=True))
    with pytest.raises(ValueError, match="--random_weights"):
        beds.make(random=False)
    classes, args = network("classes")
    data = benchmark.calibration_set(args, classes, samples=3)
    assert (len(data), data.context.shape) == (12, (12, 1, 12))
    assert torch.equal(data.x[:6], data.x[6:])
    assert torch.equal(data.context[6], data.context[11])
    assert not torch.equal(data.context[0], data.context[1])


def test_steps_are_compared_with_the_compiled_network() -> None:
    rows = [
        {"variant": "full fp16 compiled", "batch_size": 2, "best_ms": 2.0},
        {"variant": "w4a8 fp16 compiled", "batch_size": 2, "best_ms": 3.0},
        {"variant": "w4a8 fp16 compiled", "batch_size": 4, "best_ms": 5.0},
    ]
    benchmark.add_ratios(rows)
    assert [row["ratio"] for row in rows] == [1.0, 1.5, None]


def test_an_unknown_variant_is_refused(run, capsys) -> None:
    with pytest.raises(SystemExit):
        run("step", "--device", "cpu", "--variants", "w2a2")
    assert "'full fp32'" in capsys.readouterr().err


def test_images_are_compared_with_eager_fp32(run, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "why_not_compiled", lambda device: "cannot be tested quickly")
    words = ["--device", "cpu", "--batch_sizes", "1", "--repeats", "1", "--psnr", "1", "--timesteps", "4"]
    figures, said = run("step", *words, "--variants", "full fp32")
    assert set(figures["psnr"]) == {"full", "W4A32", "W4A8"}
    assert figures["psnr"]["full"]["mean"] > 25
    for name in ("W4A32", "W4A8"):
        assert figures["psnr"][name]["mean"] > figures["psnr"][name]["to_full"] + 5
    assert "PSNR" in said


def test_loading_a_packed_checkpoint(run) -> None:
    packed, model = benchmark.BUNDLED, ["--config", str(benchmark.FASHION)]
    figures, said = run(
        "loading", "--device", "cpu", "--cali_ckpt", str(packed), "--batch_size", "1", *model, model=False
    )
    parts = dict(figures["seconds"])
    assert parts.pop("whole") == pytest.approx(sum(parts.values()))
    assert list(parts)[-1] == "first call"
    assert min(parts.values()) >= 0
    assert figures["bytes"] == packed.stat().st_size
    assert f"{packed.stat().st_size / 1e6:.1f} MB" in said


def test_range_search(run) -> None:
    figures, said = run("range-search", "--device", "cpu", "--repeats", "1", model=False)
    assert figures["ms"] > 0
    assert "320x320x3x3" in said


def test_scaling_fits_lines_and_draws_them(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "SHARES", (0.5, 1.0))
    picture = tmp_path / "lines.png"
    figures, said = run("scaling", *QUICK, "--plot", str(picture))
    assert set(figures) >= {"iterations", "samples", "units"}
    assert [len(figures[axis]["x"]) for axis in ("iterations", "samples", "units")] == [2, 2, 2]
    assert figures["samples"]["x"][-1] == 8
    assert picture.stat().st_size > 1000
    assert "R²" in said


def test_ratios_on_a_cpu(run) -> None:
    words = ["--batch_size", "2", "--rounds", "1", "--iterations", "2", "--units", "2"]
    figures, said = run("cpu", *words, model=False)
    assert [row["unit"] for row in figures["units"]][-1] == "conv_out"
    for row in (*figures["units"],):
        assert row["full"] > 0
        assert math.isfinite(row["weights_ratio"])
        assert math.isfinite(row["activations_ratio"])
    assert figures["step"].keys() == {"W4A32", "W4A8"}
    assert "Loading and resuming" in said


# What it measures with.


def test_medians_and_ratios() -> None:
    pauses = iter([0.05, 0.001, 0.02, 0.001])
    taken = median_seconds(lambda: time.sleep(next(pauses)), "cpu", repeats=3)
    assert 0.001 <= taken < 0.02
    times = in_turn({"a": lambda: None, "b": lambda: time.sleep(0.002)}, "cpu", rounds=3)
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert ratio(times, "b", "a") > 1
    assert ratio({"a": [1.0, 2.0, 3.0], "b": [2.0, 6.0, 6.0]}, "b", "a") == 2.0


def test_a_line_is_found_again() -> None:
    start, slope, explained = linear_fit([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert (start, slope, explained) == (pytest.approx(3), pytest.approx(2), pytest.approx(1))
    assert linear_fit([1.0, 2.0, 3.0], [1.0, 3.0, 1.0])[2] == pytest.approx(0)


def test_the_process_has_an_age() -> None:
    assert 0 < seconds_of_process() < 24 * 3600


def test_where_it_was_measured(tmp_path: Path) -> None:
    assert environment("cpu")["torch"] == torch.__version__
    assert "threads" in environment("cpu")["device"]
    assert commit(tmp_path) == "unknown"


def test_even_samples() -> None:
    assert benchmark.evenly("abcdefg", 3) == ["a", "d", "g"]
    assert benchmark.evenly("ab", None) == benchmark.evenly("ab", 5) == ["a", "b"]
    assert benchmark.evenly("abc", 1) == ["a"]


def test_recording_units_leaves_no_hook() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)})
    model.forward = lambda x, t: model["conv"](x)
    found = benchmark.record_units(model, ["conv"], torch.ones(1, 1, 2, 2), torch.ones(1))
    assert torch.equal(found["conv"][0][0], torch.ones(1, 1, 2, 2))
    assert not model["conv"]._forward_hooks
