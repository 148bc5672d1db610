"""Timed ranges and the output's scale from the command line: calibrating, resuming, and adding a scale afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qdiff.checkpoint import read_info, read_output_scale
from qdiff.cli import correct_scale
from qdiff.cli.sample_ddim import main

from .latent_models import sample as sample_latents
from .test_sample_ddim import IMAGES, pictures, sample
from .text_models import draw

LINEAR = ["--ptq", "--quant_mode", "linear", "--weight_bit", "4", "--quant_act", "--split"]

BETTER = [*LINEAR, "--timed_ranges", "all", "--split_input", "--act_range", "mse", "--correct_scale"]
BETTER += ["--range_samples", "all"]


@pytest.fixture(scope="module")
def better(miniature, tmp_path_factory) -> Path:
    """A run folder, calibrated with everything that only the packed file can say."""
    return sample([*miniature.flags(), *BETTER, *miniature.calibration_flags()], tmp_path_factory.mktemp("better"))


@pytest.fixture(scope="module")
def plain(miniature, tmp_path_factory) -> Path:
    return sample([*miniature.flags(), *LINEAR, *miniature.calibration_flags()], tmp_path_factory.mktemp("plain"))


def resumed(miniature, checkpoint: Path, out: Path, *flags: str) -> torch.Tensor:
    words = ["--ptq", "--resume", "--cali_ckpt", str(checkpoint), *flags]
    return pictures(sample([*miniature.flags(ckpt=False), *words], out))


def test_only_the_packed_file_is_written_and_the_log_says_why(better):
    assert {p.name for p in better.glob("ckpt*")} == {"ckpt.safetensors"}
    assert "no ckpt.pth: the published format has no place for activation ranges" in (better / "run.log").read_text()
    info = read_info(better / "ckpt.safetensors")
    assert info.quant.timed_ranges == "all"
    assert len(info.quant.timesteps) == len(info.calibration["steps"])
    assert info.quant.act_range == "mse"
    assert info.calibration["correct_scale"] is True
    assert info.calibration["range_samples"] is None


def test_it_needs_no_flags_to_be_resumed(miniature, better, tmp_path):
    assert torch.equal(resumed(miniature, better / "ckpt.safetensors", tmp_path, "--quant_act"), pictures(better))


def test_the_scale_can_be_left_out(miniature, better, tmp_path):
    without = resumed(miniature, better / "ckpt.safetensors", tmp_path / "a", "--quant_act", "--no_correct_scale")
    assert not torch.equal(without, pictures(better))


def test_weights_alone_have_a_scale_of_their_own(miniature, better, tmp_path):
    scale = read_output_scale(better / "ckpt.safetensors")
    assert not torch.equal(scale.weights, scale.activations)
    weights = resumed(miniature, better / "ckpt.safetensors", tmp_path / "a")
    assert not torch.equal(
        weights, resumed(miniature, better / "ckpt.safetensors", tmp_path / "b", "--no_correct_scale")
    )
    assert not torch.equal(weights, pictures(better))


def test_going_on_in_its_run_folder(miniature, better, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(better, folder)
    (folder / "img" / "000001.png").unlink()
    arguments = [*miniature.flags(), *BETTER, *miniature.calibration_flags(), "--batch_size", "1"]
    main([*arguments, "--max_images", str(IMAGES), "-l", str(folder)])
    assert (pictures(folder) - pictures(better)).abs().max() < 0.05
    assert (folder / "run.log").read_text().count("packed:") == 1  # not calibrated again


def test_a_published_file_is_written_without_the_scale_and_the_log_says_so(miniature, tmp_path):
    flags = [*LINEAR, "--correct_scale", *miniature.calibration_flags()]
    folder = sample([*miniature.flags(), *flags], tmp_path)
    assert "but for the correction of the output, for which it has no place" in (folder / "run.log").read_text()
    uncorrected = resumed(miniature, folder / "ckpt.safetensors", tmp_path / "a", "--quant_act", "--no_correct_scale")
    words = [
        "--ptq",
        "--quant_act",
        "--resume",
        "--cali_ckpt",
        str(folder / "ckpt.pth"),
        "--weight_bit",
        "4",
        "--split",
    ]
    assert torch.equal(pictures(sample([*miniature.flags(), *words], tmp_path / "b")), uncorrected)
    assert not torch.equal(pictures(folder), uncorrected)


def test_weights_alone_rounded_to_nearest_have_a_scale_too(miniature, tmp_path):
    flags = ["--ptq", "--quant_mode", "linear", "--weight_bit", "4", "--correct_scale", *miniature.calibration_flags()]
    folder = sample([*miniature.flags(), *flags], tmp_path)
    assert read_output_scale(folder / "ckpt.safetensors").activations is None
    assert torch.equal(resumed(miniature, folder / "ckpt.safetensors", tmp_path / "a"), pictures(folder))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--timed_ranges", "input"], ["--timed_ranges input", "with --timed_ranges all", "leave the flag out"]),
        (["--timed_ranges", "none"], ["--timed_ranges none", "with --timed_ranges all"]),
        (["--a_sym"], ["--a_sym", "calibrated without"]),
        (["--correct_scale"], ["--correct_scale is for calibrating", "scripts/correct_scale.py"]),
    ],
)
def test_flags_that_contradict_the_file(miniature, better, tmp_path, failing, flags, words):
    resume = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", better / "ckpt.safetensors"]
    failure = failing(*miniature.flags(ckpt=False), *resume, *flags, "-l", tmp_path / "out")
    assert failure.status == 2
    for word in words:
        assert word in failure.message


@pytest.mark.parametrize("facts", [True, False])
@pytest.mark.parametrize("flag", ["--timed_ranges all", "--split_input"])
def test_a_published_file_has_none_of_it(miniature, plain, tmp_path, failing, facts, flag):
    shutil.copy(plain / "ckpt.pth", tmp_path)
    if facts:
        shutil.copy(plain / "ckpt.json", tmp_path)
    resume = ["--ptq", "--quant_act", "--weight_bit", 4, "--split", "--resume", "--cali_ckpt", tmp_path / "ckpt.pth"]
    failure = failing(*miniature.flags(), *resume, *flag.split(), "-l", tmp_path / "out")
    assert failure.status == 2
    assert f"{flag}:" in failure.message
    assert "leave " in failure.message


def test_timed_ranges_on_weights_that_are_calibrated(miniature, plain, tmp_path):
    """``--resume_w``: any checkpoint's weights, new activations."""
    flags = ["--ptq", "--quant_mode", "linear", "--quant_act", "--resume_w", "--cali_ckpt", str(plain / "ckpt.pth")]
    more = ["--weight_bit", "4", "--split", "--timed_ranges", "input", *miniature.calibration_flags()]
    folder = sample([*miniature.flags(), *flags, *more], tmp_path)
    ours, theirs = (load_file(f / "ckpt.safetensors") for f in (folder, plain))
    assert torch.equal(ours["codes"], theirs["codes"])
    timesteps = read_info(folder / "ckpt.safetensors").quant.timesteps
    assert len(ours["act_delta"]) == len(theirs["act_delta"]) + len(timesteps) - 1  # conv_in has more than one


# The command that adds a scale.


def added(miniature, checkpoint: Path, out: Path, *flags: str) -> None:
    selection = miniature.calibration_flags()[6:]
    model = ["--config", str(miniature.config), "--device", "cpu"]
    assert correct_scale.main([str(checkpoint), "--out", str(out), *model, *flags, *selection]) == 0


@pytest.mark.parametrize("mean", [[], ["--correct_mean"]], ids=["scale", "mean"])
@pytest.mark.parametrize("form", ["ckpt.pth", "ckpt.safetensors"])
def test_a_scale_added_is_the_one_a_calibration_fits(miniature, plain, tmp_path, capsys, form, mean):
    flags = [*LINEAR, "--correct_scale", *mean, *miniature.calibration_flags()]
    expected = sample([*miniature.flags(), *flags], tmp_path)
    source = ["--ckpt", str(miniature.ckpt)] if form.endswith("safetensors") else []
    added(miniature, plain / form, tmp_path / "out.safetensors", *source, *mean)
    ours, theirs = (load_file(path) for path in (tmp_path / "out.safetensors", expected / "ckpt.safetensors"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-4 if tensor.dim() > 1 else 0, msg=name)
    assert ("scale_activations_mean" in theirs) == bool(mean)
    said = capsys.readouterr().out
    assert ("mean error" in said) == bool(mean)
    assert f"{theirs['scale_activations'][0]:.4f}" in said
    assert "--resume --cali_ckpt" in said


def same_scale(plain: Path, corrected: Path, *model: object, selection: list[str]) -> None:
    """Added afterwards it is the one that the calibration fitted."""
    out = plain / "added.safetensors"
    words = [plain / "ckpt.safetensors", "--out", out, *model, "--device", "cpu", "--correct_mean", *selection]
    assert correct_scale.main([str(word) for word in words]) == 0
    ours, theirs = (load_file(path) for path in (out, corrected / "ckpt.safetensors"))
    assert ours.keys() == theirs.keys()
    assert "scale_activations_mean" in theirs
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-4 if tensor.dim() > 1 else 0, msg=name)
    assert read_info(out).model_config == read_info(corrected / "ckpt.safetensors").model_config


CORRECTED = ["--correct_scale", "--correct_mean"]


@pytest.mark.parametrize("kind", ["beds", "classes"])
def test_latent_models_in_the_same_way(kind, latent, tmp_path):
    model = latent(kind)
    flags = [*model.flags(*LINEAR, "-n", 0), *model.calibration_flags()]
    plain, corrected = sample_latents(flags, tmp_path / "a"), sample_latents([*flags, *CORRECTED], tmp_path / "b")
    same_scale(plain, corrected, "-r", model.ckpt, selection=model.calibration_flags()[6:])


def test_text_models_in_the_same_way_with_their_config_elsewhere(text, tmp_path):
    model = text("sd")
    flags = [*model.flags(*LINEAR), *model.calibration_flags()]
    plain, corrected = (
        draw([*flags, *more], tmp_path / name, "--n_iter", 0) for name, more in (("a", []), ("b", CORRECTED))
    )
    same_scale(plain, corrected, "-r", model.ckpt, "--config", model.config, selection=model.calibration_flags()[6:])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["say which model", "--config FILE", "-r PATH"]),
        (["-r", "{ckpt}", "--use_pretrained"], ["--use_pretrained goes with a pixel-space model"]),
        (["-r", "nowhere"], ["--resume_base nowhere: no such file"]),
        (["--config", "{config}", "--ckpt", "{ckpt}", "a.b=1"], ["a.b=1: the config of a pixel-space model"]),
    ],
)
def test_one_kind_of_model(miniature, plain, tmp_path, failing, flags, words):
    flags = [flag.format(ckpt=miniature.ckpt, config=miniature.config) for flag in flags]
    selection = miniature.calibration_flags()[6:]
    arguments = [plain / "ckpt.safetensors", "--out", tmp_path / "x.safetensors", *flags, *selection]
    failure = failing(*arguments, main=correct_scale.main)
    assert failure.status == 2
    for word in words:
        assert word in failure.message


def test_it_may_replace_the_file(miniature, better, tmp_path):
    path = tmp_path / "ckpt.safetensors"
    shutil.copy(better / "ckpt.safetensors", path)
    added(miniature, path, path, "--ckpt", str(miniature.ckpt))
    assert path.read_bytes() == (better / "ckpt.safetensors").read_bytes()  # fitted anew to the same result


def test_a_published_file_without_facts_needs_its_flags(miniature, plain, tmp_path):
    shutil.copy(plain / "ckpt.pth", tmp_path)
    added(miniature, tmp_path / "ckpt.pth", tmp_path / "a.safetensors", "--weight_bit", "4", "--split", "--quant_act")
    assert read_output_scale(tmp_path / "a.safetensors").activations is not None
    added(miniature, tmp_path / "ckpt.pth", tmp_path / "b.safetensors", "--weight_bit", "4", "--split")
    assert read_output_scale(tmp_path / "b.safetensors").activations is None


@pytest.mark.parametrize(
    ("checkpoint", "out", "flags", "words"),
    [
        ("ckpt.safetensors", "x.safetensors", [], ["--use_pretrained", "--ckpt"]),
        ("ckpt.pth", "x.pth", [], ["--out", "only the packed format", ".safetensors"]),
        ("none.pth", "x.safetensors", [], ["none.pth", "no such file"]),
        ("ckpt.pth", "x.safetensors", ["--weight_bit", "8"], ["--weight_bit 8", "with --weight_bit 4"]),
        ("ckpt.pth", "x.safetensors", ["--cali_n", "9999"], ["--cali_n 9999"]),
    ],
)
def test_wrong_input(miniature, plain, tmp_path, failing, checkpoint, out, flags, words):
    selection = miniature.calibration_flags()[6:]
    arguments = [plain / checkpoint, "--out", tmp_path / out, "--config", miniature.config, *selection, *flags]
    failure = failing(*arguments, main=correct_scale.main)
    assert failure.status == 2
    for word in words:
        assert word in failure.message
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_network(miniature, better, tmp_path, failing):
    state = torch.load(miniature.ckpt, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "other.ckpt")
    selection = miniature.calibration_flags()[6:]
    arguments = [better / "ckpt.safetensors", "--out", tmp_path / "x.safetensors", "--config", miniature.config]
    failure = failing(*arguments, *selection, "--ckpt", tmp_path / "other.ckpt", main=correct_scale.main)
    assert failure.status == 2
    assert "not roundings of this full-precision checkpoint's weights" in failure.message
