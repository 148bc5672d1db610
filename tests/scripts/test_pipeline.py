"""What a calibration shows: the bar, the lines, the summary, the curves."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qdiff.calibrate import UnitProgress, describe
from qdiff.cli.curves import curves
from qdiff.cli.pipeline import UnitBar, duration, summary, unit_table
from qdiff.cli.sample_ddim import main
from qdiff.progress import CalibrationProgress
from qdiff.reconstruction import TracePoint, UnitReport

calibrate_module = importlib.import_module("qdiff.calibrate")


def unit(index: int, phase: str, *, share: float = 0.01, seconds: float = 2.0, **report: object) -> UnitProgress:
    made = UnitReport(f"unit.{index}", "layer", phase, 10, 20, 1.0, 0.5, seconds)
    return UnitProgress(index, 8, dataclasses.replace(made, **report), share, seconds + 0.5)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (723, "12 min 03 s"), (11100, "3 h 05 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_unit_in_a_line() -> None:
    report = UnitReport("mid.attn_1", "attention block", "weights", 10, 20, 1.0, 0.5, 2.04)
    assert describe(report) == "mid.attn_1, weights: loss 1 -> 0.5 (2.0 s)"
    kept = dataclasses.replace(report, outcome="kept", note="NaN", peak_gpu_bytes=3 * 2**29)
    assert describe(kept).endswith("(2.0 s, at most 1.50 GiB of GPU memory); kept: NaN")


def test_summary_of_a_good_calibration() -> None:
    shares = [0.01, 0.05, 0.002, 0.3, 0.04, 0.02, 0.0001]
    seen = [unit(i, "weights", share=0.9) for i in range(7)]
    seen += [unit(i, "activations", share=share, seconds=8) for i, share in enumerate(shares)]
    first, second = summary(seen).splitlines()
    assert first == "calibrated in 1 min 17 s: weights 17.5 s, activations 59.5 s"
    named = second.partition("lose): ")[2]
    assert named == "unit.3 30 %, unit.1 5 %, unit.4 4 %, unit.5 2 %, unit.0 1 %"
    assert "activations" in second


def test_summary_of_weights_alone() -> None:
    assert "lost most (weights;" in summary([unit(0, "weights")])


def test_summary_names_units_that_did_not_learn() -> None:
    seen = [unit(i, "weights", outcome="kept", note=f"why {i}") for i in range(7)]
    seen += [unit(7, "weights", outcome="learned at a tenth of the rate", note="NaN")]
    _, slow, kept, _ = summary(seen).splitlines()
    assert slow == "1 unit learned at a tenth of the rate: unit.7, weights (NaN)"
    assert kept.startswith("7 units kept what they started from")
    assert "unit.0, weights (why 0); unit.1, weights (why 1)" in kept
    assert kept.endswith("unit.4, weights (why 4); and 2 more, which the table in run.log has")


def test_table_has_a_line_for_each_unit() -> None:
    seen = [unit(0, "weights").report, unit(1, "weights", name="a.longer.name", outcome="kept").report]
    header, first, second = unit_table(seen).splitlines()
    assert header.index("outcome") == second.index("kept") == first.index("learned")
    assert first.split()[:4] == ["unit.0", "layer", "weights", "10"]


def test_bar_begins_behind_restored_units(capsys) -> None:
    with UnitBar() as bar:
        for index in range(3):
            bar.show(dataclasses.replace(unit(index, "weights"), restored=True))
        assert capsys.readouterr().err == ""
        bar.show(unit(3, "weights"))
    assert "4/8" in capsys.readouterr().err


# TensorBoard.


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_hold_the_traces(tmp_path: Path) -> None:
    weights = (TracePoint(0, 4.0, 0.5, 20.0, 0.25, ()), TracePoint(10, 2.0, 0.125, 2.0, 1.0, ()))
    steps = (TracePoint(5, 1.0, 0.0, 0.0, 1.0, (0.5, 0.25)),)
    with curves(tmp_path) as drawn:
        drawn.add(unit(0, "weights", trace=weights))
        assert scalars(tmp_path)["weights-000-unit.0/loss"] == [(0, 4.0), (10, 2.0)]  # at once
        drawn.add(unit(1, "activations", trace=steps))
    assert scalars(tmp_path) == {
        "weights-000-unit.0/loss": [(0, 4.0), (10, 2.0)],
        "weights-000-unit.0/rounding_loss": [(0, 0.5), (10, 0.125)],
        "weights-000-unit.0/temperature": [(0, 20.0), (10, 2.0)],
        "weights-000-unit.0/settled": [(0, 0.25), (10, 1.0)],
        "activations-001-unit.1/loss": [(5, 1.0)],
        "activations-001-unit.1/step_size_00": [(5, 0.5)],
        "activations-001-unit.1/step_size_01": [(5, 0.25)],
    }


def test_a_continued_run_draws_every_unit_once(miniature, tmp_path, monkeypatch) -> None:
    point = TracePoint(1, 3.0, 0.5, 20.0, 0.25, ())
    original = calibrate_module.reconstruct_weights

    def traced(*args: object, **options: object) -> UnitReport:
        return dataclasses.replace(original(*args, **options), trace=(point,))

    def stopping(self: CalibrationProgress, *args: object) -> None:
        keep(self, *args)
        raise KeyboardInterrupt

    keep = CalibrationProgress.keep
    monkeypatch.setattr(calibrate_module, "reconstruct_weights", traced)
    flags = [*miniature.flags(), "--ptq", *miniature.calibration_flags(), "--max_images", "0", "--tensorboard"]
    with monkeypatch.context() as patch:
        patch.setattr(CalibrationProgress, "keep", stopping)
        with pytest.raises(SystemExit):
            main([*flags, "-l", str(tmp_path)])
    (folder,) = (tmp_path / "samples").iterdir()
    main([*flags, "-l", str(folder)])
    losses = {tag: values for tag, values in scalars(folder).items() if tag.endswith("/loss")}
    assert len(losses) == 18
    assert set(map(tuple, losses.values())) == {((1, 3.0),)}
    assert "weights-000-temb.dense.0/loss" in losses


def test_curves_are_drawn_only_when_asked_for(miniature, tmp_path) -> None:
    flags = [*miniature.flags(), "--ptq", *miniature.calibration_flags(), "--max_images", "0"]
    main([*flags, "-l", str(tmp_path)])
    (folder,) = (tmp_path / "samples").iterdir()
    assert not (folder / "tensorboard").exists()


def test_summary_reaches_terminal_and_log(miniature, tmp_path, capsys) -> None:
    flags = [*miniature.flags(), "--ptq", *miniature.calibration_flags(), "--max_images", "0"]
    main([*flags, "-l", str(tmp_path)])
    (folder,) = (tmp_path / "samples").iterdir()
    for text in (capsys.readouterr().out, (folder / "run.log").read_text()):
        assert "calibrated in " in text
        assert "lost most (weights;" in text
    assert logging.getLogger("qdiff").handlers == []
