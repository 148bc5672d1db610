"""The latent sampling command on miniature models: its documented forms, going on, and what does not change images."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff.checkpoint import read_info
from qdiff.cli import pipeline
from qdiff.cli.errors import Stopped
from qdiff.cli.latent import LatentModel, LatentSampler, SamplerOptions
from qdiff.cli.sample_ldm import build_parser, main
from qdiff.cli.samplers import with_bar

from ..cases import thorough_but
from .latent_models import CLASSES, FACTORS, IMAGES, SHAPES, STEPS, LatentMiniature, pictures, psnr, sample

KINDS = tuple(SHAPES)
DOCUMENTED = [(kind, bits) for kind in KINDS for bits in (4, 8)]


def quantized(bits: int) -> list[str]:
    return ["--ptq", "--weight_bit", str(bits)]


@pytest.fixture(scope="module")
def full(latent, tmp_path_factory):
    """Run folders in full precision, by kind."""
    return {kind: sample(latent(kind).flags(), tmp_path_factory.mktemp("full")) for kind in KINDS}


class Calibrated:
    """Run folders of the documented calibrating commands, made when they are first asked for."""

    def __init__(self, latent, factory):
        self.latent, self.factory, self.made = latent, factory, {}

    def __call__(self, kind: str, bits: int) -> Path:
        if (kind, bits) not in self.made:
            tiny: LatentMiniature = self.latent(kind)
            flags = [*quantized(bits), "--quant_mode", "qdiff", *tiny.calibration_flags()]
            self.made[kind, bits] = sample(
                tiny.flags(*flags, *tiny.activations(calibrate=True)), self.factory.mktemp(f"{kind}{bits}")
            )
        return self.made[kind, bits]


@pytest.fixture(scope="module")
def calibrated(latent, tmp_path_factory) -> Calibrated:
    return Calibrated(latent, tmp_path_factory)


# The documented commands.


@pytest.mark.parametrize("kind", KINDS)
def test_full_precision(latent, full, kind):
    folder = full[kind]
    side = SHAPES[kind][1] * FACTORS[kind]
    assert folder.parent.name == "samples"
    assert folder.parent.parent.name == f"tiny_{kind}"
    assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "img", "numpy", "run.log", "sampling_config.yaml"]
    images = pictures(folder)
    assert images.shape == (IMAGES, 3, side, side)
    assert 0.01 < images.std() < 0.5  # random weights give grey noise, neither flat nor saturated
    options = yaml.safe_load((folder / "sampling_config.yaml").read_text())
    assert options["resume_base"] == str(latent(kind).ckpt)
    assert options["model_config"]["model"]["params"]["channels"] == SHAPES[kind][0]
    first = (folder / "run.log").read_text().splitlines()[0]
    assert first.endswith(f"-l {folder}")


@pytest.mark.parametrize("kind", KINDS)
def test_all_images_in_one_array(full, kind):
    (path,) = (full[kind] / "numpy").iterdir()
    side = SHAPES[kind][1] * FACTORS[kind]
    assert path.name == f"{IMAGES}x{side}x{side}x3-samples.npz"
    with np.load(path) as content:
        assert list(content) == ["arr_0"]
        array = content["arr_0"]
    assert (array.dtype, array.shape) == (np.uint8, (IMAGES, side, side, 3))
    expected = pictures(full[kind]).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(array, expected)


@pytest.mark.parametrize(("kind", "bits"), DOCUMENTED)
def test_calibrating(latent, calibrated, full, kind, bits):
    folder = calibrated(kind, bits)
    assert {"ckpt.pth", "ckpt.json", "ckpt.safetensors"} <= {path.name for path in folder.iterdir()}
    log = (folder / "run.log").read_text()
    for unit in ("input_blocks.0.0", "middle_block.1", "time_embed.0", "out.2"):
        assert unit in log
    facts = json.loads((folder / "ckpt.json").read_text())
    min_max = kind == "beds"
    assert facts["quant"]["act_range"] == ("max" if min_max else "mse")
    assert facts["quant"]["weight_range"] == "mse"
    assert facts["calibration"]["range_order"] == "first"
    assert facts["calibration"]["running_stat"] is min_max
    assert facts["calibration"]["samples"] == (16 if kind == "classes" else 8)  # once more without the condition
    assert facts["model_config"]["unet"]["num_head_channels"] == (32 if min_max else -1)
    assert not torch.equal(pictures(folder), pictures(full[kind]))


@pytest.mark.parametrize(("kind", "bits"), DOCUMENTED)
def test_no_unit_ends_worse_than_rounded_to_nearest(calibrated, kind, bits):
    log = (calibrated(kind, bits) / "run.log").read_text()
    rows = re.findall(r"^(\S+) +\D+ (weights|activations) +\d+ +\d+ +(\S+) +(\S+) ", log, flags=re.MULTILINE)
    units = {phase: [row[0] for row in rows if row[1] == phase] for phase in ("weights", "activations")}
    assert units["weights"] == units["activations"]
    assert len(set(units["weights"])) == len(units["weights"]) >= 10
    assert all(float(after) <= float(before) for _, _, before, after in rows)


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.parametrize(("kind", "bits"), DOCUMENTED)
def test_resuming_gives_the_calibrated_images(latent, calibrated, tmp_path, kind, bits, name):
    """Bit for bit, with the flags of the documented command; a packed file and its flags agree."""
    tiny, folder = latent(kind), calibrated(kind, bits)
    flags = [*quantized(bits), *tiny.activations(calibrate=False), "--resume", "--cali_ckpt", folder / name]
    assert torch.equal(pictures(sample(tiny.flags(*flags), tmp_path)), pictures(folder))


@pytest.mark.parametrize(("kind", "bits"), DOCUMENTED)
def test_resuming_weights_only(latent, calibrated, full, tmp_path, kind, bits):
    tiny, folder = latent(kind), calibrated(kind, bits)
    flags = [*quantized(bits), "--resume", "--cali_ckpt"]
    published = pictures(sample(tiny.flags(*flags, folder / "ckpt.pth"), tmp_path / "a"))
    packed = pictures(sample(tiny.flags(*flags, folder / "ckpt.safetensors"), tmp_path / "b"))
    assert torch.equal(published, packed)
    assert not torch.equal(published, pictures(folder))
    if bits == 8 and kind == "churches":  # the others' codebooks turn small differences into other codes
        assert psnr(published, pictures(full[kind])) > 25


def test_published_checkpoint_without_its_json(latent, calibrated, tmp_path):
    tiny, folder = latent("beds"), calibrated("beds", 4)
    shutil.copy(folder / "ckpt.pth", tmp_path)
    flags = [*quantized(4), *tiny.activations(calibrate=False), "--resume", "--cali_ckpt", tmp_path / "ckpt.pth"]
    assert torch.equal(pictures(sample(tiny.flags(*flags), tmp_path / "out")), pictures(folder))


def test_activations_anew_on_calibrated_weights(latent, calibrated, tmp_path):
    tiny, source = latent("churches"), calibrated("churches", 4) / "ckpt.safetensors"
    flags = ["--ptq", "--quant_act", "--act_bit", "6", "--resume_w", "--cali_ckpt", source, *tiny.calibration_flags()]
    folder = sample(tiny.flags(*flags), tmp_path / "anew")
    assert (read_info(folder / "ckpt.safetensors").quant.act_bit, read_info(source).quant.act_bit) == (6, 8)
    only_weights = ["--ptq", "--resume", "--cali_ckpt"]
    before = sample(tiny.flags(*only_weights, source), tmp_path / "a")
    after = sample(tiny.flags(*only_weights, folder / "ckpt.safetensors"), tmp_path / "b")
    assert torch.equal(pictures(before), pictures(after))


def test_round_to_nearest_and_split_and_timed_ranges(latent, tmp_path):
    """Options beside the documented ones work for this family too, and come back from the packed file."""
    tiny = latent("classes")
    flags = ["--ptq", "--weight_bit", 4, "--quant_mode", "linear", "--split", "--quant_act", "--sm_abit", 16]
    flags += ["--timed_ranges", "all", "--split_input", "--correct_scale", *tiny.calibration_flags()]
    folder = sample(tiny.flags(*flags), tmp_path / "a")
    assert not (folder / "ckpt.pth").exists()
    again = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", folder / "ckpt.safetensors"]
    assert torch.equal(pictures(sample(tiny.flags(*again), tmp_path / "b")), pictures(folder))


# What does not change images, and what does.


@pytest.mark.parametrize("more", [[], ["--dpm"], ["-v"]], ids=["ddim", "dpm", "ddpm"])
@pytest.mark.parametrize("kind", ["churches", "classes"])
def test_latents_do_not_depend_on_the_batch_size(latent, kind, more):
    """Latents, because the codebook of a first stage turns last digits into other codes."""
    model = LatentModel(str(latent(kind).folder))
    model.load()
    method = {"--dpm": "dpm", "-v": "ddpm"}.get("".join(more), "ddim")
    labels = (1, 4) if kind == "classes" else ()
    sampler = LatentSampler(model, SamplerOptions(method, STEPS, 1.0, 41, labels, 1.5), torch.device("cpu"))
    together = sampler(model.unet, range(IMAGES))
    one_by_one = torch.cat([sampler(model.unet, [index]) for index in range(IMAGES)])
    assert (together - one_by_one).abs().max() < 1e-3
    assert (together[0] - together[1]).abs().mean() > 0.1


def test_batch_size_does_not_change_images(latent, full, tmp_path):
    one = pictures(sample(latent("churches").flags("--batch_size", 1), tmp_path))
    assert (one - pictures(full["churches"])).abs().max() <= 1 / 255 + 1e-6


def test_batch_size_with_quantized_activations(latent, calibrated, tmp_path):
    flags = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", calibrated("churches", 8) / "ckpt.safetensors"]
    one = pictures(sample(latent("churches").flags(*flags, "--batch_size", 2), tmp_path))
    assert psnr(one, pictures(calibrated("churches", 8))) >= 35


@pytest.mark.parametrize("more", [["-e", "1"], ["--dpm"], ["-v"], ["--seed", "3"], ["-c", "3"]])
def test_sampler_flags_change_images(latent, full, tmp_path, more):
    flags = latent("churches").flags()
    if more[0] in ("--dpm", "-v"):
        del flags[flags.index("-e") : flags.index("-e") + 2]
    if more[0] == "-v":
        del flags[flags.index("-c") : flags.index("-c") + 2]
    assert not torch.equal(pictures(sample(flags, tmp_path, *more)), pictures(full["churches"]))


def test_labels_go_round_and_matter(latent, full, tmp_path):
    """Image i has label i modulo their number; the noise is its own."""
    one = pictures(sample(latent("classes").flags("--class_labels", "1"), tmp_path / "a"))
    same = [torch.equal(a, b) for a, b in zip(one, pictures(full["classes"]), strict=True)]
    assert same == [True, False, True]  # of 1,4,1 against 1,1,1
    for scale in (1, 4):
        other = pictures(sample(latent("classes").flags("--scale", scale), tmp_path / f"scale{scale}"))
        assert not torch.equal(other, pictures(full["classes"]))
    accepted = pictures(sample(latent("classes").flags("--cond"), tmp_path / "cond"))
    assert torch.equal(accepted, pictures(full["classes"]))


@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=7), start=st.integers(0, 10_000))
def test_an_images_class_follows_from_its_number(latent, labels, start):
    model = LatentModel(str(latent("classes").folder))
    model.load()
    table = model.diffusion.cond_stage_model.embedding.weight
    sampler = LatentSampler(model, SamplerOptions("ddim", 4, 0.0, 1, tuple(labels), 2.0), torch.device("cpu"))
    cond, uncond = sampler.conditions(range(start, start + 5))
    for row, index in enumerate(range(start, start + 5)):
        assert torch.equal(cond[row, 0], table[labels[index % len(labels)]])
    assert torch.equal(uncond, table[CLASSES].expand(5, 1, -1))


def test_words_override_the_config(latent, full, tmp_path):
    changed = sample(latent("beds").flags(), tmp_path, "model.params.scale_factor=3", "data.target=x")
    options = yaml.safe_load((changed / "sampling_config.yaml").read_text())
    assert options["model_config"]["model"]["params"]["scale_factor"] == 3
    assert not torch.equal(pictures(changed), pictures(full["beds"]))


def test_a_folder_and_safetensors_are_the_model_too(latent, full, tmp_path):
    from qdiff.cli import make_random_checkpoint

    tiny = latent("churches")
    flags = tiny.flags()
    flags[flags.index(str(tiny.ckpt))] = str(tiny.folder)
    assert torch.equal(pictures(sample(flags, tmp_path / "a")), pictures(full["churches"]))
    copy = tmp_path / "copy" / "model.safetensors"
    make_random_checkpoint.main(["--config", str(tiny.folder / "config.yaml"), "--out", str(copy)])
    flags[flags.index(str(tiny.folder))] = str(copy.parent)
    assert torch.equal(pictures(sample(flags, tmp_path / "b")), pictures(full["churches"]))


@pytest.mark.parametrize("kind", thorough_but(["classes"], ["churches", "classes"]))
def test_half_precision_and_compilation(latent, calibrated, tmp_path, monkeypatch, kind):
    """Compiled once, for the doubled batch of guidance too, and the smaller last batch is filled up."""
    compiled = []

    def backend(graph, inputs):
        compiled.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    folder = calibrated(kind, 8)
    flags = ["--ptq", "--quant_act", "--resume", "--cali_ckpt", folder / "ckpt.safetensors", "--batch_size", 2]
    run = sample(latent(kind).flags(*flags, "--compile"), tmp_path / "a")
    assert len(compiled) == 1
    rows = 4 if kind == "classes" else 2
    assert (rows, *SHAPES[kind]) in compiled[0]
    assert ((rows, 1, 12) in compiled[0]) == (kind == "classes")
    assert "compiled for batches of 2" in (run / "run.log").read_text()
    codebook = kind == "classes"  # of the first stage: it turns last digits into other codes here and there
    assert psnr(pictures(run), pictures(folder)) > (15 if codebook else 35)
    half = sample(latent(kind).flags(*flags, "--precision", "bf16"), tmp_path / "b")
    assert psnr(pictures(half), pictures(folder)) > (8 if codebook else 25)
    assert not torch.equal(pictures(half), pictures(folder))


# Going on.


def test_the_logged_command_continues_the_run(latent, full, tmp_path):
    folder = sample(latent("churches").flags(), tmp_path)
    (folder / "img" / "000002.png").unlink()
    (array,) = (folder / "numpy").iterdir()
    array.unlink()
    words = shlex.split((folder / "run.log").read_text().splitlines()[0].split("with: ")[1])
    assert words[:2] == ["python", "scripts/sample_diffusion_ldm.py"]
    main(words[2:])
    assert (pictures(folder) - pictures(full["churches"])).abs().max() <= 1 / 255 + 1e-6
    assert array.is_file()
    assert "going on at 000002" in (folder / "run.log").read_text()
    written = array.stat().st_mtime_ns
    main(words[2:])  # nothing is missing, so nothing is made again
    assert array.stat().st_mtime_ns == written


def test_a_calibration_that_was_stopped_goes_on_to_the_same_bytes(latent, calibrated, tmp_path, monkeypatch):
    """Stopped by a signal in the middle of the second phase; the units that were finished are not learned again."""
    tiny, whole = latent("classes"), calibrated("classes", 4)
    flags = tiny.flags(*quantized(4), "--quant_mode", "qdiff", *tiny.calibration_flags())
    flags += tiny.activations(calibrate=True)
    show, seen = pipeline.UnitBar.show, []

    def stop_late(self, progress):
        show(self, progress)
        seen.append(progress.restored)
        if progress.index == progress.total * 3 // 4:
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(pipeline.UnitBar, "show", stop_late)
    with pytest.raises(SystemExit):
        main([*flags, "-l", str(tmp_path)])
    (folder,) = (tmp_path / "tiny_classes" / "samples").iterdir()
    done = len(seen)
    monkeypatch.setattr(pipeline.UnitBar, "show", lambda self, progress: seen.append(progress.restored))
    main([*flags, "-l", str(folder)])
    assert seen[done:].count(True) == done
    assert (folder / "ckpt.safetensors").read_bytes() == (whole / "ckpt.safetensors").read_bytes()
    assert torch.equal(pictures(folder), pictures(whole))


def test_other_options_are_not_mixed_into_a_run(latent, full, failing):
    failure = failing(*latent("beds").flags(), "-l", full["beds"], "--seed", 7, main=main)
    assert failure.status == 2
    assert "seed is 7, was 41" in failure.message
    failure = failing(*latent("beds").flags(), "-l", full["beds"], "model.params.linear_end=0.5", main=main)
    assert "linear_end is 0.5, was 0.0195" in failure.message


# Flags reach what they should.


def ranges(folder: Path) -> dict[str, float]:
    state = torch.load(folder / "ckpt.pth", weights_only=True)
    return {name: float(value) for name, value in state.items() if "act_quantizer" in name and name.endswith("delta")}


@pytest.mark.parametrize("kind", thorough_but(["beds"], KINDS))
def test_running_statistics_reach_every_quantizer_or_only_those_after_softmax(latent, tmp_path, kind):
    flags = latent(kind).flags(*quantized(8), "--quant_mode", "linear", "--quant_act", "--a_min_max", "-n", 0)
    flags += latent(kind).calibration_flags()
    plain = ranges(sample(flags, tmp_path / "a", "--range_samples", 3))
    every = ranges(sample(flags, tmp_path / "b", "--range_samples", 3, "--running_stat"))
    softmax = ranges(sample(flags, tmp_path / "c", "--range_samples", 3, "--running_stat", "--rs_sm_only"))
    assert plain.keys() == every.keys() == softmax.keys()
    moved = {name for name in plain if softmax[name] != plain[name]}
    maps = {name for name in plain if "act_quantizer_w" in name}
    assert moved
    assert moved <= maps
    unmoved = [name for name in plain if every[name] == plain[name]]
    # a map that holds a one has the range 0 to 1 whatever it is averaged over
    assert all(name in maps and plain[name] == pytest.approx(1 / 255) for name in unmoved), unmoved


@pytest.mark.parametrize("kind", thorough_but(["beds"], KINDS))
def test_symmetric_quantizers_but_after_softmax(latent, tmp_path, kind):
    flags = latent(kind).flags(*quantized(8), "--quant_mode", "linear", "--quant_act", "-n", 0)
    flags += latent(kind).calibration_flags()
    folders = {name: sample(flags, tmp_path / name, *more) for name, more in {"asym": [], "sym": ["--a_sym"]}.items()}
    states = {name: torch.load(f / "ckpt.pth", weights_only=True) for name, f in folders.items()}
    points = {
        name: {k: float(v) for k, v in state.items() if "act_quantizer" in k and k.endswith("zero_point")}
        for name, state in states.items()
    }
    assert set(points["sym"].values()) == {0.0}
    nonzero = {name for name, value in points["asym"].items() if value != 0}
    assert nonzero
    assert not [name for name in nonzero if "act_quantizer_w" in name]
    assert len(nonzero) > len(points["asym"]) // 2


def test_min_max_instead_of_a_search(latent, tmp_path):
    flags = latent("beds").flags(*quantized(4), "--quant_mode", "linear", "--quant_act", "--act_bit", 4, "-n", 0)
    flags += latent("beds").calibration_flags()
    searched, min_max = ranges(sample(flags, tmp_path / "a")), ranges(sample(flags, tmp_path / "b", "--a_min_max"))
    smaller = [name for name in searched if searched[name] < min_max[name]]
    assert len(smaller) > len(searched) // 2


def test_help_has_every_flag_of_the_command():
    text = build_parser().format_help()
    short = ("-r", "-n", "-e", "-v", "-l", "-c")
    for flag in (*short, "--resume", "--resume_w", "--cond", "--dpm", "--rs_sm_only", "--a_min_max", "--class_labels"):
        assert f"{flag} " in text or f"{flag}," in text, flag
    assert "key=value" in text


def test_bar_counts_model_calls(latent):
    """The sampler announces as many model calls as it makes, for every method."""
    model = LatentModel(str(latent("churches").folder))
    model.load()
    for method in ("ddim", "ddpm", "dpm"):
        sampler = LatentSampler(model, SamplerOptions(method, STEPS, 0.0, 1), torch.device("cpu"))
        calls = []

        class Bar:
            n, total = 0.0, 1.0

            def update(self, by, calls=calls):
                calls.append(by)

        with_bar(sampler, model.unet, Bar())([0])
        assert len(calls) == sampler.n_steps, method
