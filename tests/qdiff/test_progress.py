"""Finished units on disk: a calibration that dies anywhere goes on to the same result, or says why it must not."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qdiff import progress as progress_module
from qdiff.calibrate import UnitProgress, calibrate
from qdiff.capture import PairedCapture, UnitData
from qdiff.checkpoint import packed_bytes, save_published
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.progress import CalibrationProgress, FinishedUnit, ProgressError, identity, source_hashes, tensor_hash
from qdiff.quant_model import QuantModel
from qdiff.reconstruction import TracePoint, UnitReport

from ..cases import thorough_but
from .conftest import SMALL, as_calibrated, calibration_set, wrapped

pipeline = importlib.import_module("qdiff.calibrate")

SAMPLES = 6
W4A4 = QuantConfig(weight_bit=4, act_bit=4, quant_act=True, split=True)
SHORT = CalibrationConfig(iters=3, iters_a=2, batch_size=4, range_samples=6, seed=5, running_stat=True)
UNITS = 10  # of the small network


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Many tiny calibrations: a second thread only gets in their way where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Crash(BaseException):
    """Stands for a signal: nothing on the way may catch it."""


def open_progress(folder: Path, qnn: QuantModel, config: CalibrationConfig = SHORT, **data: Any) -> CalibrationProgress:
    samples = calibration_set(SAMPLES, **data)
    return CalibrationProgress.open(folder, identity(qnn, samples, config, mode="qdiff", weights_done=False))


def run(folder: Path | None, *, on_unit: Any = None, **unet: Any) -> tuple[QuantModel, list[UnitProgress]]:
    """A calibration of the small network, its units in ``folder``."""
    qnn, seen = wrapped(W4A4, **SMALL, **unet), []
    progress = None if folder is None else open_progress(folder, qnn)
    listen = lambda unit: (seen.append(unit), on_unit and on_unit(unit))  # noqa: E731
    calibrate(qnn, calibration_set(SAMPLES), SHORT, on_unit=listen, progress=progress)
    return qnn, seen


def content(qnn: QuantModel, tmp_path: Path) -> tuple[bytes, bytes]:
    """Both checkpoint files."""
    save_published(tmp_path / "ckpt.pth", qnn)
    return (tmp_path / "ckpt.pth").read_bytes(), packed_bytes(qnn)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    with torch.random.fork_rng():
        return content(run(None)[0], tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration that died after its last unit; copy before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "calibration"
    with torch.random.fork_rng():
        run(folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "calibration"
    folder.mkdir()
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# Going on.


def test_keeping_units_changes_nothing(finished: Path, uninterrupted: tuple, tmp_path: Path) -> None:
    qnn, seen = run(tmp_path / "calibration")
    assert content(qnn, tmp_path) == uninterrupted
    assert not any(unit.restored for unit in seen)
    units = [f"{phase}-{i:03d}-{u.path}.safetensors" for phase in ("activations", "weights") for i, u in numbered(qnn)]
    assert sorted(os.listdir(finished)) == sorted([*units, "ranges.safetensors", "calibration.json"])


def numbered(qnn: QuantModel) -> list[tuple[int, Any]]:
    return list(enumerate(qnn.units()))


ONE_OF_EACH = (0, 1, 2, 5)  # moments whose draws are all four places


@pytest.mark.parametrize("moment", thorough_but(ONE_OF_EACH, range(10)))
def test_dying_at_a_random_moment(moment: int, uninterrupted: tuple, tmp_path: Path, monkeypatch) -> None:
    """The files are those of an uninterrupted run; no finished unit is learned twice, none but the dying one lost."""
    draws = random.Random(moment)
    place = draws.choice(["learning", "writing", "renaming", "afterwards"])
    unit = draws.randrange(2 * UNITS)
    learned = watch_learning(monkeypatch, die_at=unit if place == "learning" else None)
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        if place in ("writing", "renaming"):
            name = {"writing": "fsync", "renaming": "replace"}[place]
            original = getattr(os, name)
            writes = unit + 1 + (unit >= UNITS)  # the manifest, and the ranges between the phases, are written too

            def dying(*args: Any) -> Any:
                if next(calls) == writes:
                    raise Crash
                return original(*args)

            patch.setattr(os, name, dying)
        with pytest.raises(Crash):
            run(tmp_path / "c", on_unit=lambda u: die() if place == "afterwards" and u.index == unit else None)
    died_with = len(list((tmp_path / "c").glob("[wa]*-*.safetensors")))
    assert died_with == (unit + 1 if place == "afterwards" else unit)
    learned.clear()
    qnn, seen = run(tmp_path / "c")
    assert [u.restored for u in seen] == [True] * died_with + [False] * (2 * UNITS - died_with)
    assert len(learned) == 2 * UNITS - died_with
    assert content(qnn, tmp_path) == uninterrupted


def die() -> None:
    raise Crash


def watch_learning(monkeypatch: pytest.MonkeyPatch, die_at: int | None = None) -> list[str]:
    """The units that are reconstructed; dies in the middle of one, once."""
    learned: list[str] = []
    deaths = [die_at] if die_at is not None else []
    for name in ("reconstruct_weights", "reconstruct_activations"):
        original = getattr(pipeline, name)

        def watched(unit: Any, *args: Any, original: Any = original, **options: Any) -> UnitReport:
            report = original(unit, *args, **options)
            if deaths and len(learned) == deaths[0]:
                deaths.clear()
                raise Crash  # it has learned, and nobody will know
            learned.append(unit.path)
            return report

        monkeypatch.setattr(pipeline, name, watched)
    return learned


def test_a_finished_calibration_needs_no_data_at_all(
    finished: Path, copied: Path, uninterrupted, tmp_path, monkeypatch
):
    for name in ("PairedCapture", "find_act_ranges", "update_running_ranges"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: pytest.fail("collects data"))
    qnn, seen = run(copied)
    assert all(unit.restored for unit in seen)
    assert content(qnn, tmp_path) == uninterrupted


def test_units_that_are_there_are_passed_without_collecting_their_data(copied: Path, monkeypatch) -> None:
    names = sorted(path.name for path in copied.glob("weights-*"))
    for path in copied.glob("[wa]*-*"):
        if path.name not in names[:5]:
            path.unlink()
    asked: list[str] = []
    original = PairedCapture.inputs
    monkeypatch.setattr(PairedCapture, "inputs", lambda self, unit: (asked.append(unit.path), original(self, unit))[1])
    run(copied)
    paths = [unit.path for unit in wrapped(**SMALL).units()]
    assert asked == paths[5:] + paths


def test_restored_reports_are_those_that_were_kept(finished: Path, copied: Path) -> None:
    _, first = run(copied)
    _, second = run(copied)
    assert [u.report for u in first] == [u.report for u in second]
    for unit in first:
        assert 0 < unit.relative_loss < 10
        assert unit.elapsed >= unit.report.seconds > 0


def test_relative_loss_is_what_zeros_would_lose(monkeypatch) -> None:
    """Against an independent computation over all samples (fewer than the report's batch)."""
    expected = []
    original = pipeline.reconstruct_weights

    def watched(unit: Any, data: Any, config: Any, *, seed: int) -> UnitReport:
        report = original(unit, data, config, seed=seed)
        with torch.no_grad():
            wrong = unit.module(*data.inputs) - data.target
        expected.append((wrong.square().sum() / data.target.square().sum()).item())
        return report

    monkeypatch.setattr(pipeline, "reconstruct_weights", watched)
    _, seen = run(None)
    assert [u.relative_loss for u in seen[:UNITS]] == pytest.approx(expected, rel=1e-4)


def test_no_more_samples_than_a_batch_are_looked_at_together(monkeypatch) -> None:
    """Beside all rows for which there was room, there is none for more of them in float32."""
    seen: list[int] = []
    original = UnitData.rows

    def watched(self: UnitData, index: torch.Tensor, device: torch.device) -> Any:
        seen.append(len(index))
        return original(self, index, device)

    monkeypatch.setattr(UnitData, "rows", watched)
    calibrate(wrapped(**SMALL), calibration_set(9), CalibrationConfig(iters=1, iters_a=1, batch_size=2))
    assert set(seen) == {1, 2}


def test_traces_survive() -> None:
    trace = (TracePoint(0, 1.5, 0.25, 20.0, 0.5, ()), TracePoint(9, 0.5, 0.0, 0.0, 1.0, (0.1, 0.2)))
    report = UnitReport("a.b", "layer", "weights", 4, 10, 2.0, 1.0, 3.0, "kept", "why", 7, trace)
    finished = FinishedUnit(report, 0.5, 4.0)
    again = FinishedUnit.from_dict(json.loads(json.dumps(finished.to_dict())))
    assert again == finished
    assert isinstance(again.report.trace[1], TracePoint)


def test_unlearned_rounding_and_grids_of_any_shape_come_back(tmp_path: Path) -> None:
    """A unit that stayed at the nearest has no rounding variables; a grid may have a step size for each channel."""
    qnn = wrapped(W4A4, **SMALL)
    qnn.find_weight_grids()
    progress = open_progress(tmp_path / "c", qnn)
    unit = qnn.units()[2]
    quantizer = unit.act_quantizers()[0]
    quantizer.delta.data, quantizer.zero_point = torch.rand(3, 1, 1), torch.arange(3.0).reshape(3, 1, 1)
    report = UnitReport(unit.path, unit.kind, "weights", 1, 0, 1.0, 1.0, 1.0)
    for phase in ("weights", "activations"):
        progress.keep(unit, phase, 2, FinishedUnit(dataclasses.replace(report, phase=phase), 0.1, 1.0))

    other = wrapped(W4A4, **SMALL)
    other.find_weight_grids()
    again = open_progress(tmp_path / "c", wrapped(W4A4, **SMALL))
    twin = other.units()[2]
    for phase in ("weights", "activations"):
        assert again.restore(twin, phase, 2) is not None
    assert not any(name.endswith("alpha") for name in twin.module.state_dict())
    for name, tensor in unit.module.state_dict().items():
        assert torch.equal(tensor, twin.module.state_dict()[name]), name
    assert all(layer.baked_weight is not None for layer in twin.layers())
    assert again.restore(other.units()[1], "weights", 1) is None


# Refusing.


def test_other_settings_data_and_weights_are_refused(copied: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()}

    def message(qnn: QuantModel | None = None, config: CalibrationConfig = SHORT, **data: Any) -> str:
        with pytest.raises(ProgressError) as caught:
            open_progress(copied, qnn or wrapped(W4A4, **SMALL), config, **data)
        return str(caught.value)

    said = message(config=dataclasses.replace(SHORT, iters=4))
    assert "calibration.iters is 4, was 3" in said
    assert "another folder" in said
    assert f"remove {copied}" in said
    assert "quant.act_bit is 8, was 4" in message(wrapped(dataclasses.replace(W4A4, act_bit=8), **SMALL))
    assert "the calibration data are others" in message(seed=1)
    assert "the full-precision weights are others" in message(wrapped(W4A4, seed=1, **SMALL))
    assert {path.name: path.stat().st_mtime_ns for path in copied.iterdir()} == before


def test_other_calibrated_weights_are_refused(tmp_path: Path) -> None:
    """``--resume_w``: they are where the calibration starts."""

    def facts(qnn: QuantModel) -> dict[str, Any]:
        return identity(qnn, calibration_set(SAMPLES), SHORT, mode="qdiff", weights_done=True)

    qnn = as_calibrated(W4A4, **SMALL)
    CalibrationProgress.open(tmp_path / "c", facts(qnn))
    CalibrationProgress.open(tmp_path / "c", facts(copy.deepcopy(qnn)))
    next(iter(qnn.layers().values())).weight_quantizer.alpha.data[0] *= -1
    with pytest.raises(ProgressError, match="calibrated weights it starts from are others"):
        CalibrationProgress.open(tmp_path / "c", facts(qnn))


def test_other_code_is_refused_by_the_name_of_the_file(copied: Path, monkeypatch) -> None:
    original = source_hashes
    monkeypatch.setattr(
        progress_module, "source_hashes", lambda qnn: original(qnn) | {"qdiff/reconstruction.py": "changed"}
    )
    with pytest.raises(ProgressError, match=r"the code has changed \(qdiff/reconstruction\.py\)"):
        open_progress(copied, wrapped(W4A4, **SMALL))
    monkeypatch.undo()
    monkeypatch.setattr(progress_module, "__version__", "9.9")
    with pytest.raises(ProgressError, match=r"qdiff is '9\.9'"):
        open_progress(copied, wrapped(W4A4, **SMALL))


def test_code_is_hashed_where_it_decides_the_result(tmp_path: Path, monkeypatch) -> None:
    qnn = wrapped(W4A4, **SMALL)
    here = Path(progress_module.__file__).parent
    for path in (*here.glob("*.py"), *here.glob("adapters/*.py")):
        target = tmp_path / path.relative_to(here)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    hashes = source_hashes(qnn)
    assert {"qdiff/primitives.py", "qdiff/capture.py", "qdiff/adapters/ddim.py", "ddim/unet.py"} <= hashes.keys()
    monkeypatch.setattr(progress_module, "__file__", str(tmp_path / "progress.py"))
    assert source_hashes(qnn) == hashes
    (tmp_path / "quantizers.py").write_text("changed")
    (tmp_path / "checkpoint.py").write_text("changed, but it decides nothing")
    assert {name for name in hashes if source_hashes(qnn)[name] != hashes[name]} == {"qdiff/quantizers.py"}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1e-6,
        lambda x: x.double(),
        lambda x: x.reshape(3, 2),
    ],
)
def test_hashes_tell_values_types_and_shapes(change: Any) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert tensor_hash({"a": x}) == tensor_hash({"a": x.t().contiguous().t()})
    assert tensor_hash({"a": x}) != tensor_hash({"a": change(x)})
    assert tensor_hash({"a": x}) != tensor_hash({"b": x})


def test_another_device_is_worth_a_warning(copied: Path, caplog) -> None:
    manifest = json.loads((copied / "calibration.json").read_text())
    (copied / "calibration.json").write_text(json.dumps(manifest | {"device": "NVIDIA H100"}))
    open_progress(copied, wrapped(W4A4, **SMALL))
    assert "NVIDIA H100 so far and on cpu from now on" in caplog.text


# Damage.


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty])
@pytest.mark.parametrize("name", ["weights-003", "activations-006", "ranges"])
def test_damaged_files_are_made_again(copied: Path, uninterrupted, tmp_path, caplog, damage, name: str) -> None:
    (path,) = copied.glob(f"{name}*")
    whole = path.read_bytes()
    damage(path)
    assert path.read_bytes() != whole
    qnn, seen = run(copied)
    assert f"{path}: " in caplog.text
    assert "calculated again" in caplog.text
    assert [f"{u.report.phase}-{u.index % UNITS:03d}" for u in seen if not u.restored] == [name] * (name != "ranges")
    assert content(qnn, tmp_path) == uninterrupted
    assert path.is_file()


def test_files_of_another_calibration_are_not_used(copied: Path, tmp_path: Path, caplog) -> None:
    """Whole, but somebody put it there."""
    qnn = wrapped(W4A4, **SMALL)
    open_progress(tmp_path / "other", qnn, seed=3)
    for path in copied.glob("weights-000*"):
        path.rename(tmp_path / "other" / path.name)
    progress = open_progress(tmp_path / "other", qnn, seed=3)
    assert "of another calibration" in caplog.text
    assert not progress.has(qnn.units()[0], "weights", 0)


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"identity": {}}'])
def test_a_damaged_manifest_is_written_anew(copied: Path, manifest: str) -> None:
    (copied / "calibration.json").write_text(manifest)
    _, seen = run(copied)
    assert all(unit.restored for unit in seen)
    with pytest.raises(ProgressError):
        open_progress(copied, wrapped(W4A4, **SMALL), seed=1)


def test_leftovers_of_a_killed_process_go(copied: Path) -> None:
    (copied / ".weights-001.safetensors.x.part").write_text("half")
    open_progress(copied, wrapped(W4A4, **SMALL)).remove()
    assert not copied.exists()


def test_a_unit_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch) -> None:
    progress = open_progress(tmp_path / "c", wrapped(W4A4, **SMALL))
    qnn = as_calibrated(W4A4, **SMALL)
    report = UnitReport("conv_in", "layer", "weights", 1, 0, 1.0, 1.0, 1.0)
    unit = next(u for u in qnn.units() if u.path == "conv_in")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        progress.keep(unit, "weights", 1, FinishedUnit(report, 0.1, 1.0))
    assert caught.value.filename.endswith("c/weights-001-conv_in.safetensors")
    assert os.listdir(tmp_path / "c") == ["calibration.json"]
    assert not progress.has(unit, "weights", 1)
