"""Every loader of files that strangers may have made: a small valid file, what is read of it, and another reading.

What a loader returns is compared with that reading, so a case may end well only with the values that the file has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import math
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis.strategies import SearchStrategy
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ddim.config import DataConfig, load_config
from ddim.datasets import DatasetUnavailable, FolderImages, open_dataset, read_idx
from ddim.pretrained import read_weights
from ldm.data.emoji import EmojiImages, pack_split
from ldm.modules.encoders.tokenizers import (
    BERT,
    CLIP,
    CLIP_MERGES,
    clip_vocabulary,
    load_tokenizer,
    write_clip_tokenizer,
)
from ldm.training import load_image_set as load_training_set
from ldm.util import load_model_config
from qdiff.calibration_data import load_calibration_set, selected_steps
from qdiff.checkpoint import load_quantized, save_packed, save_published, unpack_bits
from qdiff.cli.errors import EXPLAINED
from qdiff.cli.make_clip_tokenizer import VOCABULARY, merges_in
from qdiff.cli.run_folder import CONFIG_NAME, LAYOUT, read_options
from qdiff.cli.text import read_prompts
from qdiff.config import QuantConfig
from qdiff.evaluation.features import EmojiClassifier, load_classifier, save_classifier
from qdiff.evaluation.frechet import FeatureStatistics
from qdiff.evaluation.image_sets import load_image_set
from qdiff.evaluation.text_agreement import KnownImages
from qdiff.progress import CalibrationProgress, FinishedUnit
from qdiff.reconstruction import UnitReport
from qdiff.recording import DONE, MANIFEST, Recording, SetLayout
from tests.qdiff.conftest import SMALL, as_calibrated, wrapped

from . import mutations as m

REFUSALS = (ValueError, DatasetUnavailable, *EXPLAINED)
W4A8 = QuantConfig(4, 8, quant_act=True)
SHAPE = (3, 4, 4)


@dataclasses.dataclass(frozen=True)
class Loader:
    """One of them.

    Attributes:
        make: writes a valid file, or a folder around it, and returns the file.
        load: reads it; the result is compared by :func:`same`.
        expected: reads it in another way.
        formats: mutations beside those of bytes.
    """

    make: Callable[[Path], Path]
    load: Callable[[Path], Any]
    expected: Callable[[Path], Any]
    formats: tuple[Callable[[Path], SearchStrategy[m.Mutation]], ...] = ()


def same(a: Any, b: Any) -> bool:
    """Whether two readings are the same values, NaN included."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


# Full precision.


def state() -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    names = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "norm.weight": (4,), "count": ()}
    return {name: torch.randn(shape, generator=draws) for name, shape in names.items()}


def make_ckpt(folder: Path, **options: bool) -> Path:
    torch.save(state(), folder / "model.ckpt", **options)
    return folder / "model.ckpt"


def make_full_safetensors(folder: Path) -> Path:
    save_file(state(), folder / "model.safetensors", {"about": '{"steps": 3}'})
    return folder / "model.safetensors"


def widened(tensors: Any) -> Any:
    inner = tensors.get("state_dict", tensors)
    halves = (torch.float16, torch.bfloat16)
    return {name: t.float() if t.dtype in halves else t.clone() for name, t in inner.items()}


def safetensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def saved(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


# Calibrated checkpoints.


@functools.cache
def network() -> Any:
    """One for all cases; a strict load leaves nothing of the one before."""
    return wrapped(W4A8, **SMALL)


@functools.cache
def calibrated() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return as_calibrated(W4A8, **SMALL)


def load_calibrated(path: Path) -> dict[str, Any]:
    qnn = network()
    load_quantized(path, qnn, quant_act=True)
    weights = {name: layer.baked_weight.clone() for name, layer in qnn.layers().items()}
    return {"weights": weights, "grids": {n: grid_of(q.delta, q.zero_point) for n, q in qnn.act_quantizers().items()}}


def grid_of(delta: torch.Tensor, zero_point: torch.Tensor) -> list[float]:
    return [float(delta.float()), float(zero_point.float())]


def make_published(folder: Path) -> Path:
    save_published(folder / "ckpt.pth", calibrated())
    (folder / "ckpt.json").unlink()
    return folder / "ckpt.pth"


def published_values(path: Path) -> dict[str, Any]:
    """By the formula of docs/formats.md."""
    found = saved(path)
    found = found.get("state_dict", found)
    weights = {}
    for name in network().layers():
        entries = ("weight", *(f"weight_quantizer.{entry}" for entry in ("alpha", "delta", "zero_point")))
        w, alpha, delta, zero = (found[f"model.{name}.{entry}"].float() for entry in entries)
        delta, zero = (grid.reshape(-1, *[1] * (w.dim() - 1)) for grid in (delta, zero))
        up = (alpha >= 0).float().reshape(w.shape)
        integers = ((w / delta).floor() + up + zero).clamp(0, 15)
        weights[name] = (integers - zero) * delta
    acts = network().act_quantizers()
    grids = {n: grid_of(*(found[f"model.{n}.{entry}"] for entry in ("delta", "zero_point"))) for n in acts}
    return {"weights": weights, "grids": grids}


def make_packed(folder: Path) -> Path:
    save_packed(folder / "ckpt.safetensors", calibrated(), info={"model_config": {"a": {"b": 1}}})
    return folder / "ckpt.safetensors"


def packed_values(path: Path) -> dict[str, Any]:
    """As the reader in docs/formats.md does it, for layers that are not cut."""
    with safe_open(path, "pt") as file:
        index = json.loads(file.metadata()["qdiff-packed"])["index"]
        names = ("codes", "delta", "zero_point", "act_delta", "act_zero_point")
        codes, delta, zero, act_delta, act_zero = (file.get_tensor(name) for name in names)
    weights = {}
    for name, shape, _, _ in index["layers"]:
        count = math.prod(shape)
        grid = [shape[0]] + [1] * (len(shape) - 1)
        integers = unpack_bits(codes[: -(-count // 2)], 4, count).view(shape).float()
        weights[name] = (integers - zero[: shape[0]].view(grid).float()) * delta[: shape[0]].view(grid)
        codes, delta, zero = codes[-(-count // 2) :], delta[shape[0] :], zero[shape[0] :]
    return {"weights": weights, "grids": {n: grid_of(act_delta[i], act_zero[i]) for i, n in enumerate(index["act"])}}


def make_facts(folder: Path) -> Path:
    save_published(folder / "ckpt.pth", calibrated())
    return folder / "ckpt.json"


def load_facts(path: Path) -> Any:
    from qdiff.checkpoint import read_info

    info = read_info(path.with_name("ckpt.pth"))
    return info.quant.to_dict()


def facts_values(path: Path) -> Any:
    return QuantConfig(**json.loads(path.read_text())["quant"]).to_dict()


# Calibration: sets, and what an interrupted one left.


def make_set(folder: Path) -> Path:
    draws = torch.Generator().manual_seed(0)
    content = {
        "xs": [torch.randn(3, *SHAPE, generator=draws) for _ in range(4)],
        "ts": [torch.full((3,), 900.0 - 100 * step) for step in range(4)],
        "cs": [torch.randn(3, 2, 5, generator=draws)] * 4,
        "ucs": [torch.randn(1, 2, 5, generator=draws).expand(3, 2, 5)] * 4,
    }
    torch.save(content, folder / "set.pt")
    return folder / "set.pt"


def load_set(path: Path) -> Any:
    chosen = load_calibration_set(path, cali_st=2, cali_n=2, image_shape=SHAPE, conditional=True, context_width=5)
    return [chosen.x, chosen.t, chosen.context]


def set_values(path: Path) -> Any:
    content = saved(path)
    steps = selected_steps(len(content["xs"]), 2)
    xs, ts, cs, ucs = (
        torch.cat([torch.as_tensor(content[name][step])[:2] for step in steps]).float()
        for name in ("xs", "ts", "cs", "ucs")
    )
    return [torch.cat([xs, xs]), torch.cat([ts, ts]), torch.cat([cs, ucs])]


def progress_of(folder: Path) -> CalibrationProgress:
    return CalibrationProgress.open(folder, {"settings": {"a": 1}})


def make_unit(folder: Path) -> Path:
    qnn = calibrated()
    unit = qnn.units()[2]
    report = UnitReport(unit.path, unit.kind, "weights", 1, 0, 1.0, 1.0, 1.0)
    progress_of(folder).keep(unit, "weights", 2, FinishedUnit(report, 0.1, 1.0))
    (path,) = folder.glob("*.safetensors")
    return path


def load_unit(path: Path) -> Any:
    progress = progress_of(path.parent)
    qnn = network()
    unit = qnn.units()[2]
    if progress.restore(unit, "weights", 2) is None:
        return None  # refused: removed with a line in the log, and learned again
    return {name: tensor.clone() for name, tensor in unit.module.state_dict().items() if "weight_quantizer" in name}


def unit_values(path: Path) -> Any:
    return safetensors_of(path) if path.is_file() else None


RECORDED = SetLayout(4, 2, SHAPE)


@contextlib.contextmanager
def recording_in(folder: Path) -> Iterator[Recording]:
    """The unfinished set of a folder, opened as the command that goes on with it does."""
    recording = Recording(folder / "set.pt", RECORDED)
    try:
        recording.open({"sampler": {"seed": 0, "eta": 1.0}}, {"batch_size": 2}, anew=False)
        yield recording
    finally:
        recording.close()


def make_recording(folder: Path) -> Path:
    with recording_in(folder) as recording:
        recording.mark(range(2))
    return recording.folder / MANIFEST


def make_marks(folder: Path) -> Path:
    return make_recording(folder).with_name(DONE)


def load_recording(path: Path) -> Any:
    """Which samples are not made again; none that is done may be lost to a damaged manifest."""
    marks = path.with_name(DONE)
    before = marks.read_bytes()
    try:
        with recording_in(path.parent.parent) as recording:
            return list(recording.done())
    except ValueError:
        assert marks.read_bytes() == before
        raise


def recording_values(path: Path) -> Any:
    """The marks, where the manifest is that of the set; an entry that is None is as good as none."""

    def said(content: Any) -> Any:
        found = {key: said(value) for key, value in content.items()} if isinstance(content, dict) else content
        return {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else found

    found = said(json.loads(path.with_name(MANIFEST).read_text())["identity"])
    marks = path.with_name(DONE).read_bytes()
    return list(marks) if found == said(recorded_identity()) else "the samples of another set"


@functools.cache
def recorded_identity() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(make_recording(Path(folder)).read_text())["identity"]


# Configs and options.


def make_pixel_config(folder: Path) -> Path:
    (folder / "c.yml").write_text((Path(__file__).parents[2] / "configs" / "fashion_mnist.yml").read_text())
    return folder / "c.yml"


def load_pixel(path: Path) -> Any:
    return dataclasses.asdict(load_config(path))


def pixel_values(path: Path) -> Any:
    """What the file says, over the defaults."""
    from ddim.config import PixelConfig

    default = dataclasses.asdict(load_config(make_pixel_config(path.parent / "..").resolve()))
    empty = dataclasses.asdict(PixelConfig())
    said = yaml.safe_load(path.read_text())
    return {
        section: {
            key: type_of(said.get(section, {}).get(key, empty[section][key]), value) for key, value in keys.items()
        }
        for section, keys in default.items()
    }


def type_of(value: Any, like: Any) -> Any:
    """As the schema reads it: a tuple for a list, a text or a number for what can be read as one."""
    return value if value is None or like is None else type(like)(value)


def make_latent_config(folder: Path) -> Path:
    content = {"model": {"target": "x", "params": {"a": 1, "b": [1, 2.5], "c": {"d": None}}}, "data": {"e": True}}
    (folder / "c.yaml").write_text(yaml.safe_dump(content))
    return folder / "c.yaml"


def make_options(folder: Path) -> Path:
    content = {"seed": 1, "config": "a.yml", "quant": {"weight_bit": 4}, "prompts": ["a", "b"], "eta": 0.0}
    (folder / CONFIG_NAME).write_text(yaml.safe_dump(content))
    return folder / CONFIG_NAME


def make_captions(folder: Path) -> Path:
    annotations = [{"image_id": 7, "id": n, "caption": text} for n, text in enumerate(("A cat.", "a dog\n and  a hat"))]
    content = {"info": {"year": 2014}, "images": [{"id": 7}], "licenses": [], "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(content))
    return folder / "captions.json"


def load_captions(path: Path) -> Any:
    prompts = read_prompts(argparse.Namespace(prompt=None, from_file=str(path)))
    "".join(prompts).encode()  # as files and hashes hold them
    return list(prompts)


def captions_values(path: Path) -> Any:
    texts = [re.sub(r"\s+", " ", each["caption"]).strip() for each in json.loads(path.read_text())["annotations"]]
    return [text for text in texts if text]


# Images, statistics, tokenizers.


def pictures(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def make_npz(folder: Path) -> Path:
    np.savez(folder / "images.npz", pictures())
    return folder / "images.npz"


def npz_values(path: Path) -> torch.Tensor:
    with zipfile.ZipFile(path) as archive:
        name = archive.infolist()[0].filename.removesuffix(".npy")
    with np.load(path, allow_pickle=False) as arrays:
        found = arrays[name]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(found if found.ndim == 4 else found[..., None], -1, 1)))


def make_png(folder: Path) -> Path:
    for number, picture in enumerate(pictures()):
        Image.fromarray(picture).save(folder / f"{number:06d}.png")
    return folder / "000000.png"


def png_values(path: Path) -> torch.Tensor:
    images = [Image.open(file) for file in sorted(path.parent.glob("*.png"))]
    mode = "L" if images[0].mode in ("L", "1") else "RGB"  # that of the first serves all
    found = [np.asarray(image.convert(mode)) for image in images]
    stacked = np.stack(found)
    return torch.from_numpy(np.moveaxis(stacked if stacked.ndim == 4 else stacked[..., None], -1, 1).copy())


def folder_values(path: Path) -> torch.Tensor:
    from torchvision.transforms import functional as tvf

    image = Image.open(path).convert("RGB")
    return tvf.to_tensor(tvf.resize(tvf.center_crop(image, [min(image.size)] * 2), [4, 4], antialias=True))


def in_lmdb(path: Path) -> Path:
    """The bytes of a file as the only value of an LMDB beside it."""
    import lmdb

    place = path.with_name("cat_train_lmdb")
    with lmdb.open(str(place), map_size=2**24, sync=False) as store, store.begin(write=True) as transaction:
        transaction.put(b"0" * 40, path.read_bytes())
    return place


def make_value(folder: Path) -> Path:
    Image.fromarray(pictures()[0]).save(folder / "value", format="PNG")
    return folder / "value"


def load_lsun(path: Path) -> Any:
    return open_dataset(DataConfig("LSUN", 4, 3, category="cat"), in_lmdb(path).parent)[0][0]


def value_values(path: Path) -> torch.Tensor:
    image = Image.open(path)
    found = np.asarray(image.convert("L" if image.mode in ("L", "1") else "RGB"))
    return torch.from_numpy(np.moveaxis(found if found.ndim == 3 else found[..., None], -1, 0)[None].copy())


def make_pt(folder: Path) -> Path:
    torch.save({"images": torch.rand(2, 3, 4, 4)}["images"], folder / "images.pt")
    return folder / "images.pt"


def make_idx(folder: Path) -> Path:
    content = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 3)) + bytes(range(18))
    (folder / "images.gz").write_bytes(gzip.compress(content, mtime=0))
    return folder / "images.gz"


def idx_values(path: Path) -> torch.Tensor:
    content = gzip.decompress(path.read_bytes())
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    return torch.tensor(list(content[4 + 4 * content[3] :]), dtype=torch.uint8).reshape(sizes)


def make_statistics(folder: Path) -> Path:
    FeatureStatistics(torch.arange(3.0).double(), torch.eye(3).double(), 7, "some").save(folder / "s.safetensors")
    return folder / "s.safetensors"


def load_statistics(path: Path) -> Any:
    found = FeatureStatistics.load(path)
    return {"mean": found.mean, "covariance": found.covariance}


def make_classifier(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_classifier(folder / "c.safetensors", EmojiClassifier().state_dict(), {"network": "emoji64"})
    return folder / "c.safetensors"


def classifier_values(path: Path) -> Any:
    counts = "num_batches_tracked"  # long, whatever type the file has, and a number even as a list of one
    found = safetensors_of(path)
    return {name: t.long().reshape(()) if name.endswith(counts) else t.float() for name, t in found.items()}


def make_known(folder: Path) -> Path:
    (folder / "classifier").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    features = torch.arange(6.0).reshape(3, 2)
    numbers = torch.tensor([0, 1, 1])
    KnownImages(features, numbers, numbers, ("a", "b", "x"), digest).save(folder / "known.safetensors")
    return folder / "known.safetensors"


def load_known(path: Path) -> Any:
    known = KnownImages.load(path, path.with_name("classifier"))
    return {"features": known.features, "labels": known.labels, "bases": known.bases, "captions": list(known.captions)}


def known_values(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        captions = json.loads(file.metadata()["about"])["captions"]
    found = safetensors_of(path)
    numbers = {name: torch.tensor(found[name].tolist(), dtype=torch.int64) for name in ("labels", "bases")}
    return {"features": found["features"].float(), "captions": captions, **numbers}


def make_emoji(folder: Path) -> Path:
    (folder / "train.safetensors").write_bytes(pack_split(pictures(), [0, 1], ["a", "b"], ["x", "y"], {"seed": 0}))
    return folder / "train.safetensors"


def load_emoji(path: Path) -> Any:
    found, again = EmojiImages(path.parent), load_training_set(path.parent, "train", 4)
    assert torch.equal(found.images, again.images)
    return {"images": found.images.permute(0, 2, 3, 1), "labels": found.labels}


def make_clip(folder: Path) -> Path:
    write_clip_tokenizer(folder, [("a", "t</w>"), ("p", "u")], max_length=8)
    return folder / "vocab.json"


def clip_options(folder: Path) -> Path:
    make_clip(folder)
    return folder / "tokenizer_config.json"


def clip_merges(folder: Path) -> Path:
    make_clip(folder)
    return folder / "merges.txt"


def load_clip(path: Path) -> Any:
    return dict(load_tokenizer(CLIP, "x", path.parent).get_vocab())


def clip_values(path: Path) -> Any:
    return json.loads((path.parent / "vocab.json").read_text())


@functools.cache
def merges() -> list[tuple[str, str]]:
    """As many as OpenAI's list has: every character before every one that ends a word."""
    ends = [token for token in clip_vocabulary([]) if token.endswith("</w>")]
    pairs = ((end.removesuffix("</w>"), other) for end in ends for other in ends)
    return list(itertools.islice(pairs, CLIP_MERGES))


def make_merges(folder: Path) -> Path:
    text = "\n".join(["a heading", *map(" ".join, merges()), "more t</w>"])
    (folder / "merges.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    return folder / "merges.gz"


def make_wheel(folder: Path) -> Path:
    packed = make_merges(folder)
    with zipfile.ZipFile(folder / "clip.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("open_clip/__init__.py", "")
        wheel.write(packed, f"open_clip/{VOCABULARY}")
    packed.unlink()
    return folder / "clip.whl"


def merges_values(path: Path) -> Any:
    packed = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            packed = wheel.read(next(name for name in wheel.namelist() if name.endswith(VOCABULARY)))
    lines = gzip.decompress(packed).decode().split("\n")
    return [tuple(line.split()) for line in lines[1 : 1 + CLIP_MERGES]]


def make_backend(folder: Path) -> Path:
    make_clip(folder)
    load_tokenizer(CLIP, "x", folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def make_bert(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "puppy", "hat", "cat", "wearing", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder / "vocab.txt"


def load_bert(path: Path) -> Any:
    return dict(load_tokenizer(BERT, "x", path.parent).get_vocab())


def bert_values(path: Path) -> Any:
    return None  # what it should be is said by the tokenizer alone; see load_bert


SAVED = (m.archive_changed, m.saved_otherwise)
TABLES = (m.safetensors_header, m.safetensors_tensors)
OLD = functools.partial(make_ckpt, _use_new_zipfile_serialization=False)

LOADERS: dict[str, Loader] = {
    "full precision, .ckpt": Loader(make_ckpt, read_weights, lambda path: widened(saved(path)), SAVED),
    "full precision, .ckpt of old": Loader(OLD, read_weights, lambda path: widened(saved(path)), (m.saved_otherwise,)),
    "full precision, .safetensors": Loader(
        make_full_safetensors, read_weights, lambda path: widened(safetensors_of(path)), TABLES
    ),
    "published checkpoint": Loader(make_published, load_calibrated, published_values, SAVED),
    "packed checkpoint": Loader(make_packed, load_calibrated, packed_values, TABLES),
    "ckpt.json": Loader(make_facts, load_facts, facts_values, (m.json_changed,)),
    "calibration set": Loader(make_set, load_set, set_values, SAVED),
    "unfinished calibration": Loader(make_unit, load_unit, unit_values, TABLES),
    "unfinished calibration set, manifest": Loader(make_recording, load_recording, recording_values, (m.json_changed,)),
    "unfinished calibration set, marks": Loader(make_marks, load_recording, recording_values),
    "config of a pixel model": Loader(make_pixel_config, load_pixel, pixel_values, (m.yaml_changed,)),
    "config of a latent model": Loader(
        make_latent_config, load_model_config, lambda path: yaml.safe_load(path.read_text())["model"], (m.yaml_changed,)
    ),
    "options of a run": Loader(
        make_options,
        functools.partial(read_options, layout=LAYOUT),
        lambda path: yaml.safe_load(path.read_text()),
        (m.yaml_changed,),
    ),
    "captions of COCO": Loader(make_captions, load_captions, captions_values, (m.json_changed,)),
    "images, .npz": Loader(make_npz, load_image_set, npz_values, (m.npz_header,)),
    "images, .png": Loader(
        make_png, lambda path: load_image_set(path.parent), png_values, (m.png_header, m.other_format)
    ),
    "images, folder of a data set": Loader(
        make_png, lambda path: FolderImages(path.parent, 4, 3)[0][0], folder_values, (m.png_header, m.other_format)
    ),
    "images, LSUN": Loader(make_value, load_lsun, folder_values, (m.png_header, m.other_format)),
    "images, LMDB to evaluate": Loader(
        make_value, lambda path: load_image_set(in_lmdb(path)), value_values, (m.png_header, m.other_format)
    ),
    "images, .pt": Loader(make_pt, load_image_set, saved, (m.archive_changed,)),
    "images, IDX": Loader(make_idx, read_idx, idx_values),
    "images and captions": Loader(make_emoji, load_emoji, safetensors_of, TABLES),
    "feature statistics": Loader(make_statistics, load_statistics, safetensors_of, TABLES),
    "known images": Loader(make_known, load_known, known_values, TABLES),
    "classifier": Loader(
        make_classifier, lambda path: dict(load_classifier(path).state_dict()), classifier_values, TABLES
    ),
    "CLIP's merges": Loader(make_merges, merges_in, merges_values, (m.packed_text,)),
    "CLIP's merges in a wheel": Loader(make_wheel, merges_in, merges_values, (m.archive_changed,)),
    "tokenizer, vocab.json": Loader(make_clip, load_clip, clip_values, (m.json_changed,)),
    "tokenizer, merges.txt": Loader(clip_merges, load_clip, clip_values),
    "tokenizer, tokenizer_config.json": Loader(clip_options, load_clip, clip_values, (m.json_changed,)),
    "tokenizer, tokenizer.json": Loader(make_backend, load_clip, lambda path: None, (m.json_changed,)),
    "tokenizer, vocab.txt": Loader(make_bert, load_bert, bert_values),
}
