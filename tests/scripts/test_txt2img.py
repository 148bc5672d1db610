"""The text-to-image command on miniature models: its documented forms, prompts, what does not change images."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ldm.pretrained import UNET, build_latent_diffusion, load_state
from qdiff import primitives
from qdiff.calibration_data import load_calibration_set
from qdiff.checkpoint import read_info
from qdiff.cli import make_calibration_data, make_random_checkpoint, strip_unet
from qdiff.cli.latent import SamplerOptions
from qdiff.cli.run_folder import read_png
from qdiff.cli.sample_ldm import main as sample_ldm
from qdiff.cli.text import TextModel, TextSampler
from qdiff.cli.txt2img import build_parser, main

from .latent_models import psnr
from .text_models import ITERATIONS, PROMPT, SAMPLES, SIDE, STEPS, TOKENS, WIDTH, TextMiniature, draw, text_config

IMAGES = ITERATIONS * SAMPLES
QUANT = ["--ptq", "--quant_mode", "qdiff", "--no_grad_ckpt", "--split"]
ACTIVATIONS = ["--quant_act", "--act_bit", 8, "--sm_abit", 16]


def pictures(folder: Path) -> torch.Tensor:
    return torch.stack([read_png(path) for path in sorted((folder / "samples").iterdir())])


@pytest.fixture(scope="module")
def full(text, tmp_path_factory):
    return {kind: draw(text(kind).flags(), tmp_path_factory.mktemp("full")) for kind in ("sd", "laion")}


@pytest.fixture(scope="module")
def calibrated(text, tmp_path_factory) -> dict[int, Path]:
    """Run folders of the documented calibrating command, by weight bits."""
    tiny = text("sd")
    flags = [*QUANT, *ACTIVATIONS, "--running_stat", *tiny.calibration_flags()]
    return {
        bits: draw(tiny.flags(*flags, "--weight_bit", bits), tmp_path_factory.mktemp(f"w{bits}")) for bits in (4, 8)
    }


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for a rounding of the last of 8 bits."""
    return bool((a - b).abs().max() <= 1 / 255 + 1e-6)


# In full precision.


@pytest.mark.parametrize("kind", ["sd", "laion"])
def test_full_precision(text, full, kind):
    folder = full[kind]
    assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "run.log", "samples", "sampling_config.yaml"]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"{i:05d}.png" for i in range(IMAGES)]
    images = pictures(folder)
    assert images.shape == (IMAGES, 3, SIDE, SIDE)
    assert 0.01 < images.std() < 0.6
    assert len({image.numpy().tobytes() for image in images}) == IMAGES
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (SAMPLES * (SIDE + 1) + 1, ITERATIONS * (SIDE + 1) + 1)
    options = yaml.safe_load((folder / "sampling_config.yaml").read_text())
    assert options["ckpt"] == str(text(kind).ckpt)
    assert (options["precision"], options["batch_size"]) == ("full", SAMPLES)  # autocast on a CPU
    log = (folder / "run.log").read_text()
    assert log.splitlines()[0].endswith(f"--outdir {folder}")
    assert "not checked for content" in log


def test_an_image_says_what_it_is(text, full):
    with Image.open(full["sd"] / "samples" / "00004.png") as image:
        said = image.text
    assert (said["prompt"], said["seed"], said["image"]) == (PROMPT, "42", "4")
    options = json.loads(said["options"])
    assert options["plms"] is True
    assert (options["ddim_steps"], options["scale"], options["height"], options["width"]) == (STEPS, 7.5, SIDE, SIDE)
    name, digest = said["checkpoint"].split(" sha256:")
    assert name == text("sd").ckpt.name
    assert digest == hashlib.sha256(text("sd").ckpt.read_bytes()).hexdigest()


def test_the_images_are_the_models_own(text, full):
    """Put together by hand from the published pieces: encoder, guided PLMS, decoder."""
    from ddim.noise import ImageNoise
    from ddim.pretrained import read_weights
    from ldm.models.diffusion.sampling import sample_latents

    tiny = text("sd")
    model = build_latent_diffusion(text_config("sd")["model"])
    load_state(model, read_weights(tiny.ckpt))
    model.eval()
    model.cond_stage_model.tokenizer_folder = str(tiny.tokenizer)
    with torch.no_grad():
        cond, uncond = model.cond_stage_model([PROMPT] * 2), model.cond_stage_model([""] * 2)
        noise = ImageNoise(42, [1, 4], (4, 8, 8))
        z = sample_latents(model, noise, method="plms", steps=STEPS, cond=cond, uncond=uncond, scale=7.5)
        images = ((model.decode(z) + 1) / 2).clamp(0, 1)
    assert close(images, pictures(full["sd"])[[1, 4]])


@pytest.mark.parametrize("more", [["--dpm"], [], ["--ddim_eta", 1]], ids=["DPM-Solver++", "DDIM", "DDIM with noise"])
def test_other_samplers_make_other_images(text, full, tmp_path, more):
    other = pictures(draw(text("sd").flags(*more, plms=False), tmp_path))
    assert not close(other, pictures(full["sd"]))


@pytest.mark.parametrize("more", [["--scale", 1], ["--scale", 3], ["--seed", 7], ["--ddim_steps", 3]])
def test_flags_change_images(text, full, tmp_path, more):
    assert not close(pictures(draw(text("sd").flags(*more), tmp_path)), pictures(full["sd"]))


def test_prompts_change_images(text, full, tmp_path):
    assert not close(pictures(draw(text("sd").flags(prompt="a cat"), tmp_path)), pictures(full["sd"]))


def test_size(text, tmp_path):
    images = pictures(draw(text("sd").flags("--H", 24, "--W", 16, "--C", 4, "--f", 2, "--n_iter", 1), tmp_path))
    assert images.shape == (SAMPLES, 3, 24, 16)


def test_fixed_code_repeats_the_starting_noises(text, full, tmp_path):
    fixed = pictures(draw(text("sd").flags("--fixed_code"), tmp_path / "a"))
    assert torch.equal(fixed[:SAMPLES], fixed[SAMPLES:])
    assert torch.equal(fixed[:SAMPLES], pictures(full["sd"])[:SAMPLES])
    noisy = draw(text("sd").flags("--fixed_code", "--ddim_eta", 1, plms=False), tmp_path / "b")
    assert not close(pictures(noisy)[:SAMPLES], pictures(noisy)[SAMPLES:])  # draws of the steps are an image's own


# Prompts from a file.


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na puppy wearing a hat\n\na dog\na hat\n")
    return path


def test_prompts_from_a_file_whatever_the_batch_size(text, prompts, tmp_path):
    """Four prompts in batches of three: the last chunk is shorter."""
    flags = text("sd").flags("--from-file", prompts, prompt=None)
    folders = {n: draw(flags, tmp_path / str(n), "--n_samples", n) for n in (1, 3, 8)}
    three = pictures(folders[3])
    assert len(three) == ITERATIONS * 4
    for n in (1, 8):
        assert close(pictures(folders[n]), three)
    said = [Image.open(path).text["prompt"] for path in sorted((folders[3] / "samples").iterdir())]
    assert said == ["a cat", PROMPT, "a dog", "a hat"] * ITERATIONS
    assert not close(three[:4], three[4:])
    fixed = pictures(draw(flags, tmp_path / "fixed", "--fixed_code"))
    assert torch.equal(fixed[:4], fixed[4:])


def test_a_stopped_run_continues(text, prompts, tmp_path):
    folder = draw(text("sd").flags("--from-file", prompts, prompt=None), tmp_path)
    whole = pictures(folder)
    for index in (2, 7):
        (folder / "samples" / f"{index:05d}.png").unlink()
    words = shlex.split((folder / "run.log").read_text().splitlines()[0].split("with: ")[1])
    assert words[:2] == ["python", "scripts/txt2img.py"]
    main([*words[2:], "--n_samples", "2"])  # another batch size makes the same images
    assert close(pictures(folder), whole)
    assert "6 of 8 images are there; going on at 00002" in (folder / "run.log").read_text()


def test_other_prompts_are_not_mixed_into_a_run(text, prompts, tmp_path, failing):
    own = tmp_path / "own.txt"
    own.write_text(prompts.read_text())
    folder = draw(text("sd").flags("--from-file", own, prompt=None), tmp_path / "out")
    own.write_text("a cat\n")
    failure = failing(*text("sd").flags("--from-file", own, prompt=None), "--outdir", folder, main=main)
    assert failure.status == 2
    assert "prompts_sha256" in failure.message
    assert "--outdir" in failure.message


def test_grid_and_images_may_be_left_out(text, full, tmp_path):
    no_grid = draw(text("sd").flags("--skip_grid"), tmp_path / "a")
    assert not (no_grid / "grid.png").exists()
    assert close(pictures(no_grid), pictures(full["sd"]))
    only_grid = draw(text("sd").flags("--skip_save", "--n_rows", 2), tmp_path / "b")
    assert not (only_grid / "samples").exists()
    with Image.open(only_grid / "grid.png") as grid:
        assert grid.size == (2 * (SIDE + 1) + 1, 3 * (SIDE + 1) + 1)
    written = (only_grid / "grid.png").stat().st_mtime_ns
    main([*text("sd").flags("--skip_save", "--n_rows", "2"), "--outdir", str(only_grid)])  # nothing is missing
    assert (only_grid / "grid.png").stat().st_mtime_ns == written


def test_an_image_does_not_depend_on_its_batch(text):
    model = TextModel(str(text("sd").ckpt), str(text("sd").config), tokenizer=str(text("sd").tokenizer))
    model.load()
    options = SamplerOptions("ddim", STEPS, 0.5, 3, scale=4.0)
    sampler = TextSampler(model, options, torch.device("cpu"), ["a cat", "a dog"])
    together = sampler(model.unet, range(5))
    alone = torch.cat([sampler(model.unet, [index]) for index in range(5)])
    assert (together - alone).abs().max() < 1e-3
    assert sampler.rows_per_image == 2


# Calibration sets.


def test_calibration_set_has_both_halves(text):
    tiny = text("sd")
    content = torch.load(tiny.calibration_set, weights_only=True)
    assert set(content) == {"xs", "ts", "cs", "ucs"}
    assert [tuple(x.shape) for x in content["xs"]] == [(6, 4, 8, 8)] * STEPS
    assert tuple(content["cs"][0].shape) == (6, TOKENS, WIDTH)
    model = TextModel(str(tiny.ckpt), str(tiny.config), tokenizer=str(tiny.tokenizer))
    model.load()
    with torch.no_grad():
        expected = model.encoder(["a cat", PROMPT, "a dog"] * 2)
        empty = model.encoder([""] * 6)
    assert torch.allclose(content["cs"][1], expected, atol=1e-6)
    assert torch.allclose(content["ucs"][2], empty, atol=1e-6)
    data = load_calibration_set(
        tiny.calibration_set, cali_st=2, cali_n=3, image_shape=(4, 8, 8), conditional=True, context_width=WIDTH
    )
    assert len(data) == 2 * 2 * 3
    assert torch.equal(data.x[:6], data.x[6:])
    assert not torch.equal(data.context[:6], data.context[6:])


def test_kinds_of_calibration_sets_are_told_apart(text, failing, tmp_path):
    same = [*text("sd").files, "--out", tmp_path / "x.pt", "--device", "cpu"]
    main_ = make_calibration_data.main
    assert (
        "--timesteps goes with --config (a pixel-space model)"
        in failing("--prompt", "a", *same, "--timesteps", 3, main=main_).message
    )
    assert "--plms goes with --prompt or --from-file" in failing("-r", "x", "--out", "y", "--plms", main=main_).message
    assert "--prompt TEXT or --from-file FILE" in failing("--out", "y", main=main_).message
    both = failing("--prompt", "a", *same, "--plms", "--dpm", main=main_)
    assert "--plms and --dpm exclude each other" in both.message


# The documented commands with quantization.


@pytest.mark.parametrize("bits", [4, 8])
def test_calibrating(calibrated, full, bits):
    folder = calibrated[bits]
    assert {"ckpt.pth", "ckpt.json", "ckpt.safetensors"} <= {path.name for path in folder.iterdir()}
    facts = json.loads((folder / "ckpt.json").read_text())
    assert (facts["quant"]["weight_range"], facts["quant"]["act_range"]) == ("mse", "mse")
    assert (facts["quant"]["sm_abit"], facts["quant"]["split"]) == (16, True)
    assert (facts["calibration"]["range_order"], facts["calibration"]["range_samples"]) == ("random", 16)
    assert facts["calibration"]["running_stat"] is True
    assert facts["calibration"]["samples"] == 2 * 2 * 4  # with and without the condition
    assert not close(pictures(folder), pictures(full["sd"]))
    log = (folder / "run.log").read_text()
    rows = re.findall(r"^(\S+) +(\D+) (weights|activations) +\d+ +\d+ +(\S+) +(\S+) ", log, flags=re.MULTILINE)
    assert {"transformer block", "residual block", "layer"} <= {row[1].strip() for row in rows}
    assert all(float(row[4]) <= float(row[3]) for row in rows)


def test_published_format_has_the_published_names(calibrated):
    state = torch.load(calibrated[4] / "ckpt.pth", weights_only=True)
    block = next(name.rpartition(".attn1")[0] for name in state if ".attn1.to_q.weight" in name)
    for attention in ("attn1", "attn2"):
        for name in "qkvw":
            assert f"{block}.{attention}.act_quantizer_{name}.delta" in state
    assert f"{block}.ff.net.0.proj.act_quantizer.delta" in state
    shortcuts = {k.rpartition(".weight")[0] for k in state if re.search(r"skip_connection\.weight$", k)}
    up = {k for k in shortcuts if k.startswith("model.output_blocks")}
    assert up
    for shortcut in shortcuts:
        assert (f"{shortcut}.weight_quantizer_0.alpha" in state) is (shortcut in up)
        assert (f"{shortcut}.act_quantizer_0.delta" in state) is (shortcut in up)


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.parametrize("bits", [4, 8])
def test_resuming_gives_the_calibrated_images(text, calibrated, tmp_path, bits, name):
    """Bit for bit, with the flags of the documented command."""
    flags = [*QUANT, "--weight_bit", bits, *ACTIVATIONS, "--resume", "--cali_ckpt", calibrated[bits] / name]
    resumed = draw(text("sd").flags(*flags), tmp_path)
    assert torch.equal(pictures(resumed), pictures(calibrated[bits]))
    with Image.open(resumed / "samples" / "00000.png") as image:
        assert image.text["quantized checkpoint"].startswith(name)
        assert json.loads(image.text["options"])["weight_bit"] == bits


def test_maps_that_stay_unrounded(text, calibrated, tmp_path):
    """Other last digits, the same pictures to the eye; the picture says so."""
    flags = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", calibrated[4] / "ckpt.safetensors", "--unrounded_maps"]
    folder = draw(text("sd").flags(*flags), tmp_path)
    assert (pictures(folder) - pictures(calibrated[4])).abs().mean() < 0.02
    with Image.open(folder / "samples" / "00000.png") as image:
        assert json.loads(image.text["options"])["unrounded_maps"] is True


def test_maps_of_8_bits_have_to_be_rounded(text, failing, tmp_path):
    tiny = text("sd")
    words = [*tiny.flags(), "--ptq", "--quant_act", *tiny.calibration_flags(), "--unrounded_maps"]
    failure = failing(*words, "--outdir", tmp_path / "out", main=main)
    assert failure.status == 2
    assert "--unrounded_maps: softmax maps are quantized to 8 bits here; only those of 16" in failure.message
    assert not (tmp_path / "out").exists()


def test_an_image_says_what_its_packed_checkpoint_answered(text, calibrated, tmp_path):
    flags = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", calibrated[4] / "ckpt.safetensors", "--n_iter", 1]
    with Image.open(draw(text("sd").flags(*flags), tmp_path) / "samples" / "00000.png") as image:
        options = json.loads(image.text["options"])
    assert (options["weight_bit"], options["sm_abit"], options["split"], options["quant_act"]) == (4, 16, True, True)


def test_long_prompts_are_told(text, tmp_path):
    folder = draw(text("sd").flags("--n_iter", 1, prompt="cat " * TOKENS), tmp_path)
    assert f"the prompt is cut to the first {TOKENS} tokens" in (folder / "run.log").read_text()


@pytest.mark.parametrize("bits", [4, 8])
def test_resuming_weights_only(text, calibrated, full, tmp_path, bits):
    flags = [*QUANT, "--weight_bit", bits, "--resume", "--cali_ckpt"]
    published = pictures(draw(text("sd").flags(*flags, calibrated[bits] / "ckpt.pth"), tmp_path / "a"))
    packed = pictures(
        draw(text("sd").flags("--ptq", *flags[-2:], calibrated[bits] / "ckpt.safetensors"), tmp_path / "b")
    )
    assert torch.equal(published, packed)
    assert not torch.equal(published, pictures(calibrated[bits]))
    if bits == 8:
        assert psnr(published, pictures(full["sd"])) > 20


def test_batch_size_with_quantized_activations(text, calibrated, prompts, tmp_path):
    flags = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", calibrated[8] / "ckpt.safetensors"]
    flags = text("sd").flags(*flags, "--from-file", prompts, prompt=None)
    one, three = (pictures(draw(flags, tmp_path / str(n), "--n_samples", n)) for n in (1, 3))
    assert psnr(one, three) >= 35


def test_activation_checkpointing_gives_the_same_bytes(text, calibrated, tmp_path):
    """Also in a run that is continued with the other setting."""
    tiny = text("sd")
    flags = [f for f in QUANT if f != "--no_grad_ckpt"] + [*ACTIVATIONS, "--running_stat", *tiny.calibration_flags()]
    folder = draw(tiny.flags(*flags, "--weight_bit", 4), tmp_path)
    assert (folder / "ckpt.safetensors").read_bytes() == (calibrated[4] / "ckpt.safetensors").read_bytes()
    main([*map(str, tiny.flags(*flags, "--weight_bit", 4, "--no_grad_ckpt")), "--outdir", str(folder)])


def test_the_map_after_softmax_has_its_own_bits(text, tmp_path):
    flags = ["--ptq", "--quant_mode", "linear", "--quant_act", "--n_iter", 0, *text("sd").calibration_flags()]
    deltas = {}
    for bits in (8, 16):
        folder = draw(text("sd").flags(*flags, "--sm_abit", bits), tmp_path / str(bits))
        state = torch.load(folder / "ckpt.pth", weights_only=True)
        deltas[bits] = {k: float(v) for k, v in state.items() if k.endswith("act_quantizer_w.delta")}
        assert read_info(folder / "ckpt.safetensors").quant.sm_abit == bits
    assert deltas[8]
    assert all(deltas[8][name] > 100 * deltas[16][name] for name in deltas[8])


def test_activations_anew_on_calibrated_weights(text, calibrated, tmp_path):
    source = calibrated[4] / "ckpt.safetensors"
    flags = ["--ptq", "--quant_act", "--act_bit", 6, "--sm_abit", 16, "--resume_w", "--cali_ckpt", source]
    folder = draw(text("sd").flags(*flags, *text("sd").calibration_flags(), "--n_iter", 0), tmp_path)
    assert (read_info(folder / "ckpt.safetensors").quant.act_bit, read_info(source).quant.act_bit) == (6, 8)


# Other forms of a model.


def test_stripped_checkpoint(text, calibrated, tmp_path, failing):
    out = tmp_path / "rest.safetensors"
    strip_unet.main([str(text("sd").ckpt), str(out)])
    assert out.stat().st_size < text("sd").ckpt.stat().st_size / 2
    for name in ("ckpt.safetensors", "ckpt.pth"):
        flags = text("sd").flags("--ptq", "--quant_act", "--resume", "--cali_ckpt", calibrated[4] / name)
        flags[flags.index(str(text("sd").ckpt))] = str(out)
        assert torch.equal(pictures(draw(flags, tmp_path / name)), pictures(calibrated[4]))
    full = text("sd").flags()
    full[full.index(str(text("sd").ckpt))] = str(out)
    failure = failing(*full, "--outdir", tmp_path / "b", main=main)
    assert failure.status == 2
    assert "holds no UNet" in failure.message
    assert "exists already" in failing(text("sd").ckpt, out, main=strip_unet.main).message
    assert "name it so" in failing(text("sd").ckpt, tmp_path / "x.ckpt", main=strip_unet.main).message
    assert (
        "no first stage"
        in failing(calibrated[4] / "ckpt.pth", tmp_path / "y.safetensors", main=strip_unet.main).message
    )


def test_unet_of_the_full_checkpoint_is_not_read_with_a_packed_one(text, calibrated, tmp_path, monkeypatch):
    """NaN in every one of its tensors reaches no image."""
    content = torch.load(text("sd").ckpt, weights_only=True)
    for name, tensor in content["state_dict"].items():
        if name.startswith(UNET):
            tensor.fill_(float("nan"))
    torch.save(content, tmp_path / "model.ckpt")
    flags = text("sd").flags("--ptq", "--quant_act", "--resume", "--cali_ckpt", calibrated[4] / "ckpt.safetensors")
    flags[flags.index(str(text("sd").ckpt))] = str(tmp_path / "model.ckpt")
    assert torch.equal(pictures(draw(flags, tmp_path / "a")), pictures(calibrated[4]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["full", "packed"])
def test_memory_holds_one_copy_of_the_unet(text, tmp_path, form, monkeypatch):
    """Of a network large enough to be seen: what the process has to itself, up to the first model call."""
    monkeypatch.setattr(primitives, "MSE_CANDIDATES", 1)  # any grid will do, and a good one takes minutes
    config = text_config("sd")
    config["model"]["params"]["unet_config"]["params"] |= {"model_channels": 192, "channel_mult": [1, 4]}
    path, ckpt = tmp_path / "wide.yaml", tmp_path / "model.ckpt"
    path.write_text(yaml.safe_dump(config))
    make_random_checkpoint.main(["--config", str(path), "--out", str(ckpt)])
    files = ["--config", str(path), "--ckpt", str(ckpt), "--tokenizer", str(text("sd").tokenizer), "--device", "cpu"]
    words = ["--prompt", "a cat", *files, "--ddim_steps", "1", "--n_samples", "1", "--n_iter", "1"]
    if form == "packed":
        made = draw([*words, "--ptq", "--quant_mode", "linear"], tmp_path / "made", "--n_iter", 0)
        words += ["--ptq", "--resume", "--cali_ckpt", str(made / "ckpt.safetensors")]
    program = """
import re, sys, threading, time
import transformers
from transformers import CLIPTextModel, CLIPTokenizer
from qdiff.cli import sampling, txt2img
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
before, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
def stop(model, *_):
    global done
    done = True
    unet = sum(p.numel() * p.element_size() for p in model.parameters()) >> 20
    thread.join()
    print("grew by", most - before, "of", unet)
    raise SystemExit
sampling.sample_images = stop
txt2img.main(sys.argv[1:])
"""
    run = subprocess.run(
        [sys.executable, "-c", program, *words, "--outdir", str(tmp_path / "out")],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, unet = map(int, re.search(r"grew by (\d+) of (\d+)", run.stdout).groups())
    assert unet > 100
    assert grown < 1.5 * unet


def test_stripped_latent_model_with_averages(latent, tmp_path):
    from .latent_models import pictures as latent_pictures
    from .latent_models import sample

    tiny = latent("beds")
    whole = sample(tiny.flags("--ptq", "--quant_mode", "linear"), tmp_path / "a")
    (tmp_path / "tiny_beds").mkdir()
    rest = tmp_path / "tiny_beds" / "model.safetensors"
    strip_unet.main([str(tiny.ckpt), str(rest)])
    (tmp_path / "tiny_beds" / "config.yaml").write_bytes((tiny.folder / "config.yaml").read_bytes())
    flags = tiny.flags("--ptq", "--resume", "--cali_ckpt", whole / "ckpt.safetensors")
    flags[flags.index(str(tiny.ckpt))] = str(rest)
    assert torch.equal(latent_pictures(sample(flags, tmp_path / "b")), latent_pictures(whole))


def test_safetensors_folder_and_own_spelling_are_the_model_too(text, full, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(text("sd").ckpt, weights_only=True)["state_dict"]
    old, new = "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
    assert any(name.startswith(old) for name in state)
    assert f"{old}embeddings.position_ids" in state
    renamed = {name.replace(old, new): tensor for name, tensor in state.items() if "position_ids" not in name}
    save_file(renamed, tmp_path / "model.safetensors")
    flags = text("sd").flags()
    flags[flags.index(str(text("sd").ckpt))] = str(tmp_path)
    assert torch.equal(pictures(draw(flags, tmp_path / "out")), pictures(full["sd"]))


def test_the_documented_place_of_the_checkpoint_needs_no_flag(text, full, tmp_path, monkeypatch):
    """As in the documented commands, which name none; a file that was named is taken or missed, never replaced."""
    place = tmp_path / "models" / "ldm" / "stable-diffusion-v1"
    place.mkdir(parents=True)
    monkeypatch.setattr("qdiff.cli.text.REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = text("sd").flags("--n_iter", 1)
    named = flags.index("--ckpt")
    del flags[named : named + 2]
    for name in ("model.ckpt", "sd-v1-4.ckpt"):
        (place / name).write_bytes(text("sd").ckpt.read_bytes())
        assert torch.equal(pictures(draw(flags, tmp_path / f"out-{name}")), pictures(full["sd"])[:SAMPLES])
        (place / name).rename(tmp_path / "away.ckpt")
    (place / "sd-v1-4.ckpt").touch()
    with pytest.raises(SystemExit):
        main([*flags, "--ckpt", str(place / "other.ckpt"), "--outdir", str(tmp_path / "none")])


def test_laion_flag_takes_its_config(text, tmp_path, failing, monkeypatch):
    """Its own config, checkpoint and folder of results, each of which a flag may name instead."""
    monkeypatch.chdir(tmp_path)
    failure = failing("--prompt", "a", "--laion400m", "--tokenizer", text("laion").tokenizer, main=main)
    assert "models/ldm/text2img-large/model.ckpt: no such checkpoint" in failure.message
    main([*text("laion").flags("--laion400m", "--n_iter", "1")])
    assert len(list((tmp_path / "outputs" / "txt2img-samples-laion400m").iterdir())) == 1


def test_help_has_every_flag_of_the_command():
    text = build_parser().format_help()
    flags = (
        "prompt from-file outdir skip_grid skip_save ddim_steps plms dpm laion400m fixed_code ddim_eta n_iter H W C f"
    )
    flags += " n_samples n_rows scale config ckpt seed precision cond no_grad_ckpt ptq quant_mode weight_bit quant_act"
    flags += " act_bit sm_abit split running_stat rs_sm_only cali_data_path cali_st cali_n cali_batch_size cali_iters"
    flags += " cali_iters_a cali_lr cali_p resume resume_w cali_ckpt verbose no_watermark safety_checker tokenizer"
    for flag in flags.split():
        assert re.search(rf"--{flag}\b", text), flag
    assert "--a_sym" not in text
    assert "key=value" in text


# What is refused.

WRONG = {
    "two samplers": (["--plms", "--dpm"], "--plms and --dpm exclude each other"),
    "noise with PLMS": (["--plms", "--ddim_eta", "0.5"], "--ddim_eta 0.5 has no effect with --plms"),
    "two kinds of prompts": (["--from-file", __file__], "--prompt and --from-file exclude each other"),
    "size": (["--H", "18"], "--H 18: sizes are multiples of 4 pixels; use 16 or 20"),
    "channels": (["--C", "3"], "--C 3: it is 4 in"),
    "factor": (["--f", "8"], "--f 8: it is 2 in"),
    "steps": (["--ddim_steps", "101"], "--ddim_steps 101: the schedule"),
    "bits without --ptq": (["--weight_bit", "4"], "needs --ptq"),
    "maps without --ptq": (["--unrounded_maps"], "--unrounded_maps needs --ptq"),
    "maps in full": (["--ptq", "--unrounded_maps"], "--unrounded_maps needs --quant_act"),
    "no set": (["--ptq"], "calibrating needs --cali_data_path"),
    "a misspelt flag": (["--ddim_step", "3"], "did you mean --ddim_steps?"),
    "no tokenizer there": (["--tokenizer", "/nowhere"], "--tokenizer /nowhere: no such folder"),
    "no model there": (["--ckpt", "/nowhere/x.ckpt"], "/nowhere/x.ckpt: no such checkpoint"),
    "no such checker": (["--safety_checker", "/nowhere/at/all"], "--safety_checker /nowhere/at/all: cannot be loaded"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(text, failing, tmp_path, case):
    more, message = WRONG[case]
    tiny: TextMiniature = text("sd")
    out = tmp_path / "out"
    failure = failing("--prompt", "a cat", *tiny.files, "--device", "cpu", "--outdir", out, *more, main=main)
    assert failure.status == 2
    assert message in failure.message
    assert "Traceback" not in failure.message
    assert not out.exists()


def test_wrong_models_and_prompts(text, latent, failing, tmp_path):
    assert "say what to draw" in failing(*text("sd").files, main=main).message
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "holds no prompt" in failing(*text("sd").files, "--from-file", tmp_path / "empty.txt", main=main).message
    classes = latent("classes").folder
    words = ["--prompt", "a", "--config", classes / "config.yaml", "--ckpt", classes]
    assert "conditional on 'class_label'" in failing(*words, main=main).message
    (tmp_path / "config.yaml").write_bytes(text("sd").config.read_bytes())
    (tmp_path / "model.ckpt").write_bytes(text("sd").ckpt.read_bytes())
    assert "scripts/txt2img.py" in failing("-r", tmp_path, "--seed", 1, "--device", "cpu", main=sample_ldm).message
    empty = tmp_path / "tokenizer"
    empty.mkdir()
    flags = text("sd").flags()
    flags[flags.index(str(text("sd").tokenizer))] = str(empty)
    assert "holds no tokenizer of this model: vocab.json and merges.txt" in failing(*flags, main=main).message
