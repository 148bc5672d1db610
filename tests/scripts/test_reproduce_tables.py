"""The tables' command on the bundled model, with a handful of images: what it makes, keeps and does not do again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qdiff.checkpoint import read_info

from .conftest import load_script

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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> tuple:
    """Four rows that take two steps, from two calibrations on two timesteps."""
    monkeypatch.setattr(tables, "HELD_OUT", {"steps": 2, "per_step": 2})
    monkeypatch.setattr(tables, "SAMPLER_STEPS", 2)
    four = tables.Recipe("qdiff", 4, steps=2)
    rows = (
        tables.Row(tables.MAIN, timesteps=2),
        tables.Row(tables.MAIN, tables.Recipe("linear", 8, split=False, steps=2), timesteps=2),
        tables.Row(tables.STEPS, four, quant_act=False, timesteps=2),
        tables.Row(tables.STEPS, four, timesteps=2, eta=1.0),
    )
    monkeypatch.setattr(tables, "ROWS", rows)
    return rows


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
    recipes = [row.recipe for row in tables.ROWS if row.recipe is not None]
    for one, other in itertools.combinations(recipes, 2):  # a checkpoint's file belongs to one recipe
        assert (one.name == other.name) == (one == other)


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
    checkpoints = sorted((tmp_path / "calibrated").iterdir())
    assert [path.name for path in checkpoints] == ["linear-w8a8-nosplit-st2.safetensors", "qdiff-w4a8-st2.safetensors"]
    assert [read_info(path).quant.split for path in checkpoints] == [False, True]
    content = torch.load(tmp_path / "sets" / "st2.pt", weights_only=True)
    assert [len(x) for x in content["xs"]] == [2, 2]

    # The table and the picture.
    text = (tmp_path / "results.md").read_text()
    assert text.index(tables.MAIN) < text.index(names[1]) < text.index(tables.STEPS) < text.index(names[3])
    assert (tmp_path / "results.png").stat().st_size > 1000

    # Another seed is added to a row; nothing is calibrated for it.
    forbid(monkeypatch, "calibrate", "make_calibration_set")
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


def test_a_damaged_results_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(SystemExit):
        tables.main(["--out", str(tmp_path), *QUICK])
    assert "results.json" in capsys.readouterr().err


def test_names_with_a_star() -> None:
    parser = tables.make_parser()
    chosen = [row.name for row in tables.chosen_rows(parser, ["linear-w4a32*", "full"])]
    assert chosen[0] == "full"
    assert {"linear-w4a32", "linear-w4a32-nosplit"} <= set(chosen)
    assert all(name == "full" or name.startswith("linear-w4a32") for name in chosen)


def test_mean_and_spread() -> None:
    assert tables.mean_and_spread([1.5]) == "1.500"
    assert tables.mean_and_spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
