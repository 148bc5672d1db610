"""Attention in the UNets of latent diffusion (Rombach et al. 2022, section 3.3 and appendix E).

Two kinds: over the positions of a feature map (:class:`AttentionBlock`), and transformers over positions that also look
at a context, such as an embedded text (:class:`SpatialTransformer`). Parameters have their published names.

Axes in comments: N images, C channels, H height, W width, P = H*W positions, L tokens, A heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=eps)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, with several heads: N x C x H x W, the same back.

    Args:
        heads: each as wide as ``channels / heads``.
        heads_inside: the joint projection's channels are all q, then all k, then all v, each cut into heads. Otherwise
            they are the heads, each cut into q, k and v: what the published latent models have.
    """

    fused_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, channels: int, heads: int, *, heads_inside: bool = False):
        super().__init__()
        self.heads, self.heads_inside = heads, heads_inside
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(self.normalised(x).flatten(2)))
        h = self.proj_out(self.attend(q, k, v).flatten(1, 2))  # N, C, P
        return x + h.unflatten(2, x.shape[2:])

    def normalised(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """N x 3C x P -> q, k and v, each N x A x K x P."""
        if self.heads_inside:
            return qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        return qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k / sqrt(K)) v for each head, N x A x K x P."""
        # Fused attention wants the channels of a head next to each other in memory.
        q, k, v = (x.transpose(2, 3).contiguous() for x in (q, k, v))  # N, A, P, K
        return self.fused_attention(q, k, v).transpose(2, 3)


class CrossAttention(nn.Module):
    """Tokens take from the tokens of a context, or from one another: N x P x C, the same back.

    Args:
        context_dim: width of a context's tokens; None for self-attention.
    """

    fused_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, channels: int, heads: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        source = channels if context_dim is None else context_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source, channels, bias=False)
        self.to_v = nn.Linear(source, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # the published name counts from 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context  # N, L, its width
        q, k, v = (self._by_head(tokens) for tokens in (self.to_q(x), self.to_k(source), self.to_v(source)))
        return self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)  # N, A, P or L, K

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k / sqrt(K)) v for each head: q N x A x P x K, the others N x A x L x K -> N x A x P x K."""
        return self.fused_attention(q, k, v)


def gated_gelu(x: Tensor) -> Tensor:
    """The first half of the channels, gated by GELU of the second: ... x 2C -> ... x C."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class GEGLU(nn.Module):
    """One half of a projection, gated by GELU of the other (Shazeer 2020, "GLU variants improve transformer")."""

    gated: Callable[[Tensor], Tensor] = staticmethod(gated_gelu)

    def __init__(self, channels: int, inner_channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(self.proj(x))


class FeedForward(nn.Module):
    """Each token by itself, through four times its width."""

    def __init__(self, channels: int):
        super().__init__()
        # The published numbering counts a dropout in the middle, which no published model has on.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context and a feed-forward network, each normalised first and added."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = CrossAttention(channels, heads)
        self.attn2 = CrossAttention(channels, heads, context_dim)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attend_to_itself(x)
        x = self.attend_to_context(x, context)
        return self.feed_forward(x)  # N, P, C

    def attend_to_itself(self, x: Tensor) -> Tensor:
        return x + self.attn1(self.normalised(self.norm1, x))

    def attend_to_context(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.attn2(self.normalised(self.norm2, x), context)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.normalised(self.norm3, x))

    def normalised(self, norm: nn.Module, x: Tensor) -> Tensor:
        """What one of the three parts takes."""
        return norm(x)


class SpatialTransformer(nn.Module):
    """Transformer blocks whose tokens are the positions of a feature map: N x C x H x W, the same back.

    Args:
        depth: number of blocks.
        context_dim: width of the context's tokens, N x L x ``context_dim``.
    """

    def __init__(self, channels: int, heads: int, *, depth: int, context_dim: int):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = _as_tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(_as_map(tokens, x.shape[2:]))

    def handed_on(self, name: str, out: Tensor, context: Tensor, size: Sequence[int]) -> tuple[Tensor, ...]:
        """What the part behind another one takes, given what that one gives.

        Args:
            name: of the one before: ``proj_in``, or ``transformer_blocks.`` and a number.
            size: height and width of the feature map.
        """
        if name == "proj_in":
            return _as_tokens(out), context
        if name == f"transformer_blocks.{len(self.transformer_blocks) - 1}":
            return (_as_map(out, size),)
        return out, context


def _as_tokens(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(2).transpose(1, 2)  # N, P, C


def _as_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, tuple(size))  # N, C, H, W
