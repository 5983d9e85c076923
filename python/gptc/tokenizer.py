"""Text to token ids and back: bytes, characters, GPT-2's byte-pair encoding or one's own.

    tokenizer = make_tokenizer("bytes")
    tokens = tokenizer.encode("Once upon a time")  # int32 (T,)
    text = tokenizer.decode(tokens)

A tokenizer is saved as `gptc_tokenizer.json` in the folder of a dataset or a checkpoint.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import hashlib
import json
import os
import re
import secrets
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.download import Progress as Progress
from gptc.download import download
from gptc.errors import UPGRADE, GptcError, UsageError

if TYPE_CHECKING:
    import tiktoken

Tokens: TypeAlias = npt.NDArray[np.int32]
TokensLike: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
ENCODINGS = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")  # of tiktoken
KINDS = ("bytes", "char", "gpt2", "bpe", *ENCODINGS)
END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "gptc_tokenizer.json"
_FILE_VERSION = 2  # 1: no "bos"

# The two files that define GPT-2's encoding hold the same list of merges; one of them is enough.
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
_GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_GPT2_FILE = hashlib.sha1(_GPT2_URL.encode()).hexdigest()  # its name in tiktoken's cache
_GPT2_END_OF_TEXT = 50256
_BPE_VOCAB_SIZE = 2048  # of "bpe" without a size
_BPE_SIZES = range(258, (1 << 20) + 1)  # from every byte, one merged piece and the end of text on
_BPE_TRAIN_BYTES = 64 << 20  # more text than this does not change which pairs are frequent
# Bytes of a word that are learned from together. A merge is made in time that goes with the length
# of the words it is in, which is that of a file where one has no spaces, such as DNA or base64.
_BPE_WORD = 255  # also the longest token that llm.c's files can hold
# How GPT-2 cuts text into the pieces that merges apply to.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer(ABC):
    """A reversible mapping between text and token ids in [0, vocab_size)."""

    kind: str
    vocab_size: int
    start: str
    """The text that begins a document; it stands in for a prompt where there is none."""
    end_of_text: int | None
    """The id of the special token that separates documents, if there is one."""
    bos: int | None = None
    """The id of the token that the model beside this begins every text with (BOS), if it does.

    It says how a model was taught and not how text is cut: it is no part of `mapping`, `encode`
    does not add it, and a dataset's tokenizer has none.
    """

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """The tokens of `text`, int32 (T,). GptcError where it cannot be expressed."""

    @abstractmethod
    def encode_bytes(self, data: bytes) -> Tokens:
        """The tokens of raw bytes, int32 (T,). GptcError names the offset of what is no text."""

    def encode_raw(self, data: bytes) -> Tokens:
        """As `encode_bytes`, but bytes that are no UTF-8 become tokens of single bytes."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("utf-8", "surrogateescape")
        else:
            return self.encode(text)
        if self.byte_ids is None:
            raise GptcError(f"the {self.kind} tokenizer has no tokens for single bytes")
        parts = []
        for i, part in enumerate(re.split("([\udc80-\udcff]+)", text)):
            strays = np.frombuffer(part.encode("utf-8", "surrogateescape"), dtype=np.uint8)
            parts.append(self.byte_ids[strays] if i % 2 else self.encode(part))
        return np.concatenate(parts)

    @cached_property
    def byte_ids(self) -> Tokens | None:
        """The token of each byte (256,), -1 for an ASCII byte without one; None: there are none."""
        ids = np.full(256, -1, dtype=np.int32)
        for token, piece in reversed(list(enumerate(self.pieces))):
            if len(piece) == 1:
                ids[piece[0]] = token
        return None if (ids[128:] < 0).any() else ids

    def twin(self) -> Tokenizer:
        """The same for another thread: an encoder of tiktoken is slower where threads share one."""
        twin = copy.copy(self)
        twin.__dict__.pop("encoding", None)
        return twin

    @abstractmethod
    def cut(self, data: bytes | bytearray) -> int:
        """How many leading bytes of `data`, which goes on, have the same tokens whatever follows.

        Encoding data[:cut] and the rest apart equals encoding the whole. 0: none is known.
        """

    @property
    @abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """The bytes that each token stands for, by id."""

    @property
    def specials(self) -> frozenset[int]:
        """The ids of tokens that are no text, such as those that begin and end one."""
        return frozenset(id for id in (self.end_of_text, self.bos) if id is not None)

    @abstractmethod
    def mapping(self) -> dict[str, Any]:
        """What determines the mapping between text and ids."""

    @cached_property
    def _piece_bytes(self) -> npt.NDArray[np.int64]:
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def count_bytes(self, tokens: TokensLike) -> int:
        """The number of bytes that `tokens` decode to."""
        counts = np.bincount(np.asarray(tokens, dtype=np.int64), minlength=self.vocab_size)
        return int(counts @ self._piece_bytes)

    def decode_bytes(self, tokens: TokensLike) -> bytes:
        """The bytes that `tokens` stand for. GptcError for an id outside the vocabulary."""
        ids: list[int] = np.asarray(tokens, dtype=np.int64).tolist()
        pieces = self.pieces
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise GptcError(
                    f"token {token} is outside the {self.kind} tokenizer's vocabulary of "
                    f"{self.vocab_size}: use the tokenizer that these tokens were made with"
                )
        return b"".join([pieces[token] for token in ids])

    def decode(self, tokens: TokensLike) -> str:
        """The text that `tokens` stand for; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def has_token(self, token: object) -> bool:
        """Whether this, which a file says, is the id of a token."""
        return type(token) is int and 0 <= token < self.vocab_size

    def fingerprint(self) -> str:
        """A SHA-256 in hex, equal for tokenizers that map text to the same ids."""
        canonical = json.dumps(self.mapping(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Everything that `load_tokenizer` needs, as plain JSON values."""
        begins = {"version": 1} if self.bos is None else {"version": 2, "bos": self.bos}
        return {
            **begins,
            "vocab_size": self.vocab_size,
            "start": self.start,
            "end_of_text": self.end_of_text,
            **self.mapping(),
            "fingerprint": self.fingerprint(),
        }

    def save(self, folder: Path) -> None:
        """Writes `folder/gptc_tokenizer.json`, whole or not at all."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        write_file(folder / FILE_NAME, text.encode())


class ByteTokenizer(Tokenizer):
    """Every byte is a token: any data can be expressed, and the vocabulary is 256."""

    kind = "bytes"
    vocab_size = 256
    end_of_text = None

    def __init__(self, start: str = "\n") -> None:
        self.start = start

    def encode(self, text: str) -> Tokens:
        try:
            # Bytes of a command line that are no UTF-8 arrive as surrogate escapes.
            return self.encode_bytes(text.encode("utf-8", errors="surrogateescape"))
        except UnicodeEncodeError as e:
            raise GptcError(
                f"character {e.start} of the text is half of a surrogate pair, which has no bytes: "
                "remove it"
            ) from None

    def encode_bytes(self, data: bytes) -> Tokens:
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def encode_raw(self, data: bytes) -> Tokens:
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

    def encode(self, text: str) -> Tokens:
        ids = self._lookup(text)
        unknown = ids < 0
        if unknown.any():
            at = int(unknown.argmax())
            raise GptcError(f"character {at} of the text: {self.refusal(text[at])}")
        return ids

    def encode_bytes(self, data: bytes) -> Tokens:
        return self.encode(decode_utf8(data))

    def unknown(self, text: str) -> int | None:
        """Where `text` has its first character that is not in the vocabulary."""
        unknown = self._lookup(text) < 0
        return int(unknown.argmax()) if unknown.any() else None

    def refusal(self, char: str) -> str:
        """The sentence that says that `char` is not in the vocabulary."""
        return (
            f"{char!r} (U+{ord(char):04X}) is not among the {self.vocab_size} characters of the "
            "char tokenizer: leave it out, or use --tokenizer bytes, which knows everything"
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
        trained.train_from_iterator(text.split(END_OF_TEXT), trainer)
        ids = sorted(trained.get_vocab().items(), key=lambda item: item[1])
        byte_of = byte_characters()
        pieces = [bytes(byte_of[char] for char in piece) for piece, _ in ids]
        return cls([piece for piece in pieces if len(piece) > 1])

    def encode(self, text: str) -> Tokens:
        tokens = self.encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT})
        return np.asarray(tokens, dtype=np.int32)

    def encode_bytes(self, data: bytes) -> Tokens:
        return self.encode(decode_utf8(data))

    def cut(self, data: bytes | bytearray) -> int:
        # No piece of the pattern goes on from a character that is no whitespace into whitespace,
        # and a piece never depends on what stands before it: so text may be cut where whitespace
        # begins. Python's isspace knows all that the pattern's \s matches.
        end = len(data)
        while (space := max(data.rfind(b" ", 0, end), data.rfind(b"\n", 0, end))) > 0:
            end = len(data[:space].rstrip(b" \n\t\r"))
            before = data[max(0, end - 4) : end].decode("utf-8", errors="ignore")[-1:]
            if before and not before.isspace():
                return end
        return max(0, data.rfind(END_OF_TEXT.encode()))

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's encoder."""
        try:
            import tiktoken
        except ImportError:
            raise GptcError(
                f"the {self.kind} tokenizer needs tiktoken: pip install tiktoken, or use "
                "--tokenizer bytes"
            ) from None
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
    """GPT-2's byte-pair encoding. The vocabulary is fetched when it is first needed."""

    kind = "gpt2"
    vocab_size = 50257
    end_of_text = _GPT2_END_OF_TEXT

    def __init__(self, start: str = END_OF_TEXT) -> None:
        self.start = start

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        merges = _gpt2_vocabulary().decode().split("\n")[1:-1]
        byte_of = byte_characters()
        merged = [bytes(byte_of[char] for char in merge if char != " ") for merge in merges]
        return [*(bytes([b]) for b in byte_of.values()), *merged, END_OF_TEXT.encode()]

    def mapping(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_bpe_sha256": _GPT2_SHA256}


@cache
def byte_characters() -> dict[str, int]:
    """The characters by which GPT-2's files write bytes, in the order of its ids.

    Bytes that can be seen stand for themselves and come first; the others are numbered from 256.
    """
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def is_gpt2_vocabulary(data: bytes) -> bool:
    """Whether this is GPT-2's list of merges; it is then kept in our cache for the next time."""
    if hashlib.sha256(data).hexdigest() != _GPT2_SHA256:
        return False
    target = cache_folder() / "tiktoken" / _GPT2_FILE
    if not target.exists():
        with contextlib.suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, data)
    return True


def _gpt2_vocabulary() -> bytes:
    """GPT-2's list of merges, from a cache of tiktoken's or ours, else downloaded."""
    variables = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
    named = [Path(value) for name in variables if (value := os.environ.get(name))]
    own = cache_folder() / "tiktoken"
    for folder in [*named, own, Path(tempfile.gettempdir(), "data-gym-cache")]:
        try:
            data = (folder / _GPT2_FILE).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == _GPT2_SHA256:
            return data
    target = (named or [own])[0] / _GPT2_FILE
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


def is_spec(name: str) -> bool:
    """Whether `name` says how a tokenizer is made, rather than where one lies."""
    return name in KINDS or bpe_size(name) is not None


def bpe_size(name: str) -> int | None:
    """The vocabulary size that "bpe" or "bpe:SIZE" asks for; None for any other name."""
    if name == "bpe":
        return _BPE_VOCAB_SIZE
    if not name.startswith("bpe:"):
        return None
    found = re.fullmatch("([0-9]{1,9})([KM]?)", name.removeprefix("bpe:").upper())
    size = int(found[1]) * {"": 1, "K": 10**3, "M": 10**6}[found[2]] if found else 0
    check_bpe_size(size, f"--tokenizer {name}")
    return size


def check_bpe_size(size: int, where: str) -> None:
    """UsageError when no byte-pair encoding of that size is learned; `where` is what was typed."""
    if size not in _BPE_SIZES:
        raise UsageError(
            f"{where}: the vocabulary size must be a number from {_BPE_SIZES[0]} to "
            f"{_BPE_SIZES[-1]:,}"
        )


def make_tokenizer(name: str, text_iter: Iterable[bytes] | None = None) -> Tokenizer:
    """A tokenizer of a kind in KINDS ("bpe:SIZE" too), or that in the file or folder `name`.

    A file is one of ours, a tokenizer.json of Hugging Face, or a SentencePiece .model.
    "char" takes its characters from `text_iter`, UTF-8 in blocks cut anywhere, and "bpe" its pieces
    (from its beginning, when there is very much). UsageError for an unknown name, GptcError when
    the text is no UTF-8 or the GPT-2 vocabulary cannot be had.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        characters: set[str] = set()
        decoder = Utf8Decoder()
        for block in text_iter or ():
            characters.update(decoder.push(block))
        decoder.finish()
        return CharTokenizer(characters)
    if name == "gpt2":
        gpt2 = Gpt2Tokenizer()
        _ = gpt2.encoding  # so that a missing vocabulary is found now
        return gpt2
    size = bpe_size(name)
    if size is not None:
        data = bytearray()
        for block in text_iter or ():
            data += block[: _BPE_TRAIN_BYTES - len(data)]
        return BpeTokenizer.train(decode_utf8(bytes(data[: character_cut(data)])), size)
    if name in ENCODINGS:
        from gptc.pretrained import TiktokenTokenizer

        return TiktokenTokenizer.named(name)
    if (path := Path(name)).exists():
        from gptc.pretrained import read_file

        if not path.is_dir() or not (path / FILE_NAME).exists():
            theirs = read_file(path)
            if theirs is not None:
                return theirs
        return load_tokenizer(path)
    raise UsageError(
        f"unknown tokenizer {name!r}: choose {', '.join(KINDS)}, bpe:SIZE, a tokenizer.json or "
        ".model, or the folder of a dataset, checkpoint or run to use its tokenizer"
    )


def load_tokenizer(folder_or_file: Path) -> Tokenizer:
    """The tokenizer saved there. GptcError when the file is missing, incomplete or altered."""
    path = Path(folder_or_file)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        saved = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise GptcError(
            f"no tokenizer at {path}: give the folder of a dataset, checkpoint or run of gptc"
        ) from None
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise GptcError(
            f"{path} is truncated or is no tokenizer file: copy it again from its source"
        ) from None
    if not isinstance(saved, dict):
        saved = {}
    if isinstance(saved.get("version"), int) and saved["version"] > _FILE_VERSION:
        raise GptcError(f"{path} was written by a newer gptc: {UPGRADE}")
    tokenizer = _from_json(saved)
    if tokenizer is not None and tokenizer.has_token(saved.get("bos")):
        tokenizer.bos = saved["bos"]
    if tokenizer is None or tokenizer.to_json() != saved:
        raise GptcError(
            f"{path} was altered, or is no tokenizer file of gptc: copy it again from its source"
        )
    return tokenizer


def _from_json(saved: dict[str, Any]) -> Tokenizer | None:
    kind, start, characters = (saved.get(key) for key in ("kind", "start", "characters"))
    if not isinstance(start, str) or not start:
        return None
    if kind == "bytes":
        return ByteTokenizer(start)
    if kind == "char" and isinstance(characters, str) and characters:
        return CharTokenizer(characters, start)
    if kind == "gpt2":
        return Gpt2Tokenizer(start)
    if kind == "bpe":
        return _bpe_from_json(saved.get("merged"), start)
    from gptc.pretrained import from_json

    return from_json(saved, start)


def _bpe_from_json(merged: Any, start: str) -> Tokenizer | None:
    if not isinstance(merged, list) or not all(isinstance(piece, str) for piece in merged):
        return None
    try:
        pieces = [piece.encode("latin-1") for piece in merged]
    except UnicodeEncodeError:
        return None
    if len(set(pieces)) < len(pieces) or any(len(piece) < 2 for piece in pieces):
        return None
    return BpeTokenizer(pieces, start)


class StreamDecoder:
    """Turns tokens into text one at a time, and never gives out part of a UTF-8 character.

    The concatenation of all `push` and a final `flush` is what `decode` gives for the whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What an unfinished character at the end becomes; the decoder can then start again."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class Utf8Decoder:
    """Decodes UTF-8 that arrives in blocks cut anywhere; an error names the offset in the whole."""

    def __init__(self, where: Callable[[int], str] = "byte {} of the data".format) -> None:
        """`where` puts a byte offset into words."""
        self._where = where
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
        self.n_done = 0  # bytes of the characters given out
        self._n_held = 0  # bytes of a character that is not complete yet

    def push(self, block: bytes, final: bool = False) -> str:
        """The characters that `block` completes. GptcError where it is no UTF-8."""
        try:
            text = self._decoder.decode(block, final)
        except UnicodeDecodeError as e:
            raise GptcError(
                f"{self._where(self.n_done + e.start)} (0x{e.object[e.start]:02x}) is no UTF-8 "
                "text: convert it to UTF-8, or use --tokenizer bytes, which takes any data"
            ) from None
        n_held = len(self._decoder.getstate()[0])
        self.n_done += self._n_held + len(block) - n_held
        self._n_held = n_held
        return text

    def finish(self) -> None:
        """GptcError when the last character is incomplete."""
        self.push(b"", final=True)


def decode_utf8(data: bytes) -> str:
    """The text of UTF-8 `data`. GptcError names the offset of the first byte that is none."""
    return Utf8Decoder().push(data, final=True)


def character_cut(data: bytes | bytearray) -> int:
    """The length of `data` without an incomplete UTF-8 character at its end."""
    for back in range(1, min(4, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 != 0x80:  # the byte that begins the last character
            n_bytes = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(data) if n_bytes <= back else len(data) - back
    return len(data)


def cache_folder() -> Path:
    """Where downloads and prepared datasets are kept: $GPTC_CACHE, else the user's cache."""
    if own := os.environ.get("GPTC_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "gptc"


def write_file(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all, and is on disk when this returns."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
