"""A calibration that is killed, stopped or runs out of disk goes on in its run folder, to the same bytes."""

from __future__ import annotations

import itertools
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qdiff import progress as progress_module
from qdiff.cli.run_folder import CONFIG_NAME
from qdiff.cli.sample_ddim import main
from qdiff.files import locked
from qdiff.progress import CalibrationProgress

from .commands import KILL_MOMENTS, REPOSITORY, Commands, serving, wait_for
from .conftest import Miniature

UNITS = 18  # of the miniature network, in each of two phases
CHECKPOINTS = ("ckpt.pth", "ckpt.json", "ckpt.safetensors")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with serving("sample_ddim", tmp_path_factory.mktemp("commands")) as commands:
        yield commands


def flags(miniature: Miniature, **changes: object) -> list[str]:
    """W4A8 of the miniature network, and one image."""
    quantization = ["--ptq", "--weight_bit", "4", "--quant_act", "--a_sym", "--split"]
    words = [*miniature.flags(), *quantization, *miniature.calibration_flags(), "--max_images", "1"]
    for name, value in changes.items():
        words += [f"--{name}", str(value)]
    return words


@pytest.fixture(scope="module")
def uninterrupted(miniature: Miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    main([*flags(miniature), "-l", str(out)])
    return run_folder(out)


def run_folder(out: Path) -> Path:
    """The newest one below a folder that can be continued."""
    return max((path.parent for path in out.glob("samples/*/sampling_config.yaml")), default=out)


def units(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("calibration/[wa]*-*.safetensors"))


def assert_finished_alike(folder: Path, uninterrupted: Path) -> None:
    for name in CHECKPOINTS:
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert (folder / "img" / "000000.png").read_bytes() == (uninterrupted / "img" / "000000.png").read_bytes()
    assert not (folder / "calibration").exists()
    assert not list(folder.rglob("*.part"))


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, how: Callable[[], None]) -> None:
    """Something happens when ``count`` units are on the disk."""
    original = CalibrationProgress.keep
    kept = []

    def keep(self: CalibrationProgress, *args: object) -> None:
        original(self, *args)
        kept.append(args)
        if len(kept) == count:
            how()

    monkeypatch.setattr(CalibrationProgress, "keep", keep)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(miniature: Miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a calibration that was interrupted after seven units; copy before going on."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7, interrupt)
        with pytest.raises(SystemExit) as caught:
            main([*flags(miniature), "-l", str(out)])
    assert caught.value.code == 130
    return run_folder(out)


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


# Killed.


def test_sigkill_at_random_moments(miniature, commands: Commands, uninterrupted: Path, tmp_path: Path) -> None:
    """Each after some more units, and a bit: within the next unit, a write, or the start."""
    draws = random.Random(20230204)
    out, found = tmp_path / "out", [0]
    for moment in range(KILL_MOMENTS):
        enough = min(found[-1] + draws.randint(0 if moment else 1, 3), 2 * UNITS)
        commands.start([*flags(miniature), "-l", str(run_folder(out))])
        wait_for(lambda enough=enough: len(units(run_folder(out))) >= enough or finished(run_folder(out)), commands)
        time.sleep(draws.uniform(0, 0.03))
        commands.kill(signal.SIGKILL)
        if commands.wait() == 0 or finished(run_folder(out)):  # a fast machine: over already
            break
        found.append(len(units(run_folder(out))))
    assert len(found) > KILL_MOMENTS // 2
    assert found == sorted(found)
    assert found[-1] > 0
    commands.start([*flags(miniature), "-l", str(run_folder(out))])
    assert commands.wait() == 0, commands.said()
    assert_finished_alike(run_folder(out), uninterrupted)


def test_sigkill_while_sampling(miniature, commands: Commands, tmp_path: Path) -> None:
    """Every image that is there is whole, and those that were missing become what they would have been."""
    argv = [*miniature.flags(), "--max_images", str(2 * KILL_MOMENTS + 6), "--batch_size", "1"]
    main([*argv, "-l", str(tmp_path / "whole")])
    whole, out = run_folder(tmp_path / "whole") / "img", tmp_path / "out"
    for enough in range(2, 2 + 2 * KILL_MOMENTS, 2):
        commands.start([*argv, "-l", str(run_folder(out))])
        wait_for(lambda enough=enough: len(list(out.glob("samples/*/img/0*.png"))) >= enough, commands)
        commands.kill(signal.SIGKILL)
        commands.wait()
        for path in out.glob("samples/*/img/0*.png"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
    commands.start([*argv, "-l", str(run_folder(out))])
    assert commands.wait() == 0, commands.said()
    found = run_folder(out) / "img"
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in found.iterdir())


def test_a_second_command_in_the_folder_of_a_run(miniature, commands: Commands, tmp_path: Path, failing) -> None:
    """It is refused while the first one works, and goes on when that one is gone, however it went."""
    argv, out = [*miniature.flags(), "--max_images", "200", "--batch_size", "1"], tmp_path / "out"
    commands.start([*argv, "-l", str(out)])
    wait_for(lambda: any(out.glob("samples/*/img/0*.png")), commands)
    failure = failing(*argv, "-l", run_folder(out))
    assert failure.status == 2
    assert "another command is writing this run; wait for it or end it" in failure.message
    commands.kill(signal.SIGKILL)
    commands.wait()
    main([*miniature.flags(), "--max_images", "200", "--batch_size", "50", "-l", str(run_folder(out))])
    assert len(list(out.glob("samples/*/img/0*.png"))) == 200


def finished(folder: Path) -> bool:
    return (folder / CHECKPOINTS[-1]).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_to_the_same_bytes(miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in each phase; with kernels that add up in one order."""
    argv = [*flags(miniature, cali_iters=40, cali_iters_a=20), "--device", "cuda", "--deterministic"]
    main([*argv, "-l", str(tmp_path / "whole")])
    for count in (5, UNITS + 1):
        with monkeypatch.context() as patch:
            stop_after(patch, count, interrupt)
            with pytest.raises(SystemExit):
                main([*argv, "-l", str(tmp_path / "out" / str(count))])
        folder = run_folder(tmp_path / "out" / str(count))
        main([*argv, "-l", str(folder)])
        assert_finished_alike(folder, run_folder(tmp_path / "whole"))


def test_sigkill_around_each_file(
    miniature, commands: Commands, uninterrupted: Path, stopped: Path, tmp_path: Path
) -> None:
    """Before a file is made, gets its name or is removed: of the checkpoints, of the last units, of the pictures."""
    learned = shutil.copytree(stopped, tmp_path / "learned")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2 * UNITS - 7 - 1, interrupt)
        with pytest.raises(SystemExit):
            main([*flags(miniature), "-l", str(learned)])
    assert len(units(learned)) == 2 * UNITS - 1

    whole = shutil.copytree(learned, tmp_path / "whole")
    commands.start([*flags(miniature), "-l", str(whole)], dies=(whole, -1))
    assert commands.wait() == 0, commands.said()
    assert_finished_alike(whole, uninterrupted)
    changes = int(commands.said().split()[-1])
    assert changes > 2 * (1 + len(CHECKPOINTS) + 2)  # a unit, the checkpoints, an image and the grid: made, and named

    for moment in sorted(random.Random(20230204).sample(range(1, changes + 1), KILL_MOMENTS)):
        folder = shutil.copytree(learned, tmp_path / f"before change {moment}")
        commands.start([*flags(miniature), "-l", str(folder)], dies=(folder, moment))
        assert commands.wait() == -signal.SIGKILL, commands.said()
        main([*flags(miniature), "-l", str(folder)])
        assert_finished_alike(folder, uninterrupted)


# Going on, and refusing to.


def test_what_is_there_is_said(miniature, folder, uninterrupted, capsys) -> None:
    name = units(folder)[6].removeprefix("weights-006-").removesuffix(".safetensors")
    main([*flags(miniature), "-l", str(folder)])
    said = f"7 of {2 * UNITS} units are there; going on with "
    printed = capsys.readouterr().out
    assert said in printed
    log = (folder / "run.log").read_text()
    after = log.partition(said)[2]
    assert name not in after.splitlines()[0]
    assert f"{name}, weights: loss" not in after  # not learned again
    assert after.count(": loss ") == 2 * UNITS - 7
    assert_finished_alike(folder, uninterrupted)


def test_a_damaged_unit_is_learned_again(miniature, folder, uninterrupted, capsys) -> None:
    victim = folder / "calibration" / units(folder)[4]
    victim.write_bytes(victim.read_bytes()[:-10])
    main([*flags(miniature), "-l", str(folder)])
    printed = capsys.readouterr().out
    assert f"{victim}: cannot be read" in printed
    assert f"6 of {2 * UNITS} units are there" in printed
    assert_finished_alike(folder, uninterrupted)


def test_other_flags_are_refused(miniature, folder, failing) -> None:
    failure = failing(*flags(miniature, cali_iters=9), "-l", folder)
    assert failure.status == 2
    assert "cali_iters is 9, was 8" in failure.message
    assert len(units(folder)) == 7


@pytest.mark.parametrize("what", ["data", "weights", "code"])
def test_what_else_decides_the_result(miniature, tmp_path, failing, monkeypatch, what: str) -> None:
    """The flags are the same words; what the files hold is not."""
    own = Miniature(shutil.copytree(miniature.folder, tmp_path / "own"))
    with monkeypatch.context() as patch:
        stop_after(patch, 2, interrupt)
        with pytest.raises(SystemExit):
            main([*flags(own), "-l", str(tmp_path / "out")])
    folder = run_folder(tmp_path / "out")
    if what == "data":
        content = torch.load(own.calibration_set, weights_only=True)
        content["xs"][0][0, 0, 0, 0] += 1e-3
        torch.save(content, own.calibration_set)
        expected = "the calibration data are others (--cali_data_path)"
    elif what == "weights":
        state = torch.load(own.ckpt, weights_only=True)
        state["conv_out.bias"][0] += 1e-3
        torch.save(state, own.ckpt)
        expected = "the full-precision weights are others"
    else:
        original = progress_module.source_hashes
        monkeypatch.setattr(progress_module, "source_hashes", lambda qnn: original(qnn) | {"qdiff/capture.py": "new"})
        expected = "the code has changed (qdiff/capture.py)"
    failure = failing(*flags(own), "-l", folder)
    assert failure.status == 2
    assert expected in failure.message
    assert f"start anew: give -l another folder, or remove {folder / 'calibration'}" in failure.message
    assert len(units(folder)) == 2


def test_activations_alone_go_on_too(miniature, uninterrupted, tmp_path, monkeypatch) -> None:
    """With ``--resume_w``, whose weights come from a checkpoint."""
    source = ["--resume_w", "--cali_ckpt", str(uninterrupted / "ckpt.safetensors"), "--running_stat"]
    argv = [*flags(miniature, seed=3), *source]
    main([*argv, "-l", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        stop_after(patch, 5, interrupt)
        with pytest.raises(SystemExit):
            main([*argv, "-l", str(tmp_path / "out")])
    folder = run_folder(tmp_path / "out")
    assert [name.split("-")[0] for name in units(folder)] == ["activations"] * 5
    main([*argv, "-l", str(folder)])
    assert f"5 of {UNITS} units are there" in (folder / "run.log").read_text()
    assert_finished_alike(folder, run_folder(tmp_path / "whole"))


def test_starting_anew_as_the_refusal_says(miniature, folder, uninterrupted) -> None:
    shutil.rmtree(folder / "calibration")
    main([*flags(miniature), "-l", str(folder)])
    assert_finished_alike(folder, uninterrupted)


# Stopped by a signal.


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_while_calibrating(miniature, commands, tmp_path, name: str, status: int) -> None:
    argv = flags(miniature, cali_iters=400)
    commands.start([*argv, "-l", str(tmp_path)])
    wait_for(lambda: len(units(run_folder(tmp_path))) >= 2, commands)
    asked = time.perf_counter()
    commands.kill(getattr(signal, name))
    assert commands.wait() == status
    assert time.perf_counter() - asked < 10
    folder = run_folder(tmp_path)
    assert_told_once(commands.said(), folder)
    assert f"stopped ({name}); continue this run with" in (folder / "run.log").read_text()

    there = len(units(folder))
    commands.start([*argv, "-l", str(folder)])  # what was said works
    wait_for(lambda: "units are there" in commands.said(), commands)
    commands.kill(signal.SIGKILL)
    assert commands.wait() == -9
    assert f"{there} of {2 * UNITS} units are there" in commands.said()


def assert_told_once(said: str, folder: Path) -> None:
    (message,) = (line for line in said.splitlines() if "stopped" in line)
    assert message.startswith("sample_diffusion_ddim.py: stopped; finished files are whole; continue this run with: ")
    assert message.endswith(f"-l {folder}")
    assert "Traceback" not in said


def test_sigterm_to_the_script_while_sampling(miniature, tmp_path) -> None:
    command = [sys.executable, "scripts/sample_diffusion_ddim.py", *miniature.flags()]
    command += ["--max_images", "100000", "--batch_size", "1", "-l", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        began = time.perf_counter()
        while not (run_folder(tmp_path) / "img" / "000001.png").exists():
            time.sleep(0.01)
            assert process.poll() is None
            assert time.perf_counter() - began < 120
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    folder = run_folder(tmp_path)
    assert_told_once(said, folder)
    words = shlex.split(said.strip().splitlines()[-1].partition("with: ")[2])
    assert words[:2] == ["python", "scripts/sample_diffusion_ddim.py"]
    assert words[-2:] == ["-l", str(folder)]
    assert not list(folder.glob("img/.*")), "half an image is left"


# A clock that is set back.

BACKWARDS = """
import datetime, itertools, time
calls = itertools.count()
time.time = lambda: 1e9 - next(calls)
time.time_ns = lambda: int(time.time() * 1e9)
class Backwards(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Backwards
"""


@pytest.fixture
def backwards(tmp_path: Path) -> Iterator[Commands]:
    """Commands whose clock goes back by a second whenever it is read, from September 2001 on, anew in each."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(BACKWARDS)
    with serving("sample_ddim", tmp_path, first=tmp_path / "clock") as commands:
        yield commands


def times_in(log: Path) -> list[str]:
    """Of its lines that begin with one."""
    return re.findall(r"^(\d\d:\d\d:\d\d) ", log.read_text(), flags=re.MULTILINE)


def test_a_clock_that_goes_back(miniature, backwards: Commands, uninterrupted: Path, tmp_path: Path) -> None:
    """Killed while it calibrates, then going on before it began; another run begins at the same time as the first."""
    out = tmp_path / "out"
    backwards.start([*flags(miniature), "-l", str(out)])
    wait_for(lambda: len(units(run_folder(out))) >= 5, backwards)
    backwards.kill(signal.SIGKILL)
    backwards.wait()
    (folder,) = (out / "samples").iterdir()
    assert folder.name.startswith("2001-09-0"), "the clock does not go back"
    times = times_in(folder / "run.log")
    assert len(set(times)) > 3  # of five units, of which the last may be on the disk and not yet in the log
    assert times == sorted(times, reverse=True)

    backwards.start([*flags(miniature), "-l", str(folder)])
    wait_for(lambda: "units are there" in backwards.said(), backwards)
    with pytest.raises(BlockingIOError):  # so a second command is refused
        locked(folder / CONFIG_NAME)
    assert backwards.wait() == 0, backwards.said()
    assert_finished_alike(folder, uninterrupted)
    times = times_in(folder / "run.log")
    assert sum(later > earlier for earlier, later in itertools.pairwise(times)) == 1  # where it went on

    backwards.start([*flags(miniature), "-l", str(out)])
    assert backwards.wait() == 0, backwards.said()
    first, second = sorted((out / "samples").iterdir())
    assert folder in (first, second)
    for each in (first, second):
        assert_finished_alike(each, uninterrupted)


def test_sampling_while_the_clock_goes_back(miniature, backwards: Commands, tmp_path: Path) -> None:
    argv = [*miniature.flags(), "--max_images", "12", "--batch_size", "1"]
    main([*argv, "-l", str(tmp_path / "whole")])
    whole, out = run_folder(tmp_path / "whole") / "img", tmp_path / "out"
    backwards.start([*argv, "-l", str(out)])
    wait_for(lambda: len(list(out.glob("samples/2001-*/img/0*.png"))) >= 4, backwards)
    backwards.kill(signal.SIGKILL)
    backwards.wait()
    (folder,) = (out / "samples").iterdir()
    backwards.start([*argv, "-l", str(folder)])
    assert backwards.wait() == 0, backwards.said()
    found = {path.name: path.read_bytes() for path in (folder / "img").iterdir()}
    assert found == {path.name: path.read_bytes() for path in whole.iterdir()}


# A full disk.


@pytest.mark.parametrize("small_disk", ["24m"], indirect=True)
def test_full_disk(miniature, small_disk: Path, uninterrupted, failing, monkeypatch) -> None:
    """A real one: the next write fails, in whichever file it is."""
    ballast = small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    with monkeypatch.context() as patch:
        stop_after(patch, 5, fill)
        failure = failing(*flags(miniature), "-l", small_disk)
    assert failure.status == 2
    folder = run_folder(small_disk)
    assert "No space left on device; make room, then go on in the same folder" in failure.message
    assert f"-l {folder}" in failure.message
    assert "Traceback" not in failure.message
    assert len(units(folder)) == 5

    failure = failing(*flags(miniature), "-l", folder)
    assert failure.status == 2
    assert "make room" in failure.message
    assert len(units(folder)) == 5

    ballast.unlink()
    main([*flags(miniature), "-l", str(folder)])
    assert f"5 of {2 * UNITS} units are there" in (folder / "run.log").read_text()
    assert_finished_alike(folder, uninterrupted)


def test_files_that_may_not_grow(miniature, tmp_path, uninterrupted, failing) -> None:
    """``ulimit -f`` stops the first unit that is too large, and loses none before it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        failure = failing(*flags(miniature), "-l", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = run_folder(tmp_path)
    assert failure.status == 2
    assert "calibration/weights-" in failure.message
    assert "File too large" in failure.message
    there = len(units(folder))
    assert 0 < there < UNITS
    main([*flags(miniature), "-l", str(folder)])
    assert f"{there} of {2 * UNITS} units are there" in (folder / "run.log").read_text()
    assert_finished_alike(folder, uninterrupted)
