"""The sampling command under ``torchrun``: one calibration by two processes, one folder, images by both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .commands import KILL_MOMENTS, REPOSITORY
from .conftest import Miniature

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


@pytest.mark.timeout(1800)  # each start imports torch three times
def test_a_worker_that_dies(miniature: Miniature, tmp_path: Path) -> None:
    """Torchrun ends the other one and says so; the next start makes what is missing, with the same bytes."""
    count = 80 + 40 * KILL_MOMENTS
    words = [*miniature.flags(), "--max_images", count, "--batch_size", 1]
    place, there = tmp_path / "out", 0
    for moment in range(KILL_MOMENTS):
        kill_a_worker(words, place, there + 4, victim=1 - moment % 2)
        (place,) = (tmp_path / "out" / "samples").iterdir()
        there = len(list((place / "img").glob("0*.png")))
        assert there < count or moment
        if there > count - 60:  # a fast machine: the next worker could be done before it is killed
            break
    sample(*words, "-l", place, together=False)
    sample(*words, "-l", tmp_path / "whole", together=False)
    (whole,) = (tmp_path / "whole" / "samples").iterdir()
    images = [{path.name: path.read_bytes() for path in (run / "img").iterdir()} for run in (place, whole)]
    assert len(images[0]) == count
    assert images[0] == images[1]


def kill_a_worker(words: list[object], place: Path, enough: int, victim: int) -> None:
    """Two processes sample into a folder, and one of them is killed when there are so many images."""
    together = subprocess.Popen(
        command(*words, "-l", place, together=True),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while len(list(place.rglob("img/0*.png"))) < enough:
        assert together.poll() is None, together.communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(workers_of(together.pid)[victim], signal.SIGKILL)
    said = together.communicate(timeout=120)[1]
    assert together.returncode != 0
    assert "SIGKILL" in said or "-9" in said
