"""The emoji bundle's files, from a handful of coloured squares and a model with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from ddim.datasets import DatasetUnavailable
from ldm.data.emoji import CLASSES, EmojiImages, pack_split, split_file
from ldm.pretrained import load_latent_diffusion
from qdiff.calibrate import calibrate
from qdiff.calibration_data import save_calibration_set
from qdiff.checkpoint import read_info, save_packed
from qdiff.cli import make_random_checkpoint
from qdiff.cli.bundles import LatentBundle
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.evaluation.features import EmojiClassifier, load_classifier
from qdiff.evaluation.frechet import FeatureStatistics
from qdiff.quant_model import QuantModel

from .conftest import REPOSITORY, load_script
from .latent_models import config_of, make_bundle

script = load_script("prepare_emoji_bundle")
BUNDLE = REPOSITORY / "models" / "ldm" / "emoji64"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 x 16 images, a grey for each class, on white."""
    folder = tmp_path_factory.mktemp("emoji")
    for split, each in (("train", 6), ("heldout", 2)):
        labels = np.repeat(np.arange(len(CLASSES)), each)
        images = np.full((len(labels), 16, 16, 3), 255, dtype=np.uint8)
        images[:, 4:12, 4:12] = (labels * 25)[:, None, None, None] + np.arange(len(labels))[:, None, None, None] % each
        names = [str(i) for i in range(len(labels))]
        split_file(folder, split).write_bytes(pack_split(images, labels.tolist(), names, names, {"seed": 0}))
    return folder


@pytest.fixture
def trained_run(tmp_path: Path) -> Path:
    """A folder as train_ldm.py leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = config_of("classes")
    config["model"]["params"]["cond_stage_config"]["params"]["n_classes"] = len(CLASSES) + 1
    config["model"]["params"]["first_stage_config"]["target"] = "ldm.models.autoencoder.AutoencoderKL"
    del config["model"]["params"]["first_stage_config"]["params"]["n_embed"]
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": config["model"]}))
    words = ["--config", str(folder / "config.yaml"), "--out", str(folder / "model.safetensors")]
    make_random_checkpoint.main(words)
    (folder / "train.json").write_text('{"steps_taken": 4}')
    return folder


def classify(data: Path, out: Path, *more: str) -> None:
    words = ["classifier", "--data", str(data), "--out", str(out), "--batch_size", "16", "--device", "cpu", *more]
    assert script.main(words) == 0


def test_a_classifier_with_its_statistics_and_what_it_is_good_for(data: Path, tmp_path: Path, capsys) -> None:
    classify(data, tmp_path, "--epochs", "2")
    facts = json.loads((tmp_path / "classifier.json").read_text())
    assert set(facts["accuracy"]["heldout"]) == {"all", "mean of groups", *CLASSES}
    found = facts["distance to the training images"]
    assert found["training images"] == pytest.approx(0, abs=1e-9)
    assert all(value >= 0 for value in found.values())
    assert len([name for name in found if "blurred" in name]) == len([n for n in found if "noise" in n]) == 6
    assert facts["data"] == {"seed": 0}
    assert "held-out images" in capsys.readouterr().out
    assert isinstance(load_classifier(tmp_path / "classifier.safetensors"), EmojiClassifier)
    assert FeatureStatistics.load(tmp_path / "reference_statistics.safetensors").count == 54
    weights = load_file(tmp_path / "classifier.safetensors")
    classify(data, tmp_path / "again", "--epochs", "2")
    assert all(torch.equal(w, load_file(tmp_path / "again" / "classifier.safetensors")[n]) for n, w in weights.items())


def test_augmented_images_stay_on_white_and_keep_their_colours() -> None:
    torch.manual_seed(0)
    images = torch.ones(200, 3, 16, 16)
    images[:, 0, 6:10, 6:10], images[:, 1:, 6:10, 6:10] = 0.5, -1.0
    moved = script.augmented(images)
    assert moved.shape == images.shape
    assert (moved[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] > 0.99).all()  # corners
    assert len(moved.flatten(1).unique(dim=0)) == 200
    darkest = moved.flatten(2).amin(2)
    torch.testing.assert_close(darkest, torch.tensor([[0.5, -1.0, -1.0]]).expand(200, 3), atol=0.2, rtol=0)


def test_augmenting_mirrors_half_of_the_images() -> None:
    torch.manual_seed(0)
    images = torch.ones(400, 3, 16, 16)
    images[:, :, :, :6] = -1.0  # dark on the left
    moved = script.augmented(images)
    on_the_left = (moved[:, 0, 4:12, 5] < moved[:, 0, 4:12, 10]).float().mean(1) > 0.5
    assert 0.4 < on_the_left.float().mean() < 0.6


def test_a_run_becomes_the_bundle_that_tables_and_demo_read(data: Path, trained_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    classify(data, out, "--epochs", "1")
    words = ["--run", str(trained_run), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert script.main(["model", *words]) == 0
    expected, found = (load_latent_diffusion(folder).state_dict() for folder in (trained_run, out))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-3, rtol=1e-3)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.diffusion_model.out.2.weight").dtype == torch.float16
        assert file.get_tensor("betas").dtype == torch.float32
    assert json.loads((out / "train.json").read_text()) == {"steps_taken": 4}
    distances = json.loads((out / "first_stage.json").read_text())["distance to the training images"]
    assert set(distances) == {"train", "heldout"}
    bundle = LatentBundle(out, scale=2.0)
    images = bundle.sample(bundle.full_precision(), count=3, batch_size=3, timesteps=2)
    assert images.shape == (3, 3, 16, 16)
    assert bundle.distance(images) > 0


def test_checkpoints_of_the_tables_become_the_bundles(tmp_path: Path, capsys) -> None:
    """One with its output corrected, one without; what is sampled is what the tables sampled."""
    bundle, out = LatentBundle(make_bundle(tmp_path)), tmp_path / "tiny_emoji"
    calibrated = tmp_path / "tables" / "calibrated"
    words = ["checkpoints", "--tables", str(tmp_path / "tables"), "--out", str(out)]
    capsys.readouterr()
    assert "lacks" in refused(capsys, *words)
    full = bundle.full_precision()
    set_file = tmp_path / "set.pt"
    content = bundle.record(full, device="cpu", timesteps=2, seed=0, count=2, batch_size=2, cali_st=2)
    save_calibration_set(set_file, content)
    data = bundle.calibration_samples(set_file, cali_st=2, cali_n=2)
    options = CalibrationConfig(correct_scale=True, correct_mean=True)
    calibrated.mkdir(parents=True)
    for recipe, _ in script.CHECKPOINTS.values():
        quant = QuantConfig(4, 8, quant_act=True, timed_ranges="all" if "timed" in recipe else "none")
        model = QuantModel.from_config(bundle.full_precision(), quant.at_timesteps(data.t.tolist()))
        calibrate(model, data, options, mode="linear")
        save_packed(calibrated / f"{recipe}.safetensors", model, info={"calibration": {"quant_mode": "qdiff"}})
    (tmp_path / "tables" / "settings.json").write_text('{"iters": 7, "count": 4}')
    assert script.main(words) == 0
    inputs = data.inputs()
    for name, (recipe, corrected) in script.CHECKPOINTS.items():
        found, source = bundle.from_packed(out / name), bundle.from_packed(calibrated / f"{recipe}.safetensors")
        assert (found.output_scale is not None) == corrected
        if not corrected:
            source.output_scale = None
        with torch.no_grad():
            assert torch.equal(found(*inputs), source(*inputs))
        assert read_info(out / name).calibration == {"quant_mode": "qdiff", "recipe": recipe, "iters": 7}
    demo = load_script("demo_ldm")
    assert set(demo.BUNDLED.values()) == set(script.CHECKPOINTS)
    tables = load_script("reproduce_tables")
    recipes = {row.recipe.name for row in tables.rows_of("emoji64") if row.recipe is not None}
    assert {recipe for recipe, _ in script.CHECKPOINTS.values()} <= recipes


def refused(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        script.main([str(word) for word in words])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_run_of_another_model_is_refused(data: Path, trained_run: Path, tmp_path: Path, capsys) -> None:
    words = ["model", "--data", data, "--out", tmp_path / "out", "--run"]
    assert "lacks classifier.safetensors, reference_statistics" in refused(capsys, *words, trained_run)
    names = ("classifier.safetensors", "reference_statistics.safetensors")
    for name in names:
        (tmp_path / "out" / name).write_bytes((BUNDLE / name).read_bytes())
    assert "prepare_emoji.py" in refused(capsys, "classifier", "--data", tmp_path, "--out", tmp_path / "out")
    assert "neither model.ckpt nor model.safetensors" in refused(capsys, *words, tmp_path)
    path = trained_run / "config.yaml"
    path.write_text(path.read_text().replace("n_classes: 10", "n_classes: 8"))
    assert "does not fit" in refused(capsys, *words, trained_run)
    make_random_checkpoint.main(["--config", str(path), "--out", str(trained_run / "model.safetensors"), "--force"])
    capsys.readouterr()
    assert "n_classes is 8" in refused(capsys, *words, trained_run)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


def test_more_than_the_bundle_may_have_is_refused(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "LIMIT", 1000)
    words = ["classifier", "--data", data, "--out", tmp_path, "--batch_size", "16", "--epochs", "1", "--device", "cpu"]
    with pytest.raises(SystemExit):
        script.main([str(word) for word in words])
    assert "more than the 1000" in capsys.readouterr().err


# ---- what is bundled -------------------------------------------------------------------------------------------


def test_the_bundle_stays_within_its_size() -> None:
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) <= script.LIMIT


def test_the_bundled_distance_grows_with_blur_and_noise() -> None:
    found = json.loads((BUNDLE / "classifier.json").read_text())["distance to the training images"]
    for words in ("blurred by", "with noise of"):
        for kind in ("training", "held-out"):
            values = [value for name, value in found.items() if name.startswith(kind) and words in name]
            assert values == sorted(values)
            assert values[0] > found[f"{kind} images"]


def test_bundled_statistics_are_those_of_the_training_images() -> None:
    try:
        data = EmojiImages(REPOSITORY / "data" / "emoji64")
    except DatasetUnavailable as error:
        pytest.skip(str(error))
    facts = json.loads((BUNDLE / "classifier.json").read_text())
    if facts["data"] != data.made_with:
        pytest.skip("data/emoji64 was made otherwise than the bundle's")
    reference = FeatureStatistics.load(BUNDLE / "reference_statistics.safetensors")
    assert reference.count == len(data)
    classifier = load_classifier(BUNDLE / "classifier.safetensors")
    flags = data.labels == CLASSES.index("flags")
    assert script.guesses(classifier, data.images[flags]).eq(CLASSES.index("flags")).float().mean() > 0.95
