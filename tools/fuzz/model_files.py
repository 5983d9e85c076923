"""Valid small models of each format, and the functions that read all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mutate
from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.files.whole import write_file
from gptc.formats import llama2c, llmc
from gptc.formats.safetensors import TensorFile, tensor_chunks
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.registry import make_tokenizer
from openai_files import write_openai

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
    """A format: the valid file to damage, a function that reads it, and its structure."""

    file: Path
    read: Callable[[], object]
    structure: mutate.Structure | None = None


def small_model(folder: Path, family: str, tokenizer: Tokenizer | None = None) -> Path:
    """A checkpoint of a few thousand random numbers."""
    shape = dict(_SHAPES[family])
    if tokenizer is not None:
        shape["vocab_size"] = tokenizer.vocab_size
    config = GPTConfig.preset(str(shape.pop("preset")), **shape)
    path = folder / family
    if not path.exists():
        with Model.create(config, threads=1, training=False) as model:
            model.save(path, tokenizer or make_tokenizer("bytes"))
    return path


def bare_model(folder: Path, family: str = "llama") -> Path:
    """A checkpoint without checksums, which a change to a file would not survive."""
    path = small_model(folder, family)
    (path / "checksums.json").unlink(missing_ok=True)
    return path


def read_model(path: Path, tokenizer: bool = True) -> None:
    """Reads all of a model."""
    source = open_checkpoint(path)
    for name, _, _ in source.config.parameters():
        source.read(name)
    if tokenizer:
        source.tokenizer()


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each format of models, made in `folder`."""
    found = {}

    def model(
        name: str, file: Path, path: Path | None = None, structure: mutate.Structure | None = None
    ) -> None:
        has_tokenizer = not name.startswith("openai")  # GPT-2's is too large for this model
        found[name] = Target(file, partial(read_model, path or file, has_tokenizer), structure)

    exports = [
        ("gguf", "gguf", "gpt2", {}),
        ("gguf-q8_0", "gguf", "wide", {"dtype": "q8_0"}),
        ("gguf-qwen3", "gguf", "qwen3", {}),
        ("llm.c", "llm.c", "gpt2", {}),
        ("llama2.c-v0", "llama2.c", "llama", {"version": 0}),
        ("llama2.c-v1", "llama2.c", "llama", {"version": 1}),
        ("llama2.c-v2", "llama2.c", "wide", {"dtype": "int8"}),
        ("heimerl", "heimerl", "byte", {}),
        ("qgpt", "qgpt", "byte", {}),
    ]
    for name, to, family, options in exports:
        out = folder / name / "model.bin"
        export_model(open_checkpoint(small_model(folder, family)), to, out, **options)
        model(name, out, structure=mutate.gguf if to == "gguf" else None)
        tokenizer_file = out.with_name("model_tokenizer.bin")
        if tokenizer_file.exists():
            model(f"{name}-tokenizer", tokenizer_file, out)
    for name in ("model.safetensors", "config.json", "gptc_tokenizer.json", "checksums.json"):
        path = small_model(folder / name, "llama")
        if name != "checksums.json":
            (path / "checksums.json").unlink()
        structure = mutate.safetensors if name == "model.safetensors" else mutate.json_value
        model(name, path / name, path, structure)
    qwen3 = bare_model(folder / "qwen3-config", "qwen3")
    model("qwen3-config.json", qwen3 / "config.json", qwen3, mutate.json_value)
    theirs = bare_model(folder / "theirs")
    (theirs / "gptc_tokenizer.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        model(name, theirs / name, theirs, mutate.json_value)
    _tokenizers_alone(folder, found)
    _read_in_c(folder, found)
    state = folder / "llm.c" / "model_debug_state.bin"
    source = open_checkpoint(folder / "gpt2")
    weights = folder / "llm.c" / "model.bin"
    export_model(source, "llm.c", weights, debug_state=True, replace=True)
    config = source.config
    found["debug-state"] = Target(
        state, lambda: llmc.DebugState(state, config).gradient("wte.weight")
    )
    _folders(folder, model)
    return found


def _tokenizers_alone(folder: Path, found: dict[str, Target]) -> None:
    """The files of tokenizers next to models in one file, read without the model."""
    size = _SMALL["vocab_size"]
    file = folder / "tokenizer-of-llama2.c.bin"
    file.write_bytes(found["llama2.c-v0-tokenizer"].file.read_bytes())
    found["llama2.c-tokenizer-alone"] = Target(file, lambda: llama2c.read_tokenizer(file, size))
    other = folder / "tokenizer-of-llm.c.bin"
    other.write_bytes(found["llm.c-tokenizer"].file.read_bytes())
    found["llm.c-tokenizer-alone"] = Target(other, lambda: llmc.read_tokenizer(other))


def _read_in_c(folder: Path, found: dict[str, Target]) -> None:
    """Checkpoints that C reads by itself."""
    path = bare_model(folder / "c")
    name = str(path).encode()
    ffi, lib, _ = library.load()

    def config() -> None:
        library.call("gpt_config_load", name, ffi.new("gpt_config *"))

    def weights() -> None:
        model = ffi.new("gpt_model **")
        options = library.new_struct("gpt_options", n_threads=1, max_batch=1)
        library.call("gpt_model_load", name, options, model)
        lib.gpt_model_free(model[0])

    found["c-config"] = Target(path / "config.json", config, mutate.json_value)
    found["c-weights"] = Target(path / "model.safetensors", weights, mutate.safetensors)


def _folders(folder: Path, model: Callable[..., None]) -> None:
    """Formats of several files; each file is damaged in turn."""
    openai = folder / "openai"
    write_openai(openai, open_checkpoint(small_model(folder, "gpt2")))
    model("openai", openai / "model.ckpt.data-00000-of-00001", openai)
    model("openai-index", openai / "model.ckpt.index", openai)
    model("openai-hparams", openai / "hparams.json", openai, mutate.json_value)
    sharded = bare_model(folder / "sharded")
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
    model("sharded-index", index, sharded, mutate.json_value)


def tried(read: Callable[[], object]) -> None:
    """Reads what may well be refused."""
    with suppress(GptcError):
        read()
