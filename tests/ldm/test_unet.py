"""The latent UNet: its pieces against closed forms, its stages, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.modules.attention import AttentionBlock, CrossAttention, FeedForward
from ldm.modules.diffusionmodules.openaimodel import (
    Downsample,
    Flow,
    ResBlock,
    Stage,
    UNetModel,
    Upsample,
    timestep_embedding,
)

from .unets import CHANNELS, CONTEXT, KINDS, SIZE, latent_inputs, tiny_latent_unet

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# The whole network.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(SIZE, SIZE), (4, 12)])
def test_output_has_the_shape_of_the_input(kind: str, size: tuple[int, int]) -> None:
    x, *others = latent_inputs(kind, 2)
    out = tiny_latent_unet(kind, out_channels=5).eval()(F.interpolate(x, size), *others)
    assert out.shape == (2, 5, *size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_is_its_stages(kind: str) -> None:
    model, inputs = tiny_latent_unet(kind).eval(), latent_inputs(kind, 2)
    flow = model.begin(*inputs)
    with torch.no_grad():
        for stage in model.stages():
            model.advance(stage, flow)
        assert torch.equal(flow.h, model(*inputs))
    assert flow.skips == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_lies_in_one_stage(kind: str) -> None:
    model = tiny_latent_unet(kind)
    inside = [id(p) for stage in model.stages() for p in model.get_submodule(stage.path).parameters()]
    assert sorted(inside) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_reaches_the_output(kind: str) -> None:
    model, inputs = tiny_latent_unet(kind).eval(), latent_inputs(kind, 2)
    with torch.no_grad():
        before = model(*inputs)
        for index in range(len(inputs)):
            changed = [x + 3 if i == index else x for i, x in enumerate(inputs)]
            assert not torch.allclose(model(*changed), before, atol=1e-4), index


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_see_one_another(kind: str) -> None:
    model, inputs = tiny_latent_unet(kind).eval(), latent_inputs(kind, 3)
    with torch.no_grad():
        together = model(*inputs)
        alone = torch.cat([model(*(x[i : i + 1] for x in inputs)) for i in range(3)])
    torch.testing.assert_close(together, alone, **CLOSE)


def test_lists_of_a_config_file_are_taken() -> None:
    params = OmegaConf.create({"channel_mult": [1, 2], "attention_resolutions": [1], "transformer_depth": 2})
    model = tiny_latent_unet("transformer", **params)
    assert model(*latent_inputs("transformer", 1)).shape == (1, CHANNELS, SIZE, SIZE)
    assert len(model.middle_block[1].transformer_blocks) == 2


def test_resampling_without_convolutions() -> None:
    names = tiny_latent_unet("head_channels", conv_resample=False).state_dict()
    assert not [name for name in names if ".op." in name or ".conv." in name]
    x = torch.randn(1, 4, 4, 4)
    assert torch.equal(Downsample(4, with_conv=False)(x), F.avg_pool2d(x, 2))
    assert torch.equal(Upsample(4, with_conv=False)(x)[:, :, ::2, 1::2], x)


def test_what_the_decoder_joins_is_what_the_encoder_left() -> None:
    model = tiny_latent_unet("head_channels")
    for parts in model.output_blocks:
        assert 0 < parts[0].skip_channels < parts[0].in_channels
    assert sum(parts[0].skip_channels for parts in model.output_blocks) == 32 + 32 + 32 + 64
    assert {block.skip_channels for parts in model.input_blocks for block in parts if isinstance(block, ResBlock)} == {
        0
    }


# What travels.


def test_a_flow_hands_a_stage_what_it_takes_and_no_more() -> None:
    flow = Flow(*(torch.zeros(1) for _ in range(4)), [torch.zeros(1), torch.zeros(1)])

    def touched(stage: Stage) -> set[str]:
        new = flow.for_stage(stage, lambda x: x + 1)
        named = {"h": new.h, "t": new.t, "context": new.context, "temb": new.temb}
        named |= {f"skip {i}": skip for i, skip in enumerate(new.skips)}
        return {name for name, x in named.items() if x.item() == 1}

    assert touched(Stage("a")) == {"h", "t"}
    assert touched(Stage("a", timed=True, joins=True)) == {"h", "t", "temb", "skip 1"}
    assert touched(Stage("a", attends=True, leaves=True)) == {"h", "t", "context"}
    assert all(x.item() == 0 for x in (flow.h, flow.t, flow.context, flow.temb, *flow.skips))
    moved = flow.map(lambda x: x + 1)
    assert all(x.item() == 1 for x in (moved.h, moved.t, moved.context, moved.temb, *moved.skips))


def test_a_flow_without_context_or_embedding() -> None:
    flow = Flow(torch.zeros(1), torch.zeros(1))
    for new in (flow.map(lambda x: x + 1), flow.for_stage(Stage("a", timed=True, attends=True), lambda x: x + 1)):
        assert new.context is None
        assert new.temb is None


# Context.


def test_a_missing_context_is_an_error() -> None:
    x, t, _ = latent_inputs("transformer", 1)
    with pytest.raises(ValueError, match=rf"pass one, N x L x {CONTEXT}"):
        tiny_latent_unet("transformer")(x, t)


def test_a_context_for_an_unconditional_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="takes no context"):
        tiny_latent_unet("head_channels")(*latent_inputs("transformer", 1))


def test_a_context_of_another_width_is_an_error() -> None:
    x, t, context = latent_inputs("transformer", 1)
    with pytest.raises(ValueError, match=f"{CONTEXT - 1} wide; this network takes {CONTEXT}"):
        tiny_latent_unet("transformer")(x, t, context[..., 1:])


# Options.


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("head_channels", {"dims": 3}, "dims=3"),
        ("head_channels", {"num_classes": 10}, "num_classes=10.*ClassEmbedder"),
        ("head_channels", {"use_fp16": True}, "use_fp16=True.*--precision"),
        ("head_channels", {"n_embed": 8}, "n_embed=8"),
        ("head_channels", {"num_head_channels": -1}, "num_heads or num_head_channels"),
        ("head_channels", {"num_head_channels": 24}, "num_head_channels=24 does not divide 64"),
        ("scale_shift", {"num_heads": 5}, "num_heads=5 does not divide 64"),
        ("scale_shift", {"num_heads": 0}, "num_heads=0"),
        ("scale_shift", {"num_heads_upsample": 3}, "num_heads=3 does not divide 64"),
        ("transformer", {"num_heads_upsample": 2}, "num_heads_upsample=2"),
        ("transformer", {"context_dim": None}, "context_dim=None: one needs the other"),
        ("scale_shift", {"context_dim": 16}, "context_dim=16: one needs the other"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_latent_unet(kind, **change)


def head_counts(model: UNetModel) -> list[int]:
    return [module.heads for module in model.modules() if isinstance(module, AttentionBlock | CrossAttention)]


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("head_channels", {}, [4, 4, 4, 4]),
        ("head_channels", {"attention_resolutions": (1,)}, [2, 4, 2, 2]),  # the levels differ in width
        ("head_channels", {"num_heads": 1}, [4, 4, 4, 4]),  # the width of a head decides
        ("scale_shift", {"attention_resolutions": (1,)}, [4, 4, 4, 4]),
        ("scale_shift", {"num_heads_upsample": 2}, [4, 4, 2, 2]),
        ("transformer", {}, [4] * 8),
        ("transformer", {"num_head_channels": 8}, [8] * 8),
    ],
)
def test_heads(kind: str, change: dict[str, Any], expected: list[int]) -> None:
    assert head_counts(tiny_latent_unet(kind, **change)) == expected


def test_accepted_flags_change_nothing() -> None:
    inputs = latent_inputs("transformer", 1)
    expected = tiny_latent_unet("transformer").eval()(*inputs)
    assert torch.equal(tiny_latent_unet("transformer", use_checkpoint=True, legacy=False).eval()(*inputs), expected)


def test_dropout_is_in_the_residual_blocks_only() -> None:
    model = tiny_latent_unet("transformer")
    dropouts = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert dropouts
    assert set(dropouts.values()) == {0.3}
    assert all(name.endswith("out_layers.2") for name in dropouts)


# Time.


@pytest.mark.parametrize("channels", [6, 7])
def test_timestep_embedding(channels: int) -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 12.5]), channels)
    for row, t in zip(embedding, (0.0, 12.5), strict=True):
        angles = [t * 10_000 ** (-i / 3) for i in range(3)]
        expected = [*map(math.cos, angles), *map(math.sin, angles), *([0.0] * (channels - 6))]
        torch.testing.assert_close(row, torch.tensor(expected))


# Residual blocks.


def residual(**options: Any) -> ResBlock:
    block = ResBlock(32, options.pop("out", 32), 16, 0.0, **options)
    for norm in (block.in_layers[0], block.out_layers[0]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block


@pytest.mark.parametrize("scale_shift", [False, True])
def test_the_time_embedding_shifts_or_also_scales(scale_shift: bool) -> None:
    block, x, temb = residual(scale_shift=scale_shift, out=64), torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    h = block.in_layers(x)
    emb = block.emb_layers[1](F.silu(temb))[:, :, None, None]
    norm = block.out_layers[0]
    h = norm(h) * (1 + emb[:, :64]) + emb[:, 64:] if scale_shift else norm(h + emb)
    expected = block.skip_connection(x) + block.out_layers[3](F.silu(h))
    torch.testing.assert_close(block(x, temb), expected)


@pytest.mark.parametrize("resample", ["up", "down"])
def test_the_shortcut_changes_resolution_with_the_block(resample: str) -> None:
    block, x, temb = residual(resample=resample), torch.randn(2, 32, 4, 4), torch.randn(2, 16)

    def resized(y: Tensor) -> Tensor:
        return y.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else F.avg_pool2d(y, 2)

    h = block.in_layers[2](resized(F.silu(block.in_layers[0](x)))) + block.emb_layers(temb)[:, :, None, None]
    torch.testing.assert_close(block(x, temb), resized(x) + block.out_layers(h))


# Attention.


def test_fused_attention_over_heads_is_the_written_out_one() -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 9).unbind()  # N, A, K, P
    weights = torch.einsum("nakp,nakr->napr", q, k).div(math.sqrt(16)).softmax(-1)
    expected = torch.einsum("napr,nakr->nakp", weights, v)
    torch.testing.assert_close(AttentionBlock(64, 4).attend(q, k, v), expected, **CLOSE)


def test_fused_cross_attention_is_the_written_out_one() -> None:
    block, x, context = CrossAttention(32, 4, CONTEXT), torch.randn(2, 6, 32), torch.randn(2, 5, CONTEXT)
    heads = []
    for i in range(4):
        rows = slice(8 * i, 8 * (i + 1))  # a head's channels lie next to each other
        q = x @ block.to_q.weight[rows].T
        k, v = context @ block.to_k.weight[rows].T, context @ block.to_v.weight[rows].T
        heads.append((q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v)
    expected = block.to_out(torch.cat(heads, dim=2))
    torch.testing.assert_close(block(x, context), expected, **CLOSE)


def test_self_attention_attends_to_its_own_tokens() -> None:
    block, x = CrossAttention(32, 4), torch.randn(2, 6, 32)
    assert torch.equal(block(x), block(x, x))


def test_orders_of_the_joint_projection_differ_in_the_order_of_its_channels_only() -> None:
    outside, inside = AttentionBlock(64, 4), AttentionBlock(64, 4, heads_inside=True)
    inside.load_state_dict(outside.state_dict())
    x = torch.randn(2, 64, 3, 3)
    assert not torch.allclose(inside(x), outside(x), atol=1e-3)
    for name in ("weight", "bias"):  # heads, each q k v -> q k v, each of all heads
        own = getattr(outside.qkv, name)
        getattr(inside.qkv, name).data = own.unflatten(0, (4, 3, 16)).transpose(0, 1).flatten(0, 2)
    torch.testing.assert_close(inside(x), outside(x), **CLOSE)


def test_the_new_order_is_passed_on() -> None:
    model = tiny_latent_unet("head_channels", use_new_attention_order=True)
    assert {m.heads_inside for m in model.modules() if isinstance(m, AttentionBlock)} == {True}


def test_feed_forward_gates_one_half_with_the_other() -> None:
    block, x = FeedForward(8), torch.randn(2, 3, 8)
    projected = block.net[0].proj(x)
    expected = block.net[2](projected[..., :32] * F.gelu(projected[..., 32:]))
    torch.testing.assert_close(block(x), expected)
