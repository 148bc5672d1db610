"""The training scripts of the latent models on miniature networks and a handful of images."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddim.pretrained import load_weights
from ldm.data.emoji import PROMPTS, pack_split
from ldm.modules.encoders.tokenizers import write_clip_tokenizer
from ldm.pretrained import build_latent_diffusion, load_latent_diffusion
from ldm.training import TrainOptions, learning_rate_factor, load_image_set, to_model, to_pixels
from ldm.training_loop import fit
from ldm.util import instantiate_from_config, load_model_config

from .conftest import REPOSITORY, load_script

autoencoder, diffusion = load_script("train_autoencoder"), load_script("train_ldm")

SIZE, CLASSES = 16, 3
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True,
            "resolution": SIZE,
            "in_channels": 3,
            "out_ch": 3,
            "z_channels": 4,
            "ch": 32,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    },
}
LATENT = copy.deepcopy(load_model_config(REPOSITORY / "configs" / "latent-diffusion" / "emoji64.yaml"))
LATENT["params"] |= {"image_size": SIZE // 2, "first_stage_config": FIRST_STAGE}
LATENT["params"]["unet_config"]["params"] |= {"channel_mult": [1], "attention_resolutions": [1]}
LATENT["params"]["cond_stage_config"]["params"]["n_classes"] = CLASSES + 1
TEXT = copy.deepcopy(load_model_config(REPOSITORY / "configs" / "latent-diffusion" / "emoji-text.yaml"))
TEXT["params"] |= {"image_size": SIZE // 2, "first_stage_config": FIRST_STAGE}
TEXT["params"]["unet_config"]["params"] |= {"channel_mult": [1], "attention_resolutions": [1], "context_dim": 16}
MERGES = [("r", "e"), ("re", "d</w>")]
TEXT["params"]["cond_stage_config"]["params"] |= {
    "max_length": 12,
    "text_config": {
        "vocab_size": 514 + len(MERGES),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
    },
}
SCRIPTS = {"ae": autoencoder, "ldm": diffusion, "text": diffusion}


def write_config(path: Path, model: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"model": model}))
    return path


def write_images(folder: Path, part: str, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
    images = images.repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2).contiguous()
    labels = torch.arange(count) % CLASSES
    captions = [f"red {number}" for number in range(count)]
    path = folder / f"{part}.safetensors"
    path.write_bytes(pack_split(images.numpy(), labels.tolist(), captions, captions, {}))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the configs, images under ``data``, a tokenizer, and a first stage's random weights."""
    write_config(tmp_path / "ae.yaml", FIRST_STAGE)
    write_config(tmp_path / "ldm.yaml", LATENT)
    write_config(tmp_path / "text.yaml", TEXT)
    write_clip_tokenizer(tmp_path / "tokenizer", MERGES, 12)
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", "train", 12)
    write_images(tmp_path / "data", "heldout", 5)
    torch.manual_seed(0)
    save_file(instantiate_from_config(FIRST_STAGE).state_dict(), tmp_path / "ae.safetensors")
    return tmp_path


def command(workplace: Path, kind: str, *flags: str, **changes: Any) -> list[str]:
    options = {"config": workplace / f"{kind}.yaml", "data": workplace / "data", "logdir": workplace / kind}
    options |= {"steps": 4, "batch_size": 2, "device": "cpu", "seed": 3}
    if kind != "ae":
        options |= {"first_stage": workplace / "ae.safetensors", "grid_steps": 2}
    return [f"--{key}={value}" for key, value in (options | changes).items() if value is not None] + list(flags)


def run(workplace: Path, kind: str, *flags: str, **changes: Any) -> dict[str, Any]:
    """Train; returns the facts that were written."""
    SCRIPTS[kind].main(command(workplace, kind, *flags, **changes))
    folder = changes.get("logdir", workplace / kind)
    return json.loads((folder / "train.json").read_text())


# ---- configs -------------------------------------------------------------------------------------------------


def test_bundled_configs_fit_each_other_and_their_budgets() -> None:
    first_stage = load_model_config(REPOSITORY / "configs" / "autoencoder" / "emoji_kl.yaml")
    for name, unet, encoder in (("emoji64", 4.08e6, 640), ("emoji-text", 4.16e6, 0.78e6)):
        latent = load_model_config(REPOSITORY / "configs" / "latent-diffusion" / f"{name}.yaml")
        assert latent["params"]["first_stage_config"] == first_stage
        with torch.device("meta"):
            model = build_latent_diffusion(latent)
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        assert counts["first_stage_model"] == pytest.approx(0.95e6, rel=0.01)
        assert counts["model"] == pytest.approx(unet, rel=0.01)
        assert counts["cond_stage_model"] == pytest.approx(encoder, rel=0.01)
        assert model.image_size * model.first_stage_model.downsampling == 64


# ---- pieces --------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert [learning_rate_factor(step, None) for step in (0, 499, 999, 50_000)] == [0.001, 0.5, 1, 1]
    factors = [learning_rate_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == max(factors) == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)


def test_pixels_survive_the_way_to_the_model_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_model(pixels)), pixels)


def test_psnr_is_that_of_the_closed_form() -> None:
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert autoencoder.psnr(black, black + 255) == pytest.approx(0)
    assert autoencoder.psnr(black, black + 1) == pytest.approx(48.1308, abs=1e-3)


def test_images_are_shifted_but_never_mirrored() -> None:
    ramp = torch.arange(SIZE, dtype=torch.uint8).expand(1, 3, SIZE, SIZE).contiguous()  # grows to the right
    task = autoencoder.FirstStageTask(instantiate_from_config(FIRST_STAGE), ramp, 0.0)
    drawn, noise = task.draw(32)
    pixels = to_pixels(drawn).int()
    assert pixels.shape == (32, 3, SIZE, SIZE)
    assert noise.shape == (32, 4, SIZE // 2, SIZE // 2)
    assert (pixels.diff(dim=3) >= 0).all()
    shifts = pixels[:, 0, 0, SIZE // 2] - SIZE // 2
    assert set(shifts.tolist()) == set(range(-autoencoder.SHIFT, autoencoder.SHIFT + 1))


def test_latents_are_scaled_to_unit_deviation_and_some_classes_dropped(workplace: Path) -> None:
    model = diffusion.build(LATENT, workplace / "ae.safetensors")
    data = load_image_set(workplace / "data", "train", SIZE)
    latents = diffusion.encode_set(model, data, "cpu")
    assert latents.mean.shape == latents.std.shape == (12, 4, SIZE // 2, SIZE // 2)
    model.scale_factor.fill_(1 / diffusion.latent_std(latents))
    z, noise, t, classes = diffusion.DiffusionTask(model, latents, drop=0.25).draw(4000)
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert (int(t.min()), int(t.max())) >= (0, 900)
    assert classes.shape == (4000, 1)
    assert float((classes == CLASSES).float().mean()) == pytest.approx(0.25, abs=0.03)


def text_task(workplace: Path, drop: float = 0.1) -> Any:
    """The model of captions on the workplace's images, with random weights."""
    torch.manual_seed(0)
    model = diffusion.build(TEXT, workplace / "ae.safetensors")
    diffusion.find_tokenizer(model, workplace / "text.yaml", None)
    latents = diffusion.encode_set(model, load_image_set(workplace / "data", "train", SIZE), "cpu")
    model.scale_factor.fill_(1 / diffusion.latent_std(latents))
    return diffusion.DiffusionTask(model, latents, drop)


def test_captions_are_drawn_with_their_images_and_some_are_empty(workplace: Path) -> None:
    task = text_task(workplace, drop=0.25)
    encoder = task.model.cond_stage_model
    z, _, _, tokens = task.draw(4000)
    empty = (tokens == encoder.tokenize([""])).all(1)
    assert float(empty.float().mean()) == pytest.approx(0.25, abs=0.03)
    expected = encoder.tokenize([f"red {number}" for number in range(12)])
    task.std.zero_()  # draws are the means themselves
    z, _, _, tokens = task.draw(200)
    for number in range(12):
        mine = (tokens == expected[number]).all(1)
        torch.testing.assert_close(z[mine], (task.mean[number] * task.model.scale_factor).expand_as(z[mine]))


def test_the_loss_of_captions_compiles_whole_and_text_encoder_and_unet_learn_from_it(workplace: Path) -> None:
    task = text_task(workplace)
    for parameter in task.model.parameters():  # a new UNet ends in zeros, behind which nothing has a gradient
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    batch = task.draw(4)
    loss = torch.compile(task.loss, backend="eager", fullgraph=True)(*batch)
    assert torch.equal(loss, task.loss(*batch))
    loss.backward()
    parameters = dict(task.model.named_parameters())
    assert not [name for name, p in parameters.items() if p.grad is not None and name.startswith("first_stage_model")]
    for name, parameter in parameters.items():
        if name.startswith(("cond_stage_model", "model")):
            assert parameter.grad.any(), name


def test_a_step_of_captions_leaves_nothing_to_the_host(workplace: Path) -> None:
    """On tensors of a GPU without values, draw and loss may neither ask for values nor make tensors elsewhere."""
    task = text_task(workplace)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    seen.append((str(function), tensor.device.type))
            return result

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in task.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    setattr(module, name, on_gpu(fake, tensor))
        with Watch(), torch.no_grad():
            loss = task.loss(*task.draw(4))
    assert loss.shape == ()
    assert len(seen) > 100
    assert {device for _, device in seen} == {"cuda"}


def on_gpu(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    moved = fake.from_tensor(tensor.detach()).to("cuda")
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


# ---- the loop ------------------------------------------------------------------------------------------------


class ConstantBatch(nn.Module):
    """A task that draws the same batch at every step."""

    def __init__(self, task: nn.Module):
        super().__init__()
        self.model, self.task, self.batch = task.model, task, task.draw(8)

    def draw(self, batch_size: int) -> tuple[Tensor, ...]:
        return self.batch

    def loss(self, *batch: Tensor) -> Tensor:
        return self.task.loss(*batch)


@pytest.mark.parametrize(
    ("kind", "precision", "share"),
    [
        ("ae", "fp32", 0.6),
        pytest.param("ae", "bf16", 0.6, marks=pytest.mark.thorough),
        pytest.param("ldm", "fp32", 0.8, marks=pytest.mark.thorough),
        ("text", "bf16", 0.8),
    ],
)
def test_loss_falls_on_a_constant_batch(workplace: Path, kind: str, share: float, precision: str) -> None:
    torch.manual_seed(0)
    data = load_image_set(workplace / "data", "train", SIZE)
    if kind == "ae":
        task = autoencoder.FirstStageTask(instantiate_from_config(FIRST_STAGE), data.images, 1e-4)
    elif kind == "text":
        task = text_task(workplace)
    else:
        model = diffusion.build(LATENT, workplace / "ae.safetensors")
        latents = diffusion.encode_set(model, data, "cpu")
        model.scale_factor.fill_(1 / diffusion.latent_std(latents))
        task = diffusion.DiffusionTask(model, latents, 0.1)
    frozen = {name: p.clone() for name, p in task.model.named_parameters() if not p.requires_grad}
    options = TrainOptions(steps=30, batch_size=8, lr=3e-3, ema=0.9, precision=precision)
    loop = fit(ConstantBatch(task), options, {}, workplace / "run", resume=False, started=time.perf_counter())
    losses = [loss for _, loss in loop.progress.losses]
    assert len(losses) == 30
    assert losses[-1] < share * losses[0]
    assert int(loop.ema.num_updates) == 30
    parameters = dict(task.model.named_parameters())
    assert all(torch.equal(parameters[name], before) for name, before in frozen.items())


# ---- the scripts ---------------------------------------------------------------------------------------------


def test_autoencoder_writes_what_the_first_stage_loads(workplace: Path) -> None:
    facts = run(workplace, "ae")
    assert (facts["steps_taken"], facts["images"], facts["heldout_images"], facts["device"]) == (4, 12, 5, "CPU")
    assert 3 < facts["heldout_psnr"] < 40
    path = workplace / "ae" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["steps_taken"] == "4"
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    load_weights(path, instantiate_from_config(FIRST_STAGE))
    assert diffusion.build(LATENT, path)
    assert Image.open(workplace / "ae" / "reconstructions.png").size == (5 * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)


def test_latent_model_is_written_whole(workplace: Path) -> None:
    facts = run(workplace, "ldm")
    assert facts["heldout_loss"] == pytest.approx(1, abs=0.5)
    model = load_latent_diffusion(workplace / "ldm")
    written = load_file(workplace / "ldm" / "model.safetensors")
    assert written["betas"].dtype == torch.float32
    assert written["model.diffusion_model.out.2.weight"].dtype == torch.float16
    images = load_image_set(workplace / "data", "train", SIZE).images
    latent = model.encode(to_model(images), noise=torch.randn(12, *model.latent_shape))
    assert float(latent.std()) == pytest.approx(1, abs=0.05)
    rows = (CLASSES * (SIZE + 2) + 2,)
    assert Image.open(workplace / "ldm" / "samples.png").size[1:] == rows


def test_a_model_of_captions_is_written_with_its_tokenizer(workplace: Path) -> None:
    elsewhere = (workplace / "tokenizer").rename(workplace / "words")
    facts = run(workplace, "text", tokenizer=elsewhere)
    folder = workplace / "text"
    model = load_latent_diffusion(folder)
    encoder = model.cond_stage_model
    assert encoder.tokenizer_folder == str(folder / "tokenizer")
    assert encoder.tokenize(["red"])[0, :4].tolist() == [514, 513, 515, 515]
    assert model.get_learned_conditioning(["red 3"]).shape == (1, 12, 16)
    assert Image.open(folder / "samples.png").size[1:] == (len(PROMPTS) * (SIZE + 2) + 2,)
    start = {"first_stage": None, "init": folder / "model.safetensors", "lr": 1e-9}
    again = run(workplace, "text", logdir=workplace / "on", tokenizer=elsewhere, **start)
    assert again["init"]["tokenizer_sha256"] == facts["tokenizer_sha256"]
    assert again["heldout_loss"] == pytest.approx(facts["heldout_loss"], abs=2e-3)


def test_a_whole_model_gives_its_first_stage(workplace: Path) -> None:
    run(workplace, "ldm", weights="fp32")
    model = diffusion.build(TEXT, workplace / "ldm" / "model.safetensors")
    own = load_file(workplace / "ae.safetensors")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.first_stage_model.state_dict().items())


@pytest.mark.parametrize("kind", ["ae", "text"])
def test_stopped_and_resumed_is_the_same_run(workplace: Path, kind: str) -> None:
    whole = run(workplace, kind, weights="fp32", logdir=workplace / "whole")
    stopped = run(workplace, kind, weights="fp32", minutes=1e-9)
    assert stopped["steps_taken"] == 1
    resumed = run(workplace, kind, "--resume", weights="fp32")
    assert resumed["steps_taken"] == 4
    assert resumed["losses"] == whole["losses"]
    expected, found = (load_file(folder / "model.safetensors") for folder in (workplace / "whole", workplace / kind))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    again = run(workplace, kind, "--resume", weights="fp32")  # nothing left but the results
    assert again["losses"] == whole["losses"]


@pytest.mark.parametrize("kind", ["ae", "ldm"])
def test_a_run_of_minutes_counts_its_steps_and_ends_with_the_rate_at_zero(workplace: Path, kind: str) -> None:
    facts = run(workplace, kind, steps=None, for_minutes=0.27)  # 16 s, of which 15 are kept for the results
    assert facts["steps"] == facts["steps_taken"] > 5
    assert facts["for_minutes"] == 0.27
    saved = torch.load(workplace / kind / "last.ckpt", weights_only=True)
    assert saved["run"]["progress"]["total"] == facts["steps"]
    again = run(workplace, kind, "--resume", steps=None, for_minutes=0.27)  # nothing left
    assert again["losses"] == facts["losses"]


def test_a_run_of_minutes_stopped_early_goes_on_to_the_same_end(workplace: Path) -> None:
    stopped = run(workplace, "ae", steps=None, for_minutes=0.3, minutes=1e-9)
    assert (stopped["steps"], stopped["steps_taken"]) == (None, 1)
    resumed = run(workplace, "ae", "--resume", steps=None, for_minutes=0.3)
    assert resumed["steps"] == resumed["steps_taken"] > 5


def test_training_goes_on_from_a_whole_model(workplace: Path) -> None:
    first = run(workplace, "ldm", weights="fp32")
    start = workplace / "ldm" / "model.safetensors"
    second = run(workplace, "ldm", logdir=workplace / "second", first_stage=None, init=start, weights="fp32", lr=1e-9)
    assert second["init"]["file"] == "model.safetensors"
    assert second["init"]["steps_taken"] == str(first["steps_taken"])
    assert "first_stage" not in second
    before, after = load_file(start), load_file(workplace / "second" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=1e-5)
    assert second["heldout_loss"] == pytest.approx(first["heldout_loss"], abs=1e-4)


def test_killed_run_goes_on_from_its_last_checkpoint(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(workplace, "ae", logdir=workplace / "whole")
    loop = sys.modules["ldm.training_loop"]
    monkeypatch.setattr(loop, "SECONDS_PER_CHECKPOINT", 0.0)
    draw, calls = autoencoder.FirstStageTask.draw, []

    def dies_in_step_3(task: nn.Module, batch_size: int) -> tuple[Tensor, ...]:
        calls.append(batch_size)
        if len(calls) == 3:
            raise MemoryError
        return draw(task, batch_size)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder.FirstStageTask, "draw", dies_in_step_3)
        with pytest.raises(MemoryError):
            run(workplace, "ae")
    assert not (workplace / "ae" / "model.safetensors").exists()
    assert run(workplace, "ae", "--resume")["losses"] == whole["losses"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["ae", "ldm", "text"])
@pytest.mark.parametrize("flags", [(), ("--compile",)], ids=["eager", "compiled"])
def test_captured_steps_learn_and_resume_on_a_gpu(workplace: Path, kind: str, flags: tuple[str, ...]) -> None:
    common = {"device": "cuda", "precision": "bf16", "steps": 1000, "batch_size": 8, "lr": 3e-3}
    stopped = run(workplace, kind, *flags, minutes=1e-9, **common)
    assert 200 <= stopped["steps_taken"] < 300
    resumed = run(workplace, kind, *flags, "--resume", **common)
    assert resumed["steps_taken"] == 1000
    assert resumed["losses"][: len(stopped["losses"])] == stopped["losses"]
    assert resumed["losses"][-1][1] < stopped["losses"][0][1]


def test_averages_are_what_is_written(workplace: Path) -> None:
    run(workplace, "ae", weights="fp32", lr=0.01)
    saved = torch.load(workplace / "ae" / "last.ckpt", weights_only=True)["state_dict"]
    written = load_file(workplace / "ae" / "model.safetensors")["decoder.conv_in.weight"]
    assert torch.equal(written, saved["ema.decoderconv_inweight"])
    assert not torch.equal(written, saved["task.model.decoder.conv_in.weight"])


# ---- wrong input ---------------------------------------------------------------------------------------------


def change_data(workplace: Path, **tensors: Tensor) -> None:
    path = workplace / "data" / "train.safetensors"
    save_file(load_file(path) | tensors, path)


def write_captions(workplace: Path, captions: list[str]) -> None:
    path = workplace / "data" / "train.safetensors"
    content = load_file(path)
    path.write_bytes(pack_split(content["images"].numpy(), content["labels"].tolist(), captions, captions, {}))


def no_heldout(workplace: Path) -> None:
    (workplace / "data" / "heldout.safetensors").unlink()


WRONG = {
    "no held-out file": ("ae", no_heldout, {}, "heldout.safetensors: no such file"),
    "not safetensors": (
        "ae",
        lambda w: (w / "data" / "train.safetensors").write_bytes(b"x" * 50),
        {},
        "not a safetensors file",
    ),
    "no classes": (
        "ae",
        lambda w: save_file({"images": torch.zeros(1)}, w / "data" / "train.safetensors"),
        {},
        "has no tensor 'labels'",
    ),
    "size": (
        "ae",
        lambda w: change_data(w, images=torch.zeros(12, 8, 8, 3, dtype=torch.uint8)),
        {},
        "images are uint8 12 x 8 x 8 x 3, expected uint8 N x 16 x 16 x 3",
    ),
    "classes' type": ("ldm", lambda w: change_data(w, labels=torch.zeros(12)), {}, "expected int64 12"),
    "too many classes": ("ldm", lambda w: change_data(w, labels=torch.arange(12)), {}, "classes run from 0 to 11"),
    "first stage missing": ("ldm", None, {"first_stage": "nowhere.safetensors"}, "no such checkpoint file"),
    "wrong kind of config": ("ae", None, {"config": "ldm.yaml"}, "is not AutoencoderKL"),
    "config missing": ("ae", None, {"config": "nowhere.yaml"}, "no such config file"),
    "ema": ("ae", None, {"ema": 1.0}, "--ema 1.0"),
    "steps": ("ldm", None, {"steps": 0}, "--steps 0"),
    "two lengths": ("ldm", None, {"for_minutes": 1.0}, "not allowed with argument"),
    "no time": ("ldm", None, {"steps": None, "for_minutes": 0.0}, "--for_minutes 0.0"),
    "two starts": ("ldm", None, {"init": "ae.safetensors"}, "not allowed with argument"),
    "no whole model": ("ldm", None, {"first_stage": None, "init": "ae.safetensors"}, "holds no UNet"),
    "tokenizer missing": ("text", lambda w: (w / "tokenizer" / "merges.txt").unlink(), {}, "holds no tokenizer"),
    "tokenizer of another model": (
        "text",
        lambda w: write_clip_tokenizer(w / "tokenizer", MERGES[:1]),
        {},
        "has 515 tokens, the text encoder of",
    ),
    "tokenizer of no use": ("ldm", None, {"tokenizer": "tokenizer"}, "is conditional on classes"),
    "no captions": (
        "text",
        lambda w: save_file(load_file(w / "data" / "train.safetensors"), w / "data" / "train.safetensors"),
        {},
        "has no captions",
    ),
    "long captions": ("text", lambda w: write_captions(w, ["red " * 11] * 12), {}, "12 captions have more than 12"),
    "too few captions": ("text", lambda w: write_captions(w, ["red"] * 3), {}, "has 3 captions of 12 images"),
    "drop": ("ldm", None, {"drop": 1.5}, "--drop 1.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line_and_status_2(workplace: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, spoil, changes, message = WRONG[case]
    if spoil is not None:
        spoil(workplace)
    changes = {key: workplace / value if isinstance(value, str) else value for key, value in changes.items()}
    refused(workplace, kind, message, capsys, **changes)
    assert not (workplace / kind).exists()


def refused(workplace: Path, kind: str, message: str, capsys: Any, *flags: str, **changes: Any) -> None:
    with pytest.raises(SystemExit) as failure:
        SCRIPTS[kind].main(command(workplace, kind, *flags, **changes))
    assert failure.value.code == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert message in error
    assert error.count("\n") == 1


def test_earlier_run_is_neither_overwritten_nor_mixed_up(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(workplace, "ae", "--resume: there is no checkpoint", capsys, "--resume")
    run(workplace, "ae", steps=1)
    capsys.readouterr()
    refused(workplace, "ae", "belongs to an earlier run", capsys, steps=1)
    refused(workplace, "ae", "was made with lr 0.001, not 0.1", capsys, "--resume", steps=1, lr=0.1)
    (workplace / "ae" / "last.ckpt").write_bytes(b"damaged")
    refused(workplace, "ae", "is not a checkpoint of this script", capsys, "--resume", steps=1)


def test_missing_lightning_is_named_with_its_extra(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ldm.training_loop")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    refused(workplace, "ae", "pip install -e '.[train]'", capsys)
