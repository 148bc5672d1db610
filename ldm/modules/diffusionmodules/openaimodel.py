"""The noise-estimation UNet of latent diffusion (Rombach et al. 2022), with the published parameter names.

Its residual blocks are those of Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis".

Axes in comments: N images, C channels, H height, W width, E channels of the time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.unet import Flow, Stage, StagedNetwork
from ldm.modules.attention import AttentionBlock, SpatialTransformer, group_norm

MAX_PERIOD = 10_000


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5): N -> N x channels, cosines first.

    Not the pixel models' embedding: the order is another, and the slowest rate is left out.

    Args:
        t: timesteps, in training steps; integers or fractions.
        channels: width of the result; an odd width ends in a zero.
    """
    half = channels // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(MAX_PERIOD) / half))
    angles = torch.outer(t.float(), rates)  # N, half
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels % 2))


class Downsample(nn.Module):
    """Halve the resolution, by a convolution or by averaging."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if with_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then perhaps a convolution."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions, the time embedding between them, around a shortcut.

    Args:
        scale_shift: the time embedding scales and shifts the second normalisation's output; otherwise it is added
            before it.
        resample: ``up`` or ``down``: change the resolution before the first convolution and on the shortcut alike.
        skip_channels: how many of ``in_channels``, the last ones, come from the encoder through a U connection.
            Zero on the way down. The forward pass does not need the number; who quantizes the shortcut does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_channels: int,
        dropout: float,
        *,
        scale_shift: bool = False,
        resample: Literal["up", "down"] | None = None,
        skip_channels: int = 0,
    ):
        super().__init__()
        self.in_channels, self.skip_channels, self.scale_shift = in_channels, skip_channels, scale_shift
        self.resample = None
        if resample is not None:
            self.resample = (Upsample if resample == "up" else Downsample)(in_channels, with_conv=False)
        # Activations stand here for the published numbering; the forward pass runs them with the norm before them.
        first = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(group_norm(in_channels), nn.SiLU(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_channels, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(group_norm(out_channels), nn.SiLU(), nn.Dropout(dropout), second)
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = self.normalised(norm, x, silu=True)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self._second_half(conv(h), self.emb_layers(temb)[:, :, None, None])
        return self.skip_connection(x) + h  # N, out_channels, H, W (doubled or halved)

    def _second_half(self, h: Tensor, temb: Tensor) -> Tensor:
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            h = F.silu(self.normalised(norm, h, silu=False) * (1 + scale) + shift)
        else:
            h = self.normalised(norm, h + temb, silu=True)
        return conv(dropout(h))

    def normalised(self, norm: nn.Module, x: Tensor, *, silu: bool) -> Tensor:
        """The normalised feature, or SiLU of it."""
        return F.silu(norm(x)) if silu else norm(x)


class UNetModel(StagedNetwork):
    """Predicts the noise in a noisy latent: (N x C x H x W, N timesteps, context) -> N x out_channels x H x W.

    The keywords are those of the published YAML files.

    Args:
        image_size: height and width of a latent; recorded, any size that halves often enough can be run.
        model_channels: channels of the finest level; ``channel_mult`` multiplies them level by level.
        attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels with attention.
        conv_resample: change the resolution by convolutions; otherwise by averaging and repetition.
        num_heads: of attention, where ``num_head_channels`` does not give their width instead; -1 for not given.
        num_heads_upsample: heads on the way up where they differ; only without transformers.
        use_scale_shift_norm, resblock_updown: see :class:`ResBlock`; the latter changes the resolution inside
            residual blocks and makes ``conv_resample`` idle.
        use_new_attention_order: see ``heads_inside`` of :class:`~ldm.modules.attention.AttentionBlock`.
        use_spatial_transformer: attention is a :class:`~ldm.modules.attention.SpatialTransformer` of
            ``transformer_depth`` blocks, and the network takes a context of width ``context_dim``.
        use_checkpoint: accepted without effect: a forward pass keeps all activations that gradients need.
        legacy: accepted; it decided between two ways of computing head widths, which agree for every configuration
            that is not refused here.
        dims, num_classes, use_fp16, n_embed: accepted at their defaults only: feature maps have two axes, classes
            come as context, precision is chosen when sampling, and no codebook entries are predicted.

    Raises:
        ValueError: a configuration that no published model has and that would be computed wrongly.
    """

    # Long, for its 26 published keywords and because both ways share the widths of the skips.
    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
    ):
        super().__init__()
        _refuse(dims != 2, f"dims={dims}: only feature maps with two axes are supported")
        _refuse(num_classes is not None, f"num_classes={num_classes}: give classes as context, through a ClassEmbedder")
        _refuse(use_fp16, "use_fp16=True: weights are loaded in float32; choose --precision fp16 when sampling")
        _refuse(n_embed is not None, f"n_embed={n_embed}: predicting codebook entries is not supported")
        _refuse(
            use_spatial_transformer != (context_dim is not None),
            f"use_spatial_transformer={use_spatial_transformer} with context_dim={context_dim}: one needs the other",
        )
        _refuse(
            num_heads == num_head_channels == -1, "attention needs num_heads or num_head_channels; neither is given"
        )
        _refuse(
            use_spatial_transformer and num_heads_upsample != -1,
            f"num_heads_upsample={num_heads_upsample}: transformers have num_heads on both ways",
        )
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.context_dim = model_channels, context_dim
        embed = 4 * model_channels
        last_level = len(channel_mult) - 1

        def attention(channels: int, *, upwards: bool = False) -> nn.Module:
            own_number = upwards and num_heads_upsample != -1
            heads = _head_count(channels, num_heads_upsample if own_number else num_heads, num_head_channels)
            if context_dim is not None:  # where it is, transformers are wanted
                return SpatialTransformer(channels, heads, depth=transformer_depth, context_dim=context_dim)
            return AttentionBlock(channels, heads, heads_inside=use_new_attention_order)

        residual = partial(ResBlock, embed_channels=embed, dropout=dropout, scale_shift=use_scale_shift_norm)
        self.time_embed = nn.Sequential(nn.Linear(model_channels, embed), nn.SiLU(), nn.Linear(embed, embed))

        # What the way down leaves for the way up: the channels of every one of its blocks.
        width, skips = model_channels, [model_channels]
        down: list[list[nn.Module]] = [[nn.Conv2d(in_channels, width, 3, padding=1)]]
        for level, multiplier in enumerate(channel_mult):
            attends = 2**level in attention_resolutions
            for _ in range(num_res_blocks):
                block = residual(width, multiplier * model_channels)
                width = multiplier * model_channels
                down.append([block, attention(width)] if attends else [block])
                skips.append(width)
            if level < last_level:
                inside = resblock_updown
                down.append([residual(width, width, resample="down") if inside else Downsample(width, conv_resample)])
                skips.append(width)

        self.input_blocks = nn.ModuleList(nn.ModuleList(parts) for parts in down)
        self.middle_block = nn.ModuleList([residual(width, width), attention(width), residual(width, width)])

        up: list[list[nn.Module]] = []
        for level, multiplier in reversed(list(enumerate(channel_mult))):
            for _ in range(num_res_blocks + 1):
                skip = skips.pop()
                up.append([residual(width + skip, multiplier * model_channels, skip_channels=skip)])
                width = multiplier * model_channels
                if 2**level in attention_resolutions:
                    up[-1].append(attention(width, upwards=True))
            if level > 0:  # the level's last block ends in the next one's resolution
                inside = resblock_updown
                up[-1].append(residual(width, width, resample="up") if inside else Upsample(width, conv_resample))
        self.output_blocks = nn.ModuleList(nn.ModuleList(parts) for parts in up)

        self.out = nn.Sequential(group_norm(width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))
        self._stages = tuple(self._list_stages())

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Args:
            x: N x in_channels x H x W; t: N timesteps.
            context: N x L x context_dim, for a network with transformers and for no other.

        Raises:
            ValueError: the context is missing, not wanted or of another width.
        """
        return super().forward(x, t, context)

    def begin(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Flow:
        if context is None and self.context_dim is not None:
            raise ValueError(f"this network attends to a context: pass one, N x L x {self.context_dim}")
        if context is not None and self.context_dim is None:
            raise ValueError("this network is unconditional: it takes no context")
        if context is not None and context.shape[-1] != self.context_dim:
            raise ValueError(f"context tokens are {context.shape[-1]} wide; this network takes {self.context_dim}")
        return Flow(h=x, t=t, context=context)

    def run_stage(self, stage: Stage, flow: Flow) -> None:
        if stage.path == "time_embed":
            flow.temb = self.time_embed(timestep_embedding(flow.t, self.model_channels))
        else:
            super().run_stage(stage, flow)

    def handed_on(
        self, stage: Stage, path: str, out: Tensor, context: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, ...]:
        transformer = self.get_submodule(stage.path)
        assert isinstance(transformer, SpatialTransformer)  # no other stage is chained
        return transformer.handed_on(path.removeprefix(f"{stage.path}."), out, context, size)

    def _list_stages(self) -> Iterator[Stage]:
        yield Stage("time_embed")
        for number, parts in enumerate(self.input_blocks):
            assert isinstance(parts, nn.ModuleList)
            for index, part in enumerate(parts):
                yield _stage(f"input_blocks.{number}.{index}", part, leaves=part is parts[-1])
        for index, part in enumerate(self.middle_block):
            yield _stage(f"middle_block.{index}", part)
        for number, parts in enumerate(self.output_blocks):
            assert isinstance(parts, nn.ModuleList)
            for index, part in enumerate(parts):
                yield _stage(f"output_blocks.{number}.{index}", part, joins=index == 0)
        yield Stage("out")


def _stage(path: str, module: nn.Module, *, joins: bool = False, leaves: bool = False) -> Stage:
    timed, attends = isinstance(module, ResBlock), isinstance(module, SpatialTransformer)
    return Stage(path, timed=timed, attends=attends, joins=joins, leaves=leaves, chained=attends)


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)


def _head_count(channels: int, num_heads: int, num_head_channels: int) -> int:
    """How many heads attention over so many channels has; their width decides where it is given."""
    name, divisor = ("num_heads", num_heads) if num_head_channels == -1 else ("num_head_channels", num_head_channels)
    _refuse(divisor < 1 or channels % divisor != 0, f"{name}={divisor} does not divide {channels} channels")
    return num_heads if num_head_channels == -1 else channels // num_head_channels
