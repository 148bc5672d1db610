"""A calibration's finished units on disk, so that a process that dies loses none of them. ``docs/formats.md`` has the
files.

The folder belongs to one calibration: what decides its result (settings, calibration data, weights, software) is
written into it first, as an :func:`identity`, and a calibration with another one is refused. Every file is whole or
not there, and carries the checksum of what it holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from ddim.untrusted import FileError, UntrustedFileError, open_safetensors, parse_json, read_json, reason
from qdiff.adapters import StagedNetwork
from qdiff.calibration_data import CalibrationSet
from qdiff.config import CalibrationConfig
from qdiff.files import write_atomically
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel, Unit
from qdiff.quantizers import check_grid
from qdiff.reconstruction import Phase, TracePoint, UnitReport
from qdiff.version import __version__

MANIFEST = "calibration.json"
RANGES = "ranges"
FORMAT_VERSION = 1

_HEADER = "qdiff-progress"
_CHECKSUM = "sha256"
# Files of this package that have no part in what a unit learns; all others have.
_UNDECIDING_SOURCES = (
    "__init__.py",
    "checkpoint.py",
    "costs.py",
    "files.py",
    "progress.py",
    "published.py",
    "recording.py",
    "tensor_file.py",
    "version.py",
)

log = logging.getLogger(__name__)


class ProgressError(FileError):
    """The folder holds units of another calibration; the message names what differs and how to start anew."""


@dataclass(frozen=True)
class FinishedUnit:
    """One unit's result in one phase, but for its tensors.

    Attributes:
        relative_loss: ``report.loss_after`` as a share of the loss that an output of zeros would have.
        elapsed: seconds since the unit before it was finished: collecting its data and learning.
    """

    report: UnitReport
    relative_loss: float
    elapsed: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> FinishedUnit:
        report = dict(facts["report"])
        trace = tuple(TracePoint._make([*point[:-1], tuple(point[-1])]) for point in report.pop("trace"))
        return cls(UnitReport(**report, trace=trace), facts["relative_loss"], facts["elapsed"])


# What a calibration is.


def identity(
    qnn: QuantModel, data: CalibrationSet | None, config: CalibrationConfig, *, mode: str, weights_done: bool
) -> dict[str, Any]:
    """All that decides the result of :func:`qdiff.calibrate.calibrate`, which has the same arguments.

    Args:
        qnn: as it is before the calibration.

    Returns:
        plain values; large things by their hashes.
    """
    state = qnn.state_dict()
    weights = {name: tensor for name, tensor in state.items() if "_quantizer" not in name}
    rounding = {name: tensor for name, tensor in state.items() if ".weight_quantizer" in name}
    samples = {} if data is None else {name: getattr(data, name) for name in ("x", "t", "context")}
    facts = {
        "settings": {
            "quant": qnn.config.to_dict(),
            "calibration": config.to_dict(),
            "mode": mode,
            "weights_done": weights_done,
        },
        "data": tensor_hash({name: tensor for name, tensor in samples.items() if tensor is not None}),
        "full_precision_weights": tensor_hash(weights),
        "calibrated_weights": tensor_hash(rounding) if weights_done else None,
        "software": {
            "qdiff": __version__,
            "torch": torch.__version__,
            "progress_format": FORMAT_VERSION,
            "sources": source_hashes(qnn),
        },
    }
    return json.loads(json.dumps(facts))  # as they are read back: lists for tuples


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def source_hashes(qnn: QuantModel) -> dict[str, str]:
    """The code that decides what is learned, file by file: this package, its adapters, the UNet and its blocks."""
    package = Path(__file__).parent
    files = [path for path in package.glob("*.py") if path.name not in _UNDECIDING_SOURCES]
    files += package.glob("adapters/*.py")
    named = {f"qdiff/{path.relative_to(package).as_posix()}": path for path in files}
    for name in _modules_of(qnn.model):
        file = sys.modules[name].__file__
        assert file is not None  # a class was defined in it
        named[f"{name.replace('.', '/')}.py"] = Path(file)
    return {name: hashlib.sha256(named[name].read_bytes()).hexdigest() for name in sorted(named)}


def _modules_of(unet: StagedNetwork) -> set[str]:
    """Names of the modules in which a UNet is written: its package's, wrapped blocks included, and its stages'."""
    package = type(unet).__module__.partition(".")[0]
    classes = {cls.__module__ for module in unet.modules() for cls in type(module).__mro__}
    return {name for name in classes if name.partition(".")[0] == package} | {type(unet.stages()[0]).__module__}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two identities differ in, in words."""
    old, new = flat(before), flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    sources = [name.removeprefix("software.sources.") for name in names if name.startswith("software.sources.")]
    said = [
        f"{name.partition('.')[2]} is {new.get(name)!r}, was {old.get(name)!r}"
        for name in names
        if name.startswith(("settings.", "software.")) and not name.startswith("software.sources.")
    ]
    large = {
        "data": "the calibration data are others (--cali_data_path)",
        "full_precision_weights": "the full-precision weights are others",
        "calibrated_weights": "the calibrated weights it starts from are others",
    }
    said += [words for name, words in large.items() if name in names]
    if sources:
        said.append(f"the code has changed ({', '.join(sources)})")
    return said


# The folder.


class CalibrationProgress:
    """The finished units of one calibration in a folder. :meth:`open` finds or starts it.

    Units are told by phase and by their number in the network's order.

    Attributes:
        folder: where the files lie.
    """

    def __init__(self, folder: Path, calibration: str, there: Iterable[str]):
        self.folder, self._calibration, self._there = folder, calibration, set(there)

    @classmethod
    def open(cls, folder: str | Path, identity: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """Look through a folder, which is made where there is none; files that cannot be used are removed.

        Args:
            identity: of the calibration that wants to go on here (:func:`identity`).
            device: where it runs; another one than before is only worth a warning.

        Raises:
            ProgressError: the folder belongs to another calibration. Nothing is changed.
            OSError: the folder cannot be written to.
        """
        folder = Path(folder)
        device = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)
        recorded = _read_manifest(folder / MANIFEST)
        if recorded is not None:
            _check_same(folder, recorded["identity"], identity)
            if recorded["device"] != device:
                log.warning(
                    "%s: calibrated on %s so far and on %s from now on; either alone would give slightly other values",
                    folder,
                    recorded["device"],
                    device,
                )
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.part"):
            leftover.unlink(missing_ok=True)
        if recorded is None:
            content = {"identity": identity, "device": device}
            write_atomically(folder / MANIFEST, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
        progress = cls(folder, _text_hash(json.dumps(identity, sort_keys=True)), ())
        progress._there = {path.stem for path in sorted(folder.glob("*.safetensors")) if progress._usable(path)}
        return progress

    def _usable(self, path: Path) -> bool:
        try:
            self._read(path)
        except _DamagedError as error:
            log.warning("%s: %s; what it held is calculated again", path, error)
            path.unlink()
            return False
        return True

    def has(self, unit: Unit, phase: Phase, number: int) -> bool:
        """Whether a unit is there already."""
        return _name(unit, phase, number) in self._there

    def keep(self, unit: Unit, phase: Phase, number: int, finished: FinishedUnit) -> None:
        """Put a finished unit on the disk.

        Raises:
            OSError: naming the file; units that were there before stay.
        """
        tensors = _state_of(_quantizers(unit.module, phase))
        self._write(_name(unit, phase, number), tensors, finished.to_dict())

    def restore(self, unit: Unit, phase: Phase, number: int) -> FinishedUnit | None:
        """Put a unit's learned values into the network, where they are there."""
        if not self.has(unit, phase, number):
            return None
        path = self._path(_name(unit, phase, number))
        with _refused_as_damaged(path):
            tensors, facts = self._read(path)
            finished = FinishedUnit.from_dict(facts)
            if phase == "weights":
                for name, layer in unit.module.named_modules():
                    if isinstance(layer, QuantModule) and _has_rounding(name, tensors):
                        layer.learn_rounding()
            _load_state(_quantizers(unit.module, phase), tensors)
        if phase == "weights":
            for layer in unit.layers():
                layer.bake()
        return finished

    def keep_ranges(self, qnn: QuantModel) -> None:
        """Put the activation ranges, as they are before their step sizes are learned, on the disk."""
        self._write(RANGES, _state_of(qnn.act_quantizers()), {})

    def restore_ranges(self, qnn: QuantModel) -> bool:
        """Put the activation ranges into the network; False where they are not there."""
        if RANGES not in self._there:
            return False
        with _refused_as_damaged(self._path(RANGES)):
            _load_state(qnn.act_quantizers(), self._read(self._path(RANGES))[0])
        return True

    def remove(self) -> None:
        """Delete the folder, when its result is safe elsewhere."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        header = json.dumps({"calibration": self._calibration, "facts": facts})
        metadata = {_HEADER: header, _CHECKSUM: _text_hash(header + tensor_hash(tensors))}
        write_atomically(self._path(name), serialize(dict(tensors), metadata))
        self._there.add(name)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of a file.

        Raises:
            _DamagedError: it is cut short or altered, or belongs to another calibration.
        """
        try:
            with open_safetensors(path) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = metadata.get(_HEADER, "")
            if metadata.get(_CHECKSUM) != _text_hash(header + tensor_hash(tensors)):
                raise _DamagedError("damaged (its checksum is wrong)")
            content = parse_json(header)
        except UntrustedFileError as error:
            raise _DamagedError(f"cannot be read ({error})") from None
        if not isinstance(content, dict) or content.get("calibration") != self._calibration:
            raise _DamagedError("of another calibration")
        return tensors, content.get("facts", {})


class _DamagedError(ValueError):
    """A file that cannot be used."""


@contextmanager
def _refused_as_damaged(path: Path) -> Iterator[None]:
    """A file whose checksum is right may still be none that :meth:`CalibrationProgress.keep` wrote."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ProgressError(
            f"{path}: damaged ({reason(error)}); remove it, and what it held is learned again"
        ) from None


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """None where there is none, or none that can be read: the files then show whether they belong here."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except UntrustedFileError:
        content = None
    if isinstance(content, dict) and content.get("device") and isinstance(content.get("identity"), dict):
        return content
    log.warning("%s: damaged; written anew", path)
    return None


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    said = differences(before, now)
    if said:
        shown = "; ".join(said[:5]) + (f"; and {len(said) - 5} more" if len(said) > 5 else "")
        raise ProgressError(
            f"{folder}: the units in it come from another calibration: {shown}. Go on with what it was started with; "
            f"or start anew: give -l another folder, or remove {folder}"
        )


def _name(unit: Unit, phase: Phase, number: int) -> str:
    return f"{phase}-{number:03d}-{unit.path}"


def _quantizers(module: nn.Module, phase: Phase) -> dict[str, nn.Module]:
    """A unit's quantizers of weights or of activations, by their path in it."""
    kind = "weight_quantizer" if phase == "weights" else "act_quantizer"
    return {path: m for path, m in module.named_modules() if path.rpartition(".")[2].startswith(kind)}


def _state_of(quantizers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Everything they declare, whatever its shape."""
    return {
        f"{path}.{name}": tensor.detach().cpu().contiguous()
        for path, quantizer in quantizers.items()
        for name, tensor in quantizer.state_dict().items()
    }


def _has_rounding(path: str, tensors: Mapping[str, Tensor]) -> bool:
    prefix = f"{path}.weight_quantizer" if path else "weight_quantizer"
    return any(name.startswith(prefix) and name.endswith(".alpha") for name in tensors)


def _load_state(quantizers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    for path, quantizer in quantizers.items():
        own = quantizer.state_dict()
        state = {name: tensors[f"{path}.{name}"] for name in own}
        check_grid(state["delta"], state["zero_point"])
        for name, tensor in quantizer.state_dict(keep_vars=True).items():
            if tensor.shape != state[name].shape:  # a grid takes its shape from the tensor it was found for
                tensor.data = torch.empty_like(state[name], device=tensor.device)
        quantizer.load_state_dict(state)


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Facts within facts, told by their path: ``a.b.c`` -> value. Where there are none they are a value themselves."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
