"""The tables' command on the bundled model, with a handful of images: what it makes, keeps and does not do again."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from ddim.config import load_config
from qdiff.calibrate import calibrate
from qdiff.calibration_data import load_calibration_set
from qdiff.checkpoint import packed_bytes, read_info
from qdiff.config import CalibrationConfig
from qdiff.evaluation.variants import full_precision
from qdiff.quant_model import QuantModel

from .conftest import REPOSITORY, load_script

QUICK = [
    "--count",
    "4",
    "--batch_size",
    "4",
    "--iters",
    "1",
    "--iters_a",
    "1",
    "--cali_samples",
    "4",
    "--device",
    "cpu",
]


tables = load_script("reproduce_tables")


def quick_values() -> dict:
    """The script's constants for four rows that take two steps, from two calibrations on two timesteps."""
    four = tables.Recipe("qdiff", 4, steps=2)
    rows = (
        tables.Row(tables.MAIN, timesteps=2),
        tables.Row(tables.MAIN, tables.Recipe("linear", 8, split=False, steps=2), timesteps=2),
        tables.Row(tables.STEPS, four, quant_act=False, timesteps=2),
        tables.Row(tables.STEPS, four, timesteps=2, eta=1.0),
    )
    return {"HELD_OUT": {"steps": 2, "per_step": 2}, "SAMPLER_STEPS": 2, "ROWS": rows}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> tuple:
    values = quick_values()
    for name, value in values.items():
        monkeypatch.setattr(tables, name, value)
    return values["ROWS"]


def new_study(out: Path, *more: str) -> object:
    return tables.Study(tables.make_parser().parse_args(["--out", str(out), *QUICK, *more]))


def run(out: Path, *more: str) -> dict:
    assert tables.main(["--out", str(out), *QUICK, *more]) == 0
    path = out / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(tables, name, lambda *a, **k: pytest.fail("done again"))


def test_the_rows_are_those_of_the_paper() -> None:
    names = [row.name for row in tables.ROWS]
    assert len(set(names)) == len(names)
    for mode in ("linear", "qdiff"):
        for bits in ("w8a8", "w4a32", "w4a8"):
            assert {f"{mode}-{bits}", f"{mode}-{bits}-nosplit"} <= set(names)
    assert {"full", "qdiff-w4a8-st1", "qdiff-w4a8-st5", "full-20steps", "qdiff-w4a8-50steps-eta1"} <= set(names)
    assert {"qdiff-w4a32-weight_lr=0.03", "qdiff-w4a8-weight_lr=0.03"} <= set(names)
    assert list(dict.fromkeys(row.table for row in tables.ROWS))[:2] == [tables.MAIN, tables.RATE]
    recipes = [row.recipe for row in tables.ROWS if row.recipe is not None]
    for one, other in itertools.combinations(recipes, 2):  # a checkpoint's file belongs to one recipe
        assert (one.name == other.name) == (one == other)
        assert (one.weights.name == other.weights.name) == (one.weights == other.weights)
    assert not {recipe.name for recipe in recipes} & {recipe.weights.name for recipe in recipes}


def test_weights_are_shared_by_recipes_that_differ_in_activations_only() -> None:
    def shared(**options: object) -> str:
        return tables.Recipe("qdiff", 4, **options).weights.name

    activations = {"quant": {"timed_ranges": "all", "act_range": "mse"}, "calibration": {"range_samples": None}}
    assert shared() == shared(act_bit=4) == shared(a_sym=False, **activations) == "qdiff-w4"
    assert shared(split=False) == "qdiff-w4-nosplit"
    assert shared(steps=5) == "qdiff-w4-st5"
    assert shared(calibration={"weight_lr": 0.03, "lr": 1e-3}) == "qdiff-w4-weight_lr=0.03"
    assert shared(quant={"weight_range": "mse", "split_input": True}) == "qdiff-w4-weight_range=mse"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="published", marks=pytest.mark.thorough),
        pytest.param({"a_sym": False, "quant": {"timed_ranges": "all", "split_input": True}}, id="better"),
    ],
)
def test_shared_weights_change_nothing(quick: tuple, tmp_path: Path, options: dict) -> None:
    """A checkpoint in two parts, weights and then activations, has the bytes of one calibrated in one go."""
    rate = {"weight_lr": 0.5}  # flips roundings within a few iterations
    recipe = tables.Recipe("qdiff", 4, steps=2, **options, calibration=rate)
    study = new_study(tmp_path, "--iters", "5", "--iters_a", "5")
    made = study.checkpoint(recipe).read_bytes()
    weights = tmp_path / "calibrated" / "qdiff-w4-st2-weight_lr=0.5.safetensors"
    assert not read_info(weights).quant.quant_act

    data = load_calibration_set(study.calibration_set(2), cali_st=2, cali_n=2, image_shape=(1, 32, 32))
    config = load_config(REPOSITORY / "configs" / "fashion_mnist.yml")
    model = QuantModel.from_config(full_precision(config), recipe.quant_config().at_timesteps(data.t.tolist()))
    calibrate(model, data, CalibrationConfig(iters=5, iters_a=5, correct_scale=True, correct_mean=True, **rate))
    info = {"model_config": config.to_dict(), "calibration": {"quant_mode": "qdiff"}}
    assert packed_bytes(model, info=info) == made

    nearest = study.checkpoint(tables.Recipe("linear", 4, steps=2).weights).read_bytes()
    assert weights.read_bytes() != nearest


def test_from_nothing_to_tables_and_on(quick: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    names = [row.name for row in quick]
    assert names == [
        "full-2steps",
        "linear-w8a8-nosplit-st2-2steps",
        "qdiff-w4a32-st2-2steps",
        "qdiff-w4a8-st2-2steps-eta1",
    ]

    # Out of time before anything starts: says so, leaves nothing wrong behind.
    assert run(tmp_path, "--minutes", "1e-9") == {}
    assert "4 rows are left" in capsys.readouterr().out

    # One row, then the rest; finished ones are not sampled again.
    first = run(tmp_path, "--rows", names[0])
    assert list(first["rows"]) == names[:1]
    sampled: list[str] = []
    sample: Callable = tables.Study.sample
    monkeypatch.setattr(
        tables.Study, "sample", lambda self, row, seed: sampled.append(row.name) or sample(self, row, seed)
    )
    results = run(tmp_path)
    assert sampled == names[1:]
    assert results["rows"][names[0]] == first["rows"][names[0]]

    # What stands in the entries.
    rows = results["rows"]
    assert rows[names[0]]["output_error"] is None
    weights, both = (rows[name]["output_error"] for name in names[2:])
    assert 0 < weights < both < 1
    assert all(len(row["last_steps"] or [0, 0]) == 2 and row["frechet"]["0"] > 0 for row in rows.values())
    assert rows[names[1]]["bytes"] < rows[names[0]]["bytes"] / 3
    assert {"device", "torch", "commit"} <= rows[names[0]]["environment"].keys()

    # Two calibrations for three quantized rows, on one set of two steps, without its split and with it.
    checkpoints = sorted((tmp_path / "calibrated").glob("*.safetensors"))
    made = ["linear-w8-nosplit-st2", "linear-w8a8-nosplit-st2", "qdiff-w4-st2", "qdiff-w4a8-st2"]
    assert [path.stem for path in checkpoints] == made
    assert [read_info(path).quant.split for path in checkpoints] == [False, False, True, True]
    assert sorted(results["calibration_seconds"]) == made
    assert all(seconds > 0 for seconds in results["calibration_seconds"].values())
    content = torch.load(tmp_path / "sets" / "st2.pt", weights_only=True)
    assert [len(x) for x in content["xs"]] == [2, 2]

    # The table and the picture.
    text = (tmp_path / "results.md").read_text()
    assert text.index(tables.MAIN) < text.index(names[1]) < text.index(tables.STEPS) < text.index(names[3])
    assert (tmp_path / "results.png").stat().st_size > 1000

    # Another seed is added to a row; nothing is calibrated for it.
    forbid(monkeypatch, "calibrate", "save_calibration_set")
    more = run(tmp_path, "--seeds", "0", "1", "--rows", names[1])["rows"]
    assert sampled[3:] == [names[1]]
    assert set(more[names[1]]["frechet"]) == {"0", "1"}
    assert more[names[1]]["frechet"]["0"] != more[names[1]]["frechet"]["1"]
    assert "±" in (tmp_path / "results.md").read_text()
    assert tables.main(["--out", str(tmp_path), *QUICK, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 4

    # A folder holds rows of one setting.
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--count", "5")
    assert caught.value.code == 2
    assert "count is 5, was 4" in capsys.readouterr().err


TWIN = """
from tests.scripts.test_reproduce_tables import QUICK, quick_values, sys, tables
vars(tables).update(quick_values())
print("ready", flush=True)
input()
tables.main(["--out", sys.argv[1], *QUICK])
"""


def test_two_processes_share_a_folder(quick: tuple, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWIN, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    twins = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [twin.stdout.readline() for twin in twins] == ["ready\n"] * 2  # imported: both start now
    for twin in twins:
        twin.stdin.write("\n")
        twin.stdin.flush()
    said = [twin.communicate(timeout=120)[0] for twin in twins]
    assert [twin.returncode for twin in twins] == [0, 0]

    # Each row and each calibration once, in one of them; on a busy machine one may have done them all.
    lines = "".join(said).splitlines()
    measured = sorted(line.partition(",")[0] for line in lines if ": Fréchet" in line)
    assert measured == sorted(row.name for row in quick)
    assert sum("calibrated in" in line for line in lines) == 4
    assert sorted(json.loads((tmp_path / "results.json").read_text())["rows"]) == measured


def test_a_row_that_another_process_has_is_left_to_it(quick: tuple, tmp_path: Path, capsys) -> None:
    other, row = new_study(tmp_path), quick[0]
    with other._lock(other._row_path(row)):
        assert list(run(tmp_path, "--rows", row.name, quick[1].name)["rows"]) == [quick[1].name]
    assert "1 rows are left; other processes have them" in capsys.readouterr().out
    assert row.name in run(tmp_path, "--rows", row.name)["rows"]


def test_rows_whose_checkpoint_another_process_makes_come_last(
    quick: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    sampled: list[str] = []
    sample: Callable = tables.Study.sample
    other, made = new_study(tmp_path), ExitStack()
    awaited = other._checkpoint_path(quick[1].recipe.weights)
    made.enter_context(other._lock(awaited))

    def note(self, row, seed):
        sampled.append(row.name)
        if len(sampled) == 3:  # the other process goes on for a while after this one has nothing else to do
            threading.Timer(2.0, made.close).start()
        return sample(self, row, seed)

    monkeypatch.setattr(tables.Study, "sample", note)
    run(tmp_path)
    names = [row.name for row in quick]
    assert sampled == [names[0], *names[2:], names[1]]
    assert f"waiting for {awaited.name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rows nothing", "--list shows them"),
        ("--count 1", "at least 2"),
        ("--minutes 0", "above 0"),
        ("--precision fp16 --device cpu", "needs a GPU"),
    ],
)
def test_wrong_words(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tables.main(["--out", str(tmp_path / "out"), *words.split()])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rows/full.json", "settings.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{")
        with pytest.raises(SystemExit):
            tables.main(["--out", str(tmp_path), *QUICK])
        assert name in capsys.readouterr().err


def test_names_with_a_star() -> None:
    parser = tables.make_parser()
    chosen = [row.name for row in tables.chosen_rows(parser, ["linear-w4a32*", "full"], tables.ROWS)]
    assert chosen[0] == "full"
    assert {"linear-w4a32", "linear-w4a32-nosplit"} <= set(chosen)
    assert all(name == "full" or name.startswith("linear-w4a32") for name in chosen)
    inside = [row.name for row in tables.chosen_rows(parser, ["linear-w4*-nosplit"], tables.ROWS)]
    assert inside == ["linear-w4a32-nosplit", "linear-w4a8-nosplit"]


def test_mean_and_spread() -> None:
    assert tables.mean_and_spread([1.5]) == "1.500"
    assert tables.mean_and_spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
