"""What is written in the published format has the names, shapes and types of the published full-size checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff.checkpoint import save_published
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel

from .conftest import golden_json, golden_root, parameters
from .test_unet_full_precision import full_size

NAME = re.compile(r"(?P<network>\w+?)_quantized_w(?P<weight_bit>\d+)a(?P<act_bit>\d+)(?P<split>_split)?\.json\.gz")


def manifests() -> list[Any]:
    return sorted(path.name for path in (golden_root() / "manifests").glob("*_quantized_*.json.gz"))


def quant_config(name: str, note: str) -> QuantConfig:
    """Bits from the file's name, flags from its note; 32 bits mean that activations are left alone."""
    found = NAME.fullmatch(name)
    act_bit = int(found["act_bit"])
    return QuantConfig(
        weight_bit=int(found["weight_bit"]),
        act_bit=act_bit if act_bit < 32 else 8,
        quant_act=act_bit < 32,
        a_sym="--a_sym" in note,
        split=found["split"] is not None,
    )


@pytest.mark.parametrize("name", parameters(manifests(), "quantized manifest"))
def test_written_names_shapes_and_types(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = golden_json(f"manifests/{name}")
    with torch.device("meta"):
        network = full_size(NAME.fullmatch(name)["network"])
    qnn = QuantModel.from_config(network, quant_config(name, manifest["note"]))
    written: dict[str, Tensor] = {}
    # Gigabytes that need neither memory nor disk: shapes without values, which there is no moving to the CPU.
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: tensor)
    monkeypatch.setattr(torch, "save", lambda state, file: written.update(state))
    save_published(tmp_path / "ckpt.pth", qnn)
    ours = {key: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in written.items()}
    assert ours == {key: (shape, dtype) for key, shape, dtype in manifest["keys"]}
