"""The sampling command under ``torchrun``: one calibration by two processes, one folder, images by the first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import REPOSITORY, Miniature


def test_two_processes_calibrate_into_one_folder(miniature: Miniature, tmp_path: Path) -> None:
    words = [*miniature.flags(), *miniature.calibration_flags(), "--cali_iters", "3", "--cali_iters_a", "3"]
    words += ["--ptq", "--weight_bit", "4", "--quant_act", "--split", "--max_images", "2", "-l", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, str(REPOSITORY / "scripts" / "sample_diffusion_ddim.py"), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = (tmp_path / "samples").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"ckpt.pth", "ckpt.safetensors", "img", "grid.png", "run.log"} <= names
    assert "calibration" not in names
    assert {path.name for path in (folder / "img").iterdir()} == {"000000.png", "000001.png"}
    assert (folder / "run.log").read_text().count("run folder ") == 1
