"""Encoder and decoder of the first stages (Rombach et al. 2022, appendix G; the networks of Esser et al. 2021, VQGAN).

The pixel UNet's pieces without its time embedding and its U connections, under the names of the published weights.
Axes in comments: N images, C channels, H height, W width, f downsampling factor, P = H*W positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ddim import unet
from ddim.unet import Downsample, Upsample, group_norm


class ResnetBlock(nn.Module):
    """Two convolutions around a shortcut: N x in_channels x H x W -> N x out_channels x H x W."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.nin_shortcut(x)


class AttnBlock(unet.AttnBlock):
    """The pixel UNet's attention without its map: at P = 4096 the map of one image alone would take 64 MiB."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2).unsqueeze(1) for part in (q, k, v))  # N, one head, P, C
        return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)


class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the resolution has it."""

    downsample: nn.Module  # of an encoder's level
    upsample: nn.Module  # of a decoder's

    def __init__(self, in_channels: int, out_channels: int, blocks: int, dropout: float, attends: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(widths[i], widths[i + 1], dropout) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image to features of the latent's size: N x in_channels x H x W -> N x (z or 2 z) x H/f x W/f.

    The keywords are those of the published ``ddconfig``, which the decoder shares.

    Args:
        ch: channels at full resolution; ``ch_mult`` multiplies them, level by level, and f = 2^(levels - 1).
        num_res_blocks: residual blocks of each level.
        in_channels: of the image.
        z_channels: of the latent.
        resolution: height and width in pixels of the training images; with ``attn_resolutions`` it decides which
            levels attend. Images of other sizes pass too.
        double_z: a mean and a log-variance for each latent channel.
        out_ch: of the decoder's image; not used here.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        in_channels: int,
        z_channels: int,
        resolution: int,
        double_z: bool = True,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        out_ch: int | None = None,
    ):
        super().__init__()
        widths = [ch, *(ch * multiplier for multiplier in ch_mult)]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            attends = resolution // 2**i in attn_resolutions
            level = _Level(widths[i], widths[i + 1], num_res_blocks, dropout, attends)
            last = i == len(ch_mult) - 1
            level.downsample = nn.Identity() if last else Downsample(widths[i + 1], with_conv=True)
            self.down.append(level)
        self.mid = _Middle(widths[-1], dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.down:
            assert isinstance(level, _Level)
            h = level.downsample(level(h))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features of the latent's size to the image: N x z x H/f x W/f -> N x out_ch x H x W.

    Args as in :class:`Encoder`, whose ``ddconfig`` it shares (``in_channels`` and ``double_z`` do not matter here); a
    level has one residual block more than ``num_res_blocks``.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        out_ch: int,
        z_channels: int,
        resolution: int,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        in_channels: int | None = None,
        double_z: bool = True,
    ):
        super().__init__()
        widths = [ch * multiplier for multiplier in ch_mult]
        widths.append(widths[-1])  # the coarsest level starts from the middle, which is as wide
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], dropout)
        self.up = nn.ModuleList()  # numbered from full resolution, so run from the end
        for i in range(len(ch_mult)):
            attends = resolution // 2**i in attn_resolutions
            level = _Level(widths[i + 1], widths[i], num_res_blocks + 1, dropout, attends)
            level.upsample = nn.Identity() if i == 0 else Upsample(widths[i], with_conv=True)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            assert isinstance(level, _Level)
            h = level.upsample(level(h))
        return self.conv_out(F.silu(self.norm_out(h)))
