"""``--cali_data_path auto``: the calibrating command makes its set first, in its run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from qdiff.cli import make_calibration_data, sample_ddim, sample_ldm, txt2img
from qdiff.recording import Recording

from .conftest import Miniature
from .latent_models import LatentMiniature
from .text_models import TextMiniature

QUICK = ["--cali_iters", "1", "--cali_iters_a", "1", "--cali_batch_size", "4", "--cali_st", "2", "--cali_n", "6"]
W4A8 = ["--ptq", "--weight_bit", "4", "--quant_act"]
NEAREST = ["--ptq", "--quant_mode", "linear", "--correct_scale"]  # needs a set, and little time
AUTO = ["--cali_data_path", "auto"]


def run_folder(out: Path) -> Path:
    (record,) = out.rglob("sampling_config.yaml")
    return record.parent


def assert_same_results(folder: Path, other: Path) -> None:
    """Checkpoints of equal calibrations are equal files."""
    for name in ("ckpt.safetensors", "ckpt.pth"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def pixel_flags(miniature: Miniature) -> list[str]:
    return [*miniature.flags(), *W4A8, *QUICK, "--max_images", "1", "--batch_size", "4"]


def test_pixel_set_is_that_of_the_command(miniature: Miniature, tmp_path: Path) -> None:
    sample_ddim.main([*pixel_flags(miniature), *AUTO, "-l", str(tmp_path / "auto")])
    folder = run_folder(tmp_path / "auto")
    set_file, log = folder / "calibration_set.pt", (folder / "run.log").read_text()
    reuse = f"--cali_data_path {set_file} --cali_st 2 --cali_n 6"
    assert f"calibration set {set_file}" in log
    assert reuse in log
    assert "seed 0" in log
    assert yaml.safe_load((folder / "sampling_config.yaml").read_text())["cali_data_path"] == "auto"

    own = tmp_path / "own.pt"
    size = ["--steps", "2", "--per_step", "6", "--batch_size", "4"]
    make_calibration_data.main([*miniature.flags(), *size, "--out", str(own)])
    assert set_file.read_bytes() == own.read_bytes()

    sample_ddim.main([*pixel_flags(miniature), *reuse.split(), "-l", str(tmp_path / "reused")])
    assert_same_results(run_folder(tmp_path / "reused"), folder)


def test_images_are_not_those_of_the_set(miniature: Miniature, tmp_path: Path) -> None:
    words = [*miniature.flags(), *NEAREST, *QUICK, "--max_images", "0", "--seed", "0"]
    sample_ddim.main([*words, *AUTO, "-l", str(tmp_path)])
    content = torch.load(run_folder(tmp_path) / "calibration_set.pt", weights_only=True)
    seen = torch.load(miniature.calibration_set, weights_only=True)  # of seed 0
    assert not torch.isclose(content["xs"][0], seen["xs"][0]).any()


def test_stopped_while_the_set_is_made(miniature: Miniature, tmp_path: Path, monkeypatch, capsys) -> None:
    words = [*miniature.flags(), *NEAREST, *QUICK, "--max_images", "1", "--batch_size", "4", *AUTO]
    sample_ddim.main([*words, "-l", str(tmp_path / "whole")])

    def stop(self: Recording, indices: range) -> None:
        original(self, indices)
        raise KeyboardInterrupt

    original = Recording.mark
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "mark", stop)
        with pytest.raises(SystemExit) as caught:
            sample_ddim.main([*words, "-l", str(tmp_path / "out")])
    folder = run_folder(tmp_path / "out")
    assert caught.value.code == 130
    assert f"continue this run with: python scripts/sample_diffusion_ddim.py {words[0]}" in capsys.readouterr().err
    assert (folder / "calibration_set.pt.part").is_dir()

    sample_ddim.main([*words, "-l", str(folder)])
    assert "4 of 6 samples are there; going on" in (folder / "run.log").read_text()
    assert not (folder / "calibration_set.pt.part").exists()
    whole = run_folder(tmp_path / "whole")
    assert (folder / "calibration_set.pt").read_bytes() == (whole / "calibration_set.pt").read_bytes()
    assert_same_results(folder, whole)

    made = (folder / "calibration_set.pt").stat().st_mtime_ns
    sample_ddim.main([*words, "-l", str(folder)])  # there is nothing left to do
    assert (folder / "calibration_set.pt").stat().st_mtime_ns == made


def test_more_steps_than_the_sampler_has(miniature: Miniature, tmp_path: Path, failing) -> None:
    words = [*miniature.flags(), "--ptq", *QUICK, "--cali_st", "6", *AUTO]
    failure = failing(*words, "-l", tmp_path)
    assert failure.status == 2
    assert "--cali_st 6: the sampler makes 5 steps; keep 1 to 5" in failure.message
    assert list(tmp_path.iterdir()) == []


def test_latent_set_has_its_classes(latent, tmp_path: Path) -> None:
    tiny: LatentMiniature = latent("classes")
    words = [*tiny.flags(*NEAREST, *QUICK, "--batch_size", 4, "-n", 0), *AUTO, "-l", str(tmp_path / "auto")]
    sample_ldm.main(words)
    folder = run_folder(tmp_path / "auto")
    content = torch.load(folder / "calibration_set.pt", weights_only=True)
    assert [x.shape for x in content["xs"]] == [(6, 3, 8, 8)] * 2
    assert torch.equal(content["cs"][0][0], content["cs"][0][2])  # labels 1, 4 in turn
    assert not torch.equal(content["cs"][0][0], content["cs"][0][1])
    own = tiny.flags("--out", tmp_path / "own.pt", "--steps", 2, "--batch_size", 4, seed=0)
    own[own.index("-n") + 1] = "6"
    make_calibration_data.main(own)
    assert (folder / "calibration_set.pt").read_bytes() == (tmp_path / "own.pt").read_bytes()


def test_text_set_has_its_prompt(text, tmp_path: Path) -> None:
    tiny: TextMiniature = text("sd")
    txt2img.main([*tiny.flags(*NEAREST, "--n_iter", 0, "--fixed_code", *QUICK, *AUTO), "--outdir", str(tmp_path)])
    content = torch.load(run_folder(tmp_path) / "calibration_set.pt", weights_only=True)
    assert {name: len(steps) for name, steps in content.items()} == {"xs": 2, "ts": 2, "cs": 2, "ucs": 2}
    assert len({tuple(x.flatten().tolist()) for x in content["xs"][0]}) == 6, "every sample starts from its own noise"
    assert torch.allclose(content["cs"][0][0], content["cs"][0][5], atol=1e-5)
    assert not torch.allclose(content["cs"][0][0], content["ucs"][0][0], atol=1e-2)
