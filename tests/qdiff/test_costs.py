"""Parameters, multiplications, bit operations and bytes, against torch's own counter and the files that are written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddim.config import load_config
from ddim.unet import UNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config, load_model_config
from qdiff.checkpoint import packed_bytes
from qdiff.config import QuantConfig
from qdiff.costs import FLOATS, Costs, Precision, count_costs, reported_sizes, usual_precisions
from qdiff.output_scale import OutputScale
from qdiff.quant_model import QuantModel

from ..cases import thorough_but
from .conftest import CHANNELS, SIZE, SMALL, tiny_unet

ROOT = Path(__file__).resolve().parents[2]
STABLE_DIFFUSION: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
    "legacy": False,
}


@dataclass(frozen=True)
class Family:
    """A UNet at full size: how to make it, and what it sees."""

    make: Callable[[], nn.Module]
    image: tuple[int, int, int]
    context: tuple[int, int] | None = None


def pixel(name: str) -> Family:
    config = load_config(ROOT / "configs" / f"{name}.yml")
    size = config.data.image_size
    return Family(lambda: UNet.from_config(config), (config.data.channels, size, size))


def latent(path: str, context: tuple[int, int] | None = None) -> Family:
    params = load_model_config(ROOT / path)["params"]
    size = params["image_size"]
    return Family(lambda: instantiate_from_config(params["unet_config"]), (params["channels"], size, size), context)


FAMILIES = {
    **{name: pixel(name) for name in ("cifar10", "bedroom", "church", "cat", "fashion_mnist")},
    **{name: latent(f"models/ldm/{name}/config.yaml") for name in ("lsun_beds256", "celeba256", "ffhq256")},
    "lsun_churches256": latent("models/ldm/lsun_churches256/config.yaml"),
    "cin256-v2": latent("configs/latent-diffusion/cin256-v2.yaml", (1, 512)),
    "emoji64": latent("configs/latent-diffusion/emoji64.yaml", (1, 64)),
    "stable-diffusion-v1": Family(lambda: UNetModel(**STABLE_DIFFUSION), (4, 64, 64), (77, 768)),
}
QUICK = ("cifar10", "lsun_beds256", "cin256-v2", "stable-diffusion-v1")  # one of each kind of network
FULL_PRECISION_MIB = {"lsun_beds256": 1045.6, "lsun_churches256": 1125.4, "stable-diffusion-v1": 3279.1}  # as reported


def counted(family: Family, quant: QuantConfig, **options: Any) -> Costs:
    with torch.device("meta"):
        unet = family.make().eval()
    model = QuantModel.from_config(unet, quant)
    precisions = options.pop("precisions", usual_precisions(quant))
    return count_costs(model, family.image, family.context, precisions=precisions, **options)


@pytest.mark.parametrize("name", thorough_but(QUICK, FAMILIES))
def test_macs_of_full_size_networks_are_those_of_torchs_counter(name: str) -> None:
    family = FAMILIES[name]
    begin = time.perf_counter()
    costs = counted(family, QuantConfig(quant_act=True, split=True))
    assert time.perf_counter() - begin < 10

    with torch.device("meta"):
        unet = family.make().eval()
        inputs = [torch.empty(1, *family.image), torch.empty(1)]
        inputs += [torch.empty(1, *family.context)] if family.context else []
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*inputs)
    assert 2 * costs.macs == counter.get_total_flops()  # it counts multiplications and additions
    assert sum(row.macs for row in costs.rows if row.kind in ("q k", "softmax v")) > 0
    assert costs.parameters == sum(p.numel() for p in unet.parameters())
    assert costs.size("fp32") == 4 * costs.parameters


@pytest.mark.parametrize("name", FULL_PRECISION_MIB)
def test_full_precision_sizes_are_the_reported_ones_and_the_others_differ(name: str) -> None:
    costs = counted(FAMILIES[name], QuantConfig(quant_act=True))
    assert costs.size("fp32") / 2**20 == pytest.approx(FULL_PRECISION_MIB[name], rel=1e-3)

    reported = reported_sizes(costs)
    assert reported is not None
    assert reported.mebibytes[32] == FULL_PRECISION_MIB[name]
    for bits in (8, 4):  # whatever is counted there, a packed file holds less
        assert costs.size(f"W{bits}A8") / 2**20 < 0.95 * reported.mebibytes[bits]


def test_nothing_is_reported_of_other_networks() -> None:
    assert reported_sizes(counted(FAMILIES["cifar10"], QuantConfig())) is None


TINY = Family(lambda: tiny_unet(), (CHANNELS, SIZE, SIZE))
TIMED = {"timed_ranges": "all", "timesteps": (1, 50, 900)}
CONFIGS = [
    QuantConfig(8),
    QuantConfig(4, split=True),
    QuantConfig(3, 8, quant_act=True),
    QuantConfig(5, 6, quant_act=True, split=True, sm_abit=16, a_sym=True),
    QuantConfig(4, quant_act=True, split=True, split_input=True, **TIMED),
    QuantConfig(4, quant_act=True, **TIMED | {"timed_ranges": "input"}),
]


def tensor_bytes(content: bytes) -> int:
    return sum(tensor.nbytes for tensor in load(content).values())


@pytest.mark.parametrize("quant", CONFIGS, ids=lambda q: "-".join(map(str, (q.weight_bit, q.split, q.timed_ranges))))
def test_sizes_are_the_bytes_of_a_packed_file(quant: QuantConfig) -> None:
    model = QuantModel.from_config(tiny_unet().eval(), quant)
    model.find_weight_grids()
    costs = counted(TINY, quant)
    assert costs.size(Precision.of(quant).name) == tensor_bytes(packed_bytes(model))


LATENT: dict[str, Any] = {
    **{"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1, 2]},
    **{"num_res_blocks": 1, "attention_resolutions": [2]},
}


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({"num_head_channels": 16}, None),
        ({"num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True}, None),
        ({"num_heads": 2, "use_spatial_transformer": True, "context_dim": 12}, (7, 12)),
    ],
    ids=["heads", "resampling blocks", "transformer"],
)
def test_latent_networks_by_file_and_by_layer(options: dict[str, Any], context: tuple[int, int] | None) -> None:
    family = Family(lambda: UNetModel(**LATENT, **options), (3, 8, 8), context)
    quant = QuantConfig(4, quant_act=True, split=True)
    costs = counted(family, quant)
    model = QuantModel.from_config(family.make().eval(), quant)
    model.find_weight_grids()
    assert costs.size("W4A8") == tensor_bytes(packed_bytes(model))

    unet = family.make().eval()
    inputs = [torch.randn(1, 3, 8, 8), torch.ones(1), *([torch.randn(1, *context)] if context else [])]
    with FlopCounterMode(display=False, depth=99) as counter, torch.no_grad():
        unet(*inputs)
    name = type(unet).__name__
    theirs = {path.removeprefix(f"{name}."): sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    for row in costs.rows:
        if row.kind.startswith(("conv", "linear")):
            assert 2 * row.macs == theirs[row.path], row.path


def test_correction_of_the_output_is_counted() -> None:
    quant = QuantConfig(4, quant_act=True, split=True)
    model = QuantModel.from_config(tiny_unet().eval(), quant)
    model.find_weight_grids()
    means = torch.zeros(2, CHANNELS, SIZE, SIZE)
    for mean in (False, True):
        model.output_scale = OutputScale((1, 9), (1.0, 1.0), (1.0, 1.0), *((means, means) if mean else ()))
        costs = counted(TINY, quant, scale_timesteps=2, scale_mean=mean)
        assert costs.size("W4A8") == tensor_bytes(packed_bytes(model))
        assert costs.size("fp32") == 4 * costs.parameters


def test_bit_operations_by_hand() -> None:
    """One level of 32 channels at 8 x 8: every layer's products written down."""
    position, full = 8 * 8, 9 * 32 * 32
    residual = 2 * position * full + 128 * 32  # two convolutions and the time embedding
    upwards = position * (2 * full + full + 64 * 32) + 128 * 32  # 64 channels come in; the shortcut
    projections = 4 * position * 32 * 32
    ends = position * 9 * 32 * (CHANNELS + CHANNELS)
    embedding = 32 * 128 + 128 * 128
    layers = 3 * residual + 2 * upwards + projections + ends + embedding
    product = position * position * 32
    assert (layers, product) == (7_753_728, 131_072)

    family = Family(lambda: tiny_unet(**SMALL), (CHANNELS, SIZE, SIZE))
    quant = QuantConfig(4, 8, quant_act=True, split=True, sm_abit=16)
    costs = counted(family, quant)
    assert costs.macs == layers + 2 * product
    assert costs.bops("fp32") == 32 * 32 * costs.macs
    assert costs.bops("fp16") == 16 * 16 * costs.macs
    assert costs.bops("W4A8") == 4 * 8 * layers + 8 * 8 * product + 16 * 8 * product
    assert costs.bops("W8A8") == 8 * 8 * layers + 8 * 8 * product + 16 * 8 * product

    weights_only = counted(family, QuantConfig(4))
    assert weights_only.bops("W4A32") == 4 * 32 * layers + 32 * 32 * 2 * product

    twice = counted(family, QuantConfig(4, 8, quant_act=True, split_input=True, sm_abit=16))
    assert twice.bops("W4A8") - costs.bops("W4A8") == 4 * 8 * position * 9 * 32 * CHANNELS  # the first layer again


def test_precisions_are_those_asked_for_beside_the_usual() -> None:
    assert [p.name for p in usual_precisions(QuantConfig())] == ["fp32", "fp16", "W8A32", "W4A32"]
    names = [p.name for p in usual_precisions(QuantConfig(6, 4, quant_act=True))]
    assert names == ["fp32", "fp16", "W8A4", "W6A4", "W4A4"]


def test_network_with_values_is_refused() -> None:
    model = QuantModel.from_config(tiny_unet(), QuantConfig())
    with pytest.raises(ValueError, match="meta"):
        count_costs(model, TINY.image, precisions=FLOATS)


def test_precision_of_another_structure_is_refused() -> None:
    with pytest.raises(ValueError, match="W4A8"):
        counted(TINY, QuantConfig(4), precisions=[Precision.of(QuantConfig(4, 8, quant_act=True))])
