"""Adapters as peft stores them: adapter_config.json and adapter_model.safetensors.

peft has an adapter for each matrix of a Hugging Face class, under the name of its module. Ours of
queries, keys and values are rows of one parameter, as layout.py has it for the matrices themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora, adapters_of
from gptc.errors import GptcError
from gptc.files.limits import read_file
from gptc.files.values import is_finite, parse_json
from gptc.formats import hf
from gptc.formats.layout import Part
from gptc.formats.model_file import check_finite
from gptc.formats.safetensors import TensorFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
MOST_RANK = 4096
_MOST_ALPHA = 1e30  # the engine's scale is a float32
_MERGE = "merge the adapter with peft's merge_and_unload, and give that model's folder"

# Fields of peft's LoraConfig that ask for what the engine does not compute, unless empty or so.
_PLAIN: Mapping[str, Any] = {
    "bias": "none",
    "use_qalora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}
_NOT_MERGEABLE = ("alora_invocation_tokens", "arrow_config")

# Beginnings of init_lora_weights with which peft changes the base, also when it loads an adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")

# An adapter by name: its matrix, and which of the matrices it is that a family stores in its place.
_MATRICES = {
    "qkv": ("attn.qkv", None),
    "q": ("attn.qkv", 0),
    "k": ("attn.qkv", 1),
    "v": ("attn.qkv", 2),
    "proj": ("attn.proj", None),
    "fc": ("mlp.fc", None),
    "gate": ("mlp.fc", 0),
    "up": ("mlp.fc", 1),
    "mlp_proj": ("mlp.proj", None),
}


class Place(NamedTuple):
    """An adapter of a layer: its module in a file, and its rows of our two parameters."""

    module: str  # such as "model.layers.0.self_attn.q_proj"
    target: str
    ours: str  # such as "h.0.attn.qkv"
    a: slice  # rows of ours + ".lora_a"
    b: slice  # rows of ours + ".lora_b", and of ours + ".lora_m"
    weight: slice  # rows of ours + ".weight"
    heads: int  # as of layout.Part


def places(config: GPTConfig, lora: Lora, parts: list[Part] | None = None) -> list[Place]:
    """The adapters of a model, in the order of its matrices.

    `parts` are the matrices of a format that names them otherwise than Hugging Face's classes.
    """
    modules: dict[str, list[Part]] = {}
    for part in hf.parts(config) if parts is None else parts:
        modules.setdefault(part.ours, []).append(part)
    found = []
    for layer in range(config.n_layer):
        ends: dict[str, tuple[int, int]] = {}
        for target in (name for name in _MATRICES if name in lora.targets):
            matrix, which = _MATRICES[target]
            ours = f"h.{layer}.{matrix}"
            there = modules[f"{ours}.weight"]
            if there[0].interleaved:
                raise GptcError(
                    f"adapters of {there[0].name} are not supported: this family has queries, keys "
                    "and values head by head"
                )
            if parts is None and there[0].heads and which is not None:
                raise GptcError(
                    f"adapters of {there[0].name} are not supported: in this family the channels "
                    "that turn together are neighbours"
                )
            if which is None and len(there) > 1:
                raise GptcError(f"this family has no place for an adapter {target}")
            is_whole = which is not None and len(there) == 1
            part = _rows_of(config, there[0], target) if is_whole else there[which or 0]
            a, b = ends.get(ours, (0, 0))
            size = part.rows.stop - part.rows.start
            found.append(
                Place(
                    part.name.removesuffix(".weight"),
                    target,
                    ours,
                    slice(a, a + lora.rank),
                    slice(b, b + size),
                    part.rows,
                    part.heads,
                )
            )
            ends[ours] = (a + lora.rank, b + size)
    return found


def _rows_of(config: GPTConfig, whole: Part, target: str) -> Part:
    """The rows of an adapter, of a matrix that a class of our own stores as one."""
    kv, ff = config.n_kv_head * config.head_size, config.n_ff
    keys = whole.rows.stop - 2 * kv
    begin, end = {
        "q": (0, keys),
        "k": (keys, keys + kv),
        "v": (keys + kv, keys + 2 * kv),
        "gate": (0, ff),
        "up": (ff, 2 * ff),
    }[target]
    name = whole.name.removesuffix(".weight")
    return whole._replace(name=f"{name}.{target}.weight", rows=slice(begin, end))


# ---- ours to theirs ----


def config_to_json(config: GPTConfig, lora: Lora, base: str) -> dict[str, Any]:
    """The adapter_config.json of these adapters; `base` is the path or name of the base model."""
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    modules = sorted({_of_any_layer(place.module) for place in places(config, lora)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "fan_in_fan_out": hf.model_type(config) == "gpt2",
        "bias": "none",
        "use_rslora": lora.kind == "rslora",
        "use_dora": lora.dora,
        "inference_mode": True,
    }


def _of_any_layer(module: str) -> str:
    """The end of a module's name, as target_modules names it: without its layer."""
    return re.sub(r"^.*\.\d+\.", "", module)


def tensor_shapes(config: GPTConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter_model.safetensors."""
    inputs = {name: shape[1] for name, shape, _ in config.parameters() if len(shape) == 2}
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places(config, lora):
        names, rows = _names(place.module), place.b.stop - place.b.start
        shapes[names["a"]] = (lora.rank, inputs[f"{place.ours}.weight"])
        shapes[names["b"]] = (rows, lora.rank)
        if lora.dora:
            shapes[names["m"]] = (rows,)
    return shapes


def _names(module: str) -> dict[str, str]:
    """The tensors of an adapter, by the ends of our names."""
    ends = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
    return {kind: f"{_PREFIX}{module}.{end}" for kind, end in ends.items()}


def tensor_reader(
    config: GPTConfig, lora: Lora, read: Callable[[str], FloatArray]
) -> Callable[[str], FloatArray]:
    """A function that makes each of those tensors of our parameters, which `read` gives."""
    by_name = {
        name: (place, kind)
        for place in places(config, lora)
        for kind, name in _names(place.module).items()
    }

    def tensor(name: str) -> FloatArray:
        place, kind = by_name[name]
        return read(f"{place.ours}.lora_{kind}")[place.a if kind == "a" else place.b]

    return tensor


# ---- theirs to ours ----


class AdapterFile:
    """The adapters of a folder, for a base of some shape."""

    def __init__(self, folder: Path, config: GPTConfig) -> None:
        """GptcError for what the engine does not compute, or an adapter of another model."""
        self.path = folder
        data = read_config(folder)
        self.tensors = TensorFile(folder / WEIGHTS)
        self.lora = self._settings(data, config)
        self._places = places(config, self.lora)
        self._check_shapes(config)

    def _settings(self, data: Mapping[str, Any], config: GPTConfig) -> Lora:
        rank = _number(self.path, data, "r", lambda x: type(x) is int and 1 <= x <= MOST_RANK)
        alpha = _number(self.path, data, "lora_alpha", lambda x: 0 < x <= _MOST_ALPHA)
        dropout = _number(self.path, data, "lora_dropout", lambda x: 0 <= x < 1)
        every = Lora(int(rank), alpha, adapters_of(config))
        first = {p.target: p.module for p in places(config, every) if p.ours.startswith("h.0.")}
        targets = tuple(t for t, m in first.items() if _names(m)["a"] in self.tensors.shapes)
        if not targets:
            raise GptcError(
                f"{self.path} has no adapter of this model: it is of another base, {_base(data)}"
            )
        kind = "rslora" if data.get("use_rslora") else "plain"
        return Lora(int(rank), alpha, targets, dropout, kind, bool(data.get("use_dora")))

    def _check_shapes(self, config: GPTConfig) -> None:
        wanted, found = tensor_shapes(config, self.lora), self.tensors.shapes
        for name, shape in wanted.items():
            if found.get(name) != shape:
                raise GptcError(
                    f"{self.tensors.path}: {name} has the shape {found.get(name)}, its base "
                    f"needs {shape}: the adapter is of another model"
                )
        for name in found:
            if name not in wanted:
                raise GptcError(f"{self.tensors.path} holds {name}, which gptc does not compute")

    def read(self, name: str) -> FloatArray:
        """One of our parameters, such as "h.0.attn.qkv.lora_a"."""
        ours, _, kind = name.rpartition(".lora_")
        parts = [self.tensors.read(_names(p.module)[kind]) for p in self._places_of(ours)]
        return np.concatenate(parts)

    def _places_of(self, ours: str) -> list[Place]:
        return [place for place in self._places if place.ours == ours]

    def check(self) -> None:
        """GptcError for a number that is not finite."""
        for name in self.tensors.shapes:
            check_finite(self.tensors.read(name), f"{self.tensors.path}: {name}")


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder. GptcError for what the engine does not compute."""
    file = folder / CONFIG
    try:
        data = parse_json(read_file(file, "json"), str(file))
    except OSError as error:
        raise GptcError(f"cannot read {file}: {error.strerror}") from None
    if not isinstance(data, dict):
        raise GptcError(f"{file} is damaged: not a JSON object; copy it again")
    if data.get("peft_type") != "LORA":
        raise GptcError(f"{file}: peft_type is {data.get('peft_type')!r}; gptc reads LORA")
    for name, plain in _PLAIN.items():
        value = data.get(name, plain)
        if value != plain and value not in (None, {}, []):
            way_out = "use another adapter" if name in _NOT_MERGEABLE else _MERGE
            raise GptcError(
                f"{file} has {name} {value!r:.60}, which gptc does not compute; {way_out}"
            )
    init = str(data.get("init_lora_weights")).lower()
    if init.startswith(_CHANGES_BASE):
        raise GptcError(
            f"{file} has init_lora_weights {init!r:.60}, with which peft changes the base; {_MERGE}"
        )
    return data


def _number(
    folder: Path, data: Mapping[str, Any], name: str, holds: Callable[[float], bool]
) -> float:
    """A number of an adapter_config.json. GptcError where it is none, or out of range."""
    value = data.get(name, 0)
    if type(value) not in (int, float) or not is_finite(value) or not holds(value):
        raise GptcError(f"{folder / CONFIG}: {name} is {value!r:.40}, out of range")
    return float(value)


def _base(data: Mapping[str, Any]) -> str:
    return str(data.get("base_model_name_or_path"))


def base_of(folder: Path) -> str:
    """The path or name of the base, as an adapter_config.json has it."""
    return _base(read_config(folder))
