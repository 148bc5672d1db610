"""What the latent commands refuse: one message that names the remedy, status 2, nothing left behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from qdiff.cli import make_calibration_data, pipeline, sample_ddim
from qdiff.cli.latent import LatentSampler
from qdiff.cli.sample_ldm import main

from .latent_models import LatentMiniature, config_of, sample

FIRST = ["-n", "0"]


@pytest.fixture
def refused(latent, tmp_path, failing):
    """Runs the sampling command, which must refuse; returns its message."""

    def run(*flags: object, kind: str = "churches", base: list[str] | None = None) -> str:
        out = tmp_path / "out"
        failure = failing(*(latent(kind).flags() if base is None else base), "-l", out, *FIRST, *flags, main=main)
        assert failure.status == 2
        assert not out.exists()
        assert "Traceback" not in failure.message
        message = failure.message.partition("error: ")[2]
        assert 0 < message.count("\n") <= 2
        return message

    return run


def model_with(tmp_path: Path, kind: str, change) -> list[str]:
    """Flags that name a copy of a miniature's config, changed, beside an empty checkpoint."""
    content = config_of(kind)
    change(content["model"]["params"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "model.ckpt").touch()
    return ["-r", str(tmp_path / "model.ckpt"), "-c", "4", "--seed", "1", "--device", "cpu"]


FLAGS = {
    "unknown flag": (["--n_sample", "3"], ["--n_sample", "did you mean --n_samples"]),
    "stray word": (["twenty"], ["unrecognized", "twenty"]),
    "unknown flag with a value": (["--foo=1"], ["--foo=1"]),
    "weight bits": (["--ptq", "--weight_bit", "9"], ["--weight_bit", "'9'", "2, 3, 4"]),
    "activation bits": (["--ptq", "--quant_act", "--act_bit", "12"], ["--act_bit", "'12'", "16"]),
    "bits without --ptq": (["--weight_bit", "4"], ["--weight_bit 4 needs --ptq"]),
    "a_min_max without activations": (["--ptq", "--a_min_max"], ["--a_min_max needs --quant_act"]),
    "rs_sm_only alone": (["--ptq", "--quant_act", "--rs_sm_only"], ["--rs_sm_only needs --running_stat"]),
    "no calibration set": (["--ptq"], ["--cali_data_path", "make_calibration_data.py"]),
    "resume without a checkpoint": (["--ptq", "--resume"], ["--resume needs --cali_ckpt"]),
    "a checkpoint that is not there": (["--ptq", "--resume", "--cali_ckpt", "none.pth"], ["none.pth", "no such file"]),
    "eta with another sampler": (["--dpm"], ["--eta 0 has no effect with --dpm"]),
    "too many steps": (["-c", "41"], ["--custom_steps 41", "1 to 40"]),
    "classes": (["--class_labels", "1"], ["--class_labels", "unconditional"]),
    "guidance": (["--scale", "2"], ["--scale", "unconditional"]),
    "cond": (["--cond"], ["--cond", "unconditional"]),
    "labels": (["--class_labels", "1,two"], ["'1,two'", "1,5,207"]),
    "unknown section": (["modle.params.timesteps=3"], ["no section 'modle'", "data, model"]),
    "a word in a section's place": (["model=3"], ["'model' is no section but 3"]),
    "odd latent": (["model.params.image_size=7"], ["image_size 7", "multiple of 2"]),
    "unknown key": (["model.params.timestep=3"], ["config.yaml", "unknown keyword 'timestep'"]),
    "forbidden class": (["model.params.unet_config.target=os.system"], ["config.yaml", "'os.system'", "UNetModel"]),
    "impossible network": (["model.params.unet_config.params.dims=3"], ["config.yaml", "dims=3"]),
    "other layers": (["model.params.unet_config.params.model_channels=64"], ["model.ckpt", "does not fit"]),
    "samples": (["-n", "-1"], ["--n_samples", "'-1'"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(refused, case):
    flags, words = FLAGS[case]
    message = refused(*flags)
    for word in words:
        assert word in message


def test_flags_of_a_class_conditional_model(refused):
    message = refused("--class_labels", "0,5", kind="classes")
    assert "--class_labels 0,5: 5 is not a class" in message
    assert "0 to 4" in message


def test_seed_and_model_are_required(failing, latent):
    assert "--seed" in failing("-r", latent("beds").ckpt, main=main).message
    assert "-r/--resume_base" in failing("--seed", 1, main=main).message


def test_steps_with_ancestral_sampling(failing, latent, tmp_path):
    flags = ["-r", latent("beds").ckpt, "--seed", 1, "-l", tmp_path / "out", "-v"]
    assert "--custom_steps 20 has no effect with --vanilla_sample" in failing(*flags, "-c", 20, main=main).message
    assert "not allowed with" in failing(*flags, "--dpm", main=main).message


def test_models(refused, tmp_path, latent):
    def message(path: Path) -> str:
        return refused(base=["-r", str(path), "-c", "4", "--seed", "1", "--device", "cpu"])

    assert "no such file" in message(tmp_path / "none.ckpt")
    assert "make_random_checkpoint.py" in message(tmp_path / "none.ckpt")
    (tmp_path / "empty").mkdir()
    assert "neither model.ckpt nor model.safetensors" in message(tmp_path / "empty")
    (tmp_path / "empty" / "model.ckpt").write_bytes(latent("beds").ckpt.read_bytes()[:5000])
    assert "config.yaml: no such config file" in message(tmp_path / "empty")
    shutil.copy(latent("beds").folder / "config.yaml", tmp_path / "empty")
    assert "truncated" in message(tmp_path / "empty")
    torch.save({"state_dict": {"betas": torch.zeros(40)}}, tmp_path / "empty" / "model.ckpt")
    assert "model.ckpt: " in message(tmp_path / "empty")


class Bomb:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def test_code_in_a_checkpoint_is_refused_and_not_run(refused, latent, tmp_path):
    touched = tmp_path / "touched"
    shutil.copy(latent("beds").folder / "config.yaml", tmp_path)
    torch.save({"state_dict": {"betas": Bomb(touched)}}, tmp_path / "model.ckpt")
    assert "refused" in refused(base=["-r", str(tmp_path), "-c", "4", "--seed", "1", "--device", "cpu"])
    assert not touched.exists()


def test_models_that_are_sampled_elsewhere(refused, tmp_path):
    def as_text(params):
        params["cond_stage_config"] = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}

    assert "scripts/txt2img.py" in refused(base=model_with(tmp_path, "classes", as_text))

    def as_image(params):
        params |= {"cond_stage_config": "__is_first_stage__", "conditioning_key": "concat"}

    assert "unconditional and class-conditional" in refused(base=model_with(tmp_path, "churches", as_image))


SETS = {
    "latent shape": (lambda c: {**c, "xs": [x[:, :1] for x in c["xs"]]}, ["6x1x8x8", "Nx3x8x8"]),
    "no conditions": (lambda c: {"xs": c["xs"], "ts": c["ts"]}, ["'cs'"]),
    "fewer conditions": (lambda c: {**c, "ucs": [u[:2] for u in c["ucs"]]}, ["'ucs'", "2 samples"]),
    "narrow conditions": (lambda c: {**c, "cs": [u[..., :3] for u in c["cs"]]}, ["'cs'", "3 wide", "12 wide"]),
    "flat conditions": (lambda c: {**c, "cs": [u[:, 0] for u in c["cs"]]}, ["'cs'", "2 axes"]),
    "one tensor": (lambda c: c["xs"][0], ["--cali_st 1"]),
}


@pytest.mark.parametrize("case", SETS)
def test_calibration_sets(refused, latent, tmp_path, case):
    change, words = SETS[case]
    path = tmp_path / "set.pt"
    torch.save(change(torch.load(latent("classes").calibration_set, weights_only=True)), path)
    message = refused("--ptq", "--cali_st", 2, "--cali_n", 4, "--cali_data_path", path, kind="classes")
    assert str(path) in message
    for word in words:
        assert word in message


@pytest.fixture(scope="module")
def rounded(latent, tmp_path_factory) -> Path:
    """A checkpoint of the churches-like model, rounded to nearest."""
    flags = latent("churches").flags("--ptq", "--quant_mode", "linear", *FIRST)
    return sample(flags, tmp_path_factory.mktemp("rounded"))


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
def test_a_checkpoint_of_another_network_is_refused(refused, rounded, name):
    message = refused("--ptq", "--resume", "--cali_ckpt", rounded / name, kind="beds")
    assert "unet." in message
    assert "was calibrated for" in message
    heads = "model.params.unet_config.params.num_heads=8"  # the same tensors, put together in another way
    assert "unet.num_heads is 8" in refused("--ptq", "--resume", "--cali_ckpt", rounded / name, heads)


def test_a_checkpoint_of_the_other_kind_of_model_is_refused(refused, rounded, miniature, failing, tmp_path):
    sample_ddim.main([*miniature.flags(), "--ptq", "--quant_mode", "linear", "--max_images", "0", "-l", str(tmp_path)])
    (pixels,) = (tmp_path / "samples").iterdir()
    for name in ("ckpt.pth", "ckpt.safetensors"):
        assert str(pixels / name) in refused("--ptq", "--resume", "--cali_ckpt", pixels / name)
        flags = ["--ptq", "--resume", "--cali_ckpt", rounded / name, "-l", tmp_path / "out"]
        assert str(rounded / name) in failing(*miniature.flags(), *flags, main=sample_ddim.main).message


def test_flags_that_a_checkpoint_contradicts(refused, rounded):
    message = refused("--ptq", "--weight_bit", 4, "--resume", "--cali_ckpt", rounded / "ckpt.safetensors")
    assert "--weight_bit 4" in message
    assert "calibrated with --weight_bit 8" in message
    message = refused("--ptq", "--quant_act", "--resume", "--cali_ckpt", rounded / "ckpt.safetensors")
    assert "calibrated without activations" in message


@pytest.mark.parametrize(
    ("stage", "flag"), [("sample", "--batch_size (now 10)"), ("cali", "--cali_batch_size (now 4)")]
)
def test_out_of_gpu_memory(latent, tmp_path, failing, monkeypatch, stage, flag):
    def too_much(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    flags = ["--ptq", *latent("beds").calibration_flags()] if stage == "cali" else []
    if stage == "sample":
        monkeypatch.setattr(LatentSampler, "decode", too_much)
    else:
        monkeypatch.setattr(pipeline, "calibrate", too_much)
    failure = failing(*latent("beds").flags(*flags), "-l", tmp_path, main=main)
    assert failure.status == 2
    assert f"out of GPU memory; lower {flag}" in failure.message


# The command that makes calibration sets.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--timesteps", "5"], ["--timesteps goes with --config"]),
        (["--cali_st", "9"], ["--cali_st 9", "1 to 4"]),
        (["--class_labels", "0"], ["unconditional"]),
        (["--config", "x.yml"], ["--config FILE", "-r PATH"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_sets_of_latent_models(failing, latent: LatentMiniature, tmp_path, flags, words):
    known = latent("churches").flags("--out", tmp_path / "set.pt", *flags)
    failure = failing(*known, main=make_calibration_data.main)
    assert failure.status == 2
    for word in words:
        assert word in failure.message
    assert os.listdir(tmp_path) == []


def test_flags_of_latent_models_with_a_pixel_model(failing, miniature, tmp_path):
    known = [*miniature.flags(), "--out", str(tmp_path / "set.pt")]
    for flags, word in ((["-c", "3"], "--custom_steps goes with -r"), (["model.ch=3"], "model.ch=3")):
        assert word in failing(*known, *flags, main=make_calibration_data.main).message
    assert "say which model" in failing("--out", tmp_path / "set.pt", main=make_calibration_data.main).message
