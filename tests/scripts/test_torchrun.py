"""The sampling command under ``torchrun``: one calibration by two processes, one folder, images by both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import REPOSITORY, Miniature

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
QUANTIZED = ["--ptq", "--weight_bit", "4", "--quant_act", "--split"]


def sample(*words: object, together: bool) -> None:
    """The command in processes of its own."""
    result = subprocess.run(
        [sys.executable, *(TORCHRUN if together else []), str(REPOSITORY / "scripts" / "sample_diffusion_ddim.py")]
        + [str(word) for word in words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_processes_calibrate_into_one_folder_and_share_the_images(miniature: Miniature, tmp_path: Path) -> None:
    words = [*miniature.flags(), *miniature.calibration_flags(), "--cali_iters", "3", "--cali_iters_a", "3"]
    sample(*words, *QUANTIZED, "--max_images", 5, "-l", tmp_path, together=True)
    (folder,) = (tmp_path / "samples").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"ckpt.pth", "ckpt.safetensors", "img", "grid.png", "run.log"} <= names
    assert "calibration" not in names
    images = {path.name: path.read_bytes() for path in (folder / "img").iterdir()}
    assert images.keys() == {f"00000{i}.png" for i in range(5)}
    assert (folder / "run.log").read_text().count("run folder ") == 1
    # One process makes the same images, alone or of those that others did not get to.
    alone = tmp_path / "alone"
    resume = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", folder / "ckpt.safetensors"]
    sample(*miniature.flags(), *resume, "--max_images", 5, "-l", alone, together=False)
    (other,) = (alone / "samples").iterdir()
    assert {path.name: path.read_bytes() for path in (other / "img").iterdir()} == images
    (folder / "img" / "000004.png").unlink()  # a batch of its own
    sample(*words, *QUANTIZED, "--max_images", 5, "-l", folder, together=True)
    assert {path.name: path.read_bytes() for path in (folder / "img").iterdir()} == images
