"""The layers of a family in a config.json: rotary positions, windows, the scale of scores."""

from __future__ import annotations

import math
from typing import Any

from gptc.engine.config import GPTConfig, Layer
from gptc.errors import GptcError
from gptc.formats import hf_rope
from gptc.formats.config_json import ConfigJson
from gptc.formats.families import EXPERTS_KEYS, SOFT_CAPS, Family


def read(found: ConfigJson, family: Family, head_size: int) -> dict[str, Any]:
    """Our fields."""
    rope, local = _ropes(found, family)
    values = hf_rope.from_json(rope, found.where)
    if family.score_key:
        values["score_scale"] = _score_scale(found, family, head_size)
    if family.soft_caps:
        values |= {field: _soft_cap(found, key) for key, field in SOFT_CAPS.items()}
    if family.rotary_key:
        values["rope_dim"] = _rope_dim(found, family, head_size)
    if family.period:
        theta = values["rope_theta"]
        return values | _mixed(found, family, theta, local or theta)
    values["window"] = _window(found, family)
    if family.no_rope:
        rotated = _rotated(found)
        layers = tuple(
            {"rope": r, "rope_theta": values["rope_theta"], "window": 0} for r in rotated
        )
        values["layers"] = [] if all(rotated) else list(layers)
    return values


def _ropes(found: ConfigJson, family: Family) -> tuple[dict[str, Any], float]:
    """The config with what hf_rope reads, and the base of windowed layers."""
    data, local = dict(found.data), family.local_theta
    if family.theta_key != "rope_theta" and family.theta_key in data:
        data.setdefault("rope_theta", data[family.theta_key])
    parameters = data.get("rope_parameters")
    if family.local_theta:
        given = data.get("rope_local_base_freq", local)
        if isinstance(parameters, dict) and "full_attention" in parameters:
            inner = parameters.get("sliding_attention")
            if isinstance(inner, dict):
                ConfigJson(inner, found.where).only("rope_type", "default")
                given = inner.get("rope_theta", given)
            data["rope_parameters"] = parameters["full_attention"]
            data.pop("rope_theta", None)
        if given != local:
            raise GptcError(
                f"{found.where}: a rotary base of {given!r} of windowed layers is not supported, "
                f"only {local!r}"
            )
        scaling = data.get("rope_scaling") or data.get("rope_parameters")
        kind = scaling.get("rope_type", "default") if isinstance(scaling, dict) else "default"
        if kind != "default":
            raise GptcError(
                f"{found.where}: rope_type {kind!r} of some layers is not supported, only 'default'"
            )
    if isinstance(parameters, dict) and not family.rotary_key:
        ConfigJson(parameters, found.where).only("partial_rotary_factor", 1.0, None)
    return data, local


def _number(found: ConfigJson, key: str, value: Any, most: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < value <= most:
        raise GptcError(f"{found.where}: {key} is {value!r}, not a number above 0 up to {most:g}")
    return float(value)


def _score_scale(found: ConfigJson, family: Family, head_size: int) -> float:
    key = family.score_key
    value = _number(found, key, found.data.get(key), 1e9)
    return 0.0 if value == head_size else 1 / math.sqrt(value)


def _soft_cap(found: ConfigJson, key: str) -> float:
    value = found.data.get(key)
    return 0.0 if value is None else _number(found, key, value, 1e9)


def _rope_dim(found: ConfigJson, family: Family, head_size: int) -> int:
    """As transformers rounds it: down."""
    parameters = found.data.get("rope_parameters")
    inner = parameters if isinstance(parameters, dict) else {}
    key = "partial_rotary_factor"
    share = inner.get(key, found.data.get(key, found.data.get(family.rotary_key)))
    turned = int(head_size * _number(found, family.rotary_key, share, 1.0))
    if turned < 2 or turned % 2:
        raise GptcError(
            f"{found.where}: {family.rotary_key} {share!r} turns {turned} of {head_size} channels "
            "of a head; pairs of channels turn"
        )
    return 0 if turned == head_size else turned


def rotary_size(found: ConfigJson, family: Family, head_size: int) -> int:
    """The field rope_dim, where config.json has the number of channels that turn."""
    key = family.rotary_size_key
    if not key:
        return 0
    turned = found.need(key)
    if turned % 2 or turned > head_size:
        raise GptcError(
            f"{found.where}: {key} is {turned}; it must be even, and at most the {head_size} "
            "channels of a head"
        )
    return 0 if turned == head_size else turned


def _rotated(found: ConfigJson) -> list[bool]:
    """Which layers have rotary positions."""
    n_layer, flags = found.need("num_hidden_layers"), found.data.get("no_rope_layers")
    found.only("use_sliding_window", False, None)
    if not flags:
        interval = found.need("no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(_layers(found, n_layer))]
    if (
        not isinstance(flags, list)
        or len(flags) != n_layer
        or not set(map(repr, flags)) <= {"0", "1"}
    ):
        raise GptcError(f"{found.where}: no_rope_layers is not a list of 0 or 1 for each layer")
    return [flag == 1 for flag in flags]


def _layers(found: ConfigJson, n_layer: int) -> int:
    """n_layer, if a record for each makes sense."""
    if n_layer > 1 << 12:
        raise GptcError(f"{found.where}: num_hidden_layers is {n_layer}; it must be below 4,097")
    return n_layer


def _mixed(found: ConfigJson, family: Family, theta: float, local: float) -> dict[str, Any]:
    """Windowed layers and others, which also differ in their rotary bases."""
    n_layer = _layers(found, found.need("num_hidden_layers"))
    window = found.need("sliding_window")
    found.only("use_bidirectional_attention", False, None)
    period = found.data.get("sliding_window_pattern", found.data.get("_sliding_window_pattern"))
    period = family.period if period is None else period
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise GptcError(f"{found.where}: sliding_window_pattern is {period!r}, not a whole number")
    kinds = found.data.get("layer_types")
    if kinds is None:
        full = [(i + 1) % period == 0 for i in range(n_layer)]
    elif (
        isinstance(kinds, list)
        and len(kinds) == n_layer
        and set(map(repr, kinds))
        <= {
            "'full_attention'",
            "'sliding_attention'",
        }
    ):
        full = [kind == "full_attention" for kind in kinds]
    else:
        raise GptcError(
            f"{found.where}: layer_types must be full_attention or sliding_attention for each layer"
        )
    layers = [
        {"rope": True, "rope_theta": theta, "window": 0}
        if is_full
        else {"rope": True, "rope_theta": local, "window": window}
        for is_full in full
    ]
    return {"window": window, "layers": layers}


def _window(found: ConfigJson, family: Family) -> int:
    """The window of every layer, 0 for none. GptcError where layers differ."""
    data, n_layer = found.data, found.need("num_hidden_layers")
    used = family.window and (not family.window_switch or found.flag("use_sliding_window"))
    window = found.need("sliding_window") if used and data.get("sliding_window") is not None else 0
    kinds = data.get("layer_types")
    if kinds is None:
        first = data.get("max_window_layers", 0) if family.window_switch else 0
        if isinstance(first, bool) or not isinstance(first, int):
            raise GptcError(f"{found.where}: max_window_layers is {first!r}, not a whole number")
        if not window or first >= n_layer:
            return 0
        if first <= 0:
            return window
        key = "max_window_layers"
    else:
        n = len(kinds) if isinstance(kinds, list) else 0
        if n == n_layer and all(kind == "full_attention" for kind in kinds):
            return 0
        if window and n == n_layer and all(kind == "sliding_attention" for kind in kinds):
            return window
        key = "layer_types"
    raise GptcError(
        f"{found.where}: {key} with layers of several kinds is not supported, only layers that all "
        "have the same attention window, or none"
    )


def experts(found: ConfigJson, family: Family) -> dict[str, Any]:
    """Our fields of a family with experts in each layer."""
    data = found.data
    key = next((key for key in EXPERTS_KEYS if key in data and key != family.experts_key), None)
    n_expert, used = found.need(key or family.experts_key), found.need("num_experts_per_tok")
    if used > n_expert:
        raise GptcError(
            f"{found.where}: num_experts_per_tok is {used}, and there are {n_expert} experts"
        )
    found.only("mlp_only_layers", [], None)
    coefficient = data.get("router_aux_loss_coef")
    loss = 0.0
    if found.flag("output_router_logits") and coefficient:
        loss = _number(found, "router_aux_loss_coef", coefficient, 1e9)
    return {
        "n_expert": n_expert,
        "n_expert_used": used,
        "expert_norm": found.choice(family.expert_norm),
        "router_loss": loss,
    }


def _experts_to_json(config: GPTConfig, family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {
        family.experts_key: config.n_expert,
        family.expert_width_key: config.n_ff,
        "num_experts_per_tok": config.n_expert_used,
        "output_router_logits": config.router_loss > 0,
        "router_aux_loss_coef": config.router_loss,
        **family.plain,
    }
    if isinstance(family.expert_norm, str):
        values[family.expert_norm] = config.expert_norm
    return values


def to_json(config: GPTConfig, family: Family) -> dict[str, Any]:
    """The keys of a config.json."""
    values = {family.theta_key: config.rope_theta, **hf_rope.to_json(config)}
    if family.rotary_key:
        values[family.rotary_key] = (config.rope_dim or config.head_size) / config.head_size
    if family.score_key:
        values[family.score_key] = _score_value(config)
    if family.no_rope:
        layers = config.layers or (Layer(True, config.rope_theta, 0),) * config.n_layer
        values["no_rope_layers"] = [int(layer.rope) for layer in layers]
    if family.soft_caps:
        values |= {key: getattr(config, field) or None for key, field in SOFT_CAPS.items()}
    if family.local_theta:
        values["rope_local_base_freq"] = family.local_theta
    if family.period:
        values["layer_types"] = [
            "sliding_attention" if layer.window else "full_attention" for layer in config.layers
        ]
    if family.experts_key:
        values |= _experts_to_json(config, family)
    return values | _window_to_json(config, family)


def _score_value(config: GPTConfig) -> int | float:
    if not config.score_scale:
        return config.head_size
    value = 1 / config.score_scale**2
    return round(value) if abs(value - round(value)) < 1e-4 * value else value


def _window_to_json(config: GPTConfig, family: Family) -> dict[str, Any]:
    if not family.window:
        return {}
    values: dict[str, Any] = {"sliding_window": config.window or None}
    if family.window_switch:
        values["use_sliding_window"] = config.window > 0
        values["max_window_layers"] = 0 if config.window else config.n_layer
    return values
