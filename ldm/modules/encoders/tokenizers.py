"""Tokenizers of text encoders: transformers' own, read from a folder, from the hub's cache or from the hub.

They are no part of a checkpoint. :func:`load_tokenizer` finds one, or says which files to put where.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from ddim.config import ConfigError
from ddim.untrusted import MAX_JSON_BYTES, UntrustedFileError, read_json, reason

REPOSITORY = Path(__file__).resolve().parents[3]
LOCAL_TOKENIZERS = REPOSITORY / "models" / "tokenizers"
"""A folder in here, named as the last part of a name on the hub, is taken before the hub is asked."""

START, END = "<|startoftext|>", "<|endoftext|>"
HUB_TIMEOUT_S = 5
CLIP_MERGES = 49152 - 256 - 2  # what OpenAI's vocabulary of 49408 takes of its list of merges
END_OF_WORD = "</w>"
BESIDE = "./"
"""Beginning of the name of a tokenizer that lies in the folder of the config that names it."""


@dataclass(frozen=True)
class TokenizerKind:
    """What a tokenizer is read from.

    Attributes:
        class_name: in transformers.
        files: sets of files, each of which is enough.
    """

    class_name: str
    files: tuple[tuple[str, ...], ...]

    def lies_in(self, folder: Path) -> bool:
        return any(all((folder / name).is_file() for name in names) for names in self.files)

    @property
    def wanted(self) -> str:
        return ", or ".join(" and ".join(names) for names in self.files)


CLIP = TokenizerKind("CLIPTokenizer", (("vocab.json", "merges.txt"), ("tokenizer.json",)))
BERT = TokenizerKind("BertTokenizerFast", (("vocab.txt",), ("tokenizer.json",)))


TOKENIZER_FILES = (
    *dict.fromkeys(name for kind in (CLIP, BERT) for names in kind.files for name in names),
    "tokenizer_config.json",
)


class TokenizerError(ConfigError):
    """No tokenizer is at hand; the message says which files to put where."""


def load_tokenizer(kind: TokenizerKind, name: str, folder: str | Path | None = None) -> Any:
    """A tokenizer of transformers.

    Args:
        name: on the hub, as ``openai/clip-vit-large-patch14``, or a folder.
        folder: the only place to look at, where it is given.

    Raises:
        TokenizerError: none is there, or its files are damaged.
    """
    place = _local_folder(kind, name, folder)
    transformers = import_transformers()
    cls = getattr(transformers, kind.class_name)
    if place is not None:
        try:
            vocabulary = check_vocabulary(place)
            tokenizer = _complete(cls.from_pretrained(str(place), local_files_only=True))
            if added := sorted(tokenizer.get_vocab().keys() - vocabulary.keys()):
                raise UntrustedFileError(f"its options add the token {added[0]!r}, which the vocabulary has not")
            return tokenizer
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # what a damaged file raises depends on where; panics are no Exception
            raise TokenizerError(
                f"{place}: its tokenizer cannot be read ({reason(error)}); it needs {kind.wanted} of {name}"
            ) from None
    with quiet_hub():
        for only_cached in (True, False):
            try:
                if not only_cached:
                    reach_hub()
                return _complete(cls.from_pretrained(name, local_files_only=only_cached))
            except Exception as error:  # no network, no such name, a broken cache: the remedy is the same
                trouble = reason(error)
    raise TokenizerError(
        f"the tokenizer of {name} is neither here nor to be had from the hub ({trouble}). Put {kind.wanted} of it into "
        f"{_own_folder(name)}, or name a folder that has them with --tokenizer"
    )


def import_transformers() -> Any:
    """The package, which is slow to import, so it is not before a text encoder is made.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"text encoders need the package transformers ({error}); pip install transformers") from None
    return transformers


def folder_beside(config: str | Path, name: str) -> Path | None:
    """The folder that a config means by the name of a tokenizer such as ``./tokenizer``: one below the config's own.

    Returns:
        None where the name is of another kind: the hub's, or any folder.

    Raises:
        TokenizerError: the name leads out of the config's folder, for instance through ``..`` or a link.
    """
    if not name.startswith(BESIDE):
        return None
    home = Path(config).absolute().parent.resolve()
    folder = (home / name).resolve()
    if folder == home or not folder.is_relative_to(home):
        raise TokenizerError(f"{config}: the tokenizer {name!r} does not lie below the config's folder")
    return folder


def check_vocabulary(folder: Path) -> dict[str, int]:
    """Whether the files that a tokenizer is read from are what they should be: in the folder, not too long, and every
    token with a number of its own, from 0 on without gaps.

    Returns:
        The tokens of all of them and their numbers.

    Raises:
        UntrustedFileError: naming the file.
    """
    vocabulary: dict[str, int] = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve().parent):
            raise UntrustedFileError(f"{name} is a link that leads elsewhere")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UntrustedFileError(f"{name} is longer than {MAX_JSON_BYTES >> 20} MiB")
        try:
            content = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")
        except ValueError as error:
            raise UntrustedFileError(f"{name}: {reason(error)}") from None
        if name == "vocab.txt":
            lines = content.removesuffix("\n").split("\n")
            content = {line: number for number, line in enumerate(lines)}
        if name.startswith("vocab."):
            vocabulary |= _numbered(name, content)
        elif name == "tokenizer.json":
            vocabulary |= _numbered(name, _backend_vocabulary(name, content))
        elif name == "tokenizer_config.json":
            _check_options(name, content)
    return vocabulary


def _numbered(name: str, vocabulary: Any) -> dict[str, int]:
    numbers: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else [None]
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise UntrustedFileError(f"{name} does not number its tokens from 0 on, each once")
    return dict(vocabulary)


def _backend_vocabulary(name: str, content: Any) -> dict[str, Any]:
    """The library's own format: a model with a vocabulary, and tokens that were added to it."""
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or [] if isinstance(content, dict) else []
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise UntrustedFileError(f"{name} has no vocabulary")
    if not all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
        raise UntrustedFileError(f"{name} adds what is no token")
    return vocabulary | {token["content"]: token.get("id") for token in added}


def _check_options(name: str, content: Any) -> None:
    """What a tokenizer's class is made with: not which files or code it is read from, which the folder has to say."""
    if not isinstance(content, dict):
        raise UntrustedFileError(f"{name} holds no options")
    if found := [key for key in content if key.endswith("_file") or key == "auto_map"]:
        raise UntrustedFileError(f"{name} has the option {found[0]!r}, which would read or run another file")


def tokenizer_files(folder: str | Path) -> dict[str, bytes]:
    """Name and content of those files of a folder that tokenizers are read from."""
    paths = [Path(folder) / name for name in TOKENIZER_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _local_folder(kind: TokenizerKind, name: str, folder: str | Path | None) -> Path | None:
    """The folder to read from; None where the hub or its cache is left."""
    if folder is not None:
        if not kind.lies_in(Path(folder)):
            raise TokenizerError(f"{folder}: holds no tokenizer of this model: {kind.wanted} of {name}")
        return Path(folder)
    return next((place for place in (Path(name), _own_folder(name)) if kind.lies_in(place)), None)


def _own_folder(name: str) -> Path:
    return LOCAL_TOKENIZERS / Path(name).name


def reach_hub() -> None:
    """Fails within seconds where the hub cannot be reached; its own client tries again and again for minutes.

    Raises:
        OSError: there is no way to the hub, or none is to be taken.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    try:
        requests.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except requests.RequestException:
        raise OSError(f"{constants.ENDPOINT} cannot be reached") from None


def _complete(tokenizer: Any) -> Any:
    """Some versions make an empty tokenizer of a name whose files are not there."""
    if len(tokenizer) < 10:
        raise OSError("no vocabulary found")
    return tokenizer


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """The hub's client tells of every try; the one error at the end is enough."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def clip_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """CLIP's tokens in their order: single bytes, the same at the end of a word, what each merge makes, both marks.

    Byte-pair encoding as in Radford et al. 2021 (CLIP), section 2.4; bytes are written as printable characters, those
    that have none as characters from 256 on, as GPT-2 did.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    characters = [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]
    tokens = [*characters, *(f"{character}{END_OF_WORD}" for character in characters)]
    tokens += ["".join(pair) for pair in merges]
    return {token: number for number, token in enumerate([*tokens, START, END])}


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The merges of a CLIP tokenizer for these texts, the same for the same texts whenever it is asked.

    Byte-pair encoding (Sennrich et al. 2016, algorithm 1) over words as CLIP's tokenizer splits them: of all pairs of
    neighbouring tokens the most frequent one becomes a token, and so on. Pairs that occur once are not merged.

    Args:
        count: how many at most; fewer where the texts have no more.

    Raises:
        ConfigError: transformers is not installed.
    """
    transformers = import_transformers()
    from tokenizers.trainers import BpeTrainer  # transformers brings it

    bytes_alone = clip_vocabulary([])
    backend = transformers.CLIPTokenizer(vocab=bytes_alone, merges=[]).backend_tokenizer
    # Given as special tokens, bytes at the end of a word have their numbers beforehand. The library would number them
    # in the order of a hash table, another one in every run, and ties between pairs are broken by these numbers.
    singles = [token for token in bytes_alone if token not in (START, END)]
    trainer = BpeTrainer(
        vocab_size=len(singles) + count,
        min_frequency=2,
        special_tokens=singles,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def write_clip_tokenizer(folder: str | Path, merges: Sequence[tuple[str, str]], max_length: int | None = None) -> None:
    """``vocab.json`` and ``merges.txt``, from which transformers reads a CLIP tokenizer.

    Args:
        max_length: tokens of a text; with it goes ``tokenizer_config.json``, which says that and which tokens are
            marks, for programs that do not know the model.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if max_length is not None:
        marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        facts = {"tokenizer_class": CLIP.class_name, "model_max_length": max_length, **marks}
        (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_merges(text: str, count: int = CLIP_MERGES) -> list[tuple[str, str]]:
    """The first ``count`` merges of a list as OpenAI published it: a heading, then two pieces a line.

    Raises:
        ValueError: fewer lines, lines of another kind, or merges that make no vocabulary: of pieces that are no tokens
            yet, or of a token that is there already.
    """
    lines = text.split("\n")[1 : count + 1]
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) < count or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"expected a heading and {count} lines of two pieces each")
    tokens = set(clip_vocabulary([]))
    for number, pair in enumerate(pairs):
        merged = "".join(pair)
        if not tokens.issuperset(pair) or merged in tokens:
            raise ValueError(f"merge {number} is of pieces that are no tokens, or makes a token again")
        tokens.add(merged)
    return [(first, second) for first, second in pairs]
