"""Published full-precision checkpoints: where they are, a download that survives breaks, and strict loading."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import requests
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim.config import PixelConfig
from ddim.tensor_archive import CodeInFileError, is_state, load_archive
from ddim.untrusted import FileError, UntrustedFileError, open_safetensors

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED = {"FashionMNIST": REPOSITORY / "models" / "pixel" / "fashion_mnist" / "model.safetensors"}

ATTEMPTS = 4
FIRST_PAUSE_S = 1.0  # doubled before each further attempt
TIMEOUT_S = (10, 60)  # to connect; between two pieces of the answer
PIECE_BYTES = 1 << 18
KEYS_SHOWN = 3

# Packages whose classes may be named in a file beside its weights; they are replaced, never imported.
TRAINER_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.")


class CheckpointUnavailable(RuntimeError):  # noqa: N818 - the state of things, not a mistake of the caller
    """No published checkpoint at hand and none to be had; the message says where to put one."""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A file of the converted DDPM checkpoints (pesser/pytorch_diffusion).

    Attributes:
        file: path below the cache folder.
        md5: of the whole file, 32 hexadecimal digits.
    """

    file: str
    md5: str
    url: str


def _published(name: str, steps: int, share: str, md5: str) -> PublishedCheckpoint:
    return PublishedCheckpoint(
        f"ema_diffusion_{name}_model/model-{steps}.ckpt", md5, f"https://heibox.uni-heidelberg.de/f/{share}/?dl=1"
    )


PUBLISHED: dict[tuple[str, str | None], PublishedCheckpoint] = {
    ("CIFAR10", None): _published("cifar10", 790000, "2e4f01e2d9ee49bab1d5", "1fa350b952534ae442b1d5235cce5cd3"),
    ("LSUN", "bedroom"): _published(
        "lsun_bedroom", 2388000, "b95206528f384185889b", "1921fa46b66a3665e450e42f36c2720f"
    ),
    ("LSUN", "church_outdoor"): _published(
        "lsun_church", 4432000, "44ccb50ef3c6436db52e", "fdc68a23938c2397caba4a260bc2445f"
    ),
    ("LSUN", "cat"): _published("lsun_cat", 1761000, "0701aac3aa69457bbe34", "646f23f4821f2459b8bafc57fd824558"),
}


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/diffusion_models_converted``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion_models_converted"


def checkpoint_path(config: PixelConfig, progress: bool = True) -> Path:
    """The pretrained weights of a config: bundled, cached, or downloaded now.

    Raises:
        ValueError: no pretrained weights are known for the config's data set.
        CheckpointUnavailable: they are known but cannot be had.
    """
    data = config.data
    if data.dataset in BUNDLED:
        path = BUNDLED[data.dataset]
        if not path.is_file():
            raise CheckpointUnavailable(f"{path} is missing from this checkout; pass another file with --ckpt")
        return path
    entry = PUBLISHED.get((data.dataset, data.category if data.dataset == "LSUN" else None))
    if entry is None:
        known = [*BUNDLED, *("/".join(filter(None, key)) for key in PUBLISHED)]
        raise ValueError(
            f"no pretrained weights are known for {'/'.join(filter(None, (data.dataset, data.category)))} "
            f"(known: {', '.join(known)}); pass a file with --ckpt"
        )
    return fetch(entry, progress)


def fetch(
    entry: PublishedCheckpoint, progress: bool = True, *, attempts: int = ATTEMPTS, pause_s: float = FIRST_PAUSE_S
) -> Path:
    """The cached file, downloaded first where it is missing or damaged. Only a file of the right MD5 is ever returned.

    What has arrived lies in ``<file>.part`` beside the final place and is continued by the next attempt or run.

    Raises:
        CheckpointUnavailable: all attempts failed.
    """
    final = cache_folder() / entry.file
    if final.is_file():
        if _is_right(final, entry.md5):
            return final
        tqdm.write(f"{final} is damaged (its MD5 is not {entry.md5}); downloading it again")
    part = final.with_name(final.name + ".part")
    trouble = "no attempt was made"
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            total = _download(entry.url, part, progress)
            trouble = _fault(part, total, entry.md5)
        except _RefusedError as error:
            trouble = str(error)
            break
        except requests.RequestException as error:
            # A break may come after the last byte that matters: what arrived is judged by its MD5 all the same.
            trouble = "" if _is_right(part, entry.md5) else _reason(error)
        except OSError as error:
            trouble = f"cannot write {part}: {error.strerror}"
            break
        if not trouble:
            return _publish(part, final)
    raise CheckpointUnavailable(
        f"{final.name} could not be downloaded from {entry.url} ({trouble}). Without network, put the file at {final} "
        f"(MD5 {entry.md5}), or pass any local copy with --ckpt."
    )


class _RefusedError(Exception):
    """The server answered, and trying again would not change the answer."""


def _download(url: str, part: Path, progress: bool) -> int | None:
    """One request that continues ``part`` where it ends; returns the whole file's length if the server told it."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # lengths and offsets must be those of the file itself
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return have  # nothing lies beyond what is here: complete, or wrong, which its MD5 tells
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise _RefusedError(f"the server answered {response.status_code} {response.reason}")
        response.raise_for_status()
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        continued = response.status_code == requests.codes.partial_content
        if continued:
            if span is None or int(span[1]) != have:
                part.unlink(missing_ok=True)
                raise requests.RequestException("the server continued at the wrong place")
            total = int(span[2]) if span[2].isdigit() else None
        else:  # the whole file from its start, whether or not a part was asked for
            have = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
        _receive(response, part, have, total, progress)
    return total


def _receive(response: requests.Response, part: Path, have: int, total: int | None, progress: bool) -> None:
    """Write the answer's body from byte ``have`` on. What arrived before a break stays."""
    with (
        open(part, "r+b" if have else "wb") as file,
        tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=not progress) as bar,
    ):
        file.seek(have)
        # The last piece before a break is kept instead of thrown away with an error; _fault compares the lengths.
        response.raw.enforce_content_length = False
        try:
            for piece in response.iter_content(PIECE_BYTES):
                file.write(piece)
                bar.update(len(piece))
        finally:
            file.flush()
            os.fsync(file.fileno())


def _fault(part: Path, total: int | None, md5: str) -> str:
    """What is wrong with a download, empty when nothing is. A wrong file is removed, an unfinished one is kept."""
    size = part.stat().st_size if part.exists() else 0
    if _is_right(part, md5):
        return ""
    if total is not None and size < total:
        return f"the connection broke off after {size} of {total} bytes"
    part.unlink(missing_ok=True)
    return f"the server sent another file: {size} bytes whose MD5 is not {md5}"


def _publish(part: Path, final: Path) -> Path:
    """Give a checked file its name; the folder is synced so that the name survives a power cut too."""
    os.replace(part, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return final


def _is_right(path: Path, md5: str) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)


def read_weights(path: str | Path, *, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict in a ``.ckpt``, ``.pth``, ``.pt`` or ``.safetensors`` file, half precision widened to float32.

    A dict that wraps it under ``state_dict`` is unwrapped, and what a trainer keeps beside it is left alone. Nothing in
    the file is ever run. Tensors in full precision stay in the file, mapped into memory, until they are used.

    Args:
        without: beginnings of names whose tensors are left alone.

    Raises:
        ValueError: missing, truncated, of another kind, claiming sizes that the file does not have, or holding anything
            but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such checkpoint file")
    content = _load_safetensors(path, without) if path.suffix == ".safetensors" else _load_pickled(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not is_state(content):
        raise FileError(f"{path}: holds no state dict (names and tensors, or a dict with 'state_dict')")
    state = cast(Mapping[str, Tensor], content)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(without)}
    return {name: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for name, t in kept.items()}


def _load_safetensors(path: Path, without: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(without)}  # noqa: SIM118
    except UntrustedFileError as error:
        raise FileError(f"{path}: {error}") from None


def _load_pickled(path: Path) -> object:
    if path.suffix not in (".ckpt", ".pth", ".pt"):
        raise FileError(f"{path}: a checkpoint ends in .ckpt, .pth, .pt or .safetensors")
    try:
        return load_archive(path, inert=TRAINER_PACKAGES)
    except CodeInFileError as error:
        raise FileError(
            f"{path}: {error}; loading it could run code from the file, so it is refused. If you trust it, open it "
            "where that package is installed and save its state_dict alone, best as .safetensors"
        ) from None
    except UntrustedFileError as error:
        raise FileError(f"{path}: {error}; not a checkpoint that can be read") from None


def load_weights(path: str | Path, model: nn.Module, config_name: str = "the config") -> None:
    """Load a full-precision checkpoint strictly into a model.

    Args:
        path: see :func:`read_weights`.
        model: left untouched unless everything fits.
        config_name: what the model was built from, for the error.

    Raises:
        ValueError: the file is unusable, or its names or shapes differ from the model's; says how.
    """
    weights = read_weights(path)
    if any(".weight_quantizer" in name for name in weights):
        raise FileError(f"{path}: this is a quantized checkpoint; pass it with --cali_ckpt, not as the full model")
    expected = model.state_dict()
    differences = describe_differences(weights, expected)
    if differences:
        found, wanted = _architecture(weights), _architecture(expected)
        if found != wanted and found and wanted:
            differences.insert(0, f"the file's UNet has {found}, the config's {wanted}")
        raise FileError(f"{path}: does not fit the model of {config_name}: {'; '.join(differences)}")
    model.load_state_dict(weights, strict=True)


def weights_facts(path: str | Path) -> dict[str, str]:
    """What a file of weights says in its header of how they were made; nothing where it is pickled.

    Raises:
        ValueError: it is missing or cannot be read.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with open_safetensors(path) as file:
            return file.metadata() or {}
    except UntrustedFileError as error:
        raise FileError(f"{path}: {error}") from None


def describe_differences(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """In words, a few examples of each kind; empty where names and shapes agree."""
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    shapes = [
        f"{name} is {_size(weights[name])}, the model's {_size(tensor)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = (("missing from the file", missing), ("not in the model", unexpected), ("of another shape", shapes))
    return [f"{len(found)} tensors {kind} ({_some(found)})" for kind, found in kinds if found]


def _architecture(weights: Mapping[str, Tensor]) -> str:
    """The numbers of a pixel UNet that its parameters give away; empty for any other model."""
    first = weights.get("conv_in.weight")
    if first is None or first.dim() != 4:
        return ""
    levels = {name.split(".")[1] for name in weights if name.startswith("down.")}
    return f"{first.shape[0]} channels (model.ch), {first.shape[1]} image channels, {len(levels)} levels"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:KEYS_SHOWN]) + (", ..." if len(names) > KEYS_SHOWN else "")
