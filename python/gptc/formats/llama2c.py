"""llama2.c's files (https://github.com/karpathy/llama2.c): versions 0, 1 and 2, and its tokenizer.

Version 0 has no magic number: seven int32 and float32 tensors. Versions 1 (float32) and 2 (int8 in
groups) begin with "ak42" and have a header of 256 bytes. Rotary channels are paired.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.formats import layout
from gptc.formats.binary import INT32, UINT32, Binary
from gptc.formats.families import BIASES
from gptc.formats.format import Export, Format, Output
from gptc.formats.layout import Naming, Part
from gptc.formats.model_file import ModelFile, TensorTable, check_size, checked, elsewhere, laid_out
from gptc.formats.numbers import F32, Codec, Int8Groups, encoded
from gptc.tokenizer import vocabulary
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer
from gptc.tokenizer.native import CharTokenizer
from gptc.tokenizer.scored import SPACE, Scored, type_of

MAGIC = 0x616B3432
GROUP = 64  # of version 2, where the widths allow it
_HEADER_BYTES = 256
_SIZES = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len"]
# Constants of the program that no file stores.
_NORM_EPS = 1e-5
_THETA = 10000.0
BOS = 1  # its programs begin every text with it
# The piece of tokens that the model has and its tokenizer lacks: its programs refuse a piece of no
# bytes, and print nothing for this one.
_PADDING = b"\0"

_NAMING = Naming(
    {
        "wte.weight": ("tok_embeddings",),
        "norm_1.weight": ("layers.{}.attention_norm",),
        "attn.qkv.weight": ("layers.{}.wq", "layers.{}.wk", "layers.{}.wv"),
        "attn.proj.weight": ("layers.{}.wo",),
        "norm_2.weight": ("layers.{}.ffn_norm",),
        "mlp.fc.weight": ("layers.{}.w1", "layers.{}.w3"),
        "mlp.proj.weight": ("layers.{}.w2",),
        "norm_f.weight": ("norm",),
        "lm_head.weight": ("output",),
    },
    paired=True,
)
_NORMS = ["layers.{}.attention_norm", "layers.{}.ffn_norm", "norm"]
_MATRICES = [f"layers.{{}}.{name}" for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")]
_ORDERS = {
    0: [
        "tok_embeddings",
        "layers.{}.attention_norm",
        *_MATRICES[:4],
        "layers.{}.ffn_norm",
        *_MATRICES[4:],
        "norm",
        "output",
    ],
    1: [*_NORMS, "tok_embeddings", *_MATRICES, "output"],
    2: [*_NORMS, "tok_embeddings", *_MATRICES, "output"],
}
_TABLES = ("freq_cis_real", "freq_cis_imag")  # version 0 stores them; no program reads them


class Llama2cModel(ModelFile):
    """A model file of any version."""

    format = "llama2.c"

    def __init__(self, path: Path) -> None:
        """GptcError when the file is damaged or of another kind."""
        self.path = path
        file = Binary(path)
        self.version, start, self.config, group = _read_header(file)
        slots = _slots(self.config, self.version, group)
        entries, end = laid_out(slots, start)
        check_size(
            file,
            end,
            f"{self.config.n_layer} layers of width {self.config.n_embd}, version "
            f"{self.version} of llama2.c",
        )
        unread = {name: entries.pop(name) for name in _TABLES if name in entries}
        self.unread = TensorTable(file, unread)
        self._table = TensorTable(file, entries)

    @property
    def tensors(self) -> TensorTable:
        return self._table

    def parts(self) -> list[Part]:
        return layout.parts(self.config, _NAMING)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in a tokenizer.bin next to the model."""
        for name in (f"{self.path.stem}_tokenizer.bin", "tokenizer.bin"):
            if (self.path.parent / name).is_file():
                return read_tokenizer(self.path.parent / name, self.config.vocab_size)
        return super().tokenizer()


def detect(path: Path, begin: bytes) -> bool:
    """By the magic number; a file of version 0, which has none, by the size that it promises."""
    if begin.startswith(MAGIC.to_bytes(4, "little")):
        return True
    try:
        file = Binary(path)
        config = _config(file, file.numbers(INT32, 7, "the sizes"), None)
        return laid_out(_slots(config, 0, 0), 28)[1] == file.size
    except GptcError:
        return False


def _read_header(file: Binary) -> tuple[int, int, GPTConfig, int]:
    """Version, where the tensors begin, config, group size (of version 2)."""
    file.at = 0
    if file.number(UINT32, "magic") != MAGIC:
        file.at = 0
        return 0, 28, _config(file, file.numbers(INT32, 7, "the sizes"), None), 0
    version = file.number(INT32, "version")
    if version not in (1, 2):
        raise file.unknown("version", f"is {version}; versions 1 and 2 are known", 4)
    sizes = file.numbers(INT32, 7, "the sizes")
    tied = file.within("the flag of a tied classifier", file.number("B", "flag"), 0, 1, 36)
    config = _config(file, sizes, bool(tied))
    group = 0
    if version == 2:
        group = file.within("group_size", file.number(INT32, "group_size"), 1, 1 << 20, 37)
    file.at = 0
    file.take(_HEADER_BYTES, "the header")
    return version, _HEADER_BYTES, config, group


def _config(file: Binary, sizes: tuple[int, ...], tied: bool | None) -> GPTConfig:
    """`tied` None: the sign of the vocabulary's size tells it."""
    named = dict(zip(_SIZES, sizes, strict=True))
    vocab_size = named["vocab_size"]
    if tied is None:
        tied, vocab_size = vocab_size > 0, abs(vocab_size)
    return checked(
        {
            "vocab_size": vocab_size,
            "block_size": named["seq_len"],
            "n_layer": named["n_layers"],
            "n_head": named["n_heads"],
            "n_kv_head": named["n_kv_heads"],
            "n_embd": named["dim"],
            "n_ff": named["hidden_dim"],
            "norm": "rmsnorm",
            "norm_weight": True,
            "pos": "rope",
            "activation": "swiglu",
            "bias": False,
            "tied": tied,
            "norm_eps": _NORM_EPS,
            "rope_theta": _THETA,
        },
        f"{file.path}: the sizes at byte {file.at - 28}",
    )


def _slots(
    config: GPTConfig, version: int, group: int
) -> Iterator[tuple[str, Codec, tuple[int, ...]]]:
    """The tensors in their order."""
    for part in layout.in_order(layout.parts(config, _NAMING), _ORDERS[version]):
        codec: Codec = F32
        if version == 2 and len(part.shape) == 2:
            codec = Int8Groups(group)
            if not codec.fits(part.shape):
                raise GptcError(
                    f"{part.name} of shape {part.shape} is not a whole number of groups "
                    f"of group_size {group}"
                )
        yield part.name, codec, part.shape
        if version == 0 and part.name == "norm":
            for name in _TABLES:
                yield name, F32, (config.block_size, config.head_size // 2)


# ---- writing ----


def write(export: Export) -> list[Output]:
    """The model, and its tokenizer in a file next to it."""
    version, tokenizer = export.version, export.tokenizer
    if version is None:
        version = 2 if export.dtype == "int8" else 0
    if (version == 2) != (export.dtype == "int8"):
        raise UsageError(f"llama2.c's version {version} does not hold {export.dtype}")
    files = [Output(export.path, model_chunks(export.model, version))]
    if tokenizer is not None:
        try:
            content = b"".join(tokenizer_chunks(tokenizer, export.model.config.vocab_size))
        except GptcError as error:
            export.notes.append(f"without a tokenizer: {error}")
            return files
        files.append(Output(export.companion("tokenizer"), [content]))
        if tokenizer.bos != BOS:
            export.notes.append(
                f"llama2.c's programs begin every text with token {BOS}, which this model was not "
                "taught"
            )
    return files


def model_chunks(model: ModelFile, version: int = 1) -> Iterator[bytes | memoryview]:
    """The bytes of a model file. GptcError for a model that llama2.c cannot compute."""
    config = model.config
    refusal = why_not(config)
    if refusal:
        raise GptcError(
            f"llama2.c computes Llama only: {refusal}; export it with --to {elsewhere(config)}"
        )
    vocab_size = config.vocab_size if version or config.tied else -config.vocab_size
    sizes = struct.pack(
        "<7i",
        config.n_embd,
        config.n_ff,
        config.n_layer,
        config.n_head,
        config.n_kv_head,
        vocab_size,
        config.block_size,
    )
    group = group_size(config) if version == 2 else 0
    if version == 0:
        yield sizes
    else:
        header = struct.pack("<Ii", MAGIC, version) + sizes + bytes([config.tied])
        header += struct.pack("<i", group) if version == 2 else b""
        yield header.ljust(_HEADER_BYTES, b"\0")
    by_name = {part.name: part for part in layout.parts(config, _NAMING)}
    for name, codec, _ in _slots(config, version, group):
        if name in _TABLES:
            yield F32.encode(_rotations(config)[_TABLES.index(name)])
        else:
            part = by_name[name]
            yield encoded(codec, layout.export_tensor(part, model.read(part.ours)), part.name)


def why_not(config: GPTConfig) -> str | None:
    """Why llama2.c cannot compute this model; None where it can."""
    if config.family != "llama":
        return f"this is a model of the {config.family} family"
    if config.head_dim:
        return f"its heads have {config.head_dim} channels, and llama2.c's n_embd / n_head"
    if abs(config.norm_eps - _NORM_EPS) > 1e-9:
        return f"norm_eps is {config.norm_eps:g}, and llama2.c's {_NORM_EPS:g}"
    if config.rope_theta != _THETA:
        return f"rope_theta is {config.rope_theta:g}, and llama2.c's {_THETA:g}"
    for name in (*BIASES, "qk_norm", "window"):
        if getattr(config, name):
            return f"it has {name}, which llama2.c's models lack"
    if config.rope_scaling != "none":
        return "its rotary frequencies are scaled, and llama2.c's are not"
    return None


def group_size(config: GPTConfig) -> int:
    """The largest group up to GROUP that divides the rows of every matrix."""
    return math.gcd(GROUP, config.n_embd, config.n_ff)


def _rotations(config: GPTConfig) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines of RoPE's angles: (T, HS/2) each."""
    half = config.head_size // 2
    frequencies = _THETA ** (-np.arange(half) / half)
    angles = np.outer(np.arange(config.block_size), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


# ---- tokenizer ----


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a tokenizer.bin, whose number of tokens the model knows."""
    file = Binary(path)
    longest = file.number(INT32, "max_token_length")
    pieces, scores = [], []
    for i in range(vocab_size):
        at = file.at
        scores.append(file.number("f", f"score of token {i}"))
        if not math.isfinite(scores[-1]):
            raise file.damaged(f"score of token {i}", f"is {scores[-1]}", at)
        length = file.number(INT32, f"length of token {i}")
        file.within(f"length of token {i}", length, 0, max(longest, 0), at + 4)
        pieces.append(bytes(file.take(length, f"token {i}")))
    file.end()
    return _from_scored_pieces(pieces, scores, str(path))


def tokenizer_chunks(tokenizer: Tokenizer, vocab_size: int) -> Iterator[bytes]:
    """The bytes of a tokenizer.bin for a model of this vocabulary."""
    pieces, scores = _scored_pieces(tokenizer)
    pieces += [_PADDING] * (vocab_size - len(pieces))
    scores += [0.0] * (vocab_size - len(scores))
    yield struct.pack("<i", max(map(len, pieces)))
    for piece, score in zip(pieces, scores, strict=True):
        yield struct.pack("<fi", score, len(piece)) + piece


def _from_scored_pieces(pieces: list[bytes], scores: Sequence[float], where: str) -> Tokenizer:
    """The tokenizer that a tokenizer.bin was made from."""
    n = len(pieces)
    while n and (not pieces[n - 1] or (pieces[n - 1] == _PADDING and not scores[n - 1])):
        n -= 1
    pieces, scores = pieces[:n], scores[:n]
    if pieces[:3] != [b"<unk>", b"\n<s>\n", b"\n</s>\n"]:
        end = END_OF_TEXT.encode()
        return vocabulary.from_pieces(pieces, pieces.index(end) if end in pieces else None, where)
    try:
        texts = ["<unk>", "<s>", "</s>"]
        texts += [piece.decode().replace(" ", SPACE) for piece in pieces[3:]]
    except UnicodeDecodeError:
        raise GptcError(f"{where} holds a token that is not UTF-8 text") from None
    types = [type_of(text, i in (1, 2)) for i, text in enumerate(texts)]
    tokenizer = vocabulary.from_scored(Scored(texts, list(scores), types), where)
    tokenizer.bos = texts.index("<s>")  # its programs begin every text with it
    return tokenizer


def _scored_pieces(tokenizer: Tokenizer) -> tuple[list[bytes], list[float]]:
    """The pieces and scores of a tokenizer.bin."""
    weighted = vocabulary.scored(tokenizer)
    if weighted is None or isinstance(tokenizer, CharTokenizer):
        # llama2.c merges the highest score first: pieces in the order in which they were learned.
        return list(tokenizer.pieces), [-float(i) for i in range(tokenizer.vocab_size)]
    marks = {"<s>": "\n<s>\n", "</s>": "\n</s>\n"}
    pieces = [marks.get(p, p).replace(SPACE, " ").encode() for p in weighted.pieces]
    return pieces, weighted.scores


FORMAT = Format(
    Llama2cModel.format,
    "llama2.c",
    detect=detect,
    open=Llama2cModel,
    write=write,
    dtypes=("fp32", "int8"),
    options=("version",),
    companions=("tokenizer",),
)
