"""markusheimerl/gpt's _gpt.bin (https://github.com/markusheimerl/gpt): weights and AdamW's moments.

There is no magic number; sizes precede each part and must agree. Matrices are (in, out). The number
of heads and the context are not stored; the defaults are those of the published model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import layout
from gptc.formats.binary import INT32, Binary
from gptc.formats.families import BIASES
from gptc.formats.format import Export, Format, Output
from gptc.formats.layout import Naming, Part, Placement
from gptc.formats.model_file import Entry, ModelFile, TensorTable, check_finite, checked, elsewhere
from gptc.formats.numbers import F32
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.native import ByteTokenizer
from gptc.tokenizer.registry import make_tokenizer

N_HEAD = 8
BLOCK_SIZE = 1024

_NAMING = Naming(
    {
        "wte.weight": ("embedding",),
        "attn.qkv.weight": tuple(f"layers.{{}}.attention.W{part}" for part in "qkv"),
        "attn.proj.weight": ("layers.{}.attention.Wo",),
        "mlp.fc.weight": ("layers.{}.mlp.W1",),
        "mlp.proj.weight": ("layers.{}.mlp.W2",),
    },
    conv1d=True,
)


class _Number(NamedTuple):
    """A number of the file: its code of the module struct, and what it must be (None: a step)."""

    name: str
    code: str
    expected: int | None


class _Tensor(NamedTuple):
    """A tensor of the file: of the weights (""), or of their moments "m" and "v"."""

    part: Part
    moment: str

    @property
    def name(self) -> str:
        return f"{self.moment}.{self.part.name}" if self.moment else self.part.name


def _walk(config: GPTConfig) -> Iterator[_Number | _Tensor]:
    """The whole file in its order."""
    by_name = {part.name: part for part in layout.parts(config, _NAMING)}
    C, F, L, V = config.n_embd, config.n_ff, config.n_layer, config.vocab_size

    def numbers(where: str, **expected: int) -> Iterator[_Number]:
        for name, value in expected.items():
            flag = name in ("is_causal", "use_rope")
            yield _Number(f"{where}{name}", "B" if flag else INT32, value)

    def tensors(where: str, *names: str) -> Iterator[_Number | _Tensor]:
        """Weights, the step count, then both moments of each."""
        found = [by_name[where + name] for name in names]
        yield from (_Tensor(part, "") for part in found)
        yield _Number(f"{where}t", INT32, None)
        yield from (_Tensor(part, moment) for part in found for moment in "mv")

    yield from numbers("", d_model=C, hidden_dim=F, num_layers=L, vocab_size=V)
    yield from tensors("", "embedding")
    yield from numbers("transformer.", d_model=C, hidden_dim=F, num_layers=L)
    yield from numbers("transformer.", is_causal=1, use_rope=1)
    for layer in range(L):
        attention, mlp = f"layers.{layer}.attention.", f"layers.{layer}.mlp."
        yield from numbers(attention, d_model=C, is_causal=1, use_rope=1)
        yield from tensors(attention, "Wq", "Wk", "Wv", "Wo")
        yield from numbers(mlp, input_dim=C, hidden_dim=F, output_dim=C)
        yield from tensors(mlp, "W1", "W2")


def _size(config: GPTConfig) -> int:
    """Bytes of the whole file."""
    return sum(
        struct.calcsize(f"<{field.code}")
        if isinstance(field, _Number)
        else F32.n_bytes(field.part.shape)
        for field in _walk(config)
    )


class HeimerlModel(ModelFile):
    """A _gpt.bin."""

    format = "heimerl"

    def __init__(self, path: Path, n_head: int = N_HEAD, block_size: int = BLOCK_SIZE) -> None:
        """`n_head` and `block_size` are not stored. GptcError when the file is damaged."""
        self.path = path
        self.notes = (assumed_note(n_head, block_size),)
        file = Binary(path)
        self.config = read_config(file, 0, n_head, block_size)
        if _size(self.config) != file.size:
            raise GptcError(
                f"{path} is damaged: its header promises {_size(self.config):,} bytes, and it has "
                f"{file.size:,}; copy the file again"
            )
        entries, steps = _read(file, self.config)
        self._table = TensorTable(file, {n: e for n, e in entries.items() if n[:2] not in _MOMENTS})
        self._moments = {
            moment[0]: TensorTable(
                file, {n[2:]: e for n, e in entries.items() if n.startswith(moment)}
            )
            for moment in _MOMENTS
        }
        if len(set(steps.values())) == 1:
            self.optimizer_step = next(iter(steps.values()))
        else:
            self.notes += (
                "its parts have made different numbers of steps: their moments are left out",
            )

    @property
    def tensors(self) -> TensorTable:
        return self._table

    def parts(self) -> list[Part]:
        return layout.parts(self.config, _NAMING)

    def read_moment(self, name: str, moment: str) -> FloatArray:
        where = f"{self.path}: moment {moment}"
        return Placement(self.config, self.parts(), self._moments[moment], where).read(name)

    def tokenizer(self) -> Tokenizer:
        return bytes_where_256(self.config) or super().tokenizer()

    def check(self) -> list[str]:
        found = super().check()
        for moment, table in self._moments.items():
            for name in table.entries:
                check_finite(table.read(name), f"{self.path}: {moment}.{name}")
        return [*found, f"moments of {len(self._table.entries)} tensors, every number finite"]


_MOMENTS = ("m.", "v.")


def detect(path: Path, begin: bytes) -> bool:
    """By the size that the header promises: there is no magic number."""
    try:
        file = Binary(path)
        # Neither number changes the size.
        return _size(read_config(file, 0, 1, 1)) == file.size
    except GptcError:
        return False


def read_config(file: Binary, at: int, n_head: int, block_size: int) -> GPTConfig:
    """The config of the four sizes that begin at byte `at`."""
    file.at = at
    C, F, L, V = file.numbers(INT32, 4, "the sizes")
    return checked(
        {
            "vocab_size": V,
            "block_size": block_size,
            "n_layer": L,
            "n_head": n_head,
            "n_kv_head": n_head,
            "n_embd": C,
            "n_ff": F,
            "norm": "rmsnorm",
            "norm_weight": False,
            "pos": "rope_wide",
            "activation": "swish",
            "bias": False,
            "tied": True,
            "norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
        f"{file.path}: the sizes at byte {at} (with --n-head {n_head})",
    )


def assumed_note(n_head: int, block_size: int) -> str:
    """What a person is told who imports a file."""
    return (
        "the file does not say how many heads the model has and how long a sequence may be: "
        f"taken to be {n_head} and {block_size} (--n-head, --seq-len)"
    )


def bytes_where_256(config: GPTConfig) -> Tokenizer | None:
    """Bytes, where the vocabulary is theirs."""
    return make_tokenizer("bytes") if config.vocab_size == 256 else None


def _read(file: Binary, config: GPTConfig) -> tuple[dict[str, Entry], dict[str, int]]:
    """The position of each tensor, and the step counts."""
    entries, steps = {}, {}
    file.at = 0
    for field in _walk(config):
        at = file.at
        if isinstance(field, _Tensor):
            shape = field.part.shape
            entries[field.name] = Entry(F32, shape, at)
            file.take(F32.n_bytes(shape), field.name)
            continue
        value = file.number(field.code, field.name)
        if field.expected is None:
            steps[field.name] = file.within(field.name, value, 0, 2**31 - 1, at)
        elif value != field.expected:
            raise file.damaged(field.name, f"is {value}, not {field.expected}", at)
    file.end()
    return entries, steps


def write(export: Export) -> list[Output]:
    """One file."""
    add_notes(export)
    return [Output(export.path, model_chunks(export.model))]


def add_notes(export: Export) -> None:
    """What the file has no place for."""
    if export.tokenizer is not None and not isinstance(export.tokenizer, ByteTokenizer):
        export.notes.append("without a tokenizer: the file has no place for one")
    n_head = export.model.config.n_head
    if n_head != N_HEAD:
        export.notes.append(
            f"without the number of heads, {n_head}: markusheimerl/gpt's programs have to be "
            f"compiled with it, for they take {N_HEAD}"
        )


def model_chunks(model: ModelFile) -> Iterator[bytes | memoryview]:
    """The bytes of a _gpt.bin; moments are zero when the model has none."""
    config = model.config
    check_sort(config)
    step = model.optimizer_step
    for field in _walk(config):
        if isinstance(field, _Number):
            value = (step or 0) if field.expected is None else field.expected
            yield struct.pack(f"<{field.code}", value)
        elif field.moment and step is None:
            yield bytes(F32.n_bytes(field.part.shape))
        else:
            ours = field.part.ours
            values = model.read_moment(ours, field.moment) if field.moment else model.read(ours)
            yield F32.encode(layout.export_tensor(field.part, values))


def check_sort(config: GPTConfig) -> None:
    """GptcError for a model that its programs cannot compute."""
    refusal = why_not(config)
    if refusal:
        raise GptcError(
            f"markusheimerl/gpt computes one sort of model: {refusal}; export it with --to "
            f"{elsewhere(config)}"
        )


def why_not(config: GPTConfig) -> str | None:
    """Why that program cannot compute this model; None where it can."""
    shape = (config.norm, config.norm_weight, config.pos, config.activation, config.bias)
    usual = ("rmsnorm", False, "rope_wide", "swish", False)
    rare = any(getattr(config, name) for name in (*BIASES, "head_dim", "qk_norm", "window"))
    if shape != usual or not config.tied or rare or config.rare_features():
        return f"this is a model of the {config.family} family, and not as its byte preset"
    if abs(config.norm_eps - np.float32(1e-6)) > 1e-12 or config.rope_theta != 10000.0:
        return "norm_eps or rope_theta is not what it computes with"
    return None


FORMAT = Format(
    HeimerlModel.format,
    "markusheimerl/gpt",
    detect=detect,
    open=HeimerlModel,
    write=write,
    dtypes=("fp32",),
    assumes=("n_head", "block_size"),
)
