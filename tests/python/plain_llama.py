"""Models like Llama in NumPy, from the keys of a config.json and tensors by their published names.

Written after the papers that families.py cites, in float64, one sequence at a time, without a line
of gptc's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def logits(config: Mapping[str, Any], tensors: Mapping[str, Array], tokens: Array) -> Array:
    """(T, V) of tokens (T)."""
    x = np.float64(tensors["model.embed_tokens.weight"])[tokens]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): np.float64(values)
            for name, values in tensors.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = x + attention(config, own, rms(x, own["input_layernorm.weight"], config))
        h = rms(x, own["post_attention_layernorm.weight"], config)
        gate, up = linear(own, "mlp.gate_proj", h), linear(own, "mlp.up_proj", h)
        x = x + linear(own, "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return rms(x, np.float64(tensors["model.norm.weight"]), config) @ tensors[f"{head}.weight"].T


def rms(x: Array, weight: Array, config: Mapping[str, Any]) -> Array:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config["rms_norm_eps"]) * weight


def linear(own: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0.0)


def attention(config: Mapping[str, Any], own: Mapping[str, Array], x: Array) -> Array:
    n_head, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // n_head
    T = len(x)
    q = linear(own, "self_attn.q_proj", x).reshape(T, n_head, size)
    k = linear(own, "self_attn.k_proj", x).reshape(T, n_kv, size)
    v = linear(own, "self_attn.v_proj", x).reshape(T, n_kv, size)
    if "self_attn.q_norm.weight" in own:
        q = rms(q, own["self_attn.q_norm.weight"], config)
        k = rms(k, own["self_attn.k_norm.weight"], config)
    q, k = rotate(config, q), rotate(config, k)
    distance = np.subtract.outer(np.arange(T), np.arange(T))
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    hidden = (distance < 0) | (distance >= (window or T))
    out = np.empty_like(q)
    for h in range(n_head):
        scores = q[:, h] @ k[:, h * n_kv // n_head].T / math.sqrt(size)
        scores = np.exp(np.where(hidden, -np.inf, scores) - scores.max())
        out[:, h] = scores / scores.sum(-1, keepdims=True) @ v[:, h * n_kv // n_head]
    return linear(own, "self_attn.o_proj", out.reshape(T, -1))


def rotate(config: Mapping[str, Any], x: Array) -> Array:
    """Channels i and i + size/2 of (T, heads, size) turn together."""
    T, half = len(x), x.shape[2] // 2
    frequencies, scale = rotary(config, 2 * half, T)
    angles = np.outer(np.arange(T), frequencies)[:, None]
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return scale * np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rotary(config: Mapping[str, Any], size: int, T: int) -> tuple[Array, float]:
    """Radians a position of each pair, and the factor of queries and keys."""
    rope = {**config, **(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta, factor = rope.get("rope_theta", 10000.0), rope.get("factor", 1.0)
    longest = config["max_position_embeddings"]
    if kind == "dynamic" and longest < T:
        theta *= (factor * T / longest - factor + 1) ** (size / (size - 2))
    wave = theta ** (-2 * np.arange(size // 2) / size)
    if kind == "linear":
        return wave / factor, 1.0
    original = rope.get("original_max_position_embeddings", longest)
    if kind == "llama3":
        low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
        length = 2 * np.pi / wave
        smooth = (original / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        mixed = (1 - smooth) * wave / factor + smooth * wave
        return np.where(length > low, wave / factor, np.where(length < high, wave, mixed)), 1.0
    if kind == "yarn":

        def pair(turns: float) -> float:
            return size * math.log(original / (turns * 2 * np.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair(rope.get("beta_fast", 32))), 0)
        high = min(math.ceil(pair(rope.get("beta_slow", 1))), size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
        scale = rope.get("attention_factor", 0.1 * math.log(factor) + 1)
        return wave / factor * ramp + wave * (1 - ramp), scale
    return wave, 1.0
