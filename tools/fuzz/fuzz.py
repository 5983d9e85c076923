"""Feeds damaged files to every loader, which must read them or raise a GptcError.

    python tools/fuzz/fuzz.py --minutes 10                # all formats in turn
    python tools/fuzz/fuzz.py --formats gguf --cases 1000

A small valid model of each format is generated, then damaged. The damage is a function of (seed,
format, case), so failures are reproducible: the error shows the command, and the file is kept.
Failures are other exceptions, more memory than twice the file's size plus 16 MB, and more than 5
seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.verify import verify
from gptc.data.preparation import prepare
from gptc.data.shards import read_shard, write_shard
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.files.whole import write_file
from gptc.formats import llmc, openai_tf
from gptc.formats.model_file import ModelFile
from gptc.formats.safetensors import TensorFile, tensor_chunks
from gptc.generation.constraint import make_constraint
from gptc.tokenizer import scored, vocabulary
from gptc.tokenizer.pretrained import SentencePieceTokenizer
from gptc.tokenizer.registry import make_tokenizer, read_tokenizer
from gptc.tokenizer.utf8 import decode_utf8

with contextlib.suppress(ImportError):
    import torch  # noqa: F401  # takes seconds to import, which must not count for a file like its own

MAX_SECONDS = 5.0
SPARE_BYTES = 16 << 20
# Small enough to cut at every byte; "wide" is for weights rounded in groups of 32.
_SMALL = {"vocab_size": 256, "block_size": 8, "n_layer": 2, "n_embd": 8, "n_ff": 32}
_LLAMA = {"preset": "llama-15m", **_SMALL, "n_head": 4, "n_kv_head": 2, "n_ff": 40}
_SHAPES = {
    "gpt2": {"preset": "gpt2", **_SMALL, "n_head": 2},
    "llama": _LLAMA,
    "wide": {**_LLAMA, "n_embd": 32},
    "qwen3": {
        **_LLAMA,
        "head_dim": 4,
        "qk_norm": True,
        "qkv_bias": True,
        "attn_proj_bias": True,
        "window": 5,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original": 4,
        "rope_low_freq": 0.5,
        "rope_high_freq": 2.0,
        "rope_attention": 1.5,
    },
    "byte": {"preset": "byte", **_SMALL, "n_layer": 1, "n_embd": 16, "n_ff": 64, "n_head": 8},
}


class Target(NamedTuple):
    """A format: the valid file to damage, and a function that reads it."""

    file: Path
    read: Callable[[], object]


class Failed(Exception):
    """A loader crashed, or used too much time or memory."""


def small_model(folder: Path, family: str, tokenizer: str = "bytes") -> Path:
    """A checkpoint of a few thousand random numbers."""
    shape = dict(_SHAPES[family])
    config = GPTConfig.preset(str(shape.pop("preset")), **shape)
    path = folder / family
    if not path.exists():
        with Model.create(config, threads=1, training=False) as model:
            model.save(path, make_tokenizer(tokenizer))
    return path


def read_model(path: Path, tokenizer: bool = True) -> None:
    """Reads all of a model."""
    source = open_checkpoint(path)
    for name, _, _ in source.config.parameters():
        source.read(name)
    if tokenizer:
        source.tokenizer()


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each format, made in `folder`."""
    found = {}

    def model(name: str, file: Path, path: Path | None = None) -> None:
        has_tokenizer = not name.startswith("openai")  # GPT-2's is too large for this model
        found[name] = Target(file, lambda: read_model(path or file, has_tokenizer))

    exports = [
        ("gguf", "gguf", "gpt2", {}),
        ("gguf-q8_0", "gguf", "wide", {"dtype": "q8_0"}),
        ("gguf-qwen3", "gguf", "qwen3", {}),
        ("llm.c", "llm.c", "gpt2", {}),
        ("llama2.c-v0", "llama2.c", "llama", {"version": 0}),
        ("llama2.c-v1", "llama2.c", "llama", {"version": 1}),
        ("llama2.c-v2", "llama2.c", "wide", {"dtype": "int8"}),
        ("heimerl", "heimerl", "byte", {}),
    ]
    for name, to, family, options in exports:
        out = folder / name / "model.bin"
        export_model(open_checkpoint(small_model(folder, family)), to, out, **options)
        model(name, out)
        tokenizer_file = out.with_name("model_tokenizer.bin")
        if tokenizer_file.exists():
            model(f"{name}-tokenizer", tokenizer_file, out)
    for name in ("model.safetensors", "config.json", "gptc_tokenizer.json", "checksums.json"):
        path = small_model(folder / name, "llama")
        if name != "checksums.json":
            (path / "checksums.json").unlink()
        model(name, path / name, path)
    qwen3 = small_model(folder / "qwen3-config", "qwen3")
    (qwen3 / "checksums.json").unlink()
    model("qwen3-config.json", qwen3 / "config.json", qwen3)
    theirs = small_model(folder / "theirs", "llama")
    (theirs / "gptc_tokenizer.json").unlink()
    (theirs / "checksums.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        model(name, theirs / name, theirs)
    if importlib.util.find_spec("sentencepiece"):
        path = small_model(folder / "sentencepiece", "llama") / "tokenizer.model"
        path.write_bytes(_sentencepiece_model())
        found["tokenizer.model"] = Target(path, lambda: make_tokenizer(str(path)).pieces)
    dataset = folder / "dataset"
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    prepare([str(text)], dataset, tokenizer="bytes")
    found["dataset.json"] = Target(dataset / "dataset.json", lambda: verify(dataset))
    shard = folder / "shard.bin"
    write_shard(shard, np.arange(500) % 256, 256)
    found["shard"] = Target(shard, lambda: read_shard(shard))
    state = folder / "llm.c" / "model_debug_state.bin"
    export_model(
        open_checkpoint(folder / "gpt2"),
        "llm.c",
        folder / "llm.c" / "model.bin",
        debug_state=True,
        replace=True,
    )
    config = open_checkpoint(folder / "gpt2").config
    found["debug-state"] = Target(
        state, lambda: llmc.DebugState(state, config).gradient("wte.weight")
    )
    _folders(folder, model)
    grammar = folder / "json.gbnf"
    grammar.write_bytes((Path(__file__).parents[2] / "docs" / "json.gbnf").read_bytes())
    schema = folder / "schema.json"
    schema.write_text(json.dumps(_SCHEMA))
    for name, kind, file in (
        ("grammar", "grammar", grammar),
        ("json-schema", "json_schema", schema),
    ):
        found[name] = Target(file, partial(_follow_pattern, kind, file))
    tokenizer = small_model(folder / "tokenizer", "byte") / "gptc_tokenizer.json"
    found["tokenizer"] = Target(tokenizer, lambda: read_tokenizer(tokenizer))
    return found


_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "born": {"type": "integer", "minimum": 1900, "maximum": 2030},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "more": {"$ref": "#/$defs/more"},
    },
    "required": ["name"],
    "$defs": {"more": {"anyOf": [{"type": "null"}, {"type": "number", "multipleOf": 0.5}]}},
}


def _follow_pattern(kind: str, file: Path) -> None:
    """Reads a grammar or JSON schema, and makes a short text of bytes that begins like a match."""
    pattern = {kind: decode_utf8(file.read_bytes())}
    state = make_constraint(make_tokenizer("bytes"), 256, **pattern).begin()
    for i in range(20):
        if state.ended or not len(state.allowed):
            break
        state.take(int(state.allowed[7 * i % len(state.allowed)]))


def _sentencepiece_model() -> bytes:
    """A tokenizer.model of a few hundred pieces, such as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [scored.UNKNOWN, *[scored.CONTROL] * 2, *[scored.BYTE] * 256]
    learned = ["\u2581", "a", "t", "h", "th", "\u2581th"]
    kinds += [scored.NORMAL] * len(learned)
    scores = [-float(i) for i in range(len(kinds))]
    made = vocabulary.from_scored(scored.Scored(pieces + learned, scores, kinds), "fuzz.py")
    assert isinstance(made, SentencePieceTokenizer)
    return made.proto


def _folders(folder: Path, model: Callable[..., None]) -> None:
    """Formats of several files; each file is damaged in turn."""
    openai = folder / "openai"
    write_openai(openai, open_checkpoint(small_model(folder, "gpt2")))
    model("openai", openai / "model.ckpt.data-00000-of-00001", openai)
    model("openai-index", openai / "model.ckpt.index", openai)
    model("openai-hparams", openai / "hparams.json", openai)
    sharded = small_model(folder / "sharded", "llama")
    (sharded / "checksums.json").unlink()
    weights = TensorFile(sharded / "model.safetensors")
    weight_map = {}
    for i in range(2):
        name = f"model-{i}.safetensors"
        shapes = dict(list(weights.shapes.items())[i::2])
        write_file(sharded / name, tensor_chunks(shapes, weights.read))
        weight_map |= dict.fromkeys(shapes, name)
    (sharded / "model.safetensors").unlink()
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    model("sharded-index", index, sharded)


def write_openai(folder: Path, source: ModelFile) -> None:
    """Writes a GPT-2 of any size as OpenAI published it, as a TensorFlow checkpoint."""
    folder.mkdir()
    config = source.config
    hparams = {"n_vocab": config.vocab_size, "n_ctx": config.block_size, "n_embd": config.n_embd}
    hparams |= {"n_head": config.n_head, "n_layer": config.n_layer}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    leaves = {"weight": "g", "bias": "b"}
    places = {"attn.qkv": "attn/c_attn", "attn.proj": "attn/c_proj", "mlp.fc": "mlp/c_fc"}
    places |= {"mlp.proj": "mlp/c_proj", "norm_1": "ln_1", "norm_2": "ln_2", "norm_f": "ln_f"}
    tensors = {}
    for ours, shape, _ in config.parameters():
        *layer, stem, leaf = ours.split(".") if "norm" in ours else ours.rsplit(".", 1)
        values = source.read(ours)
        if ours.startswith("h."):
            layer, stem = ours.split(".")[1:2], ".".join(ours.split(".")[2:-1])
        name = places.get(stem, stem)
        last = leaves[leaf] if "ln_" in name else leaf[0]
        if ours.startswith("h.") and len(shape) == 2:
            values = np.ascontiguousarray(values.T)[None]
        path = f"h{layer[0]}/{name}/{last}" if layer else f"{name}/{last}"
        tensors[f"model/{path if stem not in ('wte', 'wpe') else stem}"] = values
    write_bundle(folder / "model.ckpt", tensors)


def write_bundle(prefix: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a TensorFlow checkpoint: a file of tensors, and a LevelDB table that indexes them."""
    rows = [(b"", b"\x08\x01\x1a\x02\x08\x01")]  # one file; version 1
    data = b""
    for name in sorted(tensors):
        values = tensors[name].astype("<f4")
        dims = b"".join(_sized(2, b"\x08" + _varint(n)) for n in values.shape)
        crc = openai_tf._mask(openai_tf.crc32c(values.reshape(-1).view(np.uint8)))
        entry = b"\x08\x01" + _sized(2, dims) + b"\x20" + _varint(len(data))
        entry += b"\x28" + _varint(values.nbytes) + b"\x35" + struct.pack("<I", crc)
        rows.append((name.encode(), entry))
        data += values.tobytes()
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    out = bytearray()

    def add(block: list[tuple[bytes, bytes]]) -> bytes:
        """Writes a block and returns its handle."""
        raw, restarts, previous = bytearray(), [], b""
        for i, (key, value) in enumerate(block):
            if i % 16 == 0:
                restarts.append(len(raw))
                previous = b""
            shared = _common(previous, key)
            raw += _varint(shared) + _varint(len(key) - shared) + _varint(len(value))
            raw += key[shared:] + value
            previous = key
        raw += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
        handle = _varint(len(out)) + _varint(len(raw))
        crc = openai_tf._mask(openai_tf.crc32c(np.frombuffer(bytes(raw) + b"\0", np.uint8)))
        out.extend(bytes(raw) + b"\0" + struct.pack("<I", crc))
        return handle

    blocks = [rows[i : i + 20] for i in range(0, len(rows), 20)]
    handles = [(block[-1][0], add(block)) for block in blocks]
    metaindex = add([(b"", b"")])
    footer = metaindex + add(handles)
    out += footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    prefix.with_name(f"{prefix.name}.index").write_bytes(out)


def _common(a: bytes, b: bytes) -> int:
    """Length of the common prefix of two keys."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _sized(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


# ---- damage ----

_NUMBERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, -(2**31), 2**31, 2**32 - 1]
_NUMBERS += [2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_WORDS = [b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"true", b"9" * 30, b"[" * 1200]
_WORDS += [b"..", b"/", b"\xff\xfe", b"\0", b'"a":']


def damage(random: random.Random, data: bytes) -> bytes:
    """`data` with one to four random changes, most of them near its beginning with the sizes."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        near = random.choice((64, 512, 4096, len(out)))
        at = random.randrange(max(1, min(near, len(out))))
        _ACCIDENTS[random.randrange(len(_ACCIDENTS))](random, out, at)
    return bytes(out)


def _flip(random: random.Random, out: bytearray, at: int) -> None:
    if at < len(out):
        out[at] ^= 1 << random.randrange(8)


def _number(random: random.Random, out: bytearray, at: int) -> None:
    """Writes an edge-case number, mostly at an aligned offset."""
    size = random.choice((1, 2, 4, 4, 8, 8))
    at -= at % random.choice((1, size))
    value = random.choice(_NUMBERS) & (1 << 8 * size) - 1
    out[at : at + size] = value.to_bytes(size, "little")


def _nudge(random: random.Random, out: bytearray, at: int) -> None:
    at -= at % 4
    if at + 4 <= len(out):
        (value,) = struct.unpack_from("<I", out, at)
        struct.pack_into("<I", out, at, value + random.choice((-8, -1, 1, 8)) & 0xFFFFFFFF)


def _cut(random: random.Random, out: bytearray, at: int) -> None:
    del out[random.choice((at, len(out) - at % 64)) :]


def _remove(random: random.Random, out: bytearray, at: int) -> None:
    del out[at : at + random.choice((1, 4, 8, 100))]


def _repeat(random: random.Random, out: bytearray, at: int) -> None:
    out[at:at] = out[at : at + random.choice((1, 4, 8, 100))]


def _word(random: random.Random, out: bytearray, at: int) -> None:
    """Replaces a number or a name, for JSON."""
    word = random.choice(_WORDS)
    end = at
    while end < len(out) and out[end : end + 1].isalnum():
        end += 1
    out[at:end] = word


def _swap(random: random.Random, out: bytearray, at: int) -> None:
    """Swaps two ranges of bytes."""
    size = random.choice((4, 8, 32))
    other = random.randrange(max(1, len(out) - size))
    if at + size <= len(out):
        out[at : at + size], out[other : other + size] = (
            out[other : other + size],
            out[at : at + size],
        )


_ACCIDENTS = [_flip, _number, _number, _nudge, _cut, _remove, _repeat, _word, _swap]


# ---- running ----


def attempt(target: Target, content: bytes) -> str:
    """Reads a damaged file; returns "read" or "refused". Raises Failed with the reason."""
    target.file.write_bytes(content)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        target.read()
        outcome = "read"
    except GptcError as error:
        outcome = "refused"
        if "\n" in str(error) or not str(error):
            raise Failed(f"the error is not one line: {error}") from error
    except BaseException as error:
        raise Failed(traceback.format_exc()) from error
    finally:
        seconds = time.perf_counter() - begin
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if seconds > MAX_SECONDS:
        raise Failed(f"took {seconds:.1f} s")
    if peak > 2 * len(content) + SPARE_BYTES:
        raise Failed(f"allocated {peak:,} bytes for a file of {len(content):,}")
    return outcome


def fuzz(name: str, target: Target, cases: range, seed: int, until: float = 1e18) -> Counter[str]:
    """Runs cases of a format, in order, until the time `until`; counts outcomes."""
    original = target.file.read_bytes()
    counts: Counter[str] = Counter()
    try:
        for case in cases:
            content = damage(random.Random(f"{seed} {name} {case}"), original)
            try:
                counts[attempt(target, content)] += 1
            except Failed as error:
                kept = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{case}"
                kept.write_bytes(content)
                again = f"--formats {name} --seed {seed} --first {case} --cases 1"
                raise Failed(
                    f"{error}\nagain: python tools/fuzz/fuzz.py {again}\nkept: {kept}"
                ) from None
            if time.monotonic() > until:
                break
    finally:
        target.file.write_bytes(original)
    return counts


def truncate(target: Target) -> Counter[str]:
    """Cuts a file at every byte."""
    original = target.file.read_bytes()
    try:
        return Counter(attempt(target, original[:n]) for n in range(len(original)))
    finally:
        target.file.write_bytes(original)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=0.5, help="total time, for all formats")
    parser.add_argument("--cases", type=int, default=10**9, help="largest number per format")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--formats", nargs="*")
    parser.add_argument("--truncate", action="store_true", help="cut files at every byte instead")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        found = targets(Path(folder))
        names = options.formats or list(found)
        cases = range(options.first, options.first + options.cases)
        for name in names:
            until = time.monotonic() + 60 * options.minutes / len(names)
            try:
                if options.truncate:
                    results[name] = dict(truncate(found[name]))
                    print(name, json.dumps(results[name]), flush=True)
                    continue
                results[name] = dict(fuzz(name, found[name], cases, options.seed, until))
            except Failed as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
            print(name, json.dumps(results[name]), flush=True)
    print("in all", sum(sum(counts.values()) for counts in results.values()), "cases, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
