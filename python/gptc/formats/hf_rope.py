"""Rotary scaling in a config.json: `rope_scaling`, or `rope_parameters` of transformers 5.

linear: Chen et al. 2023; dynamic and yarn: Peng et al. 2023; llama3: Grattafiori et al. 2024;
longrope, of Phi-3 in older files "su": Ding et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.config_json import is_size
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
_KEYS["longrope"] = {"rope_original": "original_max_position_embeddings"}
_FACTORS = ("short_factor", "long_factor")
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
    if kind == "longrope":
        return _longrope_to_json(config) | values
    if config.rope_attention:
        values["attention_factor"] = config.rope_attention
    return {"rope_scaling": {"type" if len(values) == 1 else "rope_type": kind, **values}}


def _longrope_to_json(config: GPTConfig) -> dict[str, Any]:
    """As older classes want it: three keys, unless the factor of queries and keys is unusual."""
    half = len(config.rope_divisors) // 2
    halves = (config.rope_divisors[:half], config.rope_divisors[half:])
    rope: dict[str, Any] = {"type": "longrope"}
    rope |= {key: list(values) for key, values in zip(_FACTORS, halves, strict=True)}
    if config.rope_attention != longrope_attention(config.block_size, config.rope_original):
        rope["attention_factor"] = config.rope_attention
    return {"rope_scaling": rope}


def longrope_attention(longest: int, original: int) -> float:
    """The usual factor of queries and keys: Ding et al. 2024, section 3.4."""
    if longest <= original or original < 2:
        return 1.0
    return _short(math.sqrt(1 + math.log(longest / original) / math.log(original)))


def _short(value: float) -> float:
    """As a GGUF file, which has it as float32, is read."""
    return float(f"{value:.7g}")


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
    kind = {"default": "none", "su": "longrope"}.get(str(kind), kind)
    if not isinstance(kind, str) or kind not in _KEYS:
        names = ", ".join(name for name in _KEYS if name != "none")
        raise GptcError(
            f"{where}: rope_scaling with rope_type {kind!r} is not supported, only {names}"
        )
    known = dict(rope)
    if kind in ("llama3", "yarn", "longrope"):
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
    if kind == "longrope":
        values |= _longrope(known, data["max_position_embeddings"], where)
    if kind == "yarn":
        values["rope_attention"] = _attention_factor(known, where)
    return {"rope_scaling": kind, **values}


def _longrope(rope: Mapping[str, Any], longest: int, where: str) -> dict[str, Any]:
    short, long = (rope.get(key) for key in _FACTORS)
    if not (isinstance(short, list) and isinstance(long, list) and len(short) == len(long)):
        raise GptcError(
            f"{where}: rope_scaling needs short_factor and long_factor, lists of one length"
        )
    divisors = [
        _number({key: value}, key, where)
        for key, values in zip(_FACTORS, (short, long), strict=True)
        for value in values
    ]
    original = rope["original_max_position_embeddings"]
    if not is_size(original):
        raise GptcError(
            f"{where}: original_max_position_embeddings is {original!r:.40}, not a whole number "
            "above 0"
        )
    if rope.get("attention_factor") is not None:
        attention = _short(_number(rope, "attention_factor", where))
    else:
        attention = longrope_attention(longest, original)
    return {"rope_divisors": divisors, "rope_attention": attention}


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
