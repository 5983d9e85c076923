"""Low-rank adapters of linear layers: Hu et al. 2021.

A layer with an adapter computes x W^T + scale dropout(x) A^T B^T; W is frozen. The engine has one
adapter for a matrix, or one each for the rows of queries, keys and values, or of gates and ups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gptc.engine import library
from gptc.engine.config import GPTConfig, Parameter
from gptc.errors import UsageError

KINDS = ("plain", "rslora")
ALL = "all"

# Adapters by name, and their bits in C.
_BITS = {
    "qkv": "GPT_LORA_QKV",
    "q": "GPT_LORA_Q",
    "k": "GPT_LORA_K",
    "v": "GPT_LORA_V",
    "proj": "GPT_LORA_ATT_PROJ",
    "fc": "GPT_LORA_FC",
    "gate": "GPT_LORA_GATE",
    "up": "GPT_LORA_UP",
    "mlp_proj": "GPT_LORA_MLP_PROJ",
}
_PARTS = {"qkv": ("q", "k", "v"), "fc": ("gate", "up")}


@dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    `targets` are names of `adapters_of(config)`. `kind` "rslora" scales by alpha / sqrt(rank)
    (Kalajdzievski 2023), "plain" by alpha / rank. `dropout` is for training alone; the adapters of
    a matrix drop the same inputs. With `dora`, rows have learned lengths (Liu et al. 2024).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    kind: str = "plain"
    dora: bool = False

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)

    def to_c(self) -> Any:
        """A gpt_lora *."""
        lib = library.load().lib
        bits = sum(getattr(lib, _BITS[name]) for name in self.targets)
        return library.new_struct(
            "gpt_lora",
            rank=self.rank,
            targets=bits,
            scale=self.scale,
            dropout=self.dropout,
            dora=int(self.dora),
        )

    def parameters(self, config: GPTConfig) -> tuple[Parameter, ...]:
        """The adapters' tensors, in the engine's order. EngineError where the model has no such."""
        ffi, lib, _ = library.load()
        settings, struct, param = self.to_c(), config.to_c(), ffi.new("gpt_param *")
        found = []
        for i in range(max(0, lib.gpt_lora_param_count(struct, settings))):
            library.call("gpt_lora_param", struct, settings, i, param)
            shape = tuple(int(param.shape[k]) for k in range(param.n_dim))
            found.append(Parameter(ffi.string(param.name).decode(), shape, bool(param.decay)))
        return tuple(found)


def adapters_of(config: GPTConfig) -> tuple[str, ...]:
    """The names of all adapters that a model can have.

    Where a family stores queries, keys and values as matrices of their own, so peft adapts them.
    """
    if config.n_expert:  # which have none
        return ("q", "k", "v", "proj")
    if config.family == "llama":
        return ("q", "k", "v", "proj", "gate", "up", "mlp_proj")
    return ("qkv", "proj", "fc", "mlp_proj")


def targets_named(config: GPTConfig, names: str) -> tuple[str, ...]:
    """The adapters that a list such as "qkv,proj" or "all" names, in order.

    UsageError for a name without a layer.
    """
    known = adapters_of(config)
    groups = {group: parts for group, parts in _PARTS.items() if set(parts) <= set(known)}
    wanted: set[str] = set()
    for name in (name.strip() for name in names.split(",")):
        if name == ALL:
            wanted |= set(known)
        elif name in groups:
            wanted |= set(groups[name])
        elif name in known:
            wanted.add(name)
        else:
            there = ", ".join(dict.fromkeys((*groups, *known, ALL)))
            raise UsageError(
                f"--lora-targets has {name!r}, which is not a layer of this model; it has {there}"
            )
    return tuple(name for name in known if name in wanted)
