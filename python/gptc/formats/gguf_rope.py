"""Rotary scaling in GGUF metadata, and the tensor that holds Llama 3's: as llama.cpp reads them.

`prefix` is the architecture with which its keys begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.layout import Tensors

# The divisor of each rotary frequency, for Llama 3's scaling. The file does not store how they were
# computed; published models have one of these original contexts, and factors of 1 and 4.
FREQUENCIES = "rope_freqs.weight"
# Those of longrope, in short contexts and in long ones.
LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
_LLAMA3_ORIGINALS = tuple(1 << n for n in range(13, 4, -1))
# Keys that change the scaling, and the values with which they do not; the first for "yarn" alone.
_PLAIN_YARN = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
_PLAIN = {"attn_factor": 1.0}
YARN_BETAS = (32.0, 1.0)  # those of models without keys for them; llama.cpp reads none
_BETAS = {
    "rope_high_freq": ("yarn_beta_fast", YARN_BETAS[0]),
    "rope_low_freq": ("yarn_beta_slow", YARN_BETAS[1]),
}


class RopeReader:
    """The scaling in a file's metadata; `number` reads a key as a float, with its default."""

    def __init__(
        self, prefix: str, metadata: Mapping[str, Any], number: Callable[[str, float], float]
    ) -> None:
        self._prefix = f"{prefix}.rope."
        self._metadata = metadata
        self._number = number

    def read(self, tensors: Tensors, head_size: int, context: int, where: str) -> dict[str, Any]:
        """Our fields. GptcError, which begins with `where`, for what gptc does not compute."""
        if all(name in tensors.shapes for name in LONGROPE):
            return self._longrope(tensors, head_size, context, where)
        kind = self._metadata.get(self._prefix + "scaling.type", "linear")
        if kind not in ("none", "linear", "yarn"):
            raise GptcError(
                f"{where}: {self._prefix}scaling.type {kind!r} is not supported, only none, "
                "linear, yarn"
            )
        for key, plain in (_PLAIN_YARN if kind == "yarn" else _PLAIN).items():
            value = self._metadata.get(f"{self._prefix}scaling.{key}", plain)
            if value != plain:
                raise GptcError(
                    f"{where}: {self._prefix}scaling.{key} is {value!r}, and only {plain!r} is "
                    "supported"
                )
        theta = self._number(self._prefix + "freq_base", 10000.0)
        factor = 1.0 if kind == "none" else self._factor()
        values: dict[str, Any] = {"rope_theta": theta}
        if FREQUENCIES in tensors.shapes:
            if factor != 1:
                raise GptcError(
                    f"{where} scales its rotary frequencies by {FREQUENCIES} and by a factor of "
                    f"{factor:g}; only one of them is supported"
                )
            return values | self._llama3(tensors, theta, head_size, where)
        if factor == 1:
            return values
        values |= {"rope_scaling": kind, "rope_factor": factor}
        return values | self._yarn(factor, context, where) if kind == "yarn" else values

    def _longrope(
        self, tensors: Tensors, head_size: int, context: int, where: str
    ) -> dict[str, Any]:
        turned = self._metadata.get(self._prefix + "dimension_count", head_size)
        divisors: list[float] = []
        for name in LONGROPE:
            if tensors.shapes[name] != (turned // 2,):
                raise GptcError(
                    f"{where}: {name} has the shape {tensors.shapes[name]}, and {turned} channels "
                    "of a head turn"
                )
            divisors += tensors.read(name).tolist()
        return {
            "rope_theta": self._number(self._prefix + "freq_base", 10000.0),
            "rope_scaling": "longrope",
            "rope_original": self._metadata.get(
                self._prefix + "scaling.original_context_length", context
            ),
            "rope_attention": self._number(self._prefix + "scaling.attn_factor", 1.0),
            "rope_divisors": divisors,
        }

    def _factor(self) -> float:
        """As in llama.cpp, scaling without a type is linear, a factor may have its old key, and 0
        means none."""
        old = self._number(self._prefix + "scale_linear", 0.0)
        return self._number(self._prefix + "scaling.factor", old) or 1.0

    def _yarn(self, factor: float, context: int, where: str) -> dict[str, Any]:
        key = self._prefix + "scaling.original_context_length"
        values: dict[str, Any] = {"rope_original": self._metadata.get(key, context)}
        for ours, (theirs, usual) in _BETAS.items():
            values[ours] = self._number(f"{self._prefix}scaling.{theirs}", usual)
        share = self._number(self._prefix + "scaling.attn_factor", 1.0)
        if not (0 < share < math.inf and 1 <= factor < math.inf):
            raise GptcError(
                f"{where}: {self._prefix}scaling.factor is {factor:g} and attn_factor {share:g}; "
                "the one has to be at least 1, the other above 0"
            )
        if share != 1:
            values["rope_attention"] = float(f"{share * _usual_attention(factor):.7g}")
        return values

    def _llama3(self, tensors: Tensors, theta: float, head_size: int, where: str) -> dict[str, Any]:
        """Each frequency is lowered by its own divisor."""
        shape = tensors.shapes[FREQUENCIES]
        if shape != (head_size // 2,):  # before anything is allocated for what the header claims
            raise GptcError(
                f"{where}: {FREQUENCIES} has the shape {shape}, and a head of {head_size} "
                f"needs ({head_size // 2},)"
            )
        stored = tensors.read(FREQUENCIES)
        if not (np.isfinite(stored).all() and (stored > 0).all() and 0 < theta < np.inf):
            raise GptcError(
                f"{where}: {FREQUENCIES} and {self._prefix}freq_base have to be finite and "
                "positive: copy the file again"
            )
        for original in _LLAMA3_ORIGINALS:
            values: dict[str, Any] = {"rope_factor": float(f"{stored.max():.7g}")}
            values |= {"rope_low_freq": 1.0, "rope_high_freq": 4.0, "rope_original": original}
            expected = divisors(theta, head_size, **values)
            if stored.shape == expected.shape and np.allclose(stored, expected, rtol=1e-4):
                return {"rope_scaling": "llama3", **values}
        raise GptcError(
            f"{where}: {FREQUENCIES} is not as in Llama 3 with an original context of one of "
            f"{', '.join(map(str, _LLAMA3_ORIGINALS))}: import the model from its original folder"
        )


def _usual_attention(factor: float) -> float:
    """By which llama.cpp multiplies queries and keys for this factor: Peng et al. 2023, eq. 22."""
    return 0.1 * math.log(factor) + 1


def divisors(
    theta: float,
    head_size: int,
    rope_factor: float,
    rope_original: int,
    rope_low_freq: float,
    rope_high_freq: float,
) -> FloatArray:
    """The divisors of Llama 3's frequencies (HS/2), as in csrc/model/rope.c."""
    half = head_size // 2
    turns = rope_original * theta ** (-np.arange(half) / half) / (2 * np.pi)
    kept = np.clip((turns - rope_low_freq) / (rope_high_freq - rope_low_freq), 0, 1)
    return (1 / ((1 - kept) / rope_factor + kept)).astype(np.float32)


def tensors_of(config: GPTConfig) -> dict[str, FloatArray]:
    """The tensors with divisors of a model's frequencies, by their names."""
    if config.rope_scaling == "longrope":
        halves = np.array(config.rope_divisors, np.float32).reshape(2, -1)
        return dict(zip(LONGROPE, halves, strict=True))
    if config.rope_scaling != "llama3":
        return {}
    names = ("rope_factor", "rope_original", "rope_low_freq", "rope_high_freq")
    values = {name: getattr(config, name) for name in names}
    return {FREQUENCIES: divisors(config.rope_theta, config.head_size, **values)}


def write(config: GPTConfig, prefix: str) -> dict[str, Any]:
    """The keys for a model's rotary positions."""
    values: dict[str, Any] = {
        "dimension_count": config.rope_dim or config.head_size,
        "freq_base": config.rope_theta,
    }
    if config.rope_scaling in ("linear", "yarn"):
        values |= {"scaling.type": config.rope_scaling, "scaling.factor": config.rope_factor}
    if config.rope_scaling == "longrope":
        values["scaling.original_context_length"] = config.rope_original
        values["scaling.attn_factor"] = config.rope_attention
    if config.rope_scaling == "yarn":
        values["scaling.original_context_length"] = config.rope_original
        for ours, (theirs, usual) in _BETAS.items():
            if getattr(config, ours) != usual:
                values[f"scaling.{theirs}"] = getattr(config, ours)
        if config.rope_attention:
            share = config.rope_attention / _usual_attention(config.rope_factor)
            values["scaling.attn_factor"] = share
    return {f"{prefix}.rope.{key}": value for key, value in values.items()}
