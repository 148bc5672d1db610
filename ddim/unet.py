"""The noise-estimation UNet of DDPM (Ho et al. 2020, appendix B), with the parameter names of its published weights.

Axes in comments: N images, C channels, H height, W width, E channels of the time embedding, P = H*W positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.config import PixelConfig

NORM_GROUPS = 32


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5): N -> N x channels, sines first.

    Args:
        t: timesteps, in training steps; integers or fractions.
        channels: width of the result; an odd width ends in a zero.
    """
    half = channels // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = torch.outer(t.float(), rates)  # N, half
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, channels % 2))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class TimeEmbedding(nn.Module):
    """Two linear layers over the sinusoids: N -> N x E."""

    def __init__(self, channels: int, embed_channels: int):
        super().__init__()
        self.channels = channels
        self.dense = nn.ModuleList([nn.Linear(channels, embed_channels), nn.Linear(embed_channels, embed_channels)])

    def forward(self, t: Tensor) -> Tensor:
        embedding = self.dense[0](timestep_embedding(t, self.channels))
        return self.dense[1](F.silu(embedding))


class Downsample(nn.Module):
    """Halve the resolution. The convolution pads right and below only, as the published weights expect."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResnetBlock(nn.Module):
    """Two convolutions with the time embedding added between them, around a shortcut.

    Args:
        skip_channels: how many of ``in_channels``, the last ones, come from the encoder through a U connection.
            Zero on the way down. The forward pass does not need the number; who quantizes the shortcut does.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embed_channels: int, dropout: float, skip_channels: int = 0
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.skip_channels = in_channels, out_channels, skip_channels
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(embed_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.activated(self.norm1, x))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(self.activated(self.norm2, h)))
        shortcut = x if self.in_channels == self.out_channels else self.nin_shortcut(x)
        return shortcut + h  # N, out_channels, H, W

    def activated(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """SiLU of the normalised feature."""
        return F.silu(norm(x))


class AttnBlock(nn.Module):
    """Self-attention over the positions of a feature map, one head as wide as the map."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.normalised(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # N, C, P
        h = self.attend(q, k, v).unflatten(2, x.shape[2:])
        return x + self.proj_out(h)

    def normalised(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k / sqrt(C)) v, each N x C x P."""
        return torch.bmm(v, self.softmax_map(q, k).transpose(1, 2))

    def softmax_map(self, q: Tensor, k: Tensor) -> Tensor:
        """N x P (of q) x P (of k): how much each position takes from each other."""
        return (torch.bmm(q.transpose(1, 2), k) * self.channels**-0.5).softmax(dim=2)


class _Level(nn.Module):
    """The blocks of one resolution; ``attn`` is empty or as long as ``block``. The UNet runs them, stage by stage."""

    downsample: Downsample  # on the way down, but not at the coarsest level
    upsample: Upsample  # on the way up, but not at the finest

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()

    def add(self, block: ResnetBlock, with_attention: bool) -> None:
        self.block.append(block)
        if with_attention:
            self.attn.append(AttnBlock(block.out_channels))


class Stage(NamedTuple):
    """One step of a UNet's forward pass, in this package or in one whose UNets also take a context.

    Attributes:
        path: of the module that the stage runs.
        timed: it takes the time embedding too.
        attends: it takes the context too, where the network has one.
        joins: the latest feature left by the way down is concatenated behind its input.
        leaves: its output is left for the way up.
        chained: each of its units takes what the one before it gives, and nothing else of what enters the stage but the
            context: see :meth:`StagedNetwork.handed_on`.
    """

    path: str
    timed: bool = False
    attends: bool = False
    joins: bool = False
    leaves: bool = False
    chained: bool = False


@dataclass
class Flow:
    """What travels from stage to stage: feature map, timesteps, their embedding, context, the open U connections.

    A connection may be None in a flow that is stored: whoever goes on from there knows how to come by it.
    """

    h: Tensor
    t: Tensor
    context: Tensor | None = None
    temb: Tensor | None = None
    skips: list[Tensor | None] = field(default_factory=list)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Flow:
        """A new flow of ``fn`` applied to every tensor (to move, to copy, to measure)."""
        context, temb, *skips = (None if x is None else fn(x) for x in (self.context, self.temb, *self.skips))
        return Flow(fn(self.h), fn(self.t), context, temb, skips)

    def for_stage(self, stage: Stage, fn: Callable[[Tensor], Tensor]) -> Flow:
        """A new flow in which ``fn`` was applied to what the stage takes, and only to that."""
        skips = list(self.skips)
        if stage.joins:
            latest = skips[-1]
            assert latest is not None  # whoever keeps a connection elsewhere fetches it before its stage
            skips[-1] = fn(latest)
        context = fn(self.context) if stage.attends and self.context is not None else self.context
        temb = fn(self.temb) if stage.timed and self.temb is not None else self.temb
        return Flow(fn(self.h), fn(self.t), context, temb, skips)

    def join(self) -> None:
        """Close the latest connection: its feature goes behind the channels of the feature map."""
        latest = self.skips.pop()
        assert latest is not None  # as in for_stage()
        self.h = torch.cat([self.h, latest], dim=1)


class StagedNetwork(nn.Module):
    """A noise-estimation network whose forward pass is begin() and then every stage in order.

    Calibration runs the same stages one by one, so that a whole calibration set moves through the network once instead
    of once for every block.
    """

    _stages: tuple[Stage, ...]

    def forward(self, *inputs: Any) -> Tensor:
        flow = self.begin(*inputs)
        for stage in self.stages():
            self.advance(stage, flow)
        return flow.h

    def begin(self, *inputs: Any, **named_inputs: Any) -> Flow:
        """What enters the first stage; the inputs are those of forward()."""
        raise NotImplementedError

    def advance(self, stage: Stage, flow: Flow) -> None:
        """Run one stage on what has reached it; ``flow`` is changed in place."""
        if stage.joins:
            flow.join()
        self.run_stage(stage, flow)
        if stage.leaves:
            flow.skips.append(flow.h)

    def run_stage(self, stage: Stage, flow: Flow) -> None:
        """What a stage does between its U connections. Networks say what is done otherwise in theirs."""
        module = self.get_submodule(stage.path)
        if stage.timed:
            flow.h = module(flow.h, flow.temb)
        elif stage.attends:
            flow.h = module(flow.h, flow.context)
        else:
            flow.h = module(flow.h)

    def handed_on(
        self, stage: Stage, path: str, out: Tensor, context: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """What reaches the next unit of a chained stage.

        Args:
            path: of the unit before it; out: what that one gives.
            context: the network's; size: height and width of the stage's feature map.
        """
        raise NotImplementedError(f"{stage.path} is not chained")

    def stages(self) -> tuple[Stage, ...]:
        """The parts of the forward pass in the order in which it runs them."""
        return self._stages


class UNet(StagedNetwork):
    """Predicts the noise in a noisy image: (N x C x H x W, N timesteps) -> N x out_ch x H x W.

    Args:
        image_size: height and width in pixels; with ``attn_resolutions`` it decides where attention stands.
        ch: channels of the finest level; ``ch_mult`` multiplies them level by level.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        out_ch: int,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.image_size = in_channels, out_ch, image_size
        embed = 4 * ch
        self.temb = TimeEmbedding(ch, embed)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)

        # What the way down leaves for the way up: the channels of conv_in, of every block and every downsampling.
        skips, width, size = [ch], ch, image_size
        self.down = nn.ModuleList()
        for index, multiplier in enumerate(ch_mult):
            level = _Level()
            for _ in range(num_res_blocks):
                level.add(ResnetBlock(width, ch * multiplier, embed, dropout), size in attn_resolutions)
                width = ch * multiplier
                skips.append(width)
            if index < len(ch_mult) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
                skips.append(width)
                size //= 2
            self.down.append(level)

        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(width, width, embed, dropout)
        self.mid.attn_1 = AttnBlock(width)
        self.mid.block_2 = ResnetBlock(width, width, embed, dropout)

        levels = []
        for index, multiplier in reversed(list(enumerate(ch_mult))):
            level = _Level()
            for _ in range(num_res_blocks + 1):
                skip = skips.pop()
                block = ResnetBlock(width + skip, ch * multiplier, embed, dropout, skip_channels=skip)
                level.add(block, size in attn_resolutions)
                width = ch * multiplier
            if index > 0:
                level.upsample = Upsample(width, resamp_with_conv)
                size *= 2
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # the published names count the way up from its end

        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)
        self._stages = tuple(self._list_stages())

    @classmethod
    def from_config(cls, config: PixelConfig) -> UNet:
        """The UNet a config file describes, with random weights."""
        m = config.model
        return cls(
            image_size=config.data.image_size,
            in_channels=m.in_channels,
            out_ch=m.out_ch,
            ch=m.ch,
            ch_mult=tuple(m.ch_mult),
            num_res_blocks=m.num_res_blocks,
            attn_resolutions=tuple(m.attn_resolutions),
            dropout=m.dropout,
            resamp_with_conv=m.resamp_with_conv,
        )

    def begin(self, x: Tensor, t: Tensor) -> Flow:
        return Flow(h=x, t=t)

    def run_stage(self, stage: Stage, flow: Flow) -> None:
        if stage.path == "temb":
            flow.temb = self.temb(flow.t)
        elif stage.path == "conv_out":
            flow.h = self.conv_out(F.silu(self.norm_out(flow.h)))
        else:
            super().run_stage(stage, flow)

    def _list_stages(self) -> Iterator[Stage]:
        yield Stage("temb")
        yield Stage("conv_in", leaves=True)
        for number, level in enumerate(self.down):
            assert isinstance(level, _Level)
            for index in range(len(level.block)):
                attends = len(level.attn) > 0
                yield Stage(f"down.{number}.block.{index}", timed=True, leaves=not attends)
                if attends:
                    yield Stage(f"down.{number}.attn.{index}", leaves=True)
            if hasattr(level, "downsample"):
                yield Stage(f"down.{number}.downsample", leaves=True)
        yield Stage("mid.block_1", timed=True)
        yield Stage("mid.attn_1")
        yield Stage("mid.block_2", timed=True)
        for number, level in reversed(list(enumerate(self.up))):
            assert isinstance(level, _Level)
            for index in range(len(level.block)):
                yield Stage(f"up.{number}.block.{index}", timed=True, joins=True)
                if len(level.attn):
                    yield Stage(f"up.{number}.attn.{index}")
            if hasattr(level, "upsample"):
                yield Stage(f"up.{number}.upsample")
        yield Stage("conv_out")
