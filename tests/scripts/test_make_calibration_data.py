"""The command that makes calibration sets."""

from __future__ import annotations

import os
import resource

import pytest
import torch

from ddim.config import load_config
from ddim.noise import ImageNoise
from qdiff.cli.make_calibration_data import main
from qdiff.cli.pixel import PixelSampler, SamplerOptions

from .conftest import STEPS


def make(miniature, path, *flags):
    main([*miniature.flags(), "--out", str(path), *map(str, flags)])
    return torch.load(path, weights_only=True)


def test_holds_every_step_of_the_sampler(miniature):
    content = torch.load(miniature.calibration_set, weights_only=True)
    assert list(content) == ["xs", "ts"]
    assert [x.shape for x in content["xs"]] == [(6, 3, 8, 8)] * STEPS
    assert [t.tolist() for t in content["ts"]] == [[t] * 6 for t in (80.0, 45.0, 20.0, 5.0, 0.0)]
    assert torch.equal(content["xs"][0], ImageNoise(0, range(6), (3, 8, 8)).start())


def test_does_not_depend_on_the_batch_size(miniature, tmp_path):
    content = torch.load(miniature.calibration_set, weights_only=True)
    again = make(miniature, tmp_path / "set.pt", "-n", 6, "--batch_size", 5)
    for x, y in zip(content["xs"], again["xs"], strict=True):
        assert (x - y).abs().max() < 1e-4


def test_keeps_what_calibration_takes(miniature, tmp_path):
    content = torch.load(miniature.calibration_set, weights_only=True)
    kept = make(miniature, tmp_path / "set.pt", "--cali_st", 2, "--cali_n", 3, "--half")
    assert [t[0].item() for t in kept["ts"]] == [80.0, 20.0, 0.0]
    assert [x.shape[0] for x in kept["xs"]] == [3, 3, 3]
    assert kept["xs"][0].dtype == torch.float16
    assert torch.equal(kept["xs"][0], content["xs"][0][:3].half())


def test_two_names_of_the_same_flags(miniature, tmp_path):
    make(miniature, tmp_path / "one.pt", "--cali_st", 2, "--cali_n", 3)
    make(miniature, tmp_path / "two.pt", "--steps", 2, "--per_step", 3)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


@pytest.mark.parametrize("sample_type", ["ddpm_noisy", "dpm_solver"])
def test_other_samplers(miniature, tmp_path, sample_type):
    content = make(miniature, tmp_path / "set.pt", "-n", 2, "--sample_type", sample_type)
    assert len(content["xs"]) == STEPS
    times = [float(t[0]) for t in content["ts"]]
    assert times == sorted(times, reverse=True)


def test_summary(miniature, tmp_path, capsys):
    make(miniature, tmp_path / "set.pt", "-n", 2)
    said = capsys.readouterr().out
    for word in ("5 steps of 2x3x8x8", "timesteps 80 down to 0", "--cali_st 5 --cali_n 2"):
        assert word in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cali_st", "6"], ["--cali_st 6", "1 to 5"]),
        (["--cali_n", "9", "-n", "3"], ["--cali_n 9", "--n_samples 3"]),
        (["--steps", "6"], ["--cali_st 6", "1 to 5"]),
        (["--threads", "0"], ["--threads", "'0'", "at least 1"]),
        (["--picture", "set.jpg"], ["--picture set.jpg", ".png"]),
        (["--picture", "/nowhere/at/all.png"], ["--picture", "no folder"]),
        (["--timesteps", "101"], ["--timesteps 101", "1 to 100"]),
        (["--timesteps", "0"], ["--timesteps", "'0'", "at least 1"]),
        (["--sample_type", "dpm_solver", "--eta", "1"], ["--eta 1.0", "generalized"]),
        (["--out", "/nowhere/at/all.pt"], ["--out", "no folder"]),
        (["--samples", "3"], ["--samples", "did you mean --n_samples"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cpu, cuda"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_flags(miniature, tmp_path, failing, flags, words):
    failure = failing(*miniature.flags(), "--out", tmp_path / "set.pt", *flags, main=main)
    assert failure.status == 2
    for word in words:
        assert word in failure.message
    assert os.listdir(tmp_path) == []


def test_does_not_replace_a_file_unasked(miniature, tmp_path, failing):
    path = tmp_path / "set.pt"
    path.write_text("precious")
    failure = failing(*miniature.flags(), "--out", path, main=main)
    assert failure.status == 2
    assert "--force" in failure.message
    assert path.read_text() == "precious"
    assert len(make(miniature, path, "-n", 1, "--force")["xs"]) == STEPS


def test_a_file_that_may_not_grow(miniature, tmp_path, failing):
    """``ulimit -f``; what a full disk says, test_recording_survives.py sees on a real one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    try:
        failure = failing(*miniature.flags(), "-n", 4, "--out", tmp_path / "set.pt", main=main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failure.status == 2
    assert "set.pt.part/set.pt: File too large" in failure.message
    assert "the same command goes on" in failure.message
    make(miniature, tmp_path / "set.pt", "-n", 4)
    assert os.listdir(tmp_path) == ["set.pt"]


def test_uniform_steps_that_do_not_divide_the_schedule(miniature):
    sampler = PixelSampler(
        load_config(miniature.config), SamplerOptions("generalized", "uniform", 30, 0.0, 0), torch.device("cpu")
    )
    assert sampler.n_steps == 34  # 0, 3, ..., 99: the stride is kept, as in the published sampler
