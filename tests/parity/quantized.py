"""Quantized networks as the golden folder stores them: built, wrapped and loaded for the tests beside this file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff.checkpoint import load_quantized
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel

from .conftest import golden_json, golden_keys, golden_root, golden_tensors
from .test_unet_full_precision import BUILDERS

_NOTHING = pytest.mark.skip(reason=f"nothing of this kind in {golden_root()}")
NONE_OF_TWO = pytest.param(None, None, marks=_NOTHING)
NONE_OF_THREE = pytest.param(None, None, None, marks=_NOTHING)

WITH_ACTIVATIONS_END_TO_END = 0.1  # a rounding edge that falls the other way spreads; the units are the real check
WITHOUT_ACTIVATIONS = 1e-4
UNIT = 1e-3


def folders() -> list[str]:
    """Names of the folders in ``unets``."""
    return sorted(path.parent.name for path in (golden_root() / "unets").glob("*/model.json"))


def facts(folder: str, variant: str) -> dict[str, Any]:
    return golden_json(f"unets/{folder}/{variant}.json")


def family_of(folder: str) -> str:
    return golden_json(f"unets/{folder}/model.json")["family"]


def all_variants() -> list[tuple[str, str]]:
    """Every ``(folder, variant)``; parts of it may be absent."""
    return [(folder, name) for folder in folders() for name in golden_json(f"unets/{folder}/model.json")["variants"]]


def variants_with(tensor: str) -> list[tuple[str, str]]:
    """Those whose file holds a tensor of that name."""
    return [
        (folder, name) for folder, name in all_variants() if tensor in golden_keys(f"unets/{folder}/{name}.safetensors")
    ]


def case(folder: str, *values: Any) -> Any:
    """A pytest parameter."""
    return pytest.param(folder, *values, id="-".join([folder, *map(str, values)]))


def quant_config(variant: dict[str, Any]) -> QuantConfig:
    return QuantConfig(
        weight_bit=variant["weight_bit"],
        act_bit=variant["act_bit"] or 8,
        quant_act=variant["act_bit"] is not None,
        a_sym=variant["symmetric"],
        split=variant["split"],
        sm_abit=variant["sm_abit"],
    )


def model_tensors(folder: str) -> dict[str, Tensor]:
    return golden_tensors(f"unets/{folder}/model.safetensors")


def stored_weights(folder: str) -> dict[str, Tensor]:
    """The full-precision weights that are there, by their names in the network."""
    return {
        name.removeprefix("weights."): tensor
        for name, tensor in model_tensors(folder).items()
        if name.startswith("weights.")
    }


def network_inputs(folder: str, prefix: str = "input.") -> tuple[Tensor, ...]:
    """Images, timesteps and, where the family has it, context; or those that set activation ranges."""
    tensors = model_tensors(folder)
    return tuple(tensors[prefix + name] for name in ("x", "t", "context") if prefix + name in tensors)


def wrapped(folder: str, variant: str) -> tuple[QuantModel, bool]:
    """The miniature with its stored weights, wrapped as the variant says, and whether all its weights are stored."""
    network = BUILDERS[family_of(folder)](golden_json(f"unets/{folder}/model.json")["config"]).eval()
    weights = stored_weights(folder)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    return QuantModel.from_config(network, quant_config(facts(folder, variant))), not missing


def stored_checkpoint(folder: str, variant: str) -> dict[str, Tensor]:
    """The calibrated checkpoint, completed by the full-precision weights that it shares with the model's file."""
    state = {f"model.{name}": tensor for name, tensor in stored_weights(folder).items()}
    for name, tensor in golden_tensors(f"unets/{folder}/{variant}.safetensors").items():
        if name.startswith("checkpoint."):
            state[name.removeprefix("checkpoint.")] = tensor
    return state


def resumed(folder: str, variant: str) -> tuple[QuantModel, set[str]]:
    """The variant resumed from its checkpoint, and the units whose every entry is stored.

    Where the folder holds some units only, made-up entries fill the rest of the checkpoint, so that the same strict
    import reads it.
    """
    qnn, _ = wrapped(folder, variant)
    qnn.find_weight_grids()
    qnn.learn_rounding()
    stored = stored_checkpoint(folder, variant)
    made_up = {
        name: tensor
        for name, tensor in qnn.state_dict().items()
        if name not in stored and (qnn.config.quant_act or ".act_quantizer" not in name)
    }
    with tempfile.TemporaryDirectory() as folder_of_file:
        path = Path(folder_of_file) / "ckpt.pth"
        torch.save(stored | made_up, path)
        load_quantized(path, qnn, quant_act=qnn.config.quant_act)
    complete = {
        unit.path for unit in qnn.units() if not any(name.startswith(f"model.{unit.path}.") for name in made_up)
    }
    return qnn, complete


def unit_inputs(tensors: dict[str, Tensor], path: str) -> tuple[Tensor, ...]:
    """What a unit was fed: its features and, where it takes them, the time embedding or context."""
    names = sorted(name for name in tensors if name.startswith(f"model.{path}.input"))
    return tuple(tensors[name] for name in names)
