from __future__ import annotations

import gzip
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as TF

from ddim import datasets
from ddim.config import DataConfig
from ddim.datasets import DEBIAN_FASHION_MNIST, DatasetUnavailable, open_dataset, read_idx

DIGITS = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
CLASSES = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    (tmp_path / "debian").mkdir()
    for split in ("train", "t10k"):
        write_idx(tmp_path / "debian" / f"{split}-images-idx3-ubyte.gz", DIGITS)
        write_idx(tmp_path / "debian" / f"{split}-labels-idx1-ubyte.gz", CLASSES)
    return tmp_path / "debian"


def fashion_config(size: int = 32, **options: object) -> DataConfig:
    return DataConfig("FashionMNIST", size, 1, **options)


def test_fashion_mnist_is_padded_with_background(fashion, tmp_path):
    data = open_dataset(fashion_config(), tmp_path)
    assert len(data) == 5
    assert data.images.shape == (5, 1, 32, 32)
    image, label = data[2]
    assert label == 4
    assert torch.equal((image[0, 2:30, 2:30] * 255).round().to(torch.uint8), torch.from_numpy(DIGITS[2]))
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert float(image[0][border].abs().max()) == 0


def test_fashion_mnist_keeps_its_own_size_when_asked(fashion, tmp_path):
    assert open_dataset(fashion_config(28), tmp_path, train=False)[0][0].shape == (1, 28, 28)


def test_the_given_folder_goes_before_debians(fashion, tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", DIGITS[:2])
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", CLASSES[:2])
    assert len(open_dataset(fashion_config(), tmp_path)) == 2


def test_torchvisions_layout_is_read_by_torchvision(fashion, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in fashion.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    ours = open_dataset(fashion_config(28), tmp_path)
    theirs = torchvision.datasets.FashionMNIST(str(tmp_path))
    assert torch.equal(ours.images[:, 0], theirs.data)
    assert ours.labels.tolist() == CLASSES.tolist()


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_package_is_the_whole_data_set(tmp_path):
    data = open_dataset(fashion_config(), tmp_path, train=False)
    assert len(data) == 10_000
    assert torch.bincount(data.labels).tolist() == [1000] * 10


def test_missing_fashion_mnist_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    with pytest.raises(DatasetUnavailable, match="apt-get install dataset-fashion-mnist") as error:
        open_dataset(fashion_config(), tmp_path / "here")
    assert str(tmp_path / "here") in str(error.value)


def test_damaged_idx_files_are_named(tmp_path):
    path = tmp_path / "x.gz"
    write_idx(path, DIGITS)
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "not a readable gzip"),
        (b"text", "not a readable gzip"),
        (gzip.compress(b"text"), "not an IDX file"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "holds 3919 values, its header promises 3920"),
    ):
        path.write_bytes(content)
        with pytest.raises(DatasetUnavailable, match=message):
            read_idx(path)


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Two rows a batch file, in the layout torchvision reads (checksums aside)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = np.random.default_rng(1).integers(0, 256, (12, 3072), dtype=np.uint8)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = rows[2 * number : 2 * number + 2]
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [number, number]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a, **k: True)
    return rows


def test_cifar10_keeps_channels_rows_and_columns_apart(tmp_path, monkeypatch):
    rows = write_cifar(tmp_path, monkeypatch)
    data = open_dataset(DataConfig("CIFAR10", 32, 3), tmp_path)
    assert len(data) == 10
    image, label = data[5]
    assert label == 2
    assert torch.equal((image * 255).round().to(torch.uint8).flatten(), torch.from_numpy(rows[5]))


def test_half_of_the_training_images_are_mirrored(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    plain = open_dataset(DataConfig("CIFAR10", 32, 3), tmp_path)[0][0]
    flipping = open_dataset(DataConfig("CIFAR10", 32, 3, random_flip=True), tmp_path)
    torch.manual_seed(0)
    mirrored = 0
    for _ in range(200):
        image = flipping[0][0]
        assert torch.equal(image, plain) or torch.equal(image.flip(-1), plain)
        mirrored += not torch.equal(image, plain)
    assert 70 < mirrored < 130
    test_split = open_dataset(DataConfig("CIFAR10", 32, 3, random_flip=True), tmp_path, train=False)
    assert all(torch.equal(test_split[0][0], test_split[0][0]) for _ in range(20))


def test_lsun_is_what_torchvision_reads(tmp_path, monkeypatch):
    """Without torchvision's cache of keys: nothing is left in the working folder, and nothing unpickled from it."""
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.chdir(tmp_path)
    with lmdb.open("tower_val_lmdb", map_size=2**24) as store, store.begin(write=True) as transaction:
        for number in range(3):
            buffer = io.BytesIO()
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 8, 3), np.uint8)).save(buffer, "WEBP")
            transaction.put(f"{number:040x}".encode(), buffer.getvalue())
    source = torchvision.datasets.LSUN(".", classes=["tower_val"])
    theirs = [source[number] for number in range(3)]
    del source  # a process opens a store once; what reads it here shares it
    cache = Path("_cache_towervallmdb")
    cache.write_bytes(b"what another library would unpickle")
    ours = open_dataset(DataConfig("LSUN", 8, 3, category="tower"), ".", train=False)
    again = open_dataset(DataConfig("LSUN", 8, 1, category="tower"), ".", train=False)
    assert len(ours) == len(again) == 3
    for number, (image, label) in enumerate(theirs):
        square = TF.to_tensor(TF.center_crop(image, [8, 8]))
        assert torch.equal(ours[number][0], square)
        assert ours[number][1] == label == 0
        assert again[number][0].shape == (1, 8, 8)
    cache.unlink()
    assert [path.name for path in Path().iterdir()] == ["tower_val_lmdb"]


def test_missing_cifar10_says_where_and_how(tmp_path):
    with pytest.raises(DatasetUnavailable, match=r"unpack cifar-10-python\.tar\.gz"):
        open_dataset(DataConfig("CIFAR10", 32, 3), tmp_path)


def test_a_folder_is_cut_to_its_central_squares(tmp_path):
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = 255  # exactly the central square
    Image.fromarray(wide).save(tmp_path / "b.png")
    (tmp_path / "sub").mkdir()
    Image.fromarray(wide[:, :, 0] // 2).save(tmp_path / "sub" / "c.png")
    (tmp_path / "a.txt").write_text("no image")
    data = open_dataset(DataConfig("FOLDER", 8, 3), tmp_path)
    assert [path.name for path in data.paths] == ["b.png", "c.png"]
    assert torch.equal(data[0][0], torch.ones(3, 8, 8))
    assert float(data[1][0].max()) == pytest.approx(127 / 255)
    assert open_dataset(DataConfig("FOLDER", 4, 1), tmp_path)[0][0].shape == (1, 4, 4)


def test_folder_errors_name_the_path(tmp_path):
    with pytest.raises(DatasetUnavailable, match="no such folder"):
        open_dataset(DataConfig("FOLDER", 8, 3), tmp_path / "none")
    with pytest.raises(DatasetUnavailable, match="no images"):
        open_dataset(DataConfig("FOLDER", 8, 3), tmp_path)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(DatasetUnavailable, match=r"bad\.png"):
        open_dataset(DataConfig("FOLDER", 8, 3), tmp_path)[0]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (DataConfig("MNIST", 28, 1), ValueError, "is not one of CIFAR10, FashionMNIST, LSUN, FOLDER"),
        (DataConfig("CIFAR10", 32, 1), ValueError, "have 3"),
        (DataConfig("FashionMNIST", 32, 3), ValueError, "have 1"),
        (DataConfig("FOLDER", 32, 4), ValueError, "1 or 3 channels"),
        (DataConfig("LSUN", 256, 3), ValueError, "needs data.category"),
        (DataConfig("LSUN", 256, 3, category="cat"), DatasetUnavailable, "cat_train_lmdb"),
    ],
)
def test_unusable_configs(config, error, message, tmp_path):
    if config.channels == 4:
        Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(error, match=message):
        open_dataset(config, tmp_path)
