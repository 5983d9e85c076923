"""The tokenizers of our own: bytes, characters, byte pairs, and GPT-2's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken
import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptc.errors import GptcError, half_a_pair
from gptc.files.download import download
from gptc.files.limits import read_file
from gptc.files.paths import cache_folder
from gptc.files.values import parse_json
from gptc.files.whole import write_file
from gptc.files.words import pip_install
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer, Tokens, TokensLike, check_text
from gptc.tokenizer.cutting import before_space
from gptc.tokenizer.libraries import called, called_for
from gptc.tokenizer.utf8 import character_cut, decode_utf8

# The two files that define GPT-2's encoding hold the same list of merges; one of them is enough.
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
_GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_GPT2_FILE = hashlib.sha1(_GPT2_URL.encode()).hexdigest()  # its name in tiktoken's cache
_GPT2_END_OF_TEXT = 50256
# Bytes of a word that are learned from together. A merge is made in time that goes with the length
# of the words it is in, which is that of a file where one has no spaces, such as DNA or base64.
_BPE_WORD = 255  # also the longest token that llm.c's files can hold
# How GPT-2 cuts text into the pieces that merges apply to.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class ByteTokenizer(Tokenizer):
    """Every byte is a token: any data can be expressed, and the vocabulary is 256."""

    kind = "bytes"
    vocab_size = 256
    end_of_text = None

    def __init__(self, start: str = "\n") -> None:
        self.start = start

    def encode(self, text: str, continued: bool = False) -> Tokens:
        check_text(text)
        try:
            # Bytes of a command line that are not UTF-8 arrive as surrogate escapes.
            return self.encode_bytes(text.encode("utf-8", errors="surrogateescape"))
        except UnicodeEncodeError as error:
            raise GptcError(
                f"character {error.start} of the text is {half_a_pair(error)}"
            ) from None

    def encode_bytes(self, data: bytes, continued: bool = False) -> Tokens:
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def encode_raw(self, data: bytes, continued: bool = False) -> Tokens:
        return self.encode_bytes(data)

    def cut(self, data: bytes | bytearray) -> int:
        return len(data)

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        return [bytes([i]) for i in range(256)]

    def count_bytes(self, tokens: TokensLike) -> int:
        return len(tokens)

    def mapping(self) -> dict[str, Any]:
        return {"kind": self.kind}


class CharTokenizer(Tokenizer):
    """Every character of a given set is a token, numbered in the order of their code points."""

    kind = "char"
    end_of_text = None

    def __init__(self, characters: Iterable[str], start: str = "\n") -> None:
        self.characters = sorted(set(characters))
        if not self.characters:
            raise GptcError("a char tokenizer needs text to take its characters from")
        self.vocab_size = len(self.characters)
        self.start = start
        codes = [ord(char) for char in self.characters]
        # The last entry answers for every code point above those that are known.
        self._ids = np.full(codes[-1] + 2, -1, dtype=np.int32)
        self._ids[codes] = np.arange(len(codes))

    def encode(self, text: str, continued: bool = False) -> Tokens:
        check_text(text)
        ids = self._lookup(text)
        unknown = ids < 0
        if unknown.any():
            at = int(unknown.argmax())
            raise GptcError(f"character {at} of the text: {self.refusal(text[at])}")
        return ids

    def encode_bytes(self, data: bytes, continued: bool = False) -> Tokens:
        return self.encode(decode_utf8(data))

    def unknown(self, text: str) -> int | None:
        """Where `text` has its first character that is not in the vocabulary."""
        unknown = self._lookup(text) < 0
        return int(unknown.argmax()) if unknown.any() else None

    def refusal(self, char: str) -> str:
        """The sentence that says that `char` is not in the vocabulary."""
        return (
            f"{char!r} (U+{ord(char):04X}) is not among the {self.vocab_size} characters of the "
            "char tokenizer: leave it out, or train with --tokenizer bytes, which knows everything"
        )

    def _lookup(self, text: str) -> Tokens:
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids: Tokens = self._ids[np.minimum(codes, len(self._ids) - 1)]
        return ids

    def cut(self, data: bytes | bytearray) -> int:
        return character_cut(data)

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        return [char.encode("utf-8", errors="surrogatepass") for char in self.characters]

    def mapping(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": "".join(self.characters)}


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) of bytes, as GPT-2 does it: it takes any text.

    Ids 0 to 255 are the bytes, the merged pieces follow in the order in which they are made, and
    the last id is <|endoftext|>.
    """

    kind = "bpe"

    def __init__(self, merged: Sequence[bytes], start: str = END_OF_TEXT) -> None:
        self.merged = list(merged)
        self.vocab_size = 256 + len(self.merged) + 1
        self.end_of_text = self.vocab_size - 1
        self.start = start

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BpeTokenizer:
        """The tokenizer that learns its pieces from `text`: the most frequent pairs, one by one."""
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trained

        trained = Trained(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Split(Regex(f".{{{_BPE_WORD}}}"), "isolated"),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = text.split(END_OF_TEXT)
        with called("the text"):
            _interruptible(lambda: trained.train_from_iterator(texts, trainer))
        ids = sorted(trained.get_vocab().items(), key=lambda item: item[1])
        byte_of = byte_characters()
        pieces = [bytes(byte_of[char] for char in piece) for piece, _ in ids]
        return cls([piece for piece in pieces if len(piece) > 1])

    def encode(self, text: str, continued: bool = False) -> Tokens:
        check_text(text)
        with called_for(text):
            tokens = self.encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT})
        return np.asarray(tokens, dtype=np.int32)

    def _encode_text(self, text: str, continued: bool) -> Sequence[int]:
        with called_for(text):
            ids: list[int] = self.encoding.encode_ordinary(text)
        return ids

    def encode_bytes(self, data: bytes, continued: bool = False) -> Tokens:
        return self.encode(decode_utf8(data))

    def cut(self, data: bytes | bytearray) -> int:
        # No piece of the pattern extends from another character into whitespace, and a piece never
        # depends on the text before it: so text may be cut where whitespace begins. Python's
        # isspace covers the pattern's \s.
        return next(before_space(data), max(0, data.rfind(END_OF_TEXT.encode())))

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's encoder."""
        try:
            import tiktoken
        except ImportError:
            raise GptcError(
                f"the {self.kind} tokenizer needs tiktoken: {pip_install('tiktoken')}, or use "
                "--tokenizer bytes"
            ) from None
        with called(f"the {self.kind} tokenizer"):
            return tiktoken.Encoding(
                self.kind,
                pat_str=GPT2_PATTERN,
                mergeable_ranks={piece: rank for rank, piece in enumerate(self.pieces[:-1])},
                special_tokens={END_OF_TEXT: self.vocab_size - 1},
                explicit_n_vocab=self.vocab_size,
            )

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        return [*(bytes([i]) for i in range(256)), *self.merged, END_OF_TEXT.encode()]

    def mapping(self) -> dict[str, Any]:
        # Latin-1 writes every byte as the character of the same number.
        return {"kind": self.kind, "merged": [piece.decode("latin-1") for piece in self.merged]}


class Gpt2Tokenizer(BpeTokenizer):
    """GPT-2's byte-pair encoding. A vocabulary that is not given is fetched when first needed."""

    kind = "gpt2"
    vocab_size = 50257
    end_of_text = _GPT2_END_OF_TEXT

    def __init__(self, start: str = END_OF_TEXT, vocabulary: bytes | None = None) -> None:
        """`vocabulary` is GPT-2's list of merges, which is stored with the tokenizer."""
        self.start = start
        self.vocabulary = vocabulary

    def to_json(self) -> dict[str, Any]:
        if self.vocabulary is None:
            return super().to_json()
        saved = super().to_json()
        version = max(saved["version"], 3)
        return {**saved, "version": version, "vocab_bpe": self.vocabulary.decode()}

    def save(self, folder: Path) -> None:
        self.vocabulary = self.vocabulary or _cached_vocabulary()
        super().save(folder)

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        merges = (self.vocabulary or _gpt2_vocabulary()).decode().split("\n")[1:-1]
        byte_of = byte_characters()
        table = str.maketrans({char: chr(byte) for char, byte in byte_of.items()} | {" ": ""})
        merged = [merge.translate(table).encode("latin-1") for merge in merges]
        return [*(bytes([b]) for b in byte_of.values()), *merged, END_OF_TEXT.encode()]

    def mapping(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_bpe_sha256": _GPT2_SHA256}


def _interruptible(work: Callable[[], object]) -> None:
    """Runs minutes of work outside Python, which Ctrl-C ends at once.

    A signal is handled between two instructions of the main thread, which waits here. The thread
    is abandoned; it ends with the process.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="gptc-bpe", daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("while the tokenizer was learned: nothing is kept") from None
    if failed:
        raise failed[0]


@cache
def byte_characters() -> dict[str, int]:
    """The characters by which GPT-2's files write bytes, in the order of its ids.

    Visible bytes are themselves and come first; the others are numbered from 256.
    """
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def keep_gpt2_vocabulary(data: bytes) -> None:
    """Keeps GPT-2's list of merges in our cache for the next time."""
    with contextlib.suppress(OSError, GptcError):
        target = cache_folder() / "tiktoken" / _GPT2_FILE
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, data)


def gpt2_vocabulary_in(folder: Path) -> bytes | None:
    """GPT-2's list of merges in the files of a model's folder; None where it is not there."""
    for name in ("vocab.bpe", "merges.txt", "tokenizer.json"):
        try:
            data = read_file(folder / name)
            if name == "tokenizer.json":
                merges = parse_json(data, name, name="entries")["model"]["merges"]
                lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
                data = "".join(f"{line}\n" for line in ["#version: 0.2", *lines]).encode()
        except (GptcError, OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if is_gpt2s(data):
            return data
    return None


def is_gpt2s(vocabulary: bytes) -> bool:
    """Whether this is GPT-2's list of merges."""
    return hashlib.sha256(vocabulary).hexdigest() == _GPT2_SHA256


def _cache_folders() -> list[Path]:
    """The folders of tiktoken's cache and ours; a vocabulary is stored in the first."""
    variables = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
    named = [Path(value) for name in variables if (value := os.environ.get(name))]
    folders = [*named, Path(tempfile.gettempdir(), "data-gym-cache")]
    with contextlib.suppress(GptcError):  # without a home folder
        folders.insert(len(named), cache_folder() / "tiktoken")
    return folders


def _cached_vocabulary() -> bytes | None:
    for folder in _cache_folders():
        try:
            data = (folder / _GPT2_FILE).read_bytes()
        except OSError:
            continue
        if is_gpt2s(data):
            return data
    return None


def _gpt2_vocabulary() -> bytes:
    """GPT-2's list of merges, from a cache of tiktoken's or ours, else downloaded."""
    if (cached := _cached_vocabulary()) is not None:
        return cached
    target = _cache_folders()[0] / _GPT2_FILE
    try:
        with tempfile.TemporaryDirectory() as work:
            download(
                _GPT2_URL, Path(work, _GPT2_FILE), sha256=_GPT2_SHA256, timeout_s=10, attempts=2
            )
            data = Path(work, _GPT2_FILE).read_bytes()
    except (GptcError, OSError):
        raise GptcError(
            "the GPT-2 vocabulary is neither in a cache nor can it be downloaded: fetch "
            f"{_GPT2_URL} where there is a network, save it as {_GPT2_FILE} in a folder, and "
            "set TIKTOKEN_CACHE_DIR to that folder"
        ) from None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, data)
    except OSError:
        pass  # without a cache it is downloaded again next time
    return data
