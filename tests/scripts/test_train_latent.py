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

from ddim.pretrained import load_weights
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


def write_config(path: Path, model: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"model": model}))
    return path


def write_images(folder: Path, part: str, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
    images = images.repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2).contiguous()
    save_file({"images": images, "labels": torch.arange(count) % CLASSES}, folder / f"{part}.safetensors")


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with both configs, images under ``data``, and a first stage's random weights."""
    write_config(tmp_path / "ae.yaml", FIRST_STAGE)
    write_config(tmp_path / "ldm.yaml", LATENT)
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", "train", 12)
    write_images(tmp_path / "data", "heldout", 5)
    torch.manual_seed(0)
    save_file(instantiate_from_config(FIRST_STAGE).state_dict(), tmp_path / "ae.safetensors")
    return tmp_path


def command(workplace: Path, kind: str, *flags: str, **changes: Any) -> list[str]:
    options = {"config": workplace / f"{kind}.yaml", "data": workplace / "data", "logdir": workplace / kind}
    options |= {"steps": 4, "batch_size": 2, "device": "cpu", "seed": 3}
    if kind == "ldm":
        options |= {"first_stage": workplace / "ae.safetensors", "grid_steps": 2}
    return [f"--{key}={value}" for key, value in (options | changes).items() if value is not None] + list(flags)


def run(workplace: Path, kind: str, *flags: str, **changes: Any) -> dict[str, Any]:
    """Train; returns the facts that were written."""
    {"ae": autoencoder, "ldm": diffusion}[kind].main(command(workplace, kind, *flags, **changes))
    folder = changes.get("logdir", workplace / kind)
    return json.loads((folder / "train.json").read_text())


# ---- configs -------------------------------------------------------------------------------------------------


def test_bundled_configs_fit_each_other_and_their_budgets() -> None:
    first_stage = load_model_config(REPOSITORY / "configs" / "autoencoder" / "emoji_kl.yaml")
    latent = load_model_config(REPOSITORY / "configs" / "latent-diffusion" / "emoji64.yaml")
    assert latent["params"]["first_stage_config"] == first_stage
    with torch.device("meta"):
        model = build_latent_diffusion(latent)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["first_stage_model"] == pytest.approx(0.95e6, rel=0.01)
    assert counts["model"] == pytest.approx(4.08e6, rel=0.01)
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
    latents = diffusion.encode_set(model.first_stage_model, data, "cpu")
    assert latents.mean.shape == latents.std.shape == (12, 4, SIZE // 2, SIZE // 2)
    model.scale_factor.fill_(1 / diffusion.latent_std(latents))
    z, noise, t, classes = diffusion.DiffusionTask(model, latents, drop=0.25).draw(4000)
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert (int(t.min()), int(t.max())) >= (0, 900)
    assert float((classes == CLASSES).float().mean()) == pytest.approx(0.25, abs=0.03)


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


@pytest.mark.parametrize(("kind", "share"), [("ae", 0.6), ("ldm", 0.8)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_falls_on_a_constant_batch(workplace: Path, kind: str, share: float, precision: str) -> None:
    torch.manual_seed(0)
    data = load_image_set(workplace / "data", "train", SIZE)
    if kind == "ae":
        task = autoencoder.FirstStageTask(instantiate_from_config(FIRST_STAGE), data.images, 1e-4)
    else:
        model = diffusion.build(LATENT, workplace / "ae.safetensors")
        latents = diffusion.encode_set(model.first_stage_model, data, "cpu")
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


@pytest.mark.parametrize("kind", ["ae", "ldm"])
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
@pytest.mark.parametrize("kind", ["ae", "ldm"])
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
    "no whole model": ("ldm", None, {"first_stage": None, "init": "ae.safetensors"}, "does not fit"),
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
        {"ae": autoencoder, "ldm": diffusion}[kind].main(command(workplace, kind, *flags, **changes))
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
