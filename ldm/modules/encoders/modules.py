"""Encoders of conditions: what cross-attention in the UNet attends to (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.config import ConfigError
from ldm.modules.encoders.token_transformer import TokenTransformer
from ldm.modules.encoders.tokenizers import (
    BERT,
    CLIP,
    TokenizerError,
    TokenizerKind,
    folder_beside,
    import_transformers,
    load_tokenizer,
)
from ldm.util import refuse_unknown


class ClassEmbedder(nn.Module):
    """A learned vector for each class, one token wide. The last class stands for "no condition".

    Args:
        embed_dim: width of the vectors.
        n_classes: how many there are, the unconditional one included.
        key: under which name a batch holds its class numbers.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class"):
        super().__init__()
        self.n_classes, self.key = n_classes, key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """N class numbers, under ``key`` -> N x 1 x embed_dim.

        Raises:
            ValueError: no such key, or a number that is not a class.
        """
        if self.key not in batch:
            raise ValueError(f"the batch has no '{self.key}', only {', '.join(batch) or 'nothing'}")
        classes = batch[self.key]
        if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) >= self.n_classes):
            raise ValueError(f"class numbers must lie between 0 and {self.n_classes - 1}: {classes.tolist()}")
        return self.encode(classes.to(self.embedding.weight.device)[:, None])

    def encode(self, numbers: Tensor) -> Tensor:
        """Class numbers on the embedding's device, N x 1 -> N x 1 x embed_dim. They are not looked at, as that would
        be waiting for the device."""
        return self.embedding(numbers)

    @property
    def nothing(self) -> Tensor:
        """The number that stands for "no condition", as one of the rows that :meth:`encode` takes: 1 int64."""
        return torch.tensor([self.n_classes - 1])

    def unconditional(self, count: int) -> Tensor:
        """The embedding of "no condition", ``count`` times: count x 1 x embed_dim."""
        return self({self.key: torch.full((count,), self.n_classes - 1)})


class TextEncoder(nn.Module):
    """What the encoders of texts have in common: a tokenizer, found when it is first used, and one length for all.

    Args:
        tokenizer: kind of it.
        name: of the tokenizer on the hub, or a folder of it; one that begins with ``./`` lies in the folder of the
            config that names it, see :meth:`look_beside`.
        max_length: tokens of every text: longer ones are cut, shorter ones filled up.

    Attributes:
        tokenizer_folder: where the tokenizer lies, where that is known; the only place that is looked at.
    """

    def __init__(self, tokenizer: TokenizerKind, name: str, max_length: int):
        super().__init__()
        self.tokenizer_kind, self.tokenizer_name, self.max_length = tokenizer, name, max_length
        self.tokenizer_folder: str | None = None
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """Raises :class:`~ldm.modules.encoders.tokenizers.TokenizerError` where there is none."""
        if self._tokenizer is None:
            found = load_tokenizer(self.tokenizer_kind, self.tokenizer_name, self.tokenizer_folder)
            if len(found) > self.vocabulary:
                place = self.tokenizer_folder or self.tokenizer_name
                raise TokenizerError(
                    f"the tokenizer {place} has {len(found)} tokens and the text encoder {self.vocabulary}: it is not "
                    "this model's"
                )
            self._tokenizer = found
        return self._tokenizer

    def look_beside(self, config: str | Path) -> None:
        """Take a tokenizer that is named relative to a config from that config's folder; others are left as they are.

        Raises: as :func:`~ldm.modules.encoders.tokenizers.folder_beside`.
        """
        folder = folder_beside(config, self.tokenizer_name)
        if folder is not None:
            self.tokenizer_folder = str(folder)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Of a token's embedding."""
        raise NotImplementedError

    def encode(self, tokens: Tensor) -> Tensor:
        """Numbers of tokens, N x L -> N x L x width. Nothing waits for the device: it may be captured and compiled."""
        raise NotImplementedError

    @property
    def nothing(self) -> Tensor:
        """The tokens of the empty text, as one of the rows that :meth:`encode` takes: L int64."""
        return self.tokenize([""])[0]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Numbers of tokens, N x ``max_length``."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length, padding="max_length")
        return torch.tensor(encoded["input_ids"])

    def too_long(self, text: str) -> bool:
        """Whether something of a text is cut off."""
        return len(self.tokenizer([text], verbose=False)["input_ids"][0]) > self.max_length

    def forward(self, texts: Sequence[str]) -> Tensor:
        """N texts -> N x ``max_length`` x width."""
        return self.encode(self.tokenize(texts).to(next(self.parameters()).device))

    def unconditional(self, count: int) -> Tensor:
        """The embedding of the empty text, ``count`` times."""
        return self([""]).expand(count, -1, -1)


# CLIP ViT-L/14's text tower.
CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


class FrozenCLIPEmbedder(TextEncoder):
    """CLIP's text tower (Radford et al. 2021), transformers' implementation: all its last hidden states, normalised.

    It is built from numbers and filled from the model's checkpoint, so nothing is fetched for it.

    Args:
        version: of the tokenizer on the hub, or a folder of it, as :class:`TextEncoder`'s ``name``.
        device: accepted without effect: the encoder moves with the model.
        max_length: tokens of a text.
        text_config: what differs from ViT-L/14 (:data:`CLIP_TEXT`), in transformers' words.

    Raises:
        ConfigError: transformers is not installed, or ``text_config`` has a key that is not known here.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str = "cuda",
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
    ):
        super().__init__(CLIP, version, max_length)
        refuse_unknown(text_config or {}, CLIP_TEXT.keys(), "FrozenCLIPEmbedder: text_config")
        numbers = CLIP_TEXT | dict(text_config or {})
        if max_length > numbers["max_position_embeddings"]:
            raise ConfigError(
                f"FrozenCLIPEmbedder: max_length {max_length} is more than the {numbers['max_position_embeddings']} "
                "positions of the encoder"
            )
        end = numbers["vocab_size"] - 1
        transformers = import_transformers()
        config = transformers.CLIPTextConfig(**numbers, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
        self.transformer = transformers.CLIPTextModel(config)

    @property
    def vocabulary(self) -> int:
        return self.transformer.config.vocab_size

    @property
    def width(self) -> int:
        return self.transformer.config.hidden_size

    def encode(self, tokens: Tensor) -> Tensor:
        # Positions are given, because the buffer of them is in no checkpoint and has no values in a model built empty.
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return self.transformer(input_ids=tokens, position_ids=positions).last_hidden_state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenCLIPEmbedder:
        for module in self.modules():  # the same buffer could not be moved either
            positions = module._buffers.get("position_ids")
            if positions is not None and positions.is_meta:
                module.position_ids = torch.arange(positions.shape[-1], device="cpu")[None]
        return super()._apply(fn, recurse)


class BERTEmbedder(TextEncoder):
    """The text encoder of the LAION-400M model, learned with it: a transformer over BERT's tokens.

    Args:
        n_embed, n_layer: width and depth.
        vocab_size: how many tokens there are.
        max_seq_len: tokens of a text.
        device: accepted without effect: the encoder moves with the model.
        use_tokenizer: only true is known: the model is asked in words.
        embedding_dropout: accepted without effect: it is for training.
        version: of the tokenizer on the hub, or a folder of it.
        heads, head_width: of attention; the published ones do not add up to the width.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str = "cuda",
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        version: str = "bert-base-uncased",
        heads: int = 8,
        head_width: int = 64,
    ):
        super().__init__(BERT, version, max_seq_len)
        if not use_tokenizer:
            raise ConfigError("BERTEmbedder: use_tokenizer false is not supported: the model is asked in words")
        self.transformer = TokenTransformer(vocab_size, max_seq_len, n_embed, n_layer, heads, head_width)

    @property
    def vocabulary(self) -> int:
        return self.transformer.token_emb.num_embeddings

    @property
    def width(self) -> int:
        return self.transformer.token_emb.embedding_dim

    def encode(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens)
