"""The command: runs and their options, pairs, prompts, several processes, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.nn.functional import cosine_similarity

from ldm.modules.encoders.tokenizers import clip_vocabulary, write_clip_tokenizer
from qdiff.cli import evaluate, prepare_lsun
from qdiff.evaluation.image_sets import load_image_set

from ..evaluation.test_image_kinds import encoded, write_cifar10, write_lmdb
from .conftest import REPOSITORY, Failure
from .test_torchrun import TORCHRUN

COUNT = 12
OPTIONS = {"seed": 1, "timesteps": 10, "eta": 0.0, "skip_type": "quad", "ptq": False}


def write_run(folder: Path, seed: int = 0, noise: int = 0, size: int = 64, **options: object) -> Path:
    """A run of blots, with some noise on them, of prompts that their files name."""
    (folder / "img").mkdir(parents=True)
    (folder / "sampling_config.yaml").write_text(yaml.safe_dump(OPTIONS | options))
    draws, disturbance = np.random.default_rng(seed), np.random.default_rng(99)
    for number in range(COUNT):
        blot = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((size, size))
        pixels = np.asarray(blot).astype(int) + disturbance.integers(-noise, noise + 1, (size, size, 3))
        text = PngInfo()
        text.add_itxt("prompt", ("a red blot", "a blue one")[number % 2])
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / "img" / f"{number:06d}.png", pnginfo=text)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and one of the same noise that differs a little."""
    parent = tmp_path_factory.mktemp("runs")
    return write_run(parent / "full"), write_run(parent / "quantized", noise=8, ptq=True)


def run(*words: object) -> None:
    assert evaluate.main([*map(str, words), "--device", "cpu"]) == 0


def refused(failing: Callable[..., Failure], *words: object) -> str:
    failure = failing(*words, "--device", "cpu", main=evaluate.main)
    assert failure.status == 2
    return failure.message


def test_a_run_brings_its_options_and_is_added_to_the_results(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, quantized = runs
    flags = ["--features", "bundled", "--append", tmp_path / "all.jsonl"]
    for folder in (quantized, quantized / "img"):
        run("--images", folder, *flags, "--json", tmp_path / f"{folder.name}.json")
    records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert records[0]["run"] == records[1]["run"] == OPTIONS | {"ptq": True}
    assert records[0]["metrics"] == records[1]["metrics"]
    assert json.loads((tmp_path / "img.json").read_text()) == records[1]
    assert records[0]["features"].startswith("EmojiClassifier sha256:")  # colour images, so those of the emoji
    assert {"device", "torch", "commit", "torch_fidelity"} <= records[0]["environment"].keys()
    said = capsys.readouterr().out
    assert "Fréchet distance" in said
    assert "FID" not in said  # that is the name of Inception's


def test_the_small_network_serves_all_scores(runs: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    full, quantized = runs
    other = write_run(tmp_path / "other", seed=7)
    words = ["--features", "bundled", "--metrics", "fid,is,kid,prc", "--kid_subset_size", 6, "--isc_splits", 2]
    near, far = (tmp_path / name for name in ("near.json", "far.json"))
    run("--images", quantized, "--reference", full, *words, "--json", near)
    run("--images", other, "--reference", full, *words, "--json", far)
    near, far = (json.loads(path.read_text())["metrics"] for path in (near, far))
    assert near.keys() == {"frechet_distance", "class_score", "kernel_distance", "precision", "recall"}
    assert near["frechet_distance"] < far["frechet_distance"]
    assert near["kernel_distance"]["mean"] < far["kernel_distance"]["mean"]
    assert near["precision"] >= far["precision"]


def test_references_of_every_kind(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Photographs in an LMDB, made square on the way, are what the folder of prepare_lsun.py is."""
    full, _ = runs
    draws = np.random.default_rng(3)
    photographs = [draws.integers(0, 256, (64 + i, 90, 3), dtype=np.uint8) for i in range(6)]
    write_lmdb(tmp_path / "photos_lmdb", [encoded(image) for image in photographs])
    prepare_lsun.main([str(tmp_path / "photos_lmdb"), "--out", str(tmp_path / "folder"), "--size", "64"])
    words = ["--images", full, "--features", "bundled", "--crop_size", 64, "--append", tmp_path / "all.jsonl"]
    run("--images", tmp_path / "folder", "--features", "bundled", "--save_statistics", tmp_path / "stored.safetensors")
    for reference in ("photos_lmdb", "folder", "stored.safetensors"):
        run(*words, "--reference", tmp_path / reference)
    write_cifar10(tmp_path, draws.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8))
    run(*words, "--reference", "cifar10-train", "--data_root", tmp_path)
    records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    lmdb, folder, stored, cifar10 = (record["metrics"]["frechet_distance"] for record in records)
    assert lmdb == folder == pytest.approx(stored)
    assert [record["reference_count"] for record in records] == [6, 6, 6, 10]
    assert cifar10 != lmdb


def test_two_processes_find_what_one_finds(runs: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    full, quantized = runs
    words = ["--images", quantized, "--reference", full, "--paired", full, "--features", "bundled", "--batch_size", 5]
    words += ["--metrics", "fid,is,kid,prc,psnr", "--kid_subset_size", 6, "--isc_splits", 2]
    run(*words, "--json", tmp_path / "one.json", "--save_statistics", tmp_path / "one.npz")
    more = ["--json", tmp_path / "two.json", "--save_statistics", tmp_path / "two.npz", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, REPOSITORY / "scripts" / "evaluate.py", *map(str, [*words, *more])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Fréchet distance") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    distances = [record["metrics"].pop("frechet_distance") for record in (one, two)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)  # sums in another order
    assert one == two  # features are the very same, in the same order
    for name in ("mu", "sigma"):
        arrays = (np.load(tmp_path / f"{stem}.npz")[name] for stem in ("one", "two"))
        np.testing.assert_allclose(*arrays, rtol=1e-9, atol=1e-12)


# ---- pairs -------------------------------------------------------------------------------------------------------


def test_pairs_of_two_runs(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, quantized = runs
    run("--images", quantized, "--paired", full, "--metrics", "psnr", "--json", tmp_path / "a.json", "--batch_size", 5)
    found = json.loads((tmp_path / "a.json").read_text())["metrics"]
    a, b = (load_image_set(folder / "img").double().numpy() for folder in (full, quantized))
    expected = -10 * np.log10((np.square(a - b) / 255**2).mean((1, 2, 3)))
    assert found["psnr"]["mean"] == pytest.approx(expected.mean())
    assert found["psnr"]["worst"] == pytest.approx(expected.min())
    assert found["psnr"]["worst_image"] == expected.argmin()
    assert (found["pairs"], found["identical"]) == (COUNT, 0)
    assert "PSNR, dB" in capsys.readouterr().out
    run("--images", full, "--paired", full, "--metrics", "psnr", "--json", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["metrics"] == {"pairs": COUNT, "identical": COUNT}


def test_pairs_that_do_not_correspond_are_refused(
    runs: tuple[Path, Path], tmp_path: Path, failing: Callable[..., Failure]
) -> None:
    full, _ = runs
    words = ["--images", full, "--metrics", "psnr", "--paired"]
    other = write_run(tmp_path / "seed", seed=2, timesteps=20)
    said = refused(failing, *words, other)
    assert "timesteps is 10 and 20" in said
    (other / "sampling_config.yaml").write_text(yaml.safe_dump(OPTIONS | {"seed": 5}))
    assert "seed is 1 and 5" in refused(failing, *words, other)
    (other / "img" / "000003.png").rename(other / "img" / "000030.png")
    assert "image 3 of" in refused(failing, *words, other)
    (other / "img" / "000030.png").unlink()
    assert f"has {COUNT} images and" in refused(failing, *words, other)
    small = write_run(tmp_path / "small", size=32)
    assert "3x64x64 and 3x32x32 do not compare" in refused(failing, *words, small)


# ---- prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights, with its tokenizer and the preparation of images, as transformers saves it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    vocabulary = clip_vocabulary([])
    write_clip_tokenizer(folder, [], max_length=16)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "eos_token_id": len(vocabulary) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_cosine_of_image_and_prompt(runs: tuple[Path, Path], clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    full, _ = runs
    run("--images", full, "--clip", clip, "--json", tmp_path / "own.json", "--batch_size", 5)
    (tmp_path / "prompts.txt").write_text("a red blot\na blue one\n")
    words = ["--images", full, "--clip", clip, "--captions", tmp_path / "prompts.txt", "--metrics", "clip"]
    run(*words, "--json", tmp_path / "file.json")
    own, file = (
        json.loads((tmp_path / f"{name}.json").read_text())["metrics"]["clip_score"] for name in ("own", "file")
    )
    assert own == pytest.approx(file)

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    images = [Image.open(path) for path in sorted((full / "img").iterdir())]
    prepared = CLIPImageProcessor.from_pretrained(clip)(images, return_tensors="pt")["pixel_values"]
    cosines = []
    with torch.no_grad():
        for number, image in enumerate(prepared):
            words = tokenizer(["a red blot", "a blue one"][number % 2], return_tensors="pt")
            found = model(pixel_values=image[None], **words)
            cosines.append(cosine_similarity(found.image_embeds, found.text_embeds).item())
    assert own["mean"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), abs=1e-3)


def test_a_clip_model_that_is_not_there(
    runs: tuple[Path, Path], failing: Callable[..., Failure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(failing, "--images", runs[0], "--clip", tmp_path)
    assert "neither here nor to be had" in said
    assert "preprocessor_config.json" in said


# ---- what is refused before anything is read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to score by"),
        (["--metrics", "fid"], "needs --reference"),
        (["--metrics", "kid", "--features", "bundled"], "needs --reference"),
        (["--metrics", "psnr"], "needs --paired"),
        (["--metrics", "agreement"], "needs --features bundled"),
        (["--metrics", "fdi"], "'fdi' is not one of"),
        (["--features", "inception", "--bundle", "x"], "--bundle belongs to"),
        (["--reference", "x", "--inception_weights", "missing"], "no such file"),
        (["--reference", "x", "--save_statistics", "statistics.txt"], ".safetensors or .npz"),
        (["--reference", "x", "--append", "missing/all.jsonl"], "there is no folder"),
        (["--features", "bundled", "--reference", "missing"], "no such file or folder of images"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], message: str, runs: tuple[Path, Path], failing: Callable[..., Failure]
) -> None:
    assert message in refused(failing, "--images", runs[0], *words)


def test_images_of_another_kind_than_the_network(
    runs: tuple[Path, Path], failing: Callable[..., Failure], tmp_path: Path
) -> None:
    grey = ["--bundle", evaluate.BUNDLES[1]]
    assert "colour images" in refused(failing, "--images", runs[0], *grey)
    assert "no such file or folder" in refused(failing, "--images", tmp_path / "missing", "--features", "bundled")
    assert "no images in it" in refused(failing, "--images", tmp_path, "--features", "bundled")
