"""Valid small models in quantized blocks or in several GGUF files, and what reads them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mutate
from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.engine.config import GPTConfig
from gptc.formats.gguf_container import ALIGNMENT, header
from gptc.formats.numbers import F32
from gptc.formats.registry import open_model
from gptc.tokenizer.registry import make_tokenizer
from model_files import Target, read_model, small_model

_EXPERTS = {
    "n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 64, "n_ff": 32, "n_expert": 4,
    "n_expert_used": 2,
}  # fmt: skip
_K_SHAPE = {"n_layer": 1, "n_head": 4, "n_kv_head": 2, "n_embd": 256, "n_ff": 256}


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each sort, made in `folder`."""
    found: dict[str, Target] = {}
    wide = small_model(folder / "models", "wide")
    for name, source, dtype in (("q4_0", wide, "q4_0"), ("q4_k", _large(folder), "q4_k_m")):
        _packed(folder / name, name, source, dtype, found)
    _experts(folder / "experts", found)
    _split(folder / "split", small_model(folder / "models", "llama"), found)
    return found


def _large(folder: Path) -> Path:
    """A checkpoint whose rows fill the blocks of 256 numbers."""
    path = folder / "models" / "k"
    config = GPTConfig.preset("llama-15m", vocab_size=256, block_size=8, **_K_SHAPE)
    with Model.create(config, threads=1, training=False) as model:
        model.save(path, make_tokenizer("bytes"))
    return path


def _packed(folder: Path, name: str, source: Path, dtype: str, found: dict[str, Target]) -> None:
    """A checkpoint folder with model.gguf, without checksums, and the GGUF file by itself."""
    folder.mkdir(exist_ok=True)
    file = folder / "alone.gguf"
    export_model(open_checkpoint(source), "gguf", file, dtype=dtype)
    path = folder / "imported"
    import_model(file, path)
    (path / "checksums.json").unlink()
    found[f"packed-{name}"] = Target(file, partial(compute, file), mutate.gguf)
    read = partial(compute, path)
    found[f"packed-{name}-model.gguf"] = Target(path / "model.gguf", read, mutate.gguf)
    if name == "q4_0":
        copy = folder / "config"
        shutil.copytree(path, copy)
        read = partial(compute, copy)
        found["packed-config.json"] = Target(copy / "config.json", read, mutate.json_value)


def _experts(folder: Path, found: dict[str, Target]) -> None:
    """A mixture of experts in blocks, and one whose matrices are quantized when it is loaded."""
    folder.mkdir()
    config = GPTConfig.preset("llama-15m", vocab_size=256, block_size=8, **_EXPERTS)
    path = folder / "model"
    with Model.create(config, threads=1, training=False) as model:
        model.save(path, make_tokenizer("bytes"))
    for dtype in ("q4_0", "q8_0"):
        _packed(folder / dtype, f"experts-{dtype}", path, dtype, found)
    (path / "checksums.json").unlink()
    for dtype in ("int8", "int4"):
        copy = folder / dtype
        shutil.copytree(path, copy)
        read = partial(compute, copy, dtype=dtype)
        file = copy / "model.safetensors"
        found[f"experts-{dtype}"] = Target(file, read, mutate.safetensors)


def compute(path: Path, **options: Any) -> None:
    """Reads all of a model, and computes with its blocks as they are."""
    read_model(path)
    tokens = np.arange(6, dtype=np.int32)[None] % 256
    with load_model(open_checkpoint(path), threads=1, max_batch=1, **options) as model:
        model.loss(tokens[:, :-1] % model.config.vocab_size, tokens[:, 1:] % 2)


def _split(folder: Path, source: Path, found: dict[str, Target]) -> None:
    """A GGUF model in two files, of which each is damaged in turn."""
    folder.mkdir()
    whole = folder / "whole.gguf"
    export_model(open_checkpoint(source), "gguf", whole)
    model = open_model(whole)
    keys = (str, bool, int, float)
    values = {k: v for k, v in model.metadata.items() if isinstance(v, keys)}
    values["tokenizer.ggml.model"] = "no_vocab"
    names = list(model.tensors.shapes)
    for i, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        numbers = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        shapes = [model.tensors.shapes[name] for name in chosen]
        out = header(values | numbers, [(n, F32, s) for n, s in zip(chosen, shapes, strict=True)])
        for name in chosen:
            data = bytes(F32.encode(model.tensors.read(name)))
            out += data + bytes(-len(data) % ALIGNMENT)
        file = folder / f"model-{i + 1:05}-of-00002.gguf"
        file.write_bytes(out)
        found[f"gguf-split-{i + 1}"] = Target(file, partial(read_model, file, False), mutate.gguf)
