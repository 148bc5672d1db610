"""What is written in the published format has the names, shapes and types of the published full-size checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddim.config import load_config
from ddim.unet import UNet
from qdiff.checkpoint import save_published
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel

from .conftest import REPOSITORY, golden_json, golden_root, parameters


def cifar10() -> nn.Module:
    return UNet.from_config(load_config(REPOSITORY / "configs" / "cifar10.yml"))


# What builds each full-size network. A network that is not here yet has its manifests skipped.
NETWORKS: dict[str, Callable[[], nn.Module]] = {"cifar10": cifar10}
NAME = re.compile(r"(?P<network>\w+?)_quantized_w(?P<weight_bit>\d+)a(?P<act_bit>\d+)(?P<split>_split)?\.json\.gz")


def manifests() -> list[Any]:
    found = []
    for path in sorted((golden_root() / "manifests").glob("*_quantized_*.json.gz")):
        network = NAME.fullmatch(path.name)["network"]
        skip = pytest.mark.skip(reason=f"the network {network} cannot be built yet")
        found.append(pytest.param(path.name, marks=[] if network in NETWORKS else [skip]))
    return found


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
        network = NETWORKS[NAME.fullmatch(name)["network"]]()
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.zero_()
    qnn = QuantModel.from_config(network, quant_config(name, manifest.get("note", "")))
    written: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(torch, "save", lambda state, file: written.update(state))  # 300 MB that need no disk
    save_published(tmp_path / "ckpt.pth", qnn)
    ours = {key: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in written.items()}
    assert ours == {key: (shape, dtype) for key, shape, dtype in manifest["keys"]}
