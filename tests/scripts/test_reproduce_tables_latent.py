"""The tables' command on a miniature latent bundle with random weights: the same rows, guided and class by class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qdiff.calibration_data import load_calibration_set
from qdiff.checkpoint import read_info
from qdiff.cli import sample_ldm
from qdiff.cli.bundles import LatentBundle
from qdiff.cli.run_folder import read_png

from .conftest import load_script
from .latent_models import CLASSES, SHAPES, make_bundle

tables = load_script("reproduce_tables")
QUICK = ["--model", "emoji64", "--count", "6", "--batch_size", "4", "--iters", "1", "--iters_a", "1"]
QUICK += ["--cali_samples", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> LatentBundle:
    """With the options of the bundled latent model."""
    real = tables.MODELS["emoji64"]
    folder = make_bundle(tmp_path_factory.mktemp("bundle"))
    return LatentBundle(folder, scale=1.5, quant=real.quant, calibration=real.calibration)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, bundle: LatentBundle) -> tuple:
    """The script's constants for four rows that take two steps."""
    rate = {"weight_lr": 0.03}
    timed = {"timed_ranges": "all", "split_input": True}
    best = tables.Recipe("qdiff", 4, a_sym=False, steps=2, quant=timed, calibration=rate)
    published = tables.Recipe("linear", 4, steps=2)
    rows = (
        tables.Row(tables.MAIN, timesteps=2),
        tables.Row(tables.MAIN, published, quant_act=False, timesteps=2),
        tables.Row(tables.MAIN, published, timesteps=2),
        tables.Row(tables.RATE, best, timesteps=2, correction="corrected"),
    )
    monkeypatch.setitem(tables.MODELS, "emoji64", bundle)
    for name, value in {"HELD_OUT": {"steps": 2, "per_step": 3}, "SAMPLER_STEPS": 2, "LATENT_ROWS": rows}.items():
        monkeypatch.setattr(tables, name, value)
    return rows


def run(out: Path, *more: str) -> dict:
    assert tables.main(["--out", str(out), *QUICK, *more]) == 0
    return json.loads((out / "results.json").read_text())


def test_the_rows_answer_the_questions_of_the_paper() -> None:
    rows = tables.rows_of("emoji64")
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for mode in ("linear", "qdiff"):
        for bits in ("w8a8", "w4a32", "w4a8"):
            assert {f"{mode}-{bits}", f"{mode}-{bits}-nosplit"} <= set(names)
    assert {"full", "qdiff-w4a8-st1", "qdiff-w4a8-st5", "qdiff-w4a32-st1", "qdiff-w4a32-st5"} <= set(names)
    assert tables.rows_of("fashion_mnist") is tables.ROWS


def test_a_family_sets_what_its_commands_set() -> None:
    family = tables.MODELS["emoji64"]
    published = tables.Recipe("qdiff", 4)
    timed = tables.Recipe("qdiff", 4, quant={"timed_ranges": "all"})
    own = tables.Recipe("qdiff", 4, quant={"weight_range": "max"}, calibration={"range_order": "random"})
    assert published.quant_config(family.quant).weight_range == "mse"
    assert published.calibration_options(family.calibration) == {"range_order": "first", "running_stat": True}
    assert timed.calibration_options(family.calibration) == {"range_order": "first"}
    assert own.quant_config(family.quant).weight_range == "max"
    assert own.calibration_options(family.calibration)["range_order"] == "random"
    pixel = tables.MODELS["fashion_mnist"]
    assert (pixel.quant, pixel.calibration, pixel.settings) == ({}, {}, {})


def test_from_nothing_to_tables_and_to_the_sampling_command(
    quick: tuple, bundle: LatentBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tables"
    names = [row.name for row in quick]
    results = run(out)
    rows = results["rows"]
    assert sorted(rows) == sorted(names)
    assert results["settings"]["scale"] == 1.5
    assert rows["full-2steps"]["bytes"] == 4 * sum(p.numel() for p in bundle.full_precision().parameters())
    weights, both = (rows[name]["output_error"] for name in names[1:3])
    assert 0 < weights < both < 1
    assert all(row["frechet"]["0"] > 0 for row in rows.values())
    assert "guidance 1.5" in bundle.steps_are
    assert (out / "results.png").stat().st_size > 1000
    text = (out / "results.md").read_text()
    assert text.index(tables.MAIN) < text.index(names[1]) < text.index(tables.RATE) < text.index(names[3])

    # The set holds both conditions, and a calibration takes the selection with each of them.
    content = torch.load(out / "sets" / "st2.pt", weights_only=True)
    assert [len(x) for x in content["xs"]] == [2, 2]
    assert not torch.equal(content["cs"][0][0], content["cs"][0][1])  # classes in turn
    assert torch.equal(content["ucs"][0][0], content["ucs"][0][1])
    assert len(bundle.calibration_samples(out / "sets" / "st2.pt", cali_st=2, cali_n=2)) == 8

    # Nothing is done again.
    monkeypatch.setattr(tables, "calibrate", lambda *a, **k: pytest.fail("done again"))
    assert run(out)["rows"] == rows

    # What it calibrated is what the command samples from, and the images are those of the tables.
    checkpoint = next((out / "calibrated").glob("qdiff-w4a8-*.safetensors"))
    assert read_info(checkpoint).quant.timed_ranges == "all"
    flags = ["-r", str(bundle.folder), "-n", "3", "-c", "2", "-e", "0", "--scale", "1.5", "--seed", "0"]
    flags += ["--ptq", "--quant_act", "--resume", "--cali_ckpt", str(checkpoint), "--device", "cpu"]
    sample_ldm.main([*flags, "-l", str(tmp_path / "run")])
    written = sorted((tmp_path / "run").glob("*/samples/*/img/*.png"))
    images = torch.stack([read_png(path) for path in written])
    kept = torch.load(out / "images" / f"{names[3]}.pt", weights_only=True)
    assert (images * 255 - kept[:3]).abs().max() <= 1


def test_an_image_is_the_same_in_any_batch(bundle: LatentBundle) -> None:
    def sample(count: int, batch_size: int, seed: int = 0) -> torch.Tensor:
        model = bundle.full_precision()
        return bundle.sample(model, count=count, batch_size=batch_size, timesteps=3, eta=1.0, seed=seed)

    images = sample(5, 5)
    assert images.shape == (5, 3, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(sample(5, 2), images, atol=1e-4, rtol=0)
    torch.testing.assert_close(sample(3, 3), images[:3], atol=1e-4, rtol=0)
    assert not torch.allclose(sample(5, 5, seed=1), images, atol=1e-2)


def test_held_out_inputs_are_asked_with_and_without_their_class(bundle: LatentBundle) -> None:
    def record(per_step: int) -> tuple[torch.nn.Module, object]:
        model = bundle.full_precision()
        return model, bundle.held_out(model, device=torch.device("cpu"), steps=2, per_step=per_step)

    model, inputs = record(per_step=3)
    assert inputs.x.shape == (12, *SHAPES["classes"])
    assert inputs.t.tolist() == [21.0] * 6 + [1.0] * 6
    assert torch.equal(inputs.x[:3], inputs.x[3:6])
    assert torch.equal(inputs.context[0], inputs.context[2])  # none
    assert not torch.equal(inputs.context[3], inputs.context[4])
    assert torch.equal(inputs.context[:6], inputs.context[6:])
    assert inputs.error(model).tolist() == [0.0, 0.0]
    assert torch.equal(record(per_step=3)[1].target, inputs.target)
    torch.testing.assert_close(record(per_step=2)[1].x[:2], inputs.x[:2])  # an image's own, however many there are


def test_without_guidance_an_image_takes_one_row(bundle: LatentBundle) -> None:
    plain = LatentBundle(bundle.folder)
    calls = []
    model = plain.full_precision()
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    plain.sample(model, count=3, batch_size=3, timesteps=2)
    assert calls == [3, 3]


def test_networks_of_a_bundle_are_its_own_each_time(bundle: LatentBundle) -> None:
    one, other = bundle.full_precision(), bundle.full_precision()
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert next(other.parameters()).abs().sum() > 0
    assert next(bundle.full_precision().parameters()).abs().sum() > 0
    assert bundle.model.classes == CLASSES


def test_a_missing_model_is_said_in_one_line(bundle: LatentBundle, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((bundle.folder / "config.yaml").read_bytes())
    monkeypatch.setitem(tables.MODELS, "emoji64", LatentBundle(folder))
    with pytest.raises(SystemExit) as caught:
        tables.main(["--out", str(tmp_path / "out"), *QUICK, "--list"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "lacks model.safetensors, classifier.safetensors, reference_statistics.safetensors" in said
    assert "prepare_emoji_bundle.py" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_set_of_another_model_is_refused(bundle: LatentBundle, tmp_path: Path) -> None:
    model = bundle.full_precision()
    content = bundle.record(
        model, device="cpu", timesteps=2, seed=0, count=2, batch_size=2, cali_st=2, progress=lambda n: None
    )
    content["cs"] = [embedding[:, :, :5] for embedding in content["cs"]]
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(ValueError, match="5 wide"):
        bundle.calibration_samples(tmp_path / "set.pt", cali_st=2, cali_n=2)
    assert load_calibration_set(tmp_path / "set.pt", cali_st=2, cali_n=2, image_shape=(3, 8, 8)).context is None
