"""Rotary scaling in a config.json: `rope_scaling`, or `rope_parameters` of transformers 5.

linear: Chen et al. 2023; dynamic and yarn: Peng et al. 2023; llama3: Grattafiori et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.families import dynamic_length

# Ours and theirs, of each way in which rotary frequencies are lowered.
_KEYS: dict[str, dict[str, str]] = {"none": {}, "linear": {"rope_factor": "factor"}}
_KEYS["dynamic"] = _KEYS["linear"]
_KEYS["llama3"] = {
    **_KEYS["linear"],
    "rope_low_freq": "low_freq_factor",
    "rope_high_freq": "high_freq_factor",
    "rope_original": "original_max_position_embeddings",
}
_KEYS["yarn"] = {
    **_KEYS["linear"],
    "rope_low_freq": "beta_slow",
    "rope_high_freq": "beta_fast",
    "rope_original": "original_max_position_embeddings",
}
_HUGE = 1e30  # above any number that makes sense, and far from where products overflow
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}


def to_json(config: GPTConfig) -> dict[str, Any]:
    """The keys of a config.json, in the spelling that transformers reads since 4.43.

    That of "linear" and "dynamic" is older: until 4.42 they must have just these two keys.
    """
    kind = config.rope_scaling
    if kind == "none":
        return {}
    values = {theirs: getattr(config, ours) for ours, theirs in _KEYS[kind].items()}
    if config.rope_attention:
        values["attention_factor"] = config.rope_attention
    return {"rope_scaling": {"type" if len(values) == 1 else "rope_type": kind, **values}}


def max_positions(config: GPTConfig) -> int:
    """max_position_embeddings: with dynamic scaling the length from which on it applies."""
    return config.rope_original if config.rope_scaling == "dynamic" else config.block_size


def from_json(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our fields for a config.json whose max_position_embeddings has been checked."""
    parameters = data.get("rope_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    rope = data.get("rope_scaling") or parameters
    theta = parameters.get("rope_theta", data.get("rope_theta", 10000.0))
    if not isinstance(rope, dict):
        raise GptcError(f"{where}: rope_scaling {rope!r} is not supported")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise GptcError(
            f"{where}: rope_parameters for {nested[0]} alone are not supported, only for all layers"
        )
    values = {"rope_theta": rope.get("rope_theta", theta), **_scaling(rope, data, where)}
    if values["rope_scaling"] == "dynamic":
        factor, original = _number(rope, "factor", where), data["max_position_embeddings"]
        if factor < 1:
            raise GptcError(f"{where}: rope_factor is {factor!r}; it must be at least 1")
        values |= {"rope_original": original, "block_size": dynamic_length(original, factor)}
    return values


def _scaling(rope: Mapping[str, Any], data: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default" if "factor" not in rope else None))
    kind = "none" if kind == "default" else kind
    if not isinstance(kind, str) or kind not in _KEYS:
        names = ", ".join(name for name in _KEYS if name != "none")
        raise GptcError(
            f"{where}: rope_scaling with rope_type {kind!r} is not supported, only {names}"
        )
    known = dict(rope)
    if kind in ("llama3", "yarn"):
        length = data.get("original_max_position_embeddings", data["max_position_embeddings"])
        known.setdefault("original_max_position_embeddings", length)
    if kind == "yarn":
        for key, usual in _YARN.items():
            known[key] = known.get(key) or usual
        if not known.get("truncate", True):
            raise GptcError(f"{where}: rope_scaling with truncate false is not supported")
    missing = [theirs for theirs in _KEYS[kind].values() if known.get(theirs) is None]
    if missing:
        raise GptcError(f"{where}: rope_scaling lacks {missing[0]}")
    values = {ours: known[theirs] for ours, theirs in _KEYS[kind].items()}
    if kind == "yarn":
        values["rope_attention"] = _attention_factor(known, where)
    return {"rope_scaling": kind, **values}


def _attention_factor(rope: Mapping[str, Any], where: str) -> float:
    """The factor of queries and keys; 0: the usual one for the scale."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor", where)
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return 0.0
    log = math.log(max(_number(rope, "factor", where), 1.0))
    one, other = (0.1 * _number(rope, key, where) * log + 1 for key in ("mscale", "mscale_all_dim"))
    return one / other


def _number(rope: Mapping[str, Any], key: str, where: str) -> float:
    value = rope[key]
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < value < _HUGE:
        raise GptcError(f"{where}: {key} of rope_scaling is {value!r}, not a number above 0")
    return float(value)
