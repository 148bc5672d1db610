"""A miniature pixel model on disk, and commands run in this process."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from ddim.config import load_config
from ddim.unet import UNet
from qdiff.cli import make_calibration_data, sample_ddim

from .latent_models import LatentMiniature, make_miniature
from .text_models import TextMiniature, make_text_miniature

REPOSITORY = Path(__file__).resolve().parents[2]


def load_script(name: str) -> ModuleType:
    """A script that is a module of its own, not one of ``qdiff.cli``."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


CONFIG = {
    "data": {"dataset": "CIFAR10", "image_size": 8, "channels": 3, "rescaled": True},
    "model": {
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.1,
    },
    "diffusion": {"num_diffusion_timesteps": 100},
    "sampling": {"batch_size": 4},
}
STEPS = 5


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Miniature networks are faster on one thread, and the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Miniature:
    """Files of a model, and the flags that name them."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yml"

    @property
    def ckpt(self) -> Path:
        return self.folder / "tiny.ckpt"

    @property
    def calibration_set(self) -> Path:
        return self.folder / "cali.pt"

    def flags(self, *, ckpt: bool = True) -> list[str]:
        model = ["--config", str(self.config)] + (["--ckpt", str(self.ckpt)] if ckpt else [])
        return [*model, "--timesteps", str(STEPS), "--eta", "0", "--skip_type", "quad", "--device", "cpu"]

    def calibration_flags(self, steps: int = 2, samples: int = 4) -> list[str]:
        quick = ["--cali_iters", "8", "--cali_iters_a", "4", "--cali_batch_size", "4"]
        return [
            *quick,
            "--cali_st",
            str(steps),
            "--cali_n",
            str(samples),
            "--cali_data_path",
            str(self.calibration_set),
        ]


def write_model(folder: Path, config: dict) -> None:
    (folder / "tiny.yml").write_text(yaml.safe_dump(config))
    torch.manual_seed(0)
    model = UNet.from_config(load_config(folder / "tiny.yml"))
    for parameter in model.parameters():  # biases and gains as a trained network has them: not all 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.save(model.state_dict(), folder / "tiny.ckpt")


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> Miniature:
    """Config, random weights, and a calibration set that the command made."""
    tiny = Miniature(tmp_path_factory.mktemp("miniature"))
    write_model(tiny.folder, CONFIG)
    make_calibration_data.main([*tiny.flags(), "-n", "6", "--out", str(tiny.calibration_set)])
    return tiny


@dataclass(frozen=True)
class Failure:
    status: int
    message: str


@pytest.fixture
def failing(capsys) -> Callable[..., Failure]:
    """Runs a command that must exit, and returns what it said."""

    def run(*argv: object, main=sample_ddim.main) -> Failure:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in argv])
        return Failure(caught.value.code, capsys.readouterr().err)

    return run


@pytest.fixture(scope="session")
def latent(tmp_path_factory) -> Callable[[str], LatentMiniature]:
    """The miniature latent model of a kind: ``beds``, ``churches`` or ``classes``; made when it is first asked for."""
    parent = tmp_path_factory.mktemp("latent")
    return functools.cache(lambda kind: make_miniature(kind, parent))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Callable[[str], TextMiniature]:
    """The miniature text-to-image model of a kind: ``sd`` or ``laion``; made when it is first asked for."""
    parent = tmp_path_factory.mktemp("text")
    return functools.cache(lambda kind: make_text_miniature(kind, parent))


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a disk of its own; the test's parameter is its size, as ``mount`` takes it."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk, and not everywhere")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
