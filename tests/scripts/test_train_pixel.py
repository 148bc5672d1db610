"""The training script on a miniature network and a handful of images."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddim.config import config_from_dict, load_config
from ddim.unet import UNet

from .conftest import load_script

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = """
data: {dataset: FashionMNIST, image_size: 32, channels: 1, rescaled: true}
model: {in_channels: 1, out_ch: 1, ch: 32, ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: [16], ema_rate: 0.9}
diffusion: {beta_schedule: linear, beta_start: 0.0001, beta_end: 0.02, num_diffusion_timesteps: 1000}
training: {batch_size: 2}
optim: {lr: 0.001}
"""


script = load_script("train_pixel_ddpm")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with ``tiny.yml`` and eight random images under ``data``."""
    (tmp_path / "tiny.yml").write_text(TINY)
    (tmp_path / "data").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "data" / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "data" / "train-labels-idx1-ubyte.gz", np.arange(8, dtype=np.uint8))
    return tmp_path


def command(workplace: Path, run: str = "run", **changes: Any) -> list[str]:
    options = {"config": workplace / "tiny.yml", "data": workplace / "data", "logdir": workplace / run}
    options |= {"steps": 4, "seed": 3, "device": "cpu"} | changes
    return [f"--{key}={value}" for key, value in options.items() if value is not None]


def make_trainer(images: Tensor, **changes: Any) -> Any:
    config = config_from_dict(yaml.safe_load(TINY))
    options = {"batch_size": 4, "lr": 1e-3, "ema": 0.5, "seed": 0, "steps": 10} | changes
    return script.Trainer(config, script.TrainOptions(**options), images)


def test_bundled_config_is_the_small_model() -> None:
    model = UNet.from_config(load_config(REPOSITORY / "configs" / "fashion_mnist.yml"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(2.24e6, rel=0.005)


def test_writes_averaged_weights_that_describe_themselves(workplace: Path) -> None:
    script.main(command(workplace))
    path = workplace / "run" / "model.safetensors"
    model = UNet.from_config(load_config(workplace / "tiny.yml"))
    model.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        header = file.metadata()
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    facts = json.loads((workplace / "run" / "train.json").read_text())
    assert (facts["steps"], facts["seed"], facts["device"], facts["images"]) == (4, 3, "CPU", 8)
    assert header["steps"] == "4"
    assert header["torch"] == torch.__version__
    assert config_from_dict(json.loads(header["config"])) == load_config(workplace / "tiny.yml")
    assert list((workplace / "run" / "tensorboard").iterdir())


def test_a_killed_run_goes_on_bit_for_bit(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SECONDS_PER_CHECKPOINT", 0.0)
    script.main(command(workplace, "whole"))

    run = script.Trainer.run
    monkeypatch.setattr(
        script.Trainer, "run", lambda self, progress, n: killed() if progress.step == 2 else run(self, progress, n)
    )

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.main(command(workplace, "parts"))
    assert not (workplace / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(script.Trainer, "run", run)
    script.main([*command(workplace, "parts"), "--resume"])

    whole, parts = (load_file(workplace / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    facts = [json.loads((workplace / name / "train.json").read_text()) for name in ("whole", "parts")]
    assert facts[0]["losses"] == facts[1]["losses"]


def test_an_interrupted_write_leaves_the_last_checkpoint_whole(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.main(command(workplace))
    path = workplace / "run" / "checkpoint.pt"
    before = path.read_bytes()
    trainer = make_trainer(torch.zeros(4, 1, 32, 32, dtype=torch.uint8))

    def half(content: Any, file: Any) -> None:
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(script.Trainer, "state", lambda self: {})
    with pytest.raises(KeyboardInterrupt):
        script.save_checkpoint(path, trainer, script.Progress())
    assert path.read_bytes() == before


def test_minutes_become_steps(workplace: Path) -> None:
    script.main(command(workplace, steps=None, minutes=0.17))  # a little more than what is kept for writing
    facts = json.loads((workplace / "run" / "train.json").read_text())
    assert facts["steps"] >= 2
    assert facts["seconds"] < 60


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"steps": 0}, [], "--steps 0: must be above 0"),
        ({"lr": 0.0}, [], "--lr 0.0: must be above 0"),
        ({"ema": 1.0}, [], "--ema 1.0: must lie in [0, 1)"),
        ({"minutes": 1}, [], "not allowed with argument"),
        ({}, ["--resume"], "there is no checkpoint"),
        ({"data": "nowhere", "config": "missing.yml"}, [], "no such config file"),
    ],
)
def test_wrong_input_is_refused(
    workplace: Path, changes: dict[str, Any], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(command(workplace, **changes) + extra)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 4}, "was made with seed 3, not 4"), ({"steps": 9}, "belongs to a run of 4 steps, not 9")],
)
def test_resume_needs_the_same_settings(
    workplace: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(command(workplace))
    with pytest.raises(SystemExit):
        script.main([*command(workplace, **changes), "--resume"])
    assert message in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(command(workplace))
    with pytest.raises(SystemExit):
        script.main(command(workplace))
    assert "belongs to an earlier run" in capsys.readouterr().err


def test_learning_rate_warms_up_stays_and_falls() -> None:
    factor = script.learning_rate_factor
    assert factor(0, 20000) == pytest.approx(1 / 1000)
    assert factor(499, 20000) == pytest.approx(0.5)
    assert factor(999, 20000) == factor(10000, 20000) == 1
    assert factor(15000, 20000) == pytest.approx(0.5)
    assert factor(20000, 20000) == 0
    assert factor(30000, None) == 1  # length unknown yet
    assert factor(9, 100) == 1  # a short run warms up over a tenth of itself


def test_noisy_images_follow_the_forward_process() -> None:
    """A model that knows the only image can work the noise out of x_t and t (Ho et al. 2020, equation 4)."""
    trainer = make_trainer(torch.full((1, 1, 32, 32), 51, dtype=torch.uint8))
    x0 = 2 * 51 / 255 - 1
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    seen = []

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        a = alpha_bar[t].reshape(-1, 1, 1, 1)
        return ((x - a.sqrt() * x0) / (1 - a).sqrt()).float() + 0 * sum(p.sum() for p in trainer.params)

    trainer.forward = oracle
    assert trainer.run(script.Progress(total=20), 20) < 1e-6
    assert min(seen) < 200
    assert max(seen) > 800


def test_average_follows_the_weights() -> None:
    trainer = make_trainer(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), ema=0.5)
    expected = [p.detach().clone() for p in trainer.params]
    progress = script.Progress(total=10)
    for _ in range(3):
        decay = min(0.5, (1 + progress.step) / (10 + progress.step))
        trainer.run(progress, 1)
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, trainer.params, strict=True)]
    for e, average in zip(expected, trainer.average, strict=True):
        torch.testing.assert_close(average, e)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    trainer = make_trainer(torch.zeros(4, 1, 32, 32, dtype=torch.uint8))
    progress = script.Progress(total=60)
    first = trainer.run(progress, 5)
    trainer.run(progress, 40)
    assert trainer.run(progress, 10) < 0.5 * first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile_model", [False, True])
def test_replayed_steps_train_as_eager_ones_do(compile_model: bool) -> None:
    images = torch.randint(256, (16, 1, 32, 32), dtype=torch.uint8, device="cuda")
    losses = []
    for captured in (False, True):
        trainer = make_trainer(images, device="cuda", compile=compile_model and captured, seed=1)
        progress = script.Progress(total=300)
        if captured:
            trainer.prepare(progress)
            assert trainer.graph is not None
        trainer.run(progress, 250 - progress.step)
        losses.append(trainer.run(progress, 50))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
