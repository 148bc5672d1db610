"""Checkpoints with random weights: the published layout, values a network can run on, little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm.models.diffusion.ddpm import make_betas
from ldm.pretrained import load_latent_diffusion
from ldm.random_weights import random_checkpoint
from ldm.util import load_model_config
from qdiff.cli import run_folder
from qdiff.cli.make_random_checkpoint import main

from ..parity.conftest import golden_json
from .latent_models import config_of

REPOSITORY = Path(__file__).resolve().parents[2]
FULL_SIZE = {
    "beds": "models/ldm/lsun_beds256/config.yaml",
    "celeba": "models/ldm/celeba256/config.yaml",
    "churches": "models/ldm/lsun_churches256/config.yaml",
    "cinv2": "configs/latent-diffusion/cin256-v2.yaml",
    "ffhq": "models/ldm/ffhq256/config.yaml",
}


def make(tmp_path: Path, kind: str, name: str, *flags: object) -> Path:
    config, out = tmp_path / "config.yaml", tmp_path / name
    config.write_text(yaml.safe_dump(config_of(kind)))
    main(["--config", str(config), "--out", str(out), *map(str, flags)])
    return out


@pytest.mark.parametrize("family", FULL_SIZE)
def test_layout_of_the_published_files(family):
    """Every name, shape and type of the file; nothing is drawn for it."""
    expected = golden_json(f"manifests/{family}_latent_diffusion.json.gz")["keys"]
    if not expected:
        pytest.skip("no golden manifest here")
    draws = random_checkpoint(load_model_config(REPOSITORY / FULL_SIZE[family]))
    found = {name: (list(draw.shape), str(draw.dtype).removeprefix("torch.")) for name, draw in draws.items()}
    known = {name: (shape, dtype) for name, shape, dtype in expected if "first_stage_model.loss." not in name}
    assert {name: value for name, value in known.items() if found.get(name) != value} == {}
    assert found.keys() == known.keys()


def test_layout_of_the_published_stable_diffusion():
    """The manifest has a current release's names of the text encoder; the published file a prefix and a buffer more."""
    expected = golden_json("manifests/sd_latent_diffusion.json.gz")
    if not expected:
        pytest.skip("no golden manifest here")
    draws = random_checkpoint(load_model_config(REPOSITORY / "configs/stable-diffusion/v1-inference.yaml"))
    found = {name: (list(draw.shape), str(draw.dtype).removeprefix("torch.")) for name, draw in draws.items()}
    prefix = "cond_stage_model.transformer."
    known = {
        f"{prefix}text_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: (shape, dtype)
        for name, shape, dtype in expected["keys"]
    }
    known[f"{prefix}text_model.embeddings.position_ids"] = ([1, 77], "int64")
    assert found == known


def test_the_laion_model_is_drawn_too():
    draws = random_checkpoint(load_model_config(REPOSITORY / "configs/latent-diffusion/txt2img-1p4B-eval.yaml"))
    shapes = {name: draw.shape for name, draw in draws.items()}
    assert shapes["cond_stage_model.transformer.attn_layers.layers.63.1.net.2.weight"] == (1280, 5120)
    assert shapes["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 1280)


@pytest.mark.parametrize("kind", ["beds", "churches", "classes"])
def test_a_model_runs_on_it(tmp_path, kind):
    path = make(tmp_path, kind, "model.ckpt")
    content = torch.load(path, weights_only=True)
    assert set(content) >= {"state_dict", "global_step"}
    model = load_latent_diffusion(path)
    config = config_of(kind)["model"]["params"]
    assert torch.equal(
        model.betas, make_betas(config["linear_start"], config["linear_end"], config["timesteps"]).float()
    )
    torch.manual_seed(0)
    x, t = torch.randn(8, *model.latent_shape), torch.full((8,), 20.0)
    context = model.cond_stage_model.unconditional(8) if model.conditional else None
    with torch.no_grad():
        eps, image = model.apply_model(x, t, context), model.decode(x)
    for out in (eps, image):
        assert torch.isfinite(out).all()
        assert 0.1 < out.std() < 10


def test_both_formats_hold_the_same_and_a_seed_decides(tmp_path):
    state = torch.load(make(tmp_path, "beds", "model.ckpt"), weights_only=True)["state_dict"]
    safe = load_file(make(tmp_path, "beds", "model.safetensors"))
    assert state.keys() == safe.keys()
    assert all(torch.equal(state[name], safe[name]) for name in state)
    other = load_file(make(tmp_path, "beds", "other.safetensors", "--seed", 1))
    name = "model.diffusion_model.out.2.weight"
    assert not torch.equal(other[name], safe[name])
    assert not torch.equal(safe["model_ema.diffusion_modelout2weight"], safe[name])  # it shows which is sampled from


def test_half_precision_halves_the_weights_and_keeps_the_schedule(tmp_path):
    full, half = (make(tmp_path, "classes", f"{d}.safetensors", "--dtype", d) for d in ("fp32", "fp16"))
    assert half.stat().st_size < 0.55 * full.stat().st_size
    tensors = load_file(half)
    assert tensors["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert torch.equal(tensors["betas"], load_file(full)["betas"])


def test_config_beside_it(tmp_path, capsys):
    config = tmp_path / "here.yaml"
    config.write_text(yaml.safe_dump(config_of("beds")))
    out = tmp_path / "there" / "model.ckpt"
    main(["--config", str(config), "--out", str(out), "model.params.use_ema=false"])
    assert (out.parent / "config.yaml").read_bytes() == config.read_bytes()
    assert "model.params.use_ema=false to the sampling command" in capsys.readouterr().out
    assert not any(name.startswith("model_ema") for name in torch.load(out, weights_only=True)["state_dict"])
    (out.parent / "config.yaml").write_text("model: other")
    main(["--config", str(config), "--out", str(out), "--force"])
    assert (out.parent / "config.yaml").read_text() == "model: other"
    assert "is not" in capsys.readouterr().out


def test_wrong_input(tmp_path, failing, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_of("beds")))
    out = tmp_path / "model.ckpt"

    def said(*flags: object) -> str:
        failure = failing(*flags, main=main)
        assert failure.status == 2
        assert not [name for name in os.listdir(tmp_path) if name not in ("config.yaml", "model.ckpt")]
        return failure.message

    assert "no such file" in said("--config", tmp_path / "none.yaml", "--out", out)
    assert ".safetensors" in said("--config", config, "--out", tmp_path / "model.bin")
    assert "unknown keyword" in said("--config", config, "--out", out, "model.params.heads=3")
    assert "dims=3" in said("--config", config, "--out", out, "model.params.unet_config.params.dims=3")
    out.write_text("precious")
    assert "--force" in said("--config", config, "--out", out)
    assert out.read_text() == "precious"
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**10}))
    assert "0 MiB are free" in said("--config", config, "--out", out, "--force")
    assert out.read_text() == "precious"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_memory_does_not_grow_with_the_model(tmp_path, name):
    """What a process has to itself, beside pages that belong to the file and can be given back at any time."""
    config = config_of("beds")
    config["model"]["params"]["unet_config"]["params"]["channel_mult"] = [2, 4, 8, 8]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    program = """
import re, sys, threading, time
import torch._dynamo  # which torch imports itself where an embedding is made without memory
from qdiff.cli.make_random_checkpoint import main
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
main(sys.argv[1:])
done = True
thread.join()
print("grew by", most - before)
"""
    words = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / name)]
    run = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    size = (tmp_path / name).stat().st_size >> 20
    assert size > 100
    assert int(run.stdout.rpartition("grew by ")[2]) < size / 3
