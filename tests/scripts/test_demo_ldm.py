"""The demo of the latent model, end to end on a miniature bundle with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.util import load_guidance
from qdiff.cli import make_calibration_data, sample_ldm
from qdiff.cli.bundles import BUNDLES

from .conftest import load_script
from .latent_models import make_bundle

demo = load_script("demo_ldm")
LABELS = ["full precision", "round to nearest W4A8", "this calibration W4A8", "the same, options W4A8"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """With two checkpoints, as one calibration of the command wrote them."""
    folder = make_bundle(tmp_path)
    model = ["-r", str(folder), "-c", "2", "--seed", "3", "--device", "cpu"]
    data = str(tmp_path / "cali.pt")
    make_calibration_data.main([*model, "-n", "2", "--out", data])
    quick = ["--cali_st", "2", "--cali_n", "2", "--cali_iters", "1", "--cali_iters_a", "1", "--cali_data_path", data]
    sample_ldm.main([*model, "-n", "0", "--ptq", "--weight_bit", "4", "--quant_act", *quick, "-l", str(tmp_path / "c")])
    packed = next((tmp_path / "c").glob("*/samples/*/ckpt.safetensors"))
    for name in demo.BUNDLED.values():
        (folder / name).write_bytes(packed.read_bytes())
    return folder


def test_from_a_bundle_to_images_side_by_side(bundle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "TIMESTEPS", 4)
    monkeypatch.setattr(demo, "SAMPLES_A_STEP", 4)
    out = tmp_path / "demo"
    words = ["--bundle", str(bundle), "--out", str(out), "--images", "3", "--iters", "2", "--iters_a", "1"]
    left = out / "calibrated" / "samples" / "of-yesterday"
    left.mkdir(parents=True)
    assert demo.main(words) == 0
    assert not left.exists()  # each time from the beginning
    said = capsys.readouterr().out
    table = (out / "comparison.md").read_text()
    assert table in said
    lines = table.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:8]] == [*LABELS, *demo.BUNDLED]
    errors = [float(line.split("|")[3]) for line in lines[3:8]]
    assert all(0 < error < 2 for error in errors)
    assert errors[4] == errors[3]  # the same file twice
    assert "3 images, 4 even steps, guidance 2, classes in turn; CPU" in table
    assert (out / "comparison.png").stat().st_size > 1000
    shown = [line for line in said.splitlines() if line.startswith("$ python scripts/")]
    assert len(shown) == 4
    assert len(list((out / "resumed").glob("*/samples/*/img/*.png"))) == 3


def test_what_is_missing_is_named_before_anything_starts(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["--bundle", str(tmp_path / "nothing"), "--out", str(tmp_path / "demo")])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    names = ("model.safetensors", "config.yaml", *demo.BUNDLED.values())
    assert all(name in said for name in names)
    assert "prepare_emoji_bundle.py" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_the_bundled_model_is_whole() -> None:
    bundle = BUNDLES["emoji64"]
    bundle.check(*demo.BUNDLED.values())
    assert load_guidance(bundle.folder / "config.yaml") == bundle.scale
    assert sum(path.stat().st_size for path in bundle.folder.iterdir()) <= 16_000_000
