"""Files that cannot be used: one message that names the remedy, status 2, nothing left behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from ddim.unet import UNet
from qdiff import files
from qdiff.cli import pipeline, run_folder
from qdiff.cli.pixel import PixelSampler
from qdiff.cli.sample_ddim import main

from .conftest import CONFIG, write_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def refused(miniature, tmp_path, failing):
    """Runs the sampling command, which must refuse; returns its message."""

    def run(*flags, base: list[str] | None = None) -> str:
        out = tmp_path / "out"
        model = miniature.flags() if base is None else [*base, "--timesteps", 5]
        failure = failing(*model, "-l", out, "--max_images", 0, *flags, main=main)
        assert failure.status == 2
        assert not out.exists()
        assert "Traceback" not in failure.message
        message = failure.message.partition("error: ")[2]
        assert 0 < message.count("\n") <= 5
        return message

    return run


@pytest.fixture(scope="module")
def checkpoints(miniature, tmp_path_factory) -> dict[str, Path]:
    """Run folders of calibrations: weights only without --split, and both with it."""
    folders = {}
    for name, flags in {"plain": [], "split_act": ["--split", "--quant_act", "--a_sym"]}.items():
        out = tmp_path_factory.mktemp(name)
        calibration = ["--ptq", "--weight_bit", "4", *flags, *miniature.calibration_flags()]
        main([*miniature.flags(), *calibration, "--max_images", "0", "-l", str(out)])
        (folders[name],) = (out / "samples").iterdir()
    return folders


def config_with(tmp_path: Path, change) -> Path:
    content = copy.deepcopy(CONFIG)
    change(content)
    path = tmp_path / "changed.yml"
    path.write_text(yaml.safe_dump(content))
    return path


CONFIGS = {
    "missing key": (lambda c: c["model"].pop("ch"), ["model.ch", "missing", "int"]),
    "unknown key": (lambda c: c["model"].update(depth=3), ["model.depth", "unknown"]),
    "wrong type": (lambda c: c["data"].update(image_size="big"), ["data.image_size", "int"]),
    "missing section": (lambda c: c.pop("data"), ["data", "missing"]),
    "impossible betas": (lambda c: c["diffusion"].update(beta_end=2.0), ["beta_end"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(refused, miniature, tmp_path, case):
    change, words = CONFIGS[case]
    path = config_with(tmp_path, change)
    message = refused(base=["--config", str(path), "--ckpt", str(miniature.ckpt)])
    for word in words:
        assert word in message


def test_config_that_is_not_yaml(refused, miniature, tmp_path):
    (tmp_path / "x.yml").write_text("data: [")
    assert "not a YAML file" in refused(base=["--config", tmp_path / "x.yml", "--ckpt", miniature.ckpt])
    assert "no such file" in refused(base=["--config", tmp_path / "none.yml", "--ckpt", miniature.ckpt])


SETS = {
    "tensor": (lambda c: c["xs"][0], ["--cali_st 1"]),
    "no timesteps": (lambda c: {"xs": c["xs"]}, ["'ts'"]),
    "shape": (lambda c: {**c, "xs": [x[:, :1] for x in c["xs"]]}, ["6x1x8x8", "Nx3x8x8"]),
    "few": (lambda c: {k: [v[:2] for v in c[k]] for k in c}, ["2 samples", "--cali_n 4"]),
    "nan": (lambda c: {**c, "xs": [x / (i != 2) * (i != 2) for i, x in enumerate(c["xs"])]}, ["step 2", "NaN"]),
}


@pytest.mark.parametrize("case", SETS)
def test_calibration_sets(refused, miniature, tmp_path, case):
    change, words = SETS[case]
    path = tmp_path / "set.pt"
    torch.save(change(torch.load(miniature.calibration_set, weights_only=True)), path)
    message = refused("--ptq", "--cali_st", 2, "--cali_n", 4, "--cali_data_path", path)
    assert str(path) in message
    for word in words:
        assert word in message


def test_truncated_calibration_set(refused, miniature, tmp_path):
    path = tmp_path / "set.pt"
    path.write_bytes(miniature.calibration_set.read_bytes()[:1000])
    assert "truncated" in refused("--ptq", "--cali_st", 2, "--cali_n", 4, "--cali_data_path", path)


class Bomb:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("flag", ["--ckpt", "--cali_ckpt", "--cali_data_path"])
def test_code_in_a_file_is_refused_and_not_run(refused, miniature, tmp_path, flag):
    path, touched = tmp_path / "bomb.pth", tmp_path / "touched"
    torch.save({"model.conv_in.weight": Bomb(touched), "conv_in.weight": Bomb(touched)}, path)
    flags = {
        "--ckpt": [],
        "--cali_ckpt": ["--ptq", "--resume", "--cali_ckpt", path],
        "--cali_data_path": ["--ptq", "--cali_data_path", path],
    }[flag]
    base = ["--config", miniature.config, "--ckpt", path if flag == "--ckpt" else miniature.ckpt]
    assert "refused" in refused(*flags, base=base)
    assert not touched.exists()


def test_full_precision_checkpoints(refused, miniature, tmp_path):
    def message(path: Path) -> str:
        return refused(base=["--config", miniature.config, "--ckpt", path])

    assert "no such file" in message(tmp_path / "none.ckpt")
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(miniature.ckpt.read_bytes()[:5000])
    assert "truncated" in message(truncated)
    other = tmp_path / "other"
    other.mkdir()
    write_model(other, {**CONFIG, "model": {**CONFIG["model"], "ch": 64}})
    assert "does not fit" in message(other / "tiny.ckpt")


def test_no_published_weights(refused, miniature, tmp_path):
    path = config_with(tmp_path, lambda c: c["data"].update(dataset="MINE"))
    assert "--ckpt" in refused(base=["--config", path, "--use_pretrained"])


def cases(name: str, flags: list[str], words: list[str]) -> list:
    return [pytest.param(name, form, flags, words, id=f"{name}-{form}-{' '.join(flags)}") for form in FORMS]


FORMS = ("ckpt.pth", "ckpt.safetensors")
MISFITS = [
    *cases("plain", ["--weight_bit", "8"], ["--weight_bit 8", "--weight_bit 4"]),
    *cases("plain", ["--weight_bit", "4", "--split"], ["without --split"]),
    *cases("plain", ["--weight_bit", "4", "--quant_act"], ["--quant_act", "without activations", "--resume_w"]),
    *cases("split_act", ["--weight_bit", "4", "--quant_act", "--act_bit", "6"], ["--act_bit 6", "--act_bit 8"]),
    *cases("split_act", ["--weight_bit", "4", "--quant_act", "--sm_abit", "16"], ["--sm_abit 16", "--sm_abit 8"]),
]


@pytest.mark.parametrize(("name", "form", "flags", "words"), MISFITS)
def test_flags_that_contradict_the_checkpoint(refused, checkpoints, name, form, flags, words):
    message = refused("--ptq", "--resume", "--cali_ckpt", checkpoints[name] / form, *flags)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("plain", ["--weight_bit", "4", "--split"], ["--split"]),
        ("split_act", ["--weight_bit", "4"], ["--split"]),
        ("split_act", ["--weight_bit", "2", "--split"], ["--weight_bit"]),
        ("plain", ["--weight_bit", "4", "--quant_act"], ["--quant_act"]),
    ],
)
def test_checkpoint_without_facts_that_does_not_fit(refused, checkpoints, tmp_path, name, flags, words):
    path = tmp_path / "ckpt.pth"
    path.write_bytes((checkpoints[name] / "ckpt.pth").read_bytes())
    message = refused("--ptq", "--resume", "--cali_ckpt", path, *flags)
    for word in words:
        assert word in message


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_of_another_architecture(refused, checkpoints, tmp_path, form):
    write_model(tmp_path, {**CONFIG, "model": {**CONFIG["model"], "ch_mult": [1, 1]}})
    base = ["--config", tmp_path / "tiny.yml", "--ckpt", tmp_path / "tiny.ckpt"]
    message = refused("--ptq", "--resume", "--cali_ckpt", checkpoints["plain"] / form, base=base)
    assert "model.ch_mult is [1, 1]" in message
    assert "[1, 2]" in message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_truncated_calibrated_checkpoint(refused, checkpoints, tmp_path, form, share):
    path = tmp_path / form
    content = (checkpoints["plain"] / form).read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in refused("--ptq", "--weight_bit", 4, "--resume", "--cali_ckpt", path)


def test_place_that_cannot_be_written_to(miniature, tmp_path, failing):
    (tmp_path / "file").write_text("mine")
    failure = failing(*miniature.flags(), "-l", tmp_path / "file", "--max_images", 1, main=main)
    assert failure.status == 2
    assert str(tmp_path / "file") in failure.message
    assert (tmp_path / "file").read_text() == "mine"


def test_disk_full_while_sampling(miniature, tmp_path, failing, monkeypatch):
    """Earlier images stay whole, and the run goes on when there is room again."""
    written = []
    original = run_folder.write_atomically

    def write(path, content, **options):
        if path.name == "000002.png" and not written:
            written.append(path)
            raise OSError(28, "No space left on device", str(path))
        return original(path, content, **options)

    monkeypatch.setattr(run_folder, "write_atomically", write)
    flags = [*miniature.flags(), "--max_images", 4, "--batch_size", 1]
    failure = failing(*flags, "-l", tmp_path, main=main)
    assert failure.status == 2
    assert "000002.png: No space left on device" in failure.message
    (folder,) = (tmp_path / "samples").iterdir()
    assert sorted(os.listdir(folder / "img")) == ["000000.png", "000001.png"]
    main([*map(str, flags), "-l", str(folder)])
    assert len(os.listdir(folder / "img")) == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("name", "before"),
    [("ckpt.pth", []), ("ckpt.json", ["ckpt.pth"]), ("ckpt.safetensors", ["ckpt.json", "ckpt.pth"])],
)
def test_disk_full_while_writing_a_checkpoint(miniature, tmp_path, failing, monkeypatch, name, before):
    make_temporary = files.tempfile.mkstemp

    def mkstemp(*, prefix, **options):
        if prefix == f".{name}.":
            return os.open("/dev/full", os.O_WRONLY), str(tmp_path / "never made")
        return make_temporary(prefix=prefix, **options)

    monkeypatch.setattr(files.tempfile, "mkstemp", mkstemp)
    flags = ["--ptq", "--max_images", 0, *miniature.calibration_flags()]
    failure = failing(*miniature.flags(), *flags, "-l", tmp_path, main=main)
    assert failure.status == 2
    assert f"{name}: No space left on device; make room" in failure.message
    (folder,) = (tmp_path / "samples").iterdir()
    assert sorted(path.name for path in folder.glob("*ckpt*")) == before


def test_too_little_room_is_said_before_calibrating(refused, miniature, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    message = refused("--ptq", *miniature.calibration_flags())
    assert "1 MiB are free" in message
    assert "-l" in message


@pytest.mark.parametrize(
    ("stage", "remedy"),
    [
        ("load", "end what else runs there, or use another --device"),
        ("sample", "lower --batch_size (now 4)"),
        ("cali", "lower --cali_batch_size (now 4)"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory\nand more")],
    ids=type,
)
def test_out_of_gpu_memory(miniature, tmp_path, failing, monkeypatch, stage, remedy, error):
    def too_much(*_args, **_options):
        raise error

    owner, name = {
        "load": (UNet, "to"),
        "sample": (PixelSampler, "__call__"),
        "cali": (pipeline, "calibrate"),
    }[stage]
    monkeypatch.setattr(owner, name, too_much)
    flags = ["--ptq", *miniature.calibration_flags()] if stage == "cali" else []
    failure = failing(*miniature.flags(), *flags, "-l", tmp_path, "--max_images", 1, main=main)
    assert failure.status == 2
    assert f"error: out of GPU memory; {remedy}" in failure.message.splitlines()[-1]
    assert "Traceback" not in failure.message


# The command in a process whose allocator may take so many MiB of the GPU.
WITHIN = """\
import sys, torch
_, total = torch.cuda.mem_get_info()
torch.cuda.set_per_process_memory_fraction(int(sys.argv.pop(1)) * 2**20 / total)
from qdiff.cli.sample_ddim import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("room", "remedy"),
    [(0, "end what else runs there, or use another --device"), (192, "lower --batch_size (now 8192)")],
    ids=["weights", "batch"],
)
def test_a_gpu_that_runs_out(miniature, tmp_path, room, remedy):
    """The run goes on in smaller batches, or when there is room."""
    words = [*miniature.flags(), "--device", "cuda", "--max_images", "8192"]

    def run(mebibytes: int, *more: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHIN, mebibytes, *words, *more]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, check=False)

    failed = run(room, "--batch_size", 8192, "-l", tmp_path)
    assert failed.returncode == 2
    assert f"error: out of GPU memory; {remedy}" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    (folder,) = (tmp_path / "samples").iterdir()
    assert not list((folder / "img").iterdir())
    again = run(room or 192, "--batch_size", 256, "-l", folder)
    assert again.returncode == 0, again.stderr
    assert len(list((folder / "img").glob("*.png"))) == 8192
