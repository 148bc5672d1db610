"""Making a calibration set is killed, stopped, shared or out of disk, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qdiff.cli.make_calibration_data import main
from qdiff.recording import Recording

from .commands import KILL_MOMENTS, REPOSITORY, Commands, serving, wait_for
from .conftest import Miniature

SAMPLES, BATCH = 32, 2


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with serving("make_calibration_data", tmp_path_factory.mktemp("commands")) as commands:
        yield commands


def flags(miniature: Miniature, out: Path, *more: object) -> list[str]:
    size = ["-n", str(SAMPLES), "--batch_size", str(BATCH)]
    return [*miniature.flags(), "--eta", "1", *size, "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def uninterrupted(miniature: Miniature, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("uninterrupted") / "set.pt"
    main(flags(miniature, path))
    return path.read_bytes()


def done(out: Path) -> int:
    """Samples that are on the disk."""
    if out.exists():
        return SAMPLES
    with suppress(FileNotFoundError):
        return (out.with_name(f"{out.name}.part") / "done").read_bytes().count(1)
    return 0


def killed_midway(miniature: Miniature, out: Path, commands: Commands) -> Path:
    """The path of a set that was killed in its middle."""
    commands.start(flags(miniature, out))
    wait_for(lambda: done(out) >= SAMPLES // 4, commands)
    commands.kill(signal.SIGKILL)
    assert commands.wait() == -signal.SIGKILL
    assert SAMPLES // 4 <= done(out) < SAMPLES
    return out


@pytest.fixture
def half_made(miniature: Miniature, tmp_path: Path, commands: Commands) -> Path:
    return killed_midway(miniature, tmp_path / "set.pt", commands)


def test_sigkill_at_random_moments(
    miniature: Miniature, commands: Commands, uninterrupted: bytes, tmp_path: Path
) -> None:
    """Each after some more batches, and a bit: within a batch, a write, or the start."""
    draws, out = random.Random(20230204), tmp_path / "set.pt"
    found = [0]
    for moment in range(KILL_MOMENTS):
        enough = min(found[-1] + BATCH * draws.randint(0 if moment else 1, 2), SAMPLES)
        commands.start(flags(miniature, out))
        wait_for(lambda enough=enough: done(out) >= enough, commands)
        time.sleep(draws.uniform(0, 0.03))
        commands.kill(signal.SIGKILL)
        assert commands.wait() in (-signal.SIGKILL, 0), commands.said()
        assert done(out) >= found[-1]
        found.append(done(out))
        if out.exists():
            break
    else:
        commands.start(flags(miniature, out))
        assert commands.wait() == 0, commands.said()
        assert f"{found[-1]} of {SAMPLES} samples are there; going on" in commands.said()
    assert len(set(found)) > min(KILL_MOMENTS, 3), "the kills did not hit the work"
    assert out.read_bytes() == uninterrupted
    assert not (tmp_path / "set.pt.part" / "set.pt").exists()


def test_sigterm_says_how_to_go_on(half_made: Path, miniature, commands: Commands, uninterrupted: bytes) -> None:
    commands.start(flags(miniature, half_made))
    there = done(half_made)
    wait_for(lambda: done(half_made) > there, commands)
    commands.kill(signal.SIGTERM)
    assert commands.wait() == 143
    assert "stopped; finished files are whole; the same command goes on" in commands.said()
    main(flags(miniature, half_made))
    assert half_made.read_bytes() == uninterrupted


def test_other_options_are_refused_and_force_starts_anew(half_made: Path, miniature, failing, uninterrupted) -> None:
    failure = failing(*flags(miniature, half_made, "--seed", 5, "--steps", 2), main=main)
    assert failure.status == 2
    assert f"{half_made}.part: the samples in it are those of another set" in failure.message
    for said in ("seed is 5, was 0", "cali_st is 2, was None", "--force"):
        assert said in failure.message
    assert done(half_made) > 0
    main(flags(miniature, half_made, "--seed", 5, "--force"))
    assert half_made.read_bytes() != uninterrupted
    assert half_made.stat().st_size == len(uninterrupted)


def test_other_weights_are_refused(half_made: Path, miniature, failing, tmp_path) -> None:
    import torch

    state = torch.load(miniature.ckpt, weights_only=True)
    state["conv_out.bias"][0] += 1e-3
    torch.save(state, tmp_path / "other.ckpt")
    words = flags(miniature, half_made)
    words[words.index(str(miniature.ckpt))] = str(tmp_path / "other.ckpt")
    failure = failing(*words, main=main)
    assert "full_precision_weights is" in failure.message


def torchrun(words: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, str(REPOSITORY / "scripts" / "make_calibration_data.py"), *words],
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("calibrate with --cali_data_path") == 1, "one process reports"


def test_two_processes_go_on_with_what_one_began(half_made: Path, miniature, uninterrupted: bytes) -> None:
    torchrun(flags(miniature, half_made))
    assert half_made.read_bytes() == uninterrupted
    assert os.listdir(half_made.parent) == ["set.pt"]


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_full_disk(miniature, small_disk: Path, commands: Commands, failing, uninterrupted: bytes) -> None:
    """A real one, before the start and while the set is made."""
    out = killed_midway(miniature, small_disk / "set.pt", commands)
    there, ballast = done(out), small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    failure = failing(*flags(miniature, out), main=main)
    assert failure.status == 2
    assert f"{out}: the set needs" in failure.message
    assert "make room" in failure.message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recording, "_check_room", lambda self: None)  # as if others had filled it since
        failure = failing(*flags(miniature, out), main=main)
    assert failure.status == 2
    assert "set.pt: No space left on device; make room" in failure.message
    assert "the same command goes on" in failure.message
    assert there <= done(out) < SAMPLES

    ballast.unlink()
    main(flags(miniature, out))
    assert out.read_bytes() == uninterrupted
