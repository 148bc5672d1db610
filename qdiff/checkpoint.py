"""Calibrated networks on disk: the published format and a packed one. ``docs/formats.md`` describes both.

*Published* (``ckpt.pth``): the state dictionary of the wrapped UNet: full-precision weights, their grids and rounding
variables, activation grids. What is true of it (bits, flags) lies in ``ckpt.json`` beside it.

*Packed* (``ckpt.safetensors``): each weight as its integers at their real bit width, and a header that says
everything needed to understand them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from torch import Tensor

from ddim.tensor_archive import CodeInFileError, is_state, load_archive
from ddim.untrusted import FileError, UntrustedFileError, open_safetensors, parse_json, read_json, reason
from qdiff.config import QuantConfig
from qdiff.files import atomic_file, write_atomically
from qdiff.output_scale import OutputScale
from qdiff.quant_layer import QuantModule, SplitQuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizers import UniformAffineQuantizer, check_grid, rounded_codes
from qdiff.version import __version__

Shape = tuple[int, ...]

FORMAT = "qdiff-packed"
FORMAT_VERSION = 2  # of files with timed ranges, a split input or an output scale; all others are version 1
_UNPACKED_AT_ONCE = 2**17  # bytes: what passes through stays in a CPU's cache
PREFIX = "model."


class CheckpointError(FileError):
    """A calibrated checkpoint that cannot be used; the message names the difference and the flag that mends it."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        quant: bits, flags and range methods.
        model_config: the UNet's config, as a nested dictionary.
        calibration: how it was calibrated, as free facts.
        versions: software that wrote it.
    """

    quant: QuantConfig
    model_config: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"quant": self.quant.to_dict()}


def software_versions() -> dict[str, str]:
    return {"qdiff": __version__, "torch": torch.__version__, "python": platform.python_version()}


def is_packed(path: str | Path) -> bool:
    """Whether a file is of the packed form, by its name."""
    return Path(path).suffix == ".safetensors"


# Writing.


def save_published(path: str | Path, qnn: QuantModel, *, info: Mapping[str, Any] | None = None) -> None:
    """Write the published format, and the facts about it beside it.

    Args:
        path: usually ``ckpt.pth``; the facts go to the same name with ``.json``.
        qnn: a calibrated model that still holds its full-precision weights.
        info: ``model_config`` and ``calibration`` to record.

    Raises:
        CheckpointError: activations are quantized in a way that this format cannot say.
    """
    if not fits_published(qnn):
        raise CheckpointError(f"{path}: the published format has no place for {UNPUBLISHABLE}; save the packed form")
    qnn.learn_rounding()  # round-to-nearest weights get the rounding variables that say the same
    state = {
        name: tensor.detach().cpu().float()
        for name, tensor in qnn.state_dict().items()
        if qnn.config.quant_act or not _is_act_entry(name)
    }
    with atomic_file(path) as file:
        torch.save(state, file)
    facts = _info_of(qnn, info).to_dict()
    write_atomically(Path(path).with_suffix(".json"), json.dumps(facts, indent=2, sort_keys=True).encode() + b"\n")
    qnn.bake()


UNPUBLISHABLE = "activation ranges that depend on the timestep, or a split input"


def fits_published(qnn: QuantModel) -> bool:
    """Whether the published format can hold a network's grids. It has no place for an output scale either way."""
    return qnn.config.published or not qnn.config.quant_act


def save_packed(path: str | Path, qnn: QuantModel, *, info: Mapping[str, Any] | None = None) -> int:
    """Write the packed format. The same model gives the same bytes.

    Returns:
        the size of the file in bytes.
    """
    content = packed_bytes(qnn, info=info)
    write_atomically(path, content)
    return len(content)


def packed_bytes(qnn: QuantModel, *, info: Mapping[str, Any] | None = None) -> bytes:
    """The content of a packed file.

    A few long tensors instead of thousands of short ones: an entry in a safetensors header costs a hundred bytes,
    more than most of the tensors. The order within each is that of ``index`` in the header.
    """
    layers = qnn.layers()
    codes, deltas, zeros, biases, full = [], [], [], [], []
    index: dict[str, Any] = {"layers": [], "full": [], "act": []}
    for path, layer in layers.items():
        for (quantizer, _), part in zip(layer.weight_quantizers(), layer.codes(), strict=True):
            codes.append(pack_bits(part.cpu(), qnn.config.weight_bit))
            deltas.append(quantizer.delta.detach().cpu().float().flatten())
            zeros.append(quantizer.zero_point.detach().cpu().to(torch.int32).flatten())
        if layer.bias is not None:
            biases.append(layer.bias.detach().cpu().float())
        index["layers"].append([path, list(layer.weight.shape), cut_of(layer), layer.bias is not None])
    for name, tensor in other_tensors(qnn).items():
        full.append(tensor.detach().cpu().float().flatten())
        index["full"].append([name, list(tensor.shape)])
    tensors = {
        "codes": torch.cat(codes),
        "delta": torch.cat(deltas),
        "zero_point": torch.cat(zeros),
        "bias": torch.cat(biases or [torch.empty(0)]),
        "full": torch.cat(full or [torch.empty(0)]),
    }
    if qnn.config.quant_act:
        quantizers = qnn.act_quantizers()
        index["act"] = list(quantizers)
        tensors["act_delta"] = torch.cat([q.delta.detach().cpu().float().flatten() for q in quantizers.values()])
        tensors["act_zero_point"] = torch.cat(
            [q.zero_point.cpu().to(torch.int32).flatten() for q in quantizers.values()]
        )
        if qnn.timed_quantizers():
            index["act_groups"] = [q.delta.numel() for q in quantizers.values()]
    if qnn.output_scale is not None:
        tensors |= _scale_tensors(qnn.output_scale)
    version = 1 if qnn.config.published and qnn.output_scale is None else FORMAT_VERSION
    metadata = {"format_version": version, "family": qnn.adapter.family, "index": index}
    metadata |= _info_of(qnn, info).to_dict()
    # One entry, because safetensors writes several in no fixed order.
    return serialize(tensors, {FORMAT: json.dumps(metadata, separators=(",", ":"), sort_keys=True)})


def _scale_tensors(scale: OutputScale) -> dict[str, Tensor]:
    # Half precision is plenty for a mean error, which is known to a few percent.
    tables = {name: x.half() if x.dim() > 1 else x for name, x in scale.tables.items()}
    return {f"scale_{name}": table.cpu().contiguous() for name, table in tables.items()}


def size_report(qnn: QuantModel, packed_size: int) -> str:
    """One line: the packed file against the same network in full precision."""
    own = [tensor for layer in qnn.layers().values() for tensor in (layer.weight, layer.bias) if tensor is not None]
    values = sum(tensor.numel() for tensor in (*own, *other_tensors(qnn).values()))
    return (
        f"{packed_size / 2**20:.2f} MiB packed: {4 * values / packed_size:.1f} times smaller than fp32 "
        f"({4 * values / 2**20:.2f} MiB), {2 * values / packed_size:.1f} times smaller than fp16 "
        f"({2 * values / 2**20:.2f} MiB)"
    )


def pack_bits(codes: Tensor, n_bits: int) -> Tensor:
    """Integers below 2^n_bits as one string of bits, lowest bit first, padded to whole bytes.

    Args:
        codes: uint8, any shape.

    Returns:
        uint8, ceil(numel · n_bits / 8), on the device of ``codes``.
    """
    flat = codes.flatten()
    if n_bits == 8:
        return flat.clone()
    if 8 % n_bits == 0:  # whole integers in a byte
        in_a_byte = 8 // n_bits
        columns = F.pad(flat, (0, -len(flat) % in_a_byte)).view(-1, in_a_byte).unbind(1)
        packed = columns[0].clone()
        for number, column in enumerate(columns[1:], start=1):
            packed |= column << (n_bits * number)
        return packed
    bits = np.unpackbits(flat.cpu().numpy()[:, None], axis=1, count=n_bits, bitorder="little")
    return torch.from_numpy(np.packbits(bits, bitorder="little")).to(codes.device)


def unpack_bits(packed: Tensor, n_bits: int, count: int) -> Tensor:
    """The ``count`` integers that :func:`pack_bits` packed: uint8, flat, on the device of ``packed``."""
    if n_bits == 8:
        return packed[:count].clone()
    if 8 % n_bits == 0:
        codes = torch.empty(len(packed), 8 // n_bits, dtype=torch.uint8, device=packed.device)
        block = _UNPACKED_AT_ONCE if packed.device.type == "cpu" else len(packed)
        for some, packed_some in zip(codes.split(block), packed.split(block), strict=True):
            for first, column in zip(range(0, 8, n_bits), some.unbind(1), strict=True):
                column.copy_(packed_some >> first).bitwise_and_(2**n_bits - 1)
        return codes.flatten()[:count]
    bits = np.unpackbits(packed.cpu().numpy(), count=count * n_bits, bitorder="little").reshape(count, n_bits)
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").squeeze(1)).to(packed.device)


def packed_length(count: int, n_bits: int) -> int:
    """Bytes of ``count`` packed integers."""
    return -(-count * n_bits // 8)


# Reading.


def read_packed_info(path: str | Path) -> CheckpointInfo:
    """What a packed file says of itself, as :func:`read_info` does, which raises the same."""
    path = _existing(path)
    return _info_from(_metadata(path), path)


def read_info(path: str | Path) -> CheckpointInfo | None:
    """What a checkpoint says of itself, from its header or the JSON beside it. None where nothing is said.

    Raises:
        CheckpointError: the file is missing or its header cannot be read.
    """
    if is_packed(path):
        return read_packed_info(path)
    path = _existing(path)
    facts = path.with_suffix(".json")
    if not facts.is_file():
        return None
    try:
        return _info_from(read_json(facts), facts)
    except UntrustedFileError as error:
        raise CheckpointError(f"{facts}: not a JSON file ({error}); remove it to rely on the flags alone") from None


def load_quantized(
    path: str | Path,
    qnn: QuantModel,
    *,
    quant_act: bool,
    weights_only: bool = False,
    keep_full_precision: bool = False,
    correct_scale: bool = True,
) -> None:
    """Load a calibrated checkpoint of either form into a wrapped UNet, exactly as it was calibrated.

    Args:
        qnn: wrapped as the checkpoint was (:func:`read_info` says how); its quantization is on afterwards.
        quant_act: quantize activations too.
        weights_only: leave activation grids alone, whether or not the file has them (``--resume_w``).
        keep_full_precision: the UNet needs its full-precision weights again, as targets. For a packed file it has to
            hold them already. Otherwise the quantized weights take their place, layer by layer.
        correct_scale: apply the output's correction of a packed file that has one; never with ``weights_only``, which
            is for calibrating further.

    Raises:
        CheckpointError: what differs, and the flag that would make it fit.
    """
    path = _existing(path)
    wants_act = quant_act and not weights_only
    qnn.output_scale = None
    if is_packed(path):
        _load_packed(path, qnn, quant_act=wants_act, keep_full_precision=keep_full_precision)
        if correct_scale and not weights_only and (scale := read_output_scale(path)) is not None:
            qnn.output_scale = scale.to(next(qnn.parameters()).device)
    else:
        _load_published(path, qnn, quant_act=wants_act, keep_full_precision=keep_full_precision)
    qnn.set_quant_state(True, wants_act)


def read_output_scale(path: str | Path) -> OutputScale | None:
    """The output scale in a packed file; None where it has none, as every published file.

    Raises:
        CheckpointError: the file is missing or cannot be read, or its scales are damaged.
    """
    path = _existing(path)
    if not is_packed(path):
        return None
    tensors = _read_tensors(path, prefix="scale_")
    if not tensors:
        return None
    try:
        return OutputScale(**{name.removeprefix("scale_"): table for name, table in tensors.items()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its output scale cannot be used: {error}; --no_correct_scale does without"
        ) from None


def resume_cali_model(
    qnn: QuantModel, ckpt_path: str | Path, cali_data: Any = None, quant_act: bool = False, *_: Any, **__: Any
) -> None:
    """The published name for :func:`load_quantized`; ``cali_data`` is not needed, since grids exist beforehand."""
    load_quantized(ckpt_path, qnn, quant_act=quant_act)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A published file's tensors, without running anything that a pickle may hold.

    Raises:
        CheckpointError: missing, truncated, or holding anything but tensors and plain containers.
    """
    path = _existing(path)
    try:
        state = load_archive(path)  # mapped: its tensors are copied into the network, and not held twice until then
    except CodeInFileError:
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors and plain containers, which would run code when loaded"
        ) from None
    except UntrustedFileError as error:
        raise CheckpointError(f"{path}: not a checkpoint, or cut short ({error})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not is_state(state):
        raise CheckpointError(f"{path}: expected a dictionary of tensors")
    return state


def _load_published(path: Path, qnn: QuantModel, *, quant_act: bool, keep_full_precision: bool) -> None:
    state = read_state(path)
    weights = {name: tensor for name, tensor in state.items() if not _is_act_entry(name)}
    acts = {name: tensor for name, tensor in state.items() if _is_act_entry(name)}
    if not any(".weight_quantizer." in name for name in weights):
        raise CheckpointError(f"{path} is not a calibrated checkpoint; a full-precision one goes to --ckpt")
    if (info := read_info(path)) is not None:
        _check_config(path, info.quant, qnn.config, quant_act=quant_act)
    expected = _published_shapes(qnn)
    _check_split(path, weights, expected)
    _check_architecture(path, {name: tuple(tensor.shape) for name, tensor in weights.items()}, expected)
    _check_values(path, weights)
    _check_bits(path, qnn, weights)
    if quant_act:
        _check_act_entries(path, qnn, acts)
    if keep_full_precision:
        qnn.learn_rounding()
        qnn.load_state_dict(weights | acts if quant_act else weights, strict=False)
        qnn.bake()
        return
    quantized = {f"model.{path}.weight" for path in qnn.layers()}
    rest = {n: tensor for n, tensor in weights.items() if n not in quantized and ".weight_quantizer" not in n}
    qnn.load_state_dict(rest | acts if quant_act else rest, strict=False)
    _take_rounded(qnn, weights)


def _published_shapes(qnn: QuantModel) -> dict[str, Shape]:
    """Names and shapes of a published file's tensors, activations aside."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in qnn.state_dict().items()
        if not _is_act_entry(name) and ".weight_quantizer" not in name
    }
    for path, layer in qnn.layers().items():
        for (suffix, part), (quantizer, _) in zip(layer.parts(), layer.weight_quantizers(), strict=True):
            name, grid = f"model.{path}.weight_quantizer{suffix}", tuple(quantizer.delta.shape)
            shapes |= {f"{name}.alpha": tuple(part.shape), f"{name}.delta": grid, f"{name}.zero_point": grid}
    return shapes


def _take_rounded(qnn: QuantModel, weights: Mapping[str, Tensor]) -> None:
    """Give every layer its quantized weights, one after the other: no second copy of all of them is ever there."""
    for path, layer in qnn.layers().items():
        parts = []
        halves = layer.parts_of(weights[f"model.{path}.weight"])
        for (suffix, part), (quantizer, _) in zip(halves, layer.weight_quantizers(), strict=True):
            name = f"model.{path}.weight_quantizer{suffix}"
            # In float32 whatever the file has: half precision would round other weights the other way.
            alpha, delta, zero_point = (
                weights[f"{name}.{entry}"].float() for entry in ("alpha", "delta", "zero_point")
            )
            parts.append((rounded_codes(part.float(), alpha, delta, zero_point, quantizer.bounds), delta, zero_point))
        layer.load_codes(parts, keep_full_precision=False)


def _check_split(path: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    in_file = any(".weight_quantizer_0." in name for name in found)
    in_model = any(".weight_quantizer_0." in name for name in expected)
    if in_file and not in_model:
        raise CheckpointError(f"{path} was calibrated with --split; add --split")
    if in_model and not in_file:
        raise CheckpointError(f"{path} was calibrated without --split; leave --split out")


def _check_architecture(path: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    different = [name for name in expected if name in found and not _same_shape(found[name], expected[name])]
    if not (missing or extra or different):
        return
    parts = [
        f"{len(missing)} tensors are missing, as {missing[0]}" if missing else "",
        f"{len(extra)} are unknown, as {extra[0]}" if extra else "",
        f"{different[0]} is {_shape(found[different[0]])} instead of {_shape(expected[different[0]])}"
        if different
        else "",
    ]
    raise CheckpointError(
        f"{path} belongs to another architecture: {'; '.join(part for part in parts if part)}. "
        "Give the --config it was calibrated with"
    )


def _check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    """Numbers are numbers, and grids are grids."""
    for name, tensor in state.items():
        owner, _, entry = name.rpartition(".")
        try:
            if entry == "delta":
                check_grid(tensor, state[f"{owner}.zero_point"])
            elif entry != "zero_point" and not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                raise ValueError(f"holds NaN, infinite values or {tensor.dtype}")
        except ValueError as error:
            raise CheckpointError(f"{path}: {name}: {error}; make or fetch it again") from None


def _same_shape(a: Shape, b: Shape) -> bool:
    return a == b or (math.prod(a) == math.prod(b) == 1)


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a number"


def _check_bits(path: Path, qnn: QuantModel, weights: Mapping[str, Tensor]) -> None:
    bits = estimate_weight_bits(weights)
    asked = qnn.config.weight_bit
    tolerance = 0 if qnn.config.weight_range == "max" else 1
    if bits is not None and abs(bits - asked) > tolerance:
        raise CheckpointError(
            f"{path} was calibrated with {bits}-bit weights, not {asked}-bit ones: give --weight_bit {bits}"
        )


def estimate_weight_bits(weights: Mapping[str, Tensor]) -> int | None:
    """Bits of the weights of a published file, which does not record them: from how many steps its ranges span."""
    steps = []
    for name, delta in weights.items():
        layer, found, suffix = name.rpartition(".weight_quantizer.delta")
        weight = weights.get(f"{layer}.weight")
        if not found or suffix or weight is None or f"{layer}.weight_quantizer_0.delta" in weights:
            continue
        rows = weight.float().flatten(1)
        spread = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
        steps.append(spread / delta.float().flatten())
    if not steps:
        return None
    return round(math.log2(torch.cat(steps).median().item() + 1))


def _check_act_entries(path: Path, qnn: QuantModel, acts: Mapping[str, Tensor]) -> None:
    expected = {f"{PREFIX}{name}.{part}" for name in qnn.act_quantizers() for part in ("delta", "zero_point")}
    if not acts:
        raise CheckpointError(
            f"{path} was calibrated without activations; leave --quant_act out, or calibrate them with --resume_w"
        )
    if missing := sorted(expected - acts.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} activation grids, as {missing[0]}; calibrate again")
    if extra := sorted(acts.keys() - expected):
        raise CheckpointError(f"{path} has {len(extra)} activation grids unknown here, as {extra[0]}")
    for name, quantizer in qnn.act_quantizers().items():
        found = acts[f"{PREFIX}{name}.delta"].shape
        if found.numel() != quantizer.delta.numel():
            raise CheckpointError(f"{path}: {PREFIX}{name}.delta is {_shape(tuple(found))} instead of one for its grid")
    _check_values(path, acts)
    symmetric = [q.config.symmetric or q.config.always_zero for q in qnn.act_quantizers().values()]
    shifted = any(tensor.any() for name, tensor in acts.items() if name.endswith("zero_point"))
    if all(symmetric) and shifted:
        raise CheckpointError(f"{path} was calibrated with asymmetric activations; leave --a_sym out")
    if not any(symmetric) and not shifted:
        raise CheckpointError(f"{path} was calibrated with symmetric activations; add --a_sym")


def _load_packed(path: Path, qnn: QuantModel, *, quant_act: bool, keep_full_precision: bool) -> None:
    metadata = _metadata(path)
    info = _info_from(metadata, path)
    _check_config(path, info.quant, qnn.config, quant_act=quant_act)
    index = _index_of(path, metadata)
    tensors = _read_tensors(path)
    _check_lengths(path, index, tensors, info.quant.weight_bit, quant_act=quant_act)
    layers = qnn.layers()
    full = other_tensors(qnn)
    found = {name: tuple(shape) for name, shape, *_ in index["layers"]} | {n: tuple(s) for n, s in index["full"]}
    found |= {f"{name}.bias": (shape[0],) for name, shape, _, bias in index["layers"] if bias}
    expected = {path: tuple(layer.weight.shape) for path, layer in layers.items()}
    expected |= {f"{path}.bias": tuple(layer.bias.shape) for path, layer in layers.items() if layer.bias is not None}
    _check_architecture(path, found, expected | {name: tuple(tensor.shape) for name, tensor in full.items()})
    for name, _, cut, _ in index["layers"]:
        if cut != cut_of(layers[name]):
            raise CheckpointError(f"{path}: {name} is cut at channel {cut}, the model's at {cut_of(layers[name])}")

    names = ("codes", "delta", "zero_point", "bias", "full")
    codes, deltas, zeros, biases, values = (_Cursor(tensors[name]) for name in names)
    for name, shape, cut, has_bias in index["layers"]:
        place = layers[name].weight.device  # packed values travel there, an eighth of the bytes
        parts = [
            _read_part(codes, deltas, zeros, part_shape, info.quant.weight_bit, place)
            for part_shape in _parts(shape, cut)
        ]
        try:
            layers[name].load_codes(parts, keep_full_precision=keep_full_precision)
        except ValueError as error:
            raise CheckpointError(f"{path}: {name}: {error}; give the --ckpt it was calibrated from") from None
        if has_bias:
            bias = layers[name].bias
            assert bias is not None  # the architecture fits
            bias.data.copy_(biases.take(shape[0]))
    for name, shape in index["full"]:
        full[name].data.copy_(values.take(math.prod(shape)).view(shape))
    if quant_act:
        quantizers = qnn.act_quantizers()
        _check_architecture(
            path,
            {name: (groups,) for name, groups in zip(index["act"], index["act_groups"], strict=True)},
            {name: (quantizer.delta.numel(),) for name, quantizer in quantizers.items()},
        )
        deltas, zeros = _Cursor(tensors["act_delta"]), _Cursor(tensors["act_zero_point"])
        for name, groups in zip(index["act"], index["act_groups"], strict=True):
            shape = quantizers[name].delta.shape
            quantizers[name].set_grid(deltas.take(groups).view(shape), zeros.take(groups).view(shape))


def _index_of(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The index in a header, with ``act_groups``; whatever follows may rely on its structure."""
    index = metadata.get("index")
    entries = index if isinstance(index, dict) else {}
    layers, full, act = (entries.get(name) for name in ("layers", "full", "act"))
    groups = entries.get("act_groups", [1] * len(act) if isinstance(act, list) else None)
    if not (isinstance(layers, list) and isinstance(full, list) and isinstance(act, list)) or not (
        all(map(_is_layer, layers)) and all(map(_is_full, full))
    ):
        raise CheckpointError(f"{path}: damaged: its index does not say where its tensors lie")
    if (
        not isinstance(groups, list)
        or len(groups) != len(act)
        or not all(map(_is_count, groups))
        or not all(isinstance(name, str) for name in act)
    ):
        raise CheckpointError(f"{path}: damaged: its index does not say where its activation grids lie")
    names = [entry[0] for entry in (*layers, *full)]
    for kind in (names, act):
        if twice := [name for name, times in Counter(kind).items() if times > 1]:
            raise CheckpointError(f"{path}: damaged: its index names {twice[0][:80]} twice")
    return {"layers": layers, "full": full, "act": act, "act_groups": groups}


def _is_layer(entry: Any) -> bool:
    """[path, shape of the weight, cut, has a bias]"""
    if not isinstance(entry, list) or len(entry) != 4 or not _is_full(entry[:2]) or len(entry[1]) < 2:
        return False
    _, shape, cut, has_bias = entry
    return isinstance(has_bias, bool) and (cut == 0 or (_is_count(cut) and cut < shape[1])) and cut is not False


def _is_full(entry: Any) -> bool:
    """[name, shape]"""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        return False
    return isinstance(entry[1], list) and all(map(_is_count, entry[1]))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_lengths(
    path: Path, index: Mapping[str, Any], tensors: Mapping[str, Tensor], n_bits: int, *, quant_act: bool
) -> None:
    """The long tensors are exactly as long as the index needs, and hold what a network can be made of."""
    parts = [part for _, shape, cut, _ in index["layers"] for part in _parts(shape, cut)]
    grids = sum(part[0] for part in parts)
    wanted = {
        "codes": (torch.uint8, sum(packed_length(math.prod(part), n_bits) for part in parts)),
        "delta": (torch.float32, grids),
        "zero_point": (torch.int32, grids),
        "bias": (torch.float32, sum(shape[0] for _, shape, _, has_bias in index["layers"] if has_bias)),
        "full": (torch.float32, sum(math.prod(shape) for _, shape in index["full"])),
    }
    if quant_act:
        groups = sum(index["act_groups"])
        wanted |= {"act_delta": (torch.float32, groups), "act_zero_point": (torch.int32, groups)}
    for name, (dtype, length) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tensor.shape != (length,):
            found = "missing" if tensor is None else f"{tensor.dtype} {_shape(tuple(tensor.shape))}"
            raise CheckpointError(f"{path}: damaged: {name} is {found}; its index needs {length} of {dtype}")
        if name in ("bias", "full") and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: damaged: {name} holds NaN or infinite values")
    for prefix in ("", "act_") if quant_act else ("",):
        try:
            check_grid(tensors[f"{prefix}delta"], tensors[f"{prefix}zero_point"])
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged: {prefix}delta, {prefix}zero_point: {error}") from None


def _check_config(path: Path, theirs: QuantConfig, ours: QuantConfig, *, quant_act: bool) -> None:
    names = ["weight_bit", "split"] + (
        ["act_bit", "a_sym", "sm_abit", "timed_ranges", "split_input"] if quant_act else []
    )
    if quant_act and not theirs.quant_act:
        raise CheckpointError(
            f"{path} was calibrated without activations; leave --quant_act out, or calibrate them with --resume_w"
        )
    for name in names:
        here, there = getattr(ours, name), getattr(theirs, name)
        if here == there:
            continue
        if isinstance(there, bool):
            remedy = f"with --{name}; add it" if there else f"without --{name}; leave it out"
            raise CheckpointError(f"{path} was calibrated {remedy}")
        raise CheckpointError(f"{path} was calibrated with --{name} {there}, not {here}")
    if quant_act and ours.timesteps != theirs.timesteps:
        raise CheckpointError(f"{path} has activation ranges for other timesteps; wrap the network as its header says")


class _Cursor:
    """Reads one piece after the other from a long tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.position = tensor, 0

    def take(self, count: int) -> Tensor:
        piece = self.tensor[self.position : self.position + count]
        self.position += count
        return piece


def _read_part(
    codes: _Cursor, deltas: _Cursor, zeros: _Cursor, shape: list[int], n_bits: int, place: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    count = math.prod(shape)
    integers = unpack_bits(codes.take(packed_length(count, n_bits)).to(place), n_bits, count).view(shape)
    grid_shape = [shape[0]] + [1] * (len(shape) - 1)
    delta, zero_point = (values.take(shape[0]).view(grid_shape).to(place) for values in (deltas, zeros))
    return integers, delta, zero_point


def _parts(shape: list[int], cut: int) -> list[list[int]]:
    """Shapes of a weight's separately quantized parts."""
    if not cut:
        return [shape]
    return [[shape[0], cut, *shape[2:]], [shape[0], shape[1] - cut, *shape[2:]]]


def cut_of(layer: QuantModule) -> int:
    """The input channel at which a layer is cut in two; 0 for a whole one."""
    return layer.split_channels if isinstance(layer, SplitQuantModule) else 0


def other_tensors(qnn: QuantModel) -> dict[str, Tensor]:
    """Everything that belongs to no quantized layer: norms, buffers. Names as in the UNet."""
    skipped = {f"{path}.{name}" for path in qnn.layers() for name in ("weight", "bias")}
    for path, module in qnn.model.named_modules():
        if isinstance(module, UniformAffineQuantizer) or path.rpartition(".")[2].startswith("weight_quantizer"):
            skipped |= {f"{path}.{name}" for name in ("delta", "zero_point", "alpha")}
    return {name: tensor for name, tensor in qnn.model.state_dict(keep_vars=True).items() if name not in skipped}


def _is_act_entry(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2].startswith("act_quantizer")


def _info_of(qnn: QuantModel, info: Mapping[str, Any] | None) -> CheckpointInfo:
    info = dict(info or {})
    return CheckpointInfo(
        quant=qnn.config,
        model_config=info.pop("model_config", {}),
        calibration=info.pop("calibration", {}),
        versions=software_versions(),
    )


def _info_from(facts: Mapping[str, Any], path: Path) -> CheckpointInfo:
    try:
        quant = QuantConfig(**facts["quant"])
        others = {name: facts.get(name, {}) for name in ("model_config", "calibration", "versions")}
        if wrong := [name for name, value in others.items() if not isinstance(value, dict)]:
            raise ValueError(f"{wrong[0]} is no section")
        return CheckpointInfo(quant=quant, **others)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: does not say how the network was quantized: {reason(error)}") from None


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with open_safetensors(path) as file:
            raw = file.metadata() or {}
        if FORMAT not in raw:
            raise CheckpointError(
                f"{path}: a safetensors file, but not a packed checkpoint; full precision goes to --ckpt"
            )
        metadata = parse_json(raw[FORMAT])
    except UntrustedFileError as error:
        raise CheckpointError(f"{path}: cannot be read: cut short or damaged ({error})") from None
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: its header does not say which format it has")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}; this release reads up to {FORMAT_VERSION}")
    return metadata


def _read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    try:
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except UntrustedFileError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such calibrated checkpoint")
    return path
