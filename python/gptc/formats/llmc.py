"""llm.c's files (https://github.com/karpathy/llm.c): model, tokenizer and debug state.

All of them begin with 256 int32: a magic number, a version, sizes. A model is GPT-2, in float32
(version 3) or bfloat16 (version 5), each tensor for all layers in turn, the vocabulary padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from gptc.engine.arrays import FloatArray, TokenArray
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import layout
from gptc.formats.binary import INT32, Binary
from gptc.formats.format import Export, Format, Output, Trainable, fixed_tokens
from gptc.formats.layout import Naming, Part, Placement
from gptc.formats.model_file import (
    ModelFile,
    TensorTable,
    check_size,
    checked,
    elsewhere,
    gpt2_values,
    laid_out,
)
from gptc.formats.numbers import BF16, F32, Codec, encoded
from gptc.tokenizer import vocabulary
from gptc.tokenizer.base import Tokenizer

MODEL_MAGIC = 20240326
STATE_MAGIC = 20240327
TOKENIZER_MAGIC = 20240328
HEADER_BYTES = 1024
OTHER_FILES = {
    STATE_MAGIC: "a debug state",
    TOKENIZER_MAGIC: "a tokenizer",
    20240520: "a token shard",
    20240801: "a token shard",
}
"""Files of llm.c that are not models, by their magic numbers."""

CODECS: dict[str, Codec] = {"fp32": F32, "bf16": BF16}
_VERSIONS: dict[int, Codec] = {3: F32, 5: BF16}
_TOKENIZER_VERSION = 2
_STATE_VERSION = 2
_PAD = 128  # the padded vocabulary is a multiple of it

_NAMING = Naming(
    layout.with_leaves(
        {
            "norm_1": "h.{}.ln_1",
            "norm_2": "h.{}.ln_2",
            "attn.qkv": "h.{}.attn.c_attn",
            "attn.proj": "h.{}.attn.c_proj",
            "mlp.fc": "h.{}.mlp.c_fc",
            "mlp.proj": "h.{}.mlp.c_proj",
            "wte": "wte",
            "wpe": "wpe",
            "norm_f": "ln_f",
        }
    )
)
_ORDER = ["wte.weight", "wpe.weight"]
_ORDER += [
    f"h.{{}}.{stem}.{leaf}"
    for stem in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for leaf in ("weight", "bias")
]
_ORDER += ["ln_f.weight", "ln_f.bias"]


class LlmcModel(ModelFile):
    """A model file."""

    format = "llm.c"

    def __init__(self, path: Path) -> None:
        """GptcError when the file is damaged or of another kind."""
        self.path = path
        file = Binary(path)
        version = read_header(file, MODEL_MAGIC, "model file")
        if version not in _VERSIONS:
            raise file.unknown("version", f"is {version}; versions 3 and 5 are known", 4)
        file.at = 8
        T, V, L, NH, C, self._padded = file.numbers(INT32, 6, "the sizes")
        sizes = {"vocab_size": V, "block_size": T, "n_layer": L, "n_head": NH, "n_embd": C}
        self.config = checked(gpt2_values(sizes), f"{path}: the sizes at byte 8")
        file.within("padded_vocab_size", self._padded, V, 1 << 25, 28)
        codec = _VERSIONS[version]
        slots = [(part.name, codec, part.shape) for part in self.parts()]
        entries, end = laid_out(slots, HEADER_BYTES)
        check_size(file, end, f"{L} layers of width {C} in {codec.name}")
        self._table = TensorTable(file, entries)

    @property
    def tensors(self) -> TensorTable:
        return self._table

    def parts(self) -> list[Part]:
        return _parts(self.config, self._padded)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in a file next to the model, else GPT-2's for a vocabulary of its size."""
        for name in (f"{self.path.stem}_tokenizer.bin", "gpt2_tokenizer.bin"):
            if (self.path.parent / name).is_file():
                return read_tokenizer(self.path.parent / name)
        if self.config.vocab_size == vocabulary.GPT2_SIZE:
            return vocabulary.gpt2(self.path.parent)
        return super().tokenizer()


def read_header(file: Binary, magic: int, what: str) -> int:
    """The version of a file of llm.c with this magic number."""
    file.at = 0
    found = file.number(INT32, "magic")
    if found != magic:
        raise file.damaged("magic", f"is {found}, not {magic}: this is not a {what} of llm.c", 0)
    version: int = file.number(INT32, "version")
    file.at = 8
    file.take(HEADER_BYTES - 8, "the header")
    return version


def write(export: Export) -> list[Output]:
    """The model, then its tokenizer and the debug state in files next to it."""
    files = [Output(export.path, model_chunks(export.model, export.dtype))]
    if export.tokenizer is not None:
        try:
            content = b"".join(tokenizer_chunks(export.tokenizer))
            files.append(Output(export.companion("tokenizer"), [content]))
        except GptcError as error:
            export.notes.append(f"without a tokenizer: {error}")
    if export.debug_state:
        files.append(Output(export.companion("debug_state"), _state(export)))
    return files


def model_chunks(model: ModelFile, dtype: str = "fp32") -> Iterator[bytes | memoryview]:
    """The bytes of a model file. GptcError for a model that is not a GPT-2."""
    config = model.config
    refusal = why_not(config)
    if refusal:
        raise GptcError(
            f"llm.c computes GPT-2 only: {refusal}; export it with --to {elsewhere(config)}"
        )
    codec = CODECS[dtype]
    version = next(number for number, known in _VERSIONS.items() if known is codec)
    padded = -(-config.vocab_size // _PAD) * _PAD
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    yield _header(MODEL_MAGIC, version, *sizes, padded)
    for part in _parts(config, padded):
        yield encoded(codec, layout.export_tensor(part, model.read(part.ours)), part.name)


def why_not(config: GPTConfig) -> str | None:
    """Why llm.c cannot compute this model; None where it can."""
    if config.family != "gpt2":
        return f"this is a model of the {config.family} family"
    if not (config.bias and config.tied):
        return "this model has no biases, or an untied output head"
    if config.n_ff != 4 * config.n_embd:
        return f"the feed-forward width is {config.n_ff}, not four times {config.n_embd}"
    if abs(config.norm_eps - 1e-5) > 1e-9:
        return f"norm_eps is {config.norm_eps:g}, not 1e-05"
    return None


def _parts(config: GPTConfig, padded: int) -> list[Part]:
    return layout.in_order(layout.parts(config, _NAMING, padded), _ORDER)


def _header(*values: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    return header.tobytes()


# ---- tokenizer ----


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer file."""
    file = Binary(path)
    version = read_header(file, TOKENIZER_MAGIC, "tokenizer file")
    if version != _TOKENIZER_VERSION:
        raise file.unknown("version", f"is {version}; version {_TOKENIZER_VERSION} is known", 4)
    file.at = 8
    count, end_of_text = file.numbers("I", 2, "count and end of text")
    # A token takes a byte at least, so that the count is bounded by the file.
    file.within("count", count, 1, file.size - HEADER_BYTES, 8)
    file.within("end of text", end_of_text, 0, count - 1, 12)
    file.at = HEADER_BYTES
    pieces = []
    for i in range(count):
        pieces.append(bytes(file.take(file.number("B", f"length of token {i}"), f"token {i}")))
    file.end()
    return vocabulary.from_pieces(pieces, end_of_text, str(path))


def tokenizer_chunks(tokenizer: Tokenizer) -> Iterator[bytes]:
    """The bytes of a tokenizer file."""
    end = tokenizer.end_of_text
    # llm.c has no files without such a token: the last token takes its place.
    end = tokenizer.vocab_size - 1 if end is None else end
    yield _header(TOKENIZER_MAGIC, _TOKENIZER_VERSION, tokenizer.vocab_size, end)
    for i, piece in enumerate(tokenizer.pieces):
        if len(piece) > 255:
            raise GptcError(f"token {i} has {len(piece)} bytes, and llm.c's tokens at most 255")
        yield bytes([len(piece)]) + piece


# ---- debug state ----


_BATCH = ("inputs", "targets", "logits", "loss")


class DebugState:
    """The logits, loss and gradients that a model must compute for one batch (B, T)."""

    def __init__(self, path: Path, config: GPTConfig) -> None:
        """`config` is that of the model that the state belongs to."""
        file = Binary(path)
        version = read_header(file, STATE_MAGIC, "debug state")
        if version != _STATE_VERSION:
            raise file.unknown("version", f"is {version}; version {_STATE_VERSION} is known", 4)
        file.at = 8
        B, T = file.numbers(INT32, 2, "B and T")
        file.within("B", B, 1, 1 << 20, 8)
        file.within("T", T, 1, config.block_size, 12)
        V = config.vocab_size
        self._parts = _parts(config, -(-V // _PAD) * _PAD)
        slots: list[tuple[str, Codec, tuple[int, ...]]] = [
            ("inputs", F32, (B, T)),
            ("targets", F32, (B, T)),
        ]
        slots += [("logits", F32, (B, T, V)), ("loss", F32, (1,))]
        slots += [(part.name, F32, part.shape) for part in self._parts]
        entries, end = laid_out(slots, HEADER_BYTES)
        check_size(file, end, f"a batch of {B} x {T}")
        self.path = path
        self.config = config
        self._batch = TensorTable(file, {name: entries.pop(name) for name in _BATCH})
        self._table = TensorTable(file, entries)

    def tokens(self, name: str) -> TokenArray:
        """The "inputs" or "targets" (B, T)."""
        return self._batch.read(name).view(np.int32)

    @cached_property
    def logits(self) -> FloatArray:
        """(B, T, V)."""
        return self._batch.read("logits")

    @property
    def loss(self) -> float:
        """The mean over the batch, in nats."""
        return float(self._batch.read("loss")[0])

    def gradient(self, name: str) -> FloatArray:
        """The gradient of one of our parameters."""
        everything = Placement(self.config, self._parts, self._table, str(self.path))
        return everything.read(name)


def _state(export: Export) -> Iterator[bytes | memoryview]:
    """The debug state for a small batch. The model is on a device while the chunks are drawn."""
    config = export.model.config
    B, T = 4, min(64, config.block_size)
    tokens = fixed_tokens(config.vocab_size, B * T + 1)
    with export.load(training=True, max_batch=B, max_seq=T) as model:
        yield from state_chunks(model, tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T))


def state_chunks(
    model: Trainable, inputs: TokenArray, targets: TokenArray
) -> Iterator[bytes | memoryview]:
    """The bytes of a debug state of a model that can train, for a batch (B, T)."""
    B, T = inputs.shape
    model.zero_gradients()
    logits = model.logits(inputs)
    loss = model.backward(inputs, targets)
    yield _header(STATE_MAGIC, _STATE_VERSION, B, T)
    yield inputs.astype("<i4").tobytes() + targets.astype("<i4").tobytes()
    yield F32.encode(logits)
    yield np.array(loss, "<f4").tobytes()
    for part in _parts(model.config, -(-model.config.vocab_size // _PAD) * _PAD):
        yield F32.encode(layout.export_tensor(part, model.read(part.ours, "grad")))


FORMAT = Format(
    LlmcModel.format,
    "llm.c",
    detect=lambda path, begin: begin.startswith(MODEL_MAGIC.to_bytes(4, "little")),
    open=LlmcModel,
    write=write,
    dtypes=tuple(CODECS),
    options=("debug_state",),
    companions=("tokenizer",),
)
