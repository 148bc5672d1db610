"""The sampling command on a miniature model: its documented forms, going on, and what does not change images."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qdiff.cli.run_folder import read_png
from qdiff.cli.sample_ddim import main

from .conftest import STEPS

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = 3
WITH_ACT = ["--quant_act", "--act_bit", "8", "--a_sym"]


def sample(flags, out: Path, *more) -> Path:
    """Run the command and return the run folder it made."""
    main([*flags, "-l", str(out), "--max_images", str(IMAGES), *map(str, more)])
    (folder,) = (out / "samples").iterdir()
    return folder


def pictures(folder: Path) -> torch.Tensor:
    return torch.stack([read_png(path) for path in sorted((folder / "img").iterdir())])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images, in dB; images that are equal count 100."""
    mse = (a - b).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * mse.log10()).mean())


def quantized(bits: int) -> list[str]:
    return ["--ptq", "--weight_bit", str(bits), "--quant_mode", "qdiff"]


@pytest.fixture(scope="module")
def full(miniature, tmp_path_factory) -> Path:
    return sample(miniature.flags(), tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module", params=[4, 8])
def bits(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def calibrated(miniature, bits, tmp_path_factory) -> Path:
    """The run folder of the documented calibrating command."""
    flags = [*quantized(bits), *WITH_ACT, "--split", *miniature.calibration_flags()]
    return sample([*miniature.flags(), *flags], tmp_path_factory.mktemp(f"calibrated{bits}"))


def test_full_precision(miniature, full):
    assert sorted(path.name for path in full.iterdir()) == ["grid.png", "img", "run.log", "sampling_config.yaml"]
    assert sorted(path.name for path in (full / "img").iterdir()) == [f"{i:06d}.png" for i in range(IMAGES)]
    assert pictures(full).shape == (IMAGES, 3, 8, 8)
    options = yaml.safe_load((full / "sampling_config.yaml").read_text())
    assert options["timesteps"] == STEPS
    assert options["batch_size"] == 4  # the config's
    assert options["model_config"]["model"]["ch"] == 32
    first = (full / "run.log").read_text().splitlines()[0]
    assert str(full) in first
    assert first.endswith(f"-l {full}")


def test_calibrating_leaves_both_checkpoints_and_a_table(calibrated, full, bits):
    names = {path.name for path in calibrated.iterdir()}
    assert {"ckpt.pth", "ckpt.json", "ckpt.safetensors"} <= names
    assert not [name for name in names if name.endswith(".part")]
    log = (calibrated / "run.log").read_text()
    assert "loss before" in log
    for unit in ("conv_in", "mid.attn_1", "up.0.block.0", "conv_out"):
        assert unit in log
    for phase in ("weights", "activations"):
        assert phase in log
    assert "fp32" in log
    assert json.loads((calibrated / "ckpt.json").read_text())
    if bits == 8:
        assert psnr(pictures(calibrated), pictures(full)) > 20


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
def test_resuming_gives_the_calibrated_images(miniature, calibrated, bits, tmp_path, name):
    flags = [*quantized(bits), *WITH_ACT, "--split", "--resume", "--cali_ckpt", str(calibrated / name)]
    assert torch.equal(pictures(sample([*miniature.flags(), *flags], tmp_path)), pictures(calibrated))


def test_resuming_weights_only(miniature, calibrated, bits, full, tmp_path):
    """All forms of the checkpoint give one result, which is not that with activations."""
    flags = [*quantized(bits), "--split", "--resume", "--cali_ckpt"]
    published = sample([*miniature.flags(), *flags, str(calibrated / "ckpt.pth")], tmp_path / "a")
    packed = sample([*miniature.flags(), *flags, str(calibrated / "ckpt.safetensors")], tmp_path / "b")
    (tmp_path / "ckpt.pth").write_bytes((calibrated / "ckpt.pth").read_bytes())
    bare = sample([*miniature.flags(), *flags, str(tmp_path / "ckpt.pth")], tmp_path / "c")
    assert torch.equal(pictures(published), pictures(packed))
    assert torch.equal(pictures(published), pictures(bare))
    assert not torch.equal(pictures(published), pictures(calibrated))
    assert psnr(pictures(published), pictures(full)) >= psnr(pictures(calibrated), pictures(full)) - 3


def test_published_checkpoint_without_its_json(miniature, calibrated, bits, tmp_path):
    shutil.copy(calibrated / "ckpt.pth", tmp_path)
    flags = [*quantized(bits), *WITH_ACT, "--split", "--resume", "--cali_ckpt", str(tmp_path / "ckpt.pth")]
    assert torch.equal(pictures(sample([*miniature.flags(), *flags], tmp_path)), pictures(calibrated))


def test_packed_checkpoint_describes_itself(miniature, calibrated, tmp_path):
    flags = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", str(calibrated / "ckpt.safetensors")]
    folder = sample([*miniature.flags(ckpt=False), *flags], tmp_path)
    assert torch.equal(pictures(folder), pictures(calibrated))
    recorded, original = (yaml.safe_load((f / "sampling_config.yaml").read_text()) for f in (folder, calibrated))
    for name in ("weight_bit", "act_bit", "a_sym", "split", "sm_abit"):
        assert recorded[name] == original[name]


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
def test_activations_anew_on_calibrated_weights(miniature, calibrated, tmp_path, name):
    source = ["--resume_w", "--cali_ckpt", str(calibrated / name)]
    flags = ["--ptq", "--quant_act", "--act_bit", "6", *source, *miniature.calibration_flags()]
    folder = sample([*miniature.flags(), *flags], tmp_path)
    log = (folder / "run.log").read_text()
    assert "activations" in log
    assert "  weights  " not in log
    weights_only = ["--ptq", "--resume", "--cali_ckpt"]
    before = sample([*miniature.flags(), *weights_only, str(calibrated / "ckpt.safetensors")], tmp_path / "a")
    after = sample([*miniature.flags(), *weights_only, str(folder / "ckpt.safetensors")], tmp_path / "b")
    assert torch.equal(pictures(before), pictures(after))


@pytest.mark.parametrize("more", [[], ["--quant_act"]], ids=["weights", "activations"])
def test_round_to_nearest(miniature, tmp_path, full, more):
    data = miniature.calibration_flags() if more else []
    folder = sample([*miniature.flags(), "--ptq", "--quant_mode", "linear", *more, *data], tmp_path)
    assert psnr(pictures(folder), pictures(full)) > 15
    assert not torch.equal(pictures(folder), pictures(full))
    again = sample(
        [*miniature.flags(ckpt=False), "--ptq", *more, "--resume", "--cali_ckpt", str(folder / "ckpt.safetensors")],
        tmp_path / "again",
    )
    assert torch.equal(pictures(again), pictures(folder))


@pytest.mark.parametrize("sampler", [["--eta", "1"], ["--sample_type", "ddpm_noisy"], ["--sample_type", "dpm_solver"]])
def test_batch_size_does_not_change_images(miniature, tmp_path, sampler):
    flags = [*miniature.flags(), *sampler]
    one = pictures(sample(flags, tmp_path / "one", "--batch_size", 1))
    all_at_once = pictures(sample(flags, tmp_path / "all", "--batch_size", IMAGES))
    assert (one - all_at_once).abs().max() <= 1 / 255 + 1e-6  # 1e-3 may cross one rounding edge of the file


def test_batch_size_with_quantized_activations(miniature, calibrated, tmp_path):
    flags = [*miniature.flags(), "--ptq", "--quant_act", "--resume"]
    flags += ["--cali_ckpt", str(calibrated / "ckpt.safetensors")]
    assert psnr(pictures(sample(flags, tmp_path, "--batch_size", 1)), pictures(calibrated)) >= 35


def test_half_precision_is_recorded_and_near(miniature, calibrated, tmp_path, failing):
    """It changes images a little, so a run is continued in the precision it was started in."""
    flags = [*miniature.flags(), "--ptq", "--quant_act", "--resume"]
    flags += ["--cali_ckpt", str(calibrated / "ckpt.safetensors")]
    folder = sample(flags, tmp_path, "--precision", "bf16")
    assert psnr(pictures(folder), pictures(calibrated)) >= 25
    assert not torch.equal(pictures(folder), pictures(calibrated))
    options = yaml.safe_load((folder / "sampling_config.yaml").read_text())
    assert (options["precision"], options["compile"]) == ("bf16", False)
    failure = failing(*flags, "-l", folder, "--max_images", IMAGES)
    assert "precision is 'full', was 'bf16'" in failure.message


def test_autocast_is_recorded_as_what_it_means(miniature, full, tmp_path):
    folder = sample(miniature.flags(), tmp_path, "--precision", "autocast")
    assert yaml.safe_load((folder / "sampling_config.yaml").read_text())["precision"] == "full"
    assert torch.equal(pictures(folder), pictures(full))


def test_compiled_once_for_all_batches(miniature, calibrated, tmp_path, monkeypatch):
    """The last batch is smaller; what is compiled is the network that was loaded."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    flags = [*miniature.flags(), "--ptq", "--quant_act", "--resume"]
    flags += ["--cali_ckpt", str(calibrated / "ckpt.safetensors"), "--compile", "--batch_size", "2"]
    folder = sample(flags, tmp_path)
    assert len(compiled) == 1
    assert psnr(pictures(folder), pictures(calibrated)) >= 35
    assert "compiled for batches of 2" in (folder / "run.log").read_text()


def test_seed_changes_images(miniature, tmp_path, full):
    assert not torch.equal(pictures(sample(miniature.flags(), tmp_path, "--seed", 5)), pictures(full))


def test_going_on_at_the_first_missing_image(miniature, full, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(full, folder)
    expected = pictures(full)
    (folder / "img" / "000001.png").unlink()
    (folder / "img" / "000002.png").unlink()
    (folder / "grid.png").unlink()
    kept = (folder / "img" / "000000.png").stat().st_mtime_ns
    main([*miniature.flags(), "--max_images", str(IMAGES), "-l", str(folder), "--batch_size", "1"])
    assert (pictures(folder) - expected).abs().max() <= 1 / 255 + 1e-6
    assert (folder / "img" / "000000.png").stat().st_mtime_ns == kept
    assert (folder / "grid.png").is_file()
    assert "going on at 000001" in (folder / "run.log").read_text()
    assert not (folder / "samples").exists()


def test_the_logged_command_continues_the_run(miniature, tmp_path):
    folder = sample(miniature.flags(), tmp_path)
    (folder / "img" / "000002.png").unlink()
    words = shlex.split((folder / "run.log").read_text().splitlines()[0].split("with: ")[1])
    assert words[:2] == ["python", "scripts/sample_diffusion_ddim.py"]
    main(words[2:])
    assert len(pictures(folder)) == IMAGES


def test_other_options_are_not_mixed_into_a_run(miniature, full, failing):
    before = sorted(path.name for path in full.iterdir())
    failure = failing(*miniature.flags(), "-l", full, "--max_images", IMAGES, "--seed", 7, main=main)
    assert failure.status == 2
    assert "seed is 7, was 1234" in failure.message
    assert sorted(path.name for path in full.iterdir()) == before


def test_a_finished_calibration_is_not_repeated(miniature, calibrated, bits, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(calibrated, folder)
    (folder / "img" / "000001.png").unlink()
    flags = [*quantized(bits), *WITH_ACT, "--split", *miniature.calibration_flags()]
    main([*miniature.flags(), *flags, "--max_images", str(IMAGES), "-l", str(folder)])
    assert psnr(pictures(folder), pictures(calibrated)) >= 35
    assert (folder / "run.log").read_text().count("loss before") == 1


def test_calibrating_only(miniature, tmp_path):
    flags = [*miniature.flags(), "--ptq", "--weight_bit", "4", *miniature.calibration_flags()]
    main([*flags, "--max_images", "0", "-l", str(tmp_path)])
    (folder,) = (tmp_path / "samples").iterdir()
    assert (folder / "ckpt.safetensors").is_file()
    assert list((folder / "img").iterdir()) == []


def test_as_a_script_from_the_repository_root(miniature, tmp_path, full):
    command = [sys.executable, "scripts/sample_diffusion_ddim.py", *miniature.flags(), "-l", str(tmp_path)]
    done = subprocess.run(
        [*command, "--max_images", str(IMAGES)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "samples").iterdir()
    assert (pictures(folder) - pictures(full)).abs().max() <= 1 / 255 + 1e-6
    assert "images/s" in done.stderr
