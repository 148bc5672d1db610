"""Text encoders: tokens, embeddings, checkpoints in both spellings, and what is said where no tokenizer is at hand."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from ddim.config import ConfigError
from ldm.modules.encoders import tokenizers
from ldm.modules.encoders.modules import BERTEmbedder, ClassEmbedder, FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizers import (
    BERT,
    CLIP,
    TokenizerError,
    clip_vocabulary,
    folder_beside,
    learn_merges,
    load_tokenizer,
    tokenizer_files,
)
from ldm.modules.encoders.tokenizers import write_clip_tokenizer as write_clip
from ldm.pretrained import with_clip_names
from ldm.util import instantiate_from_config
from qdiff.cli import make_clip_tokenizer

MERGES = [("a", "t</w>"), ("c", "at</w>"), ("d", "o"), ("do", "g</w>")]
SMALL = {
    "vocab_size": 512 + len(MERGES) + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "on", "mat", "##s", "the"]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Neither network nor what another program may have left in the cache."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizers, "LOCAL_TOKENIZERS", tmp_path / "own")


@pytest.fixture
def clip_folder(tmp_path) -> Path:
    write_clip(tmp_path / "clip", MERGES)
    return tmp_path / "clip"


@pytest.fixture
def bert_folder(tmp_path) -> Path:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path / "bert"


def clip(folder: Path, seed: int = 0) -> FrozenCLIPEmbedder:
    torch.manual_seed(seed)
    return FrozenCLIPEmbedder(version=str(folder), max_length=16, text_config=SMALL).eval()


# Tokens.


def test_clip_tokens_follow_the_vocabulary(clip_folder):
    numbers = clip_vocabulary(MERGES)
    assert len(numbers) == SMALL["vocab_size"]
    tokens = clip(clip_folder).tokenize(["Cat  dog", "b"])
    end = numbers["<|endoftext|>"]
    assert tokens.shape == (2, 16)
    first = [numbers["<|startoftext|>"], numbers["cat</w>"], numbers["dog</w>"], end]
    assert tokens[0].tolist() == first + [end] * 12
    assert tokens[1].tolist() == [numbers["<|startoftext|>"], numbers["b</w>"]] + [end] * 14


def test_long_texts_are_cut_and_told(clip_folder):
    encoder = clip(clip_folder)
    tokens = encoder.tokenize(["cat " * 30])
    assert tokens.shape == (1, 16)
    assert int(tokens[0, -1]) == SMALL["vocab_size"] - 1  # the end stays
    assert encoder.too_long("cat " * 15)
    assert not encoder.too_long("cat " * 14)


def test_bytes_without_a_merge_are_tokens_too(clip_folder):
    """Any text has tokens, none of them unknown: bytes are in the vocabulary."""
    numbers = set(clip_vocabulary(MERGES).values())
    tokens = clip(clip_folder).tokenize(["ça 猫 \U0001f408!"])[0].tolist()
    assert set(tokens) <= numbers
    assert 10 < len([token for token in tokens if token < 512]) <= 14


def test_bert_tokens(bert_folder):
    encoder = BERTEmbedder(24, 1, vocab_size=len(WORDS), max_seq_len=8, version=str(bert_folder), heads=2, head_width=4)
    tokens = encoder.tokenize(["The cats on a mat", "zebra"])
    words = [[WORDS[number] for number in row] for row in tokens.tolist()]
    assert words[0] == ["[CLS]", "the", "cat", "##s", "on", "a", "mat", "[SEP]"]
    assert words[1] == ["[CLS]", "[UNK]", "[SEP]"] + ["[PAD]"] * 5
    assert encoder(["a cat", ""]).shape == (2, 8, 24)


def published_vocabulary() -> Path | None:
    if path := os.environ.get("QDIFF_CLIP_BPE"):
        return Path(path)
    found = importlib.util.find_spec("open_clip")  # only looked for, not imported
    return Path(found.origin).with_name(make_clip_tokenizer.VOCABULARY) if found else None


@pytest.mark.skipif(published_vocabulary() is None, reason="QDIFF_CLIP_BPE names no CLIP vocabulary")
def test_clips_own_vocabulary(tmp_path, capsys):
    """Known numbers of OpenAI's vocabulary, and a sentence whose tokens many pages about CLIP show."""
    make_clip_tokenizer.main([str(published_vocabulary()), "--out", str(tmp_path / "clip")])
    numbers = json.loads((tmp_path / "clip" / "vocab.json").read_text())
    assert (len(numbers), numbers["<|startoftext|>"], numbers["<|endoftext|>"]) == (49408, 49406, 49407)
    tokenizer = load_tokenizer(CLIP, "openai/clip-vit-large-patch14", tmp_path / "clip")
    found = tokenizer(["a photograph of an astronaut riding a horse"])["input_ids"][0]
    assert found == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]


def test_making_a_tokenizer_of_something_else(tmp_path, capsys):
    (tmp_path / "other.gz").write_bytes(b"no gzip")
    with pytest.raises(SystemExit) as caught:
        make_clip_tokenizer.main([str(tmp_path / "other.gz"), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "is not bpe_simple_vocab_16e6.txt.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Learned here.

TEXTS = ["red heart", "Red Apple", "heart with arrow", "broken heart", "red car: light", "couple with heart-eyes"] * 3


def merges_by_hand(words: list[str], count: int) -> list[tuple[str, str]]:
    """Sennrich et al. 2016, algorithm 1; among equally frequent pairs that of the lowest numbers."""
    vocabulary = {**clip_vocabulary([])}
    del vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while len(merges) < count:
        pairs = Counter(pair for word in spelled for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], vocabulary[pair[0]], vocabulary[pair[1]]))
        merges.append(best)
        vocabulary.setdefault("".join(best), len(vocabulary))
        for word in spelled:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def test_merges_are_those_of_the_algorithm_and_the_same_every_time():
    words = [word for text in TEXTS for word in re.findall(r"[a-z]+|[^a-z\s]+", text.lower())]
    expected = merges_by_hand(words, 24)
    for _ in range(3):  # hash tables are seeded anew
        assert learn_merges(TEXTS, 24) == expected
    assert len(learn_merges(["aab"] * 2, 50)) == 2  # all there are


def test_a_learned_tokenizer_is_whole_for_other_programs_too(tmp_path):
    from transformers import AutoTokenizer

    write_clip(tmp_path / "own", learn_merges(TEXTS, 30), 24)
    assert sorted(tokenizer_files(tmp_path / "own")) == ["merges.txt", "tokenizer_config.json", "vocab.json"]
    ours = load_tokenizer(CLIP, "own", tmp_path / "own")
    others = AutoTokenizer.from_pretrained(str(tmp_path / "own"))
    tokens = ours(["red heart"])["input_ids"][0]
    assert ours.convert_ids_to_tokens(tokens) == ["<|startoftext|>", "red</w>", "heart</w>", "<|endoftext|>"]
    assert others(["red heart"])["input_ids"][0] == tokens
    assert (others.model_max_length, others.pad_token) == (24, "<|endoftext|>")


# Where tokenizers come from.


def test_a_tokenizer_beside_the_config(tmp_path, clip_folder, monkeypatch):
    config = tmp_path / "config.yaml"
    monkeypatch.chdir(tmp_path)
    encoder = FrozenCLIPEmbedder(version="./clip", max_length=16, text_config=SMALL)
    encoder.look_beside("config.yaml")  # as relative as it is typed
    assert encoder.tokenizer_folder == str(clip_folder)
    assert len(encoder.tokenizer) == SMALL["vocab_size"]
    assert folder_beside(config, "openai/clip-vit-large-patch14") is None
    other = FrozenCLIPEmbedder(version="openai/clip", max_length=16, text_config=SMALL)
    other.look_beside(config)
    assert other.tokenizer_folder is None


@pytest.mark.parametrize("name", ["./", "./.", "./../clip", "./a/../../clip", "./link"])
def test_a_config_names_no_tokenizer_outside_its_folder(tmp_path, clip_folder, name):
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(clip_folder)
    with pytest.raises(TokenizerError, match="does not lie below the config's folder"):
        folder_beside(home / "config.yaml", name)


def test_without_a_tokenizer_the_error_names_files_and_places(no_hub, tmp_path):
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(CLIP, "openai/clip-vit-large-patch14")
    message = str(caught.value)
    for part in ("vocab.json and merges.txt", "tokenizer.json", str(tmp_path / "own/clip-vit-large-patch14"), "--tok"):
        assert part in message
    assert "\n" not in message
    with pytest.raises(TokenizerError, match=r"vocab\.txt, or tokenizer\.json .*own/bert-base-uncased"):
        load_tokenizer(BERT, "bert-base-uncased")


def test_a_folder_named_after_the_model_is_found(no_hub, tmp_path, clip_folder):
    (tmp_path / "own").mkdir()
    clip_folder.rename(tmp_path / "own" / "clip-vit-large-patch14")
    assert len(load_tokenizer(CLIP, "openai/clip-vit-large-patch14")) == SMALL["vocab_size"]


def test_wrong_folders(no_hub, tmp_path, clip_folder):
    with pytest.raises(TokenizerError, match=r"holds no tokenizer of this model: vocab\.json"):
        load_tokenizer(CLIP, "openai/clip-vit-large-patch14", tmp_path)
    (clip_folder / "vocab.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(CLIP, "openai/clip-vit-large-patch14", clip_folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    write_clip(tmp_path / "more", [*MERGES, ("m", "at</w>")])
    with pytest.raises(TokenizerError, match="it is not this model's"):
        _ = clip(tmp_path / "more").tokenizer


# Embeddings.


def test_clip_embeddings_are_those_of_transformers(clip_folder):
    """All positions of the last layer, after the last normalisation; a prompt's do not depend on its neighbours."""
    encoder = clip(clip_folder)
    tokens = encoder.tokenize(["cat dog", ""])
    with torch.no_grad():
        both = encoder(["cat dog", ""])
        hidden = encoder.transformer(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        norm = next(m for name, m in encoder.transformer.named_modules() if name.endswith("final_layer_norm"))
        assert torch.allclose(both, norm(hidden), atol=1e-6)
        assert torch.allclose(both[:1], encoder(["cat dog"]), atol=1e-6)
        assert torch.equal(encoder.unconditional(3), encoder([""]).expand(3, -1, -1))
    assert both.shape == (2, 16, 32)
    assert (encoder.width, encoder.vocabulary) == (32, SMALL["vocab_size"])
    assert (both[0, 1:] - both[1, 1:]).abs().mean() > 0.1
    assert torch.allclose(both.mean(2), torch.zeros(2, 16), atol=1e-5)  # normalised: gains are 1 in a new model
    assert torch.allclose(both[0, 0], both[1, 0], atol=1e-6)  # the mask: nothing sees what comes after it


def test_conditions_are_rows_of_numbers_and_one_of_them_is_none(clip_folder):
    encoder, classes = clip(clip_folder), ClassEmbedder(4, n_classes=6)
    with torch.no_grad():
        assert torch.equal(encoder.encode(encoder.nothing[None]), encoder.unconditional(1))
        assert torch.equal(classes.encode(classes.nothing[None]), classes.unconditional(1))
        numbers = torch.tensor([[2], [0]])
        assert torch.equal(classes.encode(numbers), classes({"class": numbers[:, 0]}))


@pytest.mark.parametrize("spelling", ["own", "published"])
def test_a_clip_encoder_built_empty_is_filled_from_either_spelling(clip_folder, spelling):
    whole = clip(clip_folder)
    prefix = "cond_stage_model."
    state = {prefix + name: tensor for name, tensor in whole.state_dict().items()}
    if spelling == "published":
        old = f"{prefix}transformer.text_model."
        state = {name.replace(f"{prefix}transformer.", old): tensor for name, tensor in state.items()}
        state[f"{old}embeddings.position_ids"] = torch.arange(16)[None]
    with torch.device("meta"):
        empty = FrozenCLIPEmbedder(version=str(clip_folder), max_length=16, text_config=SMALL).eval()
    renamed = with_clip_names(state, {prefix + name for name in empty.state_dict()})
    empty.load_state_dict({n.removeprefix(prefix): t for n, t in renamed.items()}, strict=True, assign=True)
    empty.to("cpu", torch.float32)  # moving it must not stumble over buffers without values
    with torch.no_grad():
        assert torch.equal(empty(["cat"]), whole(["cat"]))


def test_bert_encoder_is_a_transformer_normalised_first():
    """Against torch's own encoder, where heads add up to the width."""
    torch.manual_seed(0)
    width, heads, depth = 32, 4, 3
    ours = BERTEmbedder(width, depth, vocab_size=20, max_seq_len=6, heads=heads, head_width=width // heads).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    oracle = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False).eval()
    state = ours.transformer.state_dict()
    for number, theirs in enumerate(oracle.layers):
        attention, forward = (f"attn_layers.layers.{2 * number + half}" for half in (0, 1))
        projections = [state[f"{attention}.1.to_{name}.weight"] for name in "qkv"]
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat(projections),
                "self_attn.in_proj_bias": torch.zeros(3 * width),
                "self_attn.out_proj.weight": state[f"{attention}.1.to_out.weight"],
                "self_attn.out_proj.bias": state[f"{attention}.1.to_out.bias"],
                "norm1.weight": state[f"{attention}.0.weight"],
                "norm1.bias": state[f"{attention}.0.bias"],
                "norm2.weight": state[f"{forward}.0.weight"],
                "norm2.bias": state[f"{forward}.0.bias"],
                "linear1.weight": state[f"{forward}.1.net.0.0.weight"],
                "linear1.bias": state[f"{forward}.1.net.0.0.bias"],
                "linear2.weight": state[f"{forward}.1.net.2.weight"],
                "linear2.bias": state[f"{forward}.1.net.2.bias"],
            }
        )
    oracle.norm.load_state_dict({name: state[f"norm.{name}"] for name in ("weight", "bias")})
    tokens = torch.randint(20, (2, 6))
    x = state["token_emb.weight"][tokens] + state["pos_emb.emb.weight"]
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(tokens), oracle(x), atol=1e-5, rtol=1e-5)


def test_bert_heads_need_not_add_up_to_the_width():
    """The published encoder has 8 heads of 64 in a width of 1280; only shapes are looked at."""
    with torch.device("meta"):
        encoder = BERTEmbedder(n_embed=1280, n_layer=32)
    shapes = {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes["transformer.attn_layers.layers.62.1.to_q.weight"] == [512, 1280]
    assert shapes["transformer.attn_layers.layers.62.1.to_out.weight"] == [1280, 512]
    assert shapes["transformer.attn_layers.layers.63.1.net.0.0.weight"] == [5120, 1280]
    assert shapes["transformer.token_emb.weight"] == [30522, 1280]
    assert shapes["transformer.pos_emb.emb.weight"] == [77, 1280]
    assert len(shapes) == 4 + 32 * (2 + 5 + 2 + 4)


def test_wrong_keywords_are_named():
    section = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    with pytest.raises(ConfigError, match="unknown keyword 'width'"):
        instantiate_from_config(section | {"params": {"text_config": {"width": 3}}})
    with pytest.raises(ConfigError, match="max_length 78 is more than the 77"):
        instantiate_from_config(section | {"params": {"max_length": 78}})
    with pytest.raises(ConfigError, match="use_tokenizer"):
        BERTEmbedder(8, 1, use_tokenizer=False)
