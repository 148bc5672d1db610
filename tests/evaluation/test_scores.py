"""The usual scores against torch-fidelity's own command line, a closed form, and the network written out again."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.models import vgg16

from qdiff.cli import evaluate
from qdiff.evaluation.errors import EvaluationError
from qdiff.evaluation.fidelity import INCEPTION, find_weights, lpips_network
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance, holds_statistics
from qdiff.evaluation.image_sets import load_image_set

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT, SUBSET = 12, 8


def write_images(folder: Path, count: int, seed: int, size: int = 32) -> Path:
    """Soft blots, in PNG files."""
    draws = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        blot = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blot.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    parent = tmp_path_factory.mktemp("images")
    return write_images(parent / "a", COUNT, 0), write_images(parent / "b", COUNT, 1)


def run(*words: object) -> None:
    assert evaluate.main([*map(str, words), "--device", "cpu", "--force"]) == 0


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*map(str, words), "--device", "cpu"])
    assert caught.value.code == 2
    return capsys.readouterr().err


def fidelity_command(*words: object) -> dict[str, float]:
    """torch-fidelity's own, on a CPU."""
    pytest.importorskip("torch_fidelity")
    flags = ["--cpu", "--json", "--silent", "--save-cpu-ram", "--no-cache", "-b", "50"]
    done = subprocess.run(
        [sys.executable, "-m", "torch_fidelity.fidelity", *flags, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_all_scores_are_those_of_torch_fidelity(
    folders: tuple[Path, Path], inception_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    weights = ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", inception_weights]
    sizes = ["--kid-subset-size", SUBSET, "--isc-splits", 4]
    theirs = fidelity_command("--input1", a, "--input2", b, "--isc", "--fid", "--kid", "--prc", *weights, *sizes)

    words = ["--images", a, "--inception_weights", inception_weights, "--json", tmp_path / "scores.json"]
    scores = ["--metrics", "fid,is,kid,prc", "--prc_network", "same", "--kid_subset_size", SUBSET, "--isc_splits", 4]
    run(*words, "--reference", b, *scores)
    ours = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["fid"] > 0.01
    assert ours["inception_score"]["mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["inception_score"]["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-3)
    assert ours["kid"]["mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["kid"]["std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))
    said = capsys.readouterr().out
    assert f"| FID             | {ours['fid']:.5f}" in said


@pytest.mark.thorough
def test_images_are_no_distance_from_what_was_stored_of_them(
    folders: tuple[Path, Path], inception_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In batches of another size too."""
    words = ["--images", folders[0], "--inception_weights", inception_weights, "--json", tmp_path / "scores.json"]
    run(*words, "--metrics", "is", "--save_statistics", tmp_path / "a.npz")
    run(*words, "--reference", tmp_path / "a.npz", "--metrics", "fid", "--batch_size", 7)
    assert json.loads((tmp_path / "scores.json").read_text())["metrics"]["fid"] == pytest.approx(0, abs=1e-4)
    assert "stored statistics serve" in fails(capsys, *words[:4], "--reference", tmp_path / "a.npz", "--metrics", "kid")


def test_precision_and_recall_by_vgg16(folders: tuple[Path, Path], vgg16_weights: Path, tmp_path: Path) -> None:
    for folder in folders:
        for path in sorted(folder.iterdir())[:6]:
            (tmp_path / folder.name).mkdir(exist_ok=True)
            (tmp_path / folder.name / path.name).write_bytes(path.read_bytes())
    a, b = (tmp_path / folder.name for folder in folders)
    theirs = fidelity_command("--input1", a, "--input2", b, "--prc", "--feature-extractor-weights-path", vgg16_weights)
    words = ["--images", a, "--reference", b, "--metrics", "prc", "--vgg16_weights", vgg16_weights]
    run(*words, "--json", tmp_path / "scores.json")
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["metrics"] == pytest.approx({name: theirs[name] for name in ("precision", "recall")})
    assert record["precision_recall_features"].startswith("vgg16 sha256:")


def test_frechet_distance_of_stored_gaussians_has_its_closed_form(tmp_path: Path) -> None:
    """Covariances that commute: |m|^2 + the sum of (sqrt a - sqrt b)^2."""
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    a, b = torch.arange(1.0, 9.0, dtype=torch.float64), torch.arange(9.0, 1.0, -1.0, dtype=torch.float64)
    means = torch.zeros(8, dtype=torch.float64), torch.full((8,), 0.5, dtype=torch.float64)
    for name, mean, values in (("a.npz", means[0], a), ("b.safetensors", means[1], b)):
        FeatureStatistics(mean, basis @ values.diag() @ basis.T, 100, name).save(tmp_path / name)
        assert holds_statistics(tmp_path / name)
    one, other = (FeatureStatistics.load(tmp_path / name) for name in ("a.npz", "b.safetensors"))
    assert frechet_distance(one, other) == pytest.approx(2 + float((a.sqrt() - b.sqrt()).square().sum()))


def test_statistics_of_another_network_are_refused() -> None:
    one, other = (FeatureStatistics(torch.zeros(2), torch.eye(2), 9, name, name) for name in ("inception", "vgg16"))
    with pytest.raises(ValueError, match="different networks"):
        frechet_distance(one, other)


def lpips_written_out(a: Tensor, b: Tensor, vgg: Path, lin: Path) -> Tensor:
    """Zhang et al. 2018, equation 1, on the five layers of VGG16 before its poolings."""
    network = vgg16()
    network.load_state_dict(torch.load(vgg, weights_only=True))
    linear = torch.load(lin, weights_only=True)
    shift, scale = (torch.tensor(x)[None, :, None, None] for x in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    x, y = (((images.float() / 127.5 - 1) - shift) / scale for images in (a, b))
    total, layer = torch.zeros(len(a)), 0
    for number, module in enumerate(network.features):
        x, y = module(x), module(y)
        if number in (3, 8, 15, 22, 29):
            difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
            total += (difference * linear[f"lin{layer}.model.1.weight"]).sum(1).mean((1, 2))
            layer += 1
    return total


@torch.no_grad()
def test_lpips_is_the_papers_formula(vgg16_weights: Path, lpips_weights: Path) -> None:
    pytest.importorskip("torch_fidelity")
    before = torch.hub.get_dir()
    network = lpips_network(lpips_weights, vgg16_weights, torch.device("cpu"))
    assert torch.hub.get_dir() == before
    a, b = torch.randint(256, (2, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = network(a, b).reshape(-1)
    torch.testing.assert_close(found, lpips_written_out(a, b, vgg16_weights, lpips_weights), rtol=1e-4, atol=1e-6)
    assert found.min() > 0


@torch.no_grad()
def test_lpips_of_pairs_on_disk(
    folders: tuple[Path, Path], vgg16_weights: Path, lpips_weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch_fidelity")
    a, b = (load_image_set(folder) for folder in folders)
    torch.save(a[:5], tmp_path / "a.pt")
    torch.save(b[:5], tmp_path / "b.pt")
    words = ["--images", tmp_path / "a.pt", "--paired", tmp_path / "b.pt", "--batch_size", 2, "--metrics", "lpips"]
    run(*words, "--vgg16_weights", vgg16_weights, "--lpips_weights", lpips_weights, "--json", tmp_path / "scores.json")
    found = json.loads((tmp_path / "scores.json").read_text())["metrics"]["lpips"]
    expected = lpips_written_out(a[:5], b[:5], vgg16_weights, lpips_weights)
    assert found["mean"] == pytest.approx(expected.mean().item(), rel=1e-3)
    assert found["worst"] == pytest.approx(expected.max().item(), rel=1e-3)
    assert found["worst_image"] == expected.argmax()


def test_missing_weights_are_one_error_with_the_remedies(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody is there
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    try:
        said = fails(capsys, "--images", folders[0], "--reference", folders[1])
    finally:
        torch.hub.set_dir(before)
    assert str(tmp_path / "hub" / "checkpoints" / INCEPTION.name) in said
    assert "--inception_weights" in said
    assert "Traceback" not in said


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_hostile_weights_are_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Hostile(tmp_path / "mark")}, tmp_path / "weights.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(EvaluationError, match="not a file of weights"):
            find_weights(INCEPTION, tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_other_weights_are_refused(
    folders: tuple[Path, Path], vgg16_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_fidelity")
    words = ["--images", folders[0], "--reference", folders[1], "--inception_weights", vgg16_weights]
    assert "not the weights of Inception v3" in fails(capsys, *words)


def test_without_the_extra_the_error_names_it(folders: tuple[Path, Path]) -> None:
    """In a process in which the package cannot be imported, as where it is not installed."""
    code = (
        "import sys; sys.modules['torch_fidelity'] = None\n"
        "from qdiff.cli.evaluate import main\n"
        f"main(['--images', {str(folders[0])!r}, '--reference', {str(folders[1])!r}, '--device', 'cpu'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install torch-fidelity" in done.stderr
    assert "Traceback" not in done.stderr
