"""The bundle of the model of captions, on coloured squares: from a data set to a model, tables, demo and scores.

Every step is the documented command; the model is trained for two steps, and knows nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.data.emoji import CLASSES, PROMPTS, EmojiImages, pack_split, split_file
from ldm.data.emoji_list import base_of
from ldm.pretrained import load_latent_diffusion
from ldm.util import instantiate_from_config, load_guidance
from qdiff.calibrate import calibrate
from qdiff.calibration_data import save_calibration_set
from qdiff.checkpoint import read_info, save_packed
from qdiff.cli import demonstration, evaluate, txt2img
from qdiff.cli.bundles import BUNDLES, CAPTIONS_JUDGED, NAMES, SCORING, TextBundle
from qdiff.cli.run_folder import read_png
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.evaluation.features import load_classifier
from qdiff.evaluation.text_agreement import KnownImages, agreement
from qdiff.quant_model import QuantModel

from .conftest import REPOSITORY, load_script
from .latent_models import config_of
from .text_models import text_config

prepare, train, tables = load_script("prepare_emoji_bundle"), load_script("train_ldm"), load_script("reproduce_tables")
demo = load_script("demo_txt2img")
BUNDLE = REPOSITORY / "models" / "ldm" / "emoji-text"
COLOURS = ("red", "green", "blue", "dark red", "dark green", "dark blue")
VOCABULARY = 530
QUICK = ["--model", "emoji-text", "--count", "20", "--batch_size", "10", "--iters", "1", "--iters_a", "1"]
QUICK += ["--cali_samples", "4", "--device", "cpu"]


def config() -> dict:
    """Of the model: a miniature of Stable Diffusion whose tokenizer lies beside it."""
    found = copy.deepcopy(text_config("sd"))["model"]
    params = found["params"]
    params |= {"scale_by_std": True, "timesteps": 40}
    params.pop("scale_factor")
    params["unet_config"]["params"] |= {"channel_mult": [1], "attention_resolutions": [1]}  # few grids to be found
    params["cond_stage_config"]["params"]["version"] = "./tokenizer"
    params["cond_stage_config"]["params"]["text_config"]["vocab_size"] = VOCABULARY
    return {"model": found}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 x 16 squares of six colours in every class, the dark ones variants of the others."""
    folder = tmp_path_factory.mktemp("squares")
    for split, colours in (("train", COLOURS), ("heldout", COLOURS[1:4])):
        labels = np.repeat(np.arange(len(CLASSES)), len(colours))
        images = np.full((len(labels), 16, 16, 3), 255, dtype=np.uint8)
        captions, emoji = [], []
        for number, label in enumerate(labels):
            colour = colours[number % len(colours)]
            shade, size = 90 if "dark" in colour else 230, 3 + label
            square = images[number, 2 : 2 + size, 2 : 2 + size]
            square[:] = 0
            square[..., ("red", "green", "blue").index(colour.split()[-1])] = shade
            captions.append(f"{colour} square of {CLASSES[label]}")
            tone = "\U0001f3ff" if "dark" in colour else ""
            emoji.append(chr(0x1F600 + 3 * label + COLOURS.index(colour) % 3) + tone)
        split_file(folder, split).write_bytes(pack_split(images, labels.tolist(), captions, emoji, {"seed": 0}))
    return folder


@pytest.fixture(scope="module")
def bundle(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Made and trained by the commands, with the options of the bundled model."""
    place = tmp_path_factory.mktemp("text")
    judges, folder, run = place / "judges", place / "emoji-text", place / "run"
    where = ["--data", str(data)]
    small = ["--epochs", "1", "--batch_size", "16", "--device", "cpu"]
    assert prepare.main(["classifier", *where, "--out", str(judges), *small]) == 0
    words = ["tokenizer", *where, "--out", str(folder), "--vocabulary", str(VOCABULARY)]
    assert prepare.main(words) == 0
    judged = [*where, "--out", str(folder), "--judges", str(judges), "--device", "cpu"]
    assert prepare.main(["names", *judged]) == 0
    (place / "config.yaml").write_text(yaml.safe_dump(config()))
    torch.manual_seed(0)
    first_stage = instantiate_from_config(config()["model"]["params"]["first_stage_config"])
    save_file(first_stage.state_dict(), place / "first_stage.safetensors")
    flags = [*where, "--config", str(place / "config.yaml"), "--first_stage", str(place / "first_stage.safetensors")]
    flags += ["--tokenizer", str(folder / "tokenizer"), "-l", str(run), "--steps", "2", "--batch_size", "2"]
    train.main([*flags, "--grid_steps", "2", "--device", "cpu"])
    assert prepare.main(["text-model", "--run", str(run), *judged]) == 0
    return dataclasses.replace(BUNDLES["emoji-text"], folder=folder, judges=judges)


@pytest.fixture(scope="module")
def calibrated(bundle: TextBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the tables leave it, with the checkpoint that the bundle takes."""
    folder = tmp_path_factory.mktemp("tables")
    content = bundle.record(
        bundle.full_precision(), device="cpu", timesteps=2, seed=0, count=2, batch_size=2, cali_st=2
    )
    save_calibration_set(folder / "set.pt", content)
    samples = bundle.calibration_samples(folder / "set.pt", cali_st=2, cali_n=2)
    options = bundle.quant | {"act_range": "max", "timed_ranges": "all"}  # quickly found
    quant = QuantConfig(4, 8, quant_act=True, split=True, **options)
    model = QuantModel.from_config(bundle.full_precision(), quant.at_timesteps(samples.t.tolist()))
    calibrate(model, samples, CalibrationConfig(correct_scale=True, correct_mean=True), mode="linear")
    (folder / "calibrated").mkdir()
    recipe, _ = prepare.TEXT_CHECKPOINTS["w4a8.safetensors"]
    save_packed(folder / "calibrated" / f"{recipe}.safetensors", model, info={"calibration": {"quant_mode": "linear"}})
    (folder / "settings.json").write_text('{"iters": 7, "count": 4}')
    return folder


@pytest.fixture
def whole(bundle: TextBundle, calibrated: Path) -> TextBundle:
    """With its checkpoint."""
    words = ["text-checkpoint", "--tables", str(calibrated), "--out", str(bundle.folder)]
    assert prepare.main(words) == 0
    return bundle


# ---- the files -------------------------------------------------------------------------------------------------


def test_the_bundle_is_whole_and_stands_for_itself(bundle: TextBundle, data: Path) -> None:
    bundle.check()
    names = {str(path.relative_to(bundle.folder)) for path in bundle.folder.rglob("*") if path.is_file()}
    tokenizer = {f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    facts = {"names.json", "train.json", "first_stage.json", "captions.txt"}
    assert names >= {*bundle.files, *tokenizer, *facts}
    with safe_open(bundle.folder / "model.safetensors", "pt") as file:
        kinds = {name.split(".")[0]: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds["cond_stage_model"] == kinds["first_stage_model"] == kinds["model"] == "F16"
    assert kinds["betas"] == "F32"
    encoder = load_latent_diffusion(bundle.folder).cond_stage_model
    assert encoder.tokenizer_folder == str(bundle.folder / "tokenizer")
    assert len(encoder.tokenizer) == encoder.vocabulary == VOCABULARY
    train_set = EmojiImages(data)
    assert not any(encoder.too_long(caption) for caption in train_set.captions)
    known = bundle.known
    assert known.captions == tuple(train_set.captions)
    pairs = [base_of(tuple(map(ord, one))) for one in train_set.emoji]
    assert [[a == b for b in pairs] for a in pairs] == (known.bases[:, None] == known.bases).tolist()


def test_what_recognising_is_good_for_is_measured(bundle: TextBundle) -> None:
    found = json.loads((bundle.folder / "names.json").read_text())["agreement"]
    assert found["training images"]["named"] == found["training images"]["base"] == 1
    assert found["with noise of 32 / 255"]["named"] <= found["with noise of 8 / 255"]["named"]
    facts = json.loads((bundle.folder / "first_stage.json").read_text())
    assert set(facts["agreement of decoded training images"]) == {"count", "group", "named", "base"}
    captions = (bundle.folder / "captions.txt").read_text().splitlines()
    assert captions == bundle.asked_for(len(captions))
    assert len(captions) == min(CAPTIONS_JUDGED, len(COLOURS) * len(CLASSES))


def test_the_checkpoint_of_the_tables_is_taken_with_its_settings(whole: TextBundle) -> None:
    info = read_info(whole.folder / "w4a8.safetensors")
    recipe, _ = prepare.TEXT_CHECKPOINTS["w4a8.safetensors"]
    assert info.calibration == {"quant_mode": "linear", "recipe": recipe, "iters": 7}
    assert (info.quant.sm_abit, info.quant.split) == (16, True)
    assert recipe in {row.recipe.name for row in tables.rows_of("emoji-text") if row.recipe is not None}


def refused(capsys, main, *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_wrong_input_is_told_in_one_line(bundle: TextBundle, data: Path, tmp_path: Path, capsys) -> None:
    judged = ["--data", data, "--out", tmp_path / "out", "--judges", bundle.judges, "--device", "cpu"]
    run = tmp_path / "run"
    run.mkdir()
    assert "`prepare_emoji_bundle.py names`" in refused(capsys, prepare.main, "text-model", "--run", run, *judged)
    assert "lacks classifier" in refused(capsys, prepare.main, "names", "--data", data, "--judges", tmp_path)
    assert "give no more than" in refused(
        capsys, prepare.main, "tokenizer", "--data", data, "--out", tmp_path / "out", "--vocabulary", 1500
    )
    few = ["tokenizer", "--data", data, "--out", tmp_path / "out", "--vocabulary", VOCABULARY, "--max_length", 4]
    assert "a caption has" in refused(capsys, prepare.main, *few)
    (tmp_path / "out" / NAMES).write_bytes((bundle.folder / NAMES).read_bytes())
    (run / "config.yaml").write_text(yaml.safe_dump({"model": config_of("classes")["model"]}))
    (run / "model.safetensors").write_bytes((bundle.folder / "model.safetensors").read_bytes())
    assert "does not fit" in refused(capsys, prepare.main, "text-model", "--run", run, *judged)
    changed = config()
    changed["model"]["params"]["cond_stage_config"]["params"]["version"] = "openai/clip"
    (run / "config.yaml").write_text(yaml.safe_dump(changed))
    assert "names no tokenizer beside it" in refused(capsys, prepare.main, "text-model", "--run", run, *judged)
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ---- the commands that read it -----------------------------------------------------------------------------------


def flags(bundle: TextBundle) -> list[str]:
    """As the README has them: neither sizes nor a tokenizer is named."""
    files = ["--config", bundle.folder / "config.yaml", "--ckpt", bundle.folder / "model.safetensors"]
    return ["--plms", "--cond", *map(str, files), "--ddim_steps", "2", "--device", "cpu"]


def test_the_documented_command_draws_in_both_precisions_and_scores(
    whole: TextBundle, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)  # the tokenizer is found from anywhere
    captions = whole.folder / "captions.txt"
    draw = ["--from-file", str(captions), *flags(whole), "--n_iter", "1", "--n_samples", "27"]
    packed = ["--ptq", "--quant_act", "--sm_abit", "16", "--split", "--resume", "--cali_ckpt"]
    txt2img.main([*draw, "--scale", "2", "--outdir", "full"])
    txt2img.main([*draw, "--scale", "2", *packed, str(whole.folder / "w4a8.safetensors"), "--outdir", "w4a8"])
    folders = [next(Path(name).glob("*/samples")) for name in ("full", "w4a8")]
    full, quantized = (torch.stack([read_png(path) for path in sorted(folder.iterdir())]) for folder in folders)
    assert full.shape == quantized.shape == (len(captions.read_text().splitlines()), 3, 16, 16)
    assert 0 < (full - quantized).abs().mean() < 0.2

    names = ["--bundle", str(whole.judges), "--names", str(whole.folder / NAMES), "--captions", str(captions)]
    capsys.readouterr()
    evaluate.main(["--images", str(folders[0]), *names, "--device", "cpu", "--append", "scores.jsonl"])
    record = json.loads(Path("scores.jsonl").read_text())
    said = record["metrics"]
    expected = agreement(
        load_classifier(whole.judges / SCORING[0]), whole.known, full, captions.read_text().splitlines()
    )
    assert {key: said[key] for key in ("group", "named", "base")} == {
        key: value for key, value in expected.to_dict().items() if key != "count"
    }
    assert said["frechet_distance"] > 0
    assert record["run"]["from_file"] == str(captions)
    evaluate.main(["--images", str(folders[0].parent), *names[:4], "--metrics", "agreement", "--json", "own.json"])
    assert json.loads(Path("own.json").read_text())["metrics"].items() <= said.items()  # by the prompts in the files


def test_scores_refuse_captions_that_are_not_known(bundle: TextBundle, tmp_path: Path, capsys) -> None:
    images, captions = tmp_path / "images.pt", tmp_path / "captions.txt"
    torch.save(torch.rand(3, 3, 16, 16), images)
    known = ["--names", bundle.folder / NAMES, "--bundle", bundle.judges, "--device", "cpu"]
    words = ["--images", images, "--captions", captions, *known]

    def said(text: str | None) -> str:
        if text is not None:
            captions.write_text(text)
        with pytest.raises(SystemExit):
            evaluate.main([str(word) for word in words])
        return capsys.readouterr().err

    assert "no such file" in said(None)
    assert "holds no caption" in said("\n \n")
    assert "3 captions are of no known image, as 'unicorn'" in said("unicorn\n")
    assert KnownImages.load(BUNDLE / NAMES, evaluate.BUNDLES[3] / SCORING[0]).rows(PROMPTS).shape == (8,)


def test_tables_tell_how_images_agree_with_their_captions(bundle: TextBundle, tmp_path: Path, monkeypatch) -> None:
    published = tables.Recipe("linear", 4, steps=2)
    rows = (
        tables.Row(tables.MAIN, timesteps=2),
        tables.Row(tables.MAIN, published, timesteps=2),
    )
    monkeypatch.setitem(tables.MODELS, "emoji-text", bundle)
    for name, value in {"HELD_OUT": {"steps": 2, "per_step": 3}, "SAMPLER_STEPS": 2, "LATENT_ROWS": rows}.items():
        monkeypatch.setattr(tables, name, value)
    out = tmp_path / "tables"
    assert tables.main(["--out", str(out), *QUICK]) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["settings"]["sampler"], results["settings"]["scale"]) == ("plms", bundle.scale)
    assert read_info(out / "calibrated" / f"{published.name}.safetensors").quant.sm_abit == 16
    for row in results["rows"].values():
        shares = row["agreement"]["0"]
        assert shares["count"] == 20
        assert 0 <= shares["named"] <= shares["base"] <= 1
    text = (out / "results.md").read_text()
    heading = next(line for line in text.splitlines() if line.startswith("| row"))
    assert [cell.strip() for cell in heading.split("|")[6:9]] == ["group", "emoji", "emoji or a variant"]
    assert f"{100 * results['rows']['full-2steps']['agreement']['0']['group']:.1f} %" in text
    assert (out / "results.png").stat().st_size > 1000

    # Calibration draws other captions than the rows, in another order; both take the groups in turn.
    content = torch.load(out / "sets" / "st2.pt", weights_only=True)
    encoder = bundle.model.encoder
    with torch.no_grad():
        expected = encoder(bundle.known.in_turn(1)[:2])
    torch.testing.assert_close(content["cs"][0].float(), expected, atol=1e-5, rtol=1e-5)
    assert bundle.known.in_turn(1)[:9] != bundle.asked_for(9)


def test_images_of_a_bundle_are_those_of_the_command(bundle: TextBundle, tmp_path: Path) -> None:
    images = bundle.sample(bundle.full_precision(), count=3, batch_size=2, timesteps=2, seed=5)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(bundle.asked_for(3)))
    words = ["--from-file", str(prompts), *flags(bundle), "--n_iter", "1", "--scale", str(bundle.scale), "--seed", "5"]
    txt2img.main([*words, "--outdir", str(tmp_path / "out")])
    drawn = torch.stack([read_png(path) for path in sorted((tmp_path / "out").glob("*/samples/*.png"))])
    assert (images - drawn).abs().max() <= 1 / 255 + 1e-6
    with pytest.raises(ValueError, match="PLMS has no noise"):
        bundle.sample(bundle.full_precision(), count=1, batch_size=1, timesteps=2, eta=1.0)


def test_the_demo_ends_in_a_picture_with_captions(whole: TextBundle, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "TIMESTEPS", 2)
    monkeypatch.setattr(demo, "SAMPLES_A_STEP", 1)
    out = tmp_path / "demo"
    words = ["--bundle", str(whole.folder), "--judges", str(whole.judges), "--out", str(out), "--iters", "1"]
    words += ["--iters_a", "1", "--prompts", "red square of food", "dark blue square of flags"]
    words += ["--measured", "3"]
    shown = mock.Mock(wraps=demonstration.comparison_picture)
    monkeypatch.setattr(demonstration, "comparison_picture", shown)
    (out / "resumed" / "old" / "samples").mkdir(parents=True)  # an earlier run's; every run starts anew
    assert demo.main(words) == 0
    said = capsys.readouterr().out
    table = (out / "comparison.md").read_text()
    assert table in said
    labels = ["full precision", "round to nearest W4A8", "this calibration W4A8", "bundled W4A8"]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:6]] == labels
    errors = [float(line.split("|")[3]) for line in table.splitlines()[3:6]]
    assert all(0 < error < 2 for error in errors)
    assert "3 images, 4 PLMS steps, guidance 2; CPU" in table
    (rows, _), options = shown.call_args
    assert [len(images) for images in rows.values()] == [2] * 4
    assert options["captions"] == words[words.index("--prompts") + 1 :][:2]
    assert (out / "comparison.png").stat().st_size > 1000
    assert len([line for line in said.splitlines() if line.startswith("$ python scripts/")]) == 4
    assert not set(demo.PROMPTS) & set((out / "captions.txt").read_text().splitlines())


def test_the_demo_names_what_is_missing_before_anything_starts(bundle: TextBundle, tmp_path: Path, capsys) -> None:
    nothing = tmp_path / "nothing"
    words = ["--bundle", nothing, "--judges", nothing, "--out", tmp_path / "demo"]
    said = refused(capsys, demo.main, *words)
    assert all(name in said for name in (*bundle.files, *SCORING, "w4a8.safetensors"))
    assert not (tmp_path / "demo").exists()
    assert "lacks classifier" in refused(capsys, demo.main, "--bundle", bundle.folder, "--judges", nothing)


# ---- what is bundled ---------------------------------------------------------------------------------------------


def test_the_bundle_stays_within_its_size() -> None:
    assert sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()) <= prepare.LIMIT


def test_the_bundled_config_recommends_the_guidance_of_the_tables() -> None:
    assert load_guidance(BUNDLE / "config.yaml") == BUNDLES["emoji-text"].scale


def test_bundled_names_and_tokenizer_belong_together() -> None:
    config_file = REPOSITORY / "configs" / "latent-diffusion" / "emoji-text.yaml"
    encoder = yaml.safe_load(config_file.read_text())["model"]["params"]["cond_stage_config"]["params"]
    text = instantiate_from_config({"target": f"{ENCODERS}.FrozenCLIPEmbedder", "params": encoder})
    text.tokenizer_folder = str(BUNDLE / "tokenizer")
    assert len(text.tokenizer) == text.vocabulary == prepare.VOCABULARY
    known = KnownImages.load(BUNDLE / NAMES, BUNDLES["emoji-text"].judges / SCORING[0])
    assert not any(text.too_long(caption) for caption in known.captions)
    captions = (BUNDLE / "captions.txt").read_text().splitlines()
    assert captions == BUNDLES["emoji-text"].asked_for(CAPTIONS_JUDGED)
    assert len(set(captions)) == CAPTIONS_JUDGED


ENCODERS = "ldm.modules.encoders.modules"
