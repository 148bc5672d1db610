"""The sampling command under ``torchrun``: one calibration by two processes, one folder, images by both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .conftest import REPOSITORY, Miniature

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
QUANTIZED = ["--ptq", "--weight_bit", "4", "--quant_act", "--split"]


def sample(*words: object, together: bool) -> None:
    """The command in processes of its own."""
    result = subprocess.run(
        command(*words, together=together), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def command(*words: object, together: bool) -> list[str]:
    script = str(REPOSITORY / "scripts" / "sample_diffusion_ddim.py")
    return [sys.executable, *(TORCHRUN if together else []), script, *map(str, words)]


def workers_of(launcher: int) -> list[int]:
    """The processes that torchrun started, and that still run."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [pid for pid in map(int, children) if b"sample_diffusion" in Path(f"/proc/{pid}/cmdline").read_bytes()]


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


def test_a_worker_that_dies(miniature: Miniature, tmp_path: Path) -> None:
    """Torchrun ends the other one and says so; the next start makes what is missing, with the same bytes."""
    words = [*miniature.flags(), "--max_images", 120, "--batch_size", 1]
    together = subprocess.Popen(
        command(*words, "-l", tmp_path / "out", together=True),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("out/samples/*/img/0*.png"))) < 4:
        assert together.poll() is None, together.communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(workers_of(together.pid)[1], signal.SIGKILL)
    said = together.communicate(timeout=120)[1]
    assert together.returncode != 0
    assert "SIGKILL" in said or "-9" in said
    (folder,) = (tmp_path / "out" / "samples").iterdir()
    assert len(list((folder / "img").glob("0*.png"))) < 120
    sample(*words, "-l", folder, together=False)
    sample(*words, "-l", tmp_path / "whole", together=False)
    (whole,) = (tmp_path / "whole" / "samples").iterdir()
    images = [{path.name: path.read_bytes() for path in (run / "img").iterdir()} for run in (folder, whole)]
    assert len(images[0]) == 120
    assert images[0] == images[1]
