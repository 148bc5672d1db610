"""Recording a calibration set into its file: in pieces, by several processes, in little memory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qdiff.calibration_data import CalibrationSetError, OnStep, make_calibration_set
from qdiff.progress import ProgressError
from qdiff.recording import SetLayout, record_calibration_set

SHAPE, STEPS, SAMPLES, BATCH = (2, 3, 3), 5, 11, 4
LAYOUT = SetLayout(SAMPLES, STEPS, SHAPE, context_shape=(2, 3))
DECIDED_BY = {"sampler": {"seed": 0, "eta": 1.0}}


class StoppedError(Exception):
    """Stands for whatever ends a process."""


class Trajectories:
    """A sampler whose samples shrink step by step; can stop in the middle of a batch.

    Attributes:
        asked: the numbers that were asked for.
    """

    def __init__(self, stop_in: int | None = None):
        self.stop_in, self.asked = stop_in, []

    def __call__(self, indices: Sequence[int], on_step: OnStep) -> None:
        start = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in indices])
        for k in range(STEPS):
            if self.stop_in in indices and k == 3:
                raise StoppedError
            on_step(k, float(100 - k), start / (k + 1))
        self.asked += indices


def conditions(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    numbers = torch.tensor([float(i) for i in indices])[:, None, None]
    return numbers.expand(-1, 2, 3) + torch.arange(3), torch.ones(1, 2, 3).expand(len(indices), -1, -1)


def record(path: Path, sampler: Trajectories | None = None, layout: SetLayout = LAYOUT, **changes: object) -> Path:
    options = {"batch_size": BATCH, "decided_by": DECIDED_BY, "rounded_by": {"threads": 1}, "conditions": conditions}
    record_calibration_set(path, sampler or Trajectories(), layout, **{**options, **changes})
    return path


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The path of a set that was stopped in its second batch."""
    with pytest.raises(StoppedError):
        record(tmp_path / "set.pt", Trajectories(stop_in=BATCH))
    return tmp_path / "set.pt"


@pytest.mark.parametrize("options", [{}, {"cali_st": 2}, {"half": True}], ids=str)
def test_it_is_what_memory_would_hold(tmp_path: Path, options: dict[str, object]) -> None:
    told: list[int] = []
    path = record(tmp_path / "set.pt", layout=replace(LAYOUT, **options), progress=told.append)
    content = torch.load(path, weights_only=True)
    expected = make_calibration_set(
        Trajectories(),
        n_samples=SAMPLES,
        n_steps=STEPS,
        batch_size=BATCH,
        context=conditions(range(SAMPLES)),
        **options,
    )
    assert list(content) == list(expected)
    for name, tensors in expected.items():
        assert len(content[name]) == len(tensors)
        for found, tensor in zip(content[name], tensors, strict=True):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    assert told == [0, 4, 8, 11]
    assert os.listdir(tmp_path) == ["set.pt"]


def test_goes_on_with_what_is_missing(stopped: Path, tmp_path: Path) -> None:
    assert not stopped.exists()
    sampler, told = Trajectories(), []
    record(stopped, sampler, progress=told.append)
    assert sampler.asked == list(range(BATCH, SAMPLES))
    assert told[0] == BATCH
    assert stopped.read_bytes() == record(tmp_path / "whole.pt").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["set.pt", "whole.pt"]


def test_another_set_is_refused_by_what_differs(stopped: Path) -> None:
    other = {"sampler": {"seed": 1, "eta": 1.0}}
    with pytest.raises(ProgressError, match=r"seed is 1, was 0\. Go on .* or start anew: remove the folder"):
        record(stopped, decided_by=other)
    with pytest.raises(ProgressError, match=r"cali_st is 2, was None; half is True, was False[;.]"):
        record(stopped, layout=replace(LAYOUT, cali_st=2, half=True))
    sampler = Trajectories()
    record(stopped, sampler, decided_by=other, anew=True)
    assert sampler.asked == list(range(SAMPLES))


def test_where_nothing_is_done_nothing_is_lost(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        record(tmp_path / "set.pt", Trajectories(stop_in=0))
    record(tmp_path / "set.pt", decided_by={"sampler": {"seed": 1}})
    assert (tmp_path / "set.pt").is_file()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recording.json", b"{", "damaged: Expecting property name"),
        ("recording.json", b"[]", "damaged: it is no manifest"),
        ("done", b"\1" * (SAMPLES + 1), f"damaged: it has {SAMPLES + 1} bytes instead of {SAMPLES}"),
        ("done", b"\1\2" + bytes(SAMPLES - 2), "damaged: it has other bytes than 0 and 1"),
    ],
)
def test_what_is_done_is_not_lost_to_a_damaged_file(stopped: Path, name: str, content: bytes, message: str) -> None:
    folder = stopped.with_name("set.pt.part")
    (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ProgressError, match=rf"{name}: {message}.*; start anew: remove .*, which .* --force does"):
        record(stopped)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    record(stopped, anew=True)
    assert stopped.is_file()


def test_another_rounding_is_told(stopped: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    sampler = Trajectories()
    with caplog.at_level(logging.WARNING):
        record(stopped, sampler, batch_size=3, rounded_by={"threads": 2})
    for word in ("batch_size is 3, was 4", "threads is 2, was 1"):
        assert word in caplog.text
    assert sampler.asked == list(range(BATCH, SAMPLES))
    assert stopped.read_bytes() == record(tmp_path / "whole.pt").read_bytes()  # here nothing is rounded


def test_one_process_at_a_time(stopped: Path) -> None:
    with open(stopped.with_name("set.pt.part") / "done") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ProgressError, match="another process is making this set"):
            record(stopped)
    record(stopped)


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "set.pt.part"
    folder.mkdir()
    (folder / "diary.txt").write_text("precious")
    with pytest.raises(ProgressError, match=r"is in the way, with files such as diary\.txt"):
        record(tmp_path / "set.pt", anew=True)
    assert (folder / "diary.txt").read_text() == "precious"


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetError, match=r"needs \d+ MiB and \d+ MiB are free; make room, keep fewer steps"):
        record(tmp_path / "set.pt", layout=replace(LAYOUT, n_samples=10**12))
    assert os.listdir(tmp_path) == []


def test_the_folder_says_what_it_holds(stopped: Path) -> None:
    """As docs/formats.md has it."""
    folder = stopped.with_name("set.pt.part")
    assert sorted(os.listdir(folder)) == ["done", "recording.json", "set.pt"]
    assert (folder / "done").read_bytes() == b"\1" * BATCH + bytes(SAMPLES - BATCH)
    manifest = json.loads((folder / "recording.json").read_text())
    assert manifest["rounded_by"] == {"batch_size": BATCH, "threads": 1}
    assert manifest["identity"]["sampler"] == DECIDED_BY["sampler"]
    assert manifest["identity"]["layout"]["n_samples"] == SAMPLES


LARGE = """
import resource, sys
import torch
from qdiff.calibration_data import load_calibration_set, steps_of
from qdiff.recording import SetLayout, record_calibration_set

SHAPE, STEPS, SAMPLES, BATCH = (4, 64, 64), 40, 96, 8
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

def sample(indices, on_step):
    for k in range(STEPS):
        on_step(k, float(k), torch.randn(len(indices), *SHAPE))

sample(range(BATCH), lambda *_: None)
before = peak()
record_calibration_set(sys.argv[1], sample, SetLayout(SAMPLES, STEPS, SHAPE), batch_size=BATCH, decided_by={})
recorded = peak()
chosen = load_calibration_set(sys.argv[1], cali_st=4, cali_n=8, image_shape=SHAPE)
loaded = peak()
assert [float(t) for t in chosen.t[::8]] == [0.0, 10.0, 20.0, 30.0]
assert sum(1 for step in steps_of(sys.argv[1]) if step.x.isfinite().all()) == STEPS
print(recorded - before, loaded - recorded, peak() - loaded)
"""


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """240 MiB in less than 60: recorded, a part loaded, and all of it looked through."""
    path = tmp_path / "set.pt"
    command = [sys.executable, "-c", LARGE, str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert path.stat().st_size > 240 * 2**20
    recorded, loaded, looked = map(float, result.stdout.split())
    assert max(recorded, loaded, looked) < 60
