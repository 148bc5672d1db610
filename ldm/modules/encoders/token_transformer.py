"""A plain transformer encoder over tokens (Vaswani et al. 2017), normalised before each part, with learned positions.

The names of parameters are those of the published LAION-400M checkpoint. Axes in comments: N texts, L tokens, A heads,
K channels of a head, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention of all tokens to all others: N x L x C, the same back."""

    def __init__(self, channels: int, heads: int, head_width: int):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )  # N, A, L, K
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Each token by itself, through four times its width."""

    def __init__(self, channels: int):
        super().__init__()
        first = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU())
        self.net = nn.Sequential(first, nn.Identity(), nn.Linear(4 * channels, channels))  # published: dropout between

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Positions(nn.Module):
    """A learned vector for each place."""

    def __init__(self, length: int, channels: int):
        super().__init__()
        self.emb = nn.Embedding(length, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """N x L -> L x C."""
        return self.emb(torch.arange(tokens.shape[1], device=tokens.device))


class Layers(nn.Module):
    """Attention and feed-forward in turn, each with its normalisation, added to what came in."""

    def __init__(self, channels: int, depth: int, heads: int, head_width: int):
        super().__init__()
        parts = [part for _ in range(depth) for part in (Attention(channels, heads, head_width), FeedForward(channels))]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(channels), part]) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            norm, part = layer
            x = x + part(norm(x))
        return x


class TokenTransformer(nn.Module):
    """Numbers of tokens, N x L -> N x L x C."""

    def __init__(self, vocabulary: int, length: int, channels: int, depth: int, heads: int, head_width: int):
        super().__init__()
        self.token_emb = nn.Embedding(vocabulary, channels)
        self.pos_emb = Positions(length, channels)
        self.attn_layers = Layers(channels, depth, heads, head_width)
        self.norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.attn_layers(self.token_emb(tokens) + self.pos_emb(tokens)))
