"""Run folders: new, continued, refused, and what a full disk leaves."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from datetime import datetime

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from qdiff.cli import run_folder
from qdiff.cli.errors import UserError, exit_on_error, explain_os_error
from qdiff.cli.run_folder import RunFolder, continue_command, read_png

OPTIONS = {"seed": 1, "timesteps": 5, "device": "cpu", "batch_size": 4, "nested": {"list": (1, 2), "none": None}}


def images(count: int, channels: int = 3) -> torch.Tensor:
    return torch.linspace(0, 1, count * channels * 16).reshape(count, channels, 4, 4)


def test_new_folders_never_meet(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    names = [RunFolder.create(tmp_path, OPTIONS).path.relative_to(tmp_path) for _ in range(3)]
    assert [str(name) for name in names] == [f"samples/2030-01-02-03-04-05{end}" for end in ("", "-1", "-2")]


def test_runs_of_one_model_lie_together(tmp_path):
    folder = RunFolder.create(tmp_path, OPTIONS, model_name="lsun_beds256")
    assert folder.path.parent == tmp_path / "lsun_beds256" / "samples"
    assert RunFolder.find(folder.path, OPTIONS).path == folder.path


def test_array_of_all_images_takes_the_memory_of_one(tmp_path):
    folder = RunFolder.create(tmp_path, OPTIONS)
    count, side = 150, 48
    draws = torch.Generator().manual_seed(0)
    saved = torch.randint(256, (count, 3, side, side), generator=draws)
    folder.save_images(range(count), saved / 255)
    assert not folder.has_array(count)
    tracemalloc.start()
    path = folder.save_array(count)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < saved.numel() / 4
    assert path == folder.path / "numpy" / "150x48x48x3-samples.npz"
    assert folder.has_array(count)
    assert not folder.has_array(count - 1)
    with np.load(path) as content:
        assert np.array_equal(content["arr_0"], saved.permute(0, 2, 3, 1).numpy())
    assert folder.save_array(0) is None


def test_array_is_whole_or_not_there(tmp_path):
    folder = RunFolder.create(tmp_path, OPTIONS)
    folder.save_images(range(2), images(2))
    folder.save_images([2], torch.zeros(1, 3, 5, 5))
    with pytest.raises(UserError, match=r"000002\.png: of another size"):
        folder.save_array(3)
    folder.image_path(1).write_bytes(folder.image_path(0).read_bytes()[:20])
    with pytest.raises(UserError, match=r"000001\.png: not a readable image .*; delete it"):
        folder.save_array(3)
    folder.image_path(1).unlink()
    with pytest.raises(UserError, match=r"000001\.png: cannot be read \(No such file"):
        folder.save_array(3)
    assert list(folder.arrays.iterdir()) == []
    (folder.arrays / ".2x4x4x3-samples.npz.abc.part").touch()
    folder.tidy()
    assert list(folder.arrays.iterdir()) == []


def test_options_are_recorded_and_found(tmp_path):
    folder = RunFolder.create(tmp_path, OPTIONS)
    assert yaml.safe_load((folder.path / "sampling_config.yaml").read_text())["nested"] == {
        "list": [1, 2],
        "none": None,
    }
    assert RunFolder.find(tmp_path, OPTIONS) is None
    found = RunFolder.find(folder.path, OPTIONS)
    assert found.path == folder.path
    assert found.continued


def test_speed_and_place_may_differ(tmp_path):
    folder = RunFolder.create(tmp_path, OPTIONS)
    assert RunFolder.find(folder.path, {**OPTIONS, "device": "cuda", "batch_size": 64, "logdir": "there"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2}, ["seed is 2, was 1"]),
        ({"seed": 2, "timesteps": 6}, ["seed is 2, was 1", "timesteps is 6, was 5"]),
        ({"nested": {"list": [1, 3], "none": None}}, ["nested.list is [1, 3], was [1, 2]"]),
        ({"split": True}, ["split is True, was None"]),
    ],
)
def test_other_options_differ(tmp_path, change, words):
    folder = RunFolder.create(tmp_path, OPTIONS)
    with pytest.raises(UserError) as caught:
        RunFolder.find(folder.path, {**OPTIONS, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", ""])
def test_damaged_record(tmp_path, content):
    (tmp_path / "sampling_config.yaml").write_text(content)
    with pytest.raises(UserError, match="another folder"):
        RunFolder.find(tmp_path, OPTIONS)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_and_grid(tmp_path, channels, mode):
    folder = RunFolder.create(tmp_path, OPTIONS)
    assert folder.save_grid(3) is None
    folder.save_images([0, 2], images(2, channels))
    assert folder.missing_images(4) == [1, 3]
    with Image.open(folder.image_path(2)) as image:
        assert image.mode == mode
    assert (read_png(folder.image_path(0)) - images(2, channels)[0]).abs().max() <= 0.5 / 255 + 1e-6
    assert folder.save_grid(4).name == "grid.png"


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    folder = RunFolder.create(tmp_path, OPTIONS)
    (folder.images / ".000001.png.abc.part").write_text("half")
    folder.tidy()
    assert os.listdir(folder.images) == []


def test_log_starts_with_how_to_continue(tmp_path, capsys):
    folder = RunFolder.create(tmp_path, OPTIONS)
    logger = logging.getLogger("qdiff.cli.something")
    with folder.logging(["python", "scripts/x.py", "-l", "with space", "--seed", "1"]):
        logger.info("hello")
        logger.debug("hidden")
        logger.info("long", extra=run_folder.LOG_ONLY)
        logging.getLogger("qdiff.elsewhere").info("shown by a bar")
    logger.info("afterwards")
    first, second, *others = (folder.path / "run.log").read_text().splitlines()
    assert first.startswith(f"run folder {folder.path}; ")
    assert first.endswith(f"python scripts/x.py --seed 1 -l {folder.path}")
    assert second.endswith("hello")
    assert len(others) == 2
    printed = capsys.readouterr().out
    assert "hello" in printed
    assert "long" not in printed
    assert "bar" not in printed
    with RunFolder.find(folder.path, OPTIONS).logging(["x"], verbose=True):
        logger.debug("shown")
    assert len((folder.path / "run.log").read_text().splitlines()) == 6


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys):
    folder = RunFolder.create(tmp_path, OPTIONS)
    with pytest.raises(SystemExit) as caught, exit_on_error("p"), folder.logging(["python", "scripts/x.py"]):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    printed = capsys.readouterr()
    how = f"continue this run with: python scripts/x.py -l {folder.path}"
    assert printed.err == f"\np: stopped; finished files are whole; {how}\n"
    assert "stopped" not in printed.out  # once is enough
    assert (folder.path / "run.log").read_text().endswith(f"stopped (KeyboardInterrupt); {how}\n")


@pytest.mark.parametrize("words", [["-l", "a b"], ["--logdir", "a"], ["--logdir=a"], ["-la"], []])
def test_continue_command(tmp_path, words):
    command = continue_command(["python", "s.py", "--seed", "1", *words, "--ptq"], tmp_path)
    assert command == f"python s.py --seed 1 --ptq -l {tmp_path}"


def test_writing_fails_with_the_path_and_spares_earlier_images(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, OPTIONS)
    folder.save_images([0], images(1))
    before = folder.image_path(0).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left") as caught:
            folder.save_images([0, 1], images(2))
    assert caught.value.filename == str(folder.image_path(0))
    assert "make room" in explain_os_error(caught.value)
    assert folder.image_path(0).read_bytes() == before
    assert os.listdir(folder.images) == ["000000.png"]


def test_log_on_a_full_disk_is_an_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    folder = RunFolder.create(tmp_path, OPTIONS)
    (folder.path / "run.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, folder.logging(["x"]):
        pass
    assert caught.value.filename == str(folder.path / "run.log")


def test_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RunFolder.create(tmp_path / "file", OPTIONS)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("try this"), 2, "p: error: try this"),
        (OSError(28, "No space left on device", "x.png"), 2, "x.png: No space left on device; make room"),
        (OSError(13, "Permission denied", "x"), 2, "permissions"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=["user", "full", "permission", "interrupt"],
)
def test_statuses(error, status, words, capsys):
    with pytest.raises(SystemExit) as caught, exit_on_error("p"):
        raise error
    assert caught.value.code == status
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_status(number, status, capsys):
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as caught, exit_on_error("p"):
            send_to_itself(number)
        assert caught.value.code == status
        assert capsys.readouterr().err == "\np: stopped; finished files are whole\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])


def send_to_itself(number):
    os.kill(os.getpid(), number)
    for _ in range(100):  # the handler runs between two statements
        time.sleep(0.001)


def test_signals_that_others_care_for_are_left_alone():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with exit_on_error("p"):
            send_to_itself(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_commands_run_in_other_threads_too():
    """Where signals cannot be handled."""
    raised = []

    def run():
        try:
            with exit_on_error("p"):
                raise UserError("x")
        except SystemExit as stop:
            raised.append(stop.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == [2]


def test_verbose_shows_the_traceback(capsys):
    with pytest.raises(SystemExit), exit_on_error("p", verbose=True):
        raise UserError("try this")
    assert "Traceback" in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_error("p"):
        raise ZeroDivisionError


FILL = """
import resource, sys
from qdiff.cli.errors import exit_on_error
from qdiff.cli.run_folder import RunFolder
import signal, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = RunFolder.create(sys.argv[1], {"seed": 1})
folder.save_images([0], torch.zeros(1, 3, 8, 8))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with exit_on_error("p"):
    folder.save_images([1], torch.rand(1, 3, 64, 64))
"""


def test_a_file_that_may_not_grow(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "000001.png: File too large" in done.stderr
    (folder,) = (tmp_path / "samples").iterdir()
    assert os.listdir(folder / "img") == ["000000.png"]
    with Image.open(folder / "img" / "000000.png") as image:
        image.load()
