"""The shape of a model, for all families (byte, gpt2, llama)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

from gptc.engine import library
from gptc.errors import EngineError, UsageError

Norm = Literal["layernorm", "rmsnorm"]
Pos = Literal["learned", "rope", "rope_wide"]
Activation = Literal["gelu", "swish", "swiglu", "gelu_erf", "relu", "geglu"]
NormAt = Literal["before", "after", "both"]
RopeScaling = Literal["none", "linear", "llama3", "yarn", "dynamic", "longrope"]

# Fields that are enums in C: their values here, and the prefix of the C names.
_ENUMS: dict[str, tuple[tuple[str, ...], str]] = {
    "norm": (get_args(Norm), "GPT_NORM_"),
    "pos": (get_args(Pos), "GPT_POS_"),
    "activation": (get_args(Activation), "GPT_ACT_"),
    "rope_scaling": (get_args(RopeScaling), "GPT_ROPE_"),
    "norm_at": (get_args(NormAt), "GPT_NORM_"),
}


_SCALING = (
    *("rope_scaling", "rope_factor", "rope_low_freq", "rope_high_freq", "rope_original"),
    "rope_attention",
    "rope_divisors",
)
# Fields that only some models have; `to_dict` leaves them out where they are 0.
_BIASES = ("qkv_bias", "attn_proj_bias", "mlp_bias", "norm_bias")
_RARE: tuple[str, ...] = (
    "head_dim",
    "qk_norm",
    "wide_qk_norm",
    "window",
    *_BIASES,
    "rope_dim",
    "parallel",
)
_RARE += ("score_scale", "score_by_layer", "embedding_scale", "score_cap", "logit_cap", "layers")
_RARE += ("n_expert", "n_expert_used", "expert_norm", "router_loss", "one_norm", "head_bias")
MOST_EXPERTS = 128
"""GPT_MAX_EXPERTS."""
GATED = ("swiglu", "geglu")
"""Activations with gates and ups."""


class Layer(NamedTuple):
    """One layer of a model whose layers differ."""

    rope: bool  # queries and keys are rotated
    rope_theta: float  # base of their frequencies; unused without
    window: int  # keys that a query sees; 0: all


class Parameter(NamedTuple):
    """A parameter tensor; `shape` is (out, in) for linear weights."""

    name: str
    shape: tuple[int, ...]
    decay: bool  # AdamW's weight decay applies


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, such as `GPTConfig.preset("tiny", vocab_size=256)`.

    `vocab_size` is the number of different tokens, `block_size` the longest sequence, `n_embd` the
    width, `n_ff` the hidden width of the feed-forward layers. With `n_kv_head` below `n_head`,
    queries share keys and values. `norm` ("layernorm", "rmsnorm"), `pos` ("learned", "rope",
    "rope_wide") and `activation` ("gelu", "swish", "swiglu") choose the layers; `norm_weight` gives
    the norms a learned scale; `tied` makes the token embedding the output head. The `rope_` fields
    are for rotary positions. With `head_dim`, heads may have another size than n_embd / n_head.
    `bias` gives all layers biases, `qkv_bias`, `attn_proj_bias` and `mlp_bias` only some of them.
    `qk_norm` normalises each head of queries and keys, `wide_qk_norm` all of a token's together;
    `window` is the number of keys that a query sees, `rope_dim` that of the channels of a head that
    turn. With `n_expert`, a token has `n_expert_used` of so many feed-forward layers, and
    `router_loss` keeps them equally busy in training. Branches have their norms before, after or on
    both sides (`norm_at`), and with `parallel` both read the layer's input, with `one_norm` through
    one norm. `head_bias` gives logits a bias. `layers` is for models whose layers differ.
    `check()` raises UsageError for an invalid shape.
    """

    vocab_size: int
    block_size: int  # the longest sequence, in tokens
    n_layer: int
    n_head: int
    n_kv_head: int  # fewer than n_head: grouped queries
    n_embd: int
    n_ff: int  # hidden width of the feed-forward layer
    norm: Norm
    norm_weight: bool  # norms have a learned scale
    pos: Pos
    activation: Activation
    bias: bool
    tied: bool  # the output head is the token embedding
    norm_eps: float
    rope_theta: float
    # Scaling of the rotary frequencies for longer sequences; unused fields are 0.
    rope_scaling: RopeScaling = "none"
    rope_factor: float = 0.0
    rope_low_freq: float = 0.0
    rope_high_freq: float = 0.0
    rope_original: int = 0
    # Of "yarn" and "longrope": factor of queries and keys; 0: by rope_factor
    rope_attention: float = 0.0
    head_dim: int = 0  # channels of an attention head, `head_size` in C; 0: n_embd / n_head
    qk_norm: bool = False  # RMSNorm with a learned scale over each head of queries and keys
    window: int = 0  # keys that a query sees, its own and those before it; 0: all
    # Biases of some layers, where `bias` is false.
    qkv_bias: bool = False
    attn_proj_bias: bool = False
    mlp_bias: bool = False  # of both feed-forward layers
    norm_bias: bool = False  # of LayerNorms
    wide_qk_norm: bool = False  # RMSNorm over all queries, and all keys, of a token
    rope_dim: int = 0  # rotated channels of a head, the first; 0: all
    parallel: bool = False  # both branches of a layer read its input
    norm_at: NormAt = "before"  # the norms of a branch
    score_scale: float = 0.0  # factor of the scores; 0: 1 / sqrt(head size)
    score_by_layer: bool = False  # scores of layer l, from 0 on, are divided by l + 1
    embedding_scale: float = 0.0  # factor of the token embedding; 0: 1
    score_cap: float = 0.0  # soft cap of scores, cap tanh(score / cap); 0: none
    logit_cap: float = 0.0  # that of logits
    layers: tuple[Layer, ...] = ()  # a record for each; (): all have the fields above
    n_expert: int = 0  # of each feed-forward layer, each n_ff wide; 0: one for all tokens
    n_expert_used: int = 0  # experts of a token
    expert_norm: bool = False  # their weights are divided by their sum
    router_loss: float = 0.0  # factor of the load-balance loss in the gradient
    one_norm: bool = False  # parallel branches read one norm
    head_bias: bool = False  # logits have a bias
    # Of "longrope": divisors of rotary frequencies in contexts of up to rope_original tokens, then
    # those in longer ones.
    rope_divisors: tuple[float, ...] = ()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """A named shape, with some fields replaced.

        An overridden `n_embd` scales `n_ff`, and an overridden `n_head` scales `n_kv_head`, unless
        these are given too. With `n_expert`, a token has two experts whose weights add up to 1, and
        the load-balance loss has the factor 0.01, unless other fields say so.
        """
        struct = library.load().ffi.new("gpt_config *")
        if name not in presets():
            raise UsageError(f"unknown preset {name!r}{_did_you_mean(name, presets())}")
        library.call("gpt_config_preset", name.encode(), struct)
        base = cls._from_c(struct)
        known = {field.name: field for field in fields(cls)}
        for key, value in overrides.items():
            if key not in known:
                raise UsageError(f"unknown model field {key!r}{_did_you_mean(key, list(known))}")
            if key not in ("layers", "rope_divisors"):
                plain = value.item() if hasattr(value, "item") else value  # of NumPy
                overrides[key] = _typed(known[key], plain)
        if "n_embd" in overrides and "n_ff" not in overrides:
            n_ff = base.n_ff * overrides["n_embd"] / base.n_embd
            multiple = 8 if overrides.get("activation", base.activation) in GATED else 1
            overrides["n_ff"] = max(multiple, round(n_ff / multiple) * multiple)
        if "n_head" in overrides and "n_kv_head" not in overrides:
            overrides["n_kv_head"] = max(1, overrides["n_head"] * base.n_kv_head // base.n_head)
        if "n_expert" in overrides:
            usual = {"n_expert_used": min(2, overrides["n_expert"]), "router_loss": 0.01}
            overrides = {**usual, "expert_norm": True, **overrides}
        config = replace(base, **overrides)
        config.check()
        return config

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GPTConfig:
        """The config from `to_dict`. UsageError for unknown, missing or mistyped fields."""
        names = [field.name for field in fields(cls)]
        for key in data:
            if key not in names:
                raise UsageError(f"unknown model field {key!r}{_did_you_mean(key, names)}")
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in data:
                if field.default is not MISSING:
                    continue
                raise UsageError(f"the model's {field.name} is missing")
            value = data[field.name]
            if field.name == "layers":
                values["layers"] = _layers(value)
                continue
            if field.name == "rope_divisors":
                values["rope_divisors"] = _numbers(field.name, value)
                continue
            values[field.name] = _typed(field, value)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, without what few models have where this one does not."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        absent = {key for key in (*_RARE, "rope_attention", "rope_divisors") if not values[key]}
        if self.norm_at == "before":
            absent.add("norm_at")
        values["layers"] = [layer._asdict() for layer in self.layers]
        values["rope_divisors"] = list(self.rope_divisors)
        if self.rope_scaling == "none":
            absent |= set(_SCALING)
        return {key: value for key, value in values.items() if key not in absent}

    def check(self) -> None:
        """Raises UsageError, which names the field, for an invalid shape."""
        try:
            library.call("gpt_config_check", self.to_c())
        except EngineError as error:
            raise UsageError(str(error)) from error

    @property
    def family(self) -> str:
        """The family that the shape belongs to: gpt2, llama, or else byte."""
        shape = (self.norm, self.norm_weight, self.pos, self.activation)
        if self.rare_features():
            return "byte"
        plain_heads = self.n_kv_head == self.n_head and not self.head_dim and not self.qk_norm
        if shape == ("layernorm", True, "learned", "gelu") and plain_heads and not self.window:
            return "gpt2"
        if shape == ("rmsnorm", True, "rope", "swiglu") and not self.bias:
            return "llama"
        return "byte"

    def rare_features(self) -> list[str]:
        """The fields that neither a GPT-2 nor a Llama or byte model has set."""
        names = [name for name in _RARE[_RARE.index("rope_dim") :] if getattr(self, name)]
        names += [name for name in ("wide_qk_norm",) if getattr(self, name)]
        return names + ["norm_at"] * (self.norm_at != "before")

    @property
    def head_size(self) -> int:
        """Channels of one attention head (HS)."""
        return self.head_dim or self.n_embd // self.n_head

    def parameters(self) -> tuple[Parameter, ...]:
        """The parameter tensors of this shape, in the engine's order."""
        return _parameters(self)

    def to_c(self) -> Any:
        """A gpt_config *."""
        lib = library.load().lib
        values: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if name in _ENUMS:
                choices, prefix = _ENUMS[name]
                if value not in choices:
                    raise UsageError(f"{name} is {value!r}, not one of {', '.join(choices)}")
                value = getattr(lib, prefix + value.upper())
            values[name] = value
        layers, divisors = values.pop("layers", ()), values.pop("rope_divisors", ())
        values["head_size"] = values.pop("head_dim", 0)
        if values.pop("wide_qk_norm", False):
            values["qk_norm"] = lib.GPT_QK_NORM_WIDTH
        some = sum(bits for name, bits in _biases(lib).items() if values.pop(name, False))
        values["bias"] = lib.GPT_BIAS_ALL if self.bias else some
        struct = library.new_struct("gpt_config", **values)
        if divisors:
            if len(divisors) != (size := (self.rope_dim or self.head_size) // 2 * 2):
                raise UsageError(f"rope_divisors has {len(divisors)} numbers, not {size}")
            library.attach_floats(struct, "rope_divisors", divisors)
        if layers:
            if len(layers) != self.n_layer:
                raise UsageError(f"layers has {len(layers)} records, and n_layer is {self.n_layer}")
            norm = values["norm"]
            records = [library.new_struct("gpt_layer", norm=norm, **layer) for layer in layers]
            library.attach(struct, "layers", "gpt_layer", records)
        return struct

    @classmethod
    def _from_c(cls, struct: Any) -> GPTConfig:
        lib = library.load().lib
        values: dict[str, Any] = {}
        for field in fields(cls):
            if bits := _biases(lib).get(field.name):
                values[field.name] = not values["bias"] and struct.bias & bits == bits
                continue
            if field.name in ("layers", "rope_divisors"):  # of no preset
                continue
            if field.name == "wide_qk_norm":
                values[field.name] = struct.qk_norm == lib.GPT_QK_NORM_WIDTH
                continue
            value = getattr(struct, "head_size" if field.name == "head_dim" else field.name)
            if field.name == "bias":
                value = value == lib.GPT_BIAS_ALL
            elif field.name in _ENUMS:
                choices, prefix = _ENUMS[field.name]
                value = next(c for c in choices if getattr(lib, prefix + c.upper()) == value)
            elif field.type == "bool":
                value = value == 1
            elif field.type == "float":
                value = float(f"{value:.7g}")  # 1e-05, where the float32 reads 9.99999974e-06
            values[field.name] = value
        return cls(**values)


def _biases(lib: Any) -> dict[str, int]:
    """The fields for biases of some layers, and their bits in C."""
    return {
        "qkv_bias": lib.GPT_BIAS_QKV,
        "attn_proj_bias": lib.GPT_BIAS_ATT_PROJ,
        "mlp_bias": lib.GPT_BIAS_FC | lib.GPT_BIAS_MLP_PROJ,
        "norm_bias": lib.GPT_BIAS_NORM,
    }


def _typed(field: Field[Any], value: Any) -> Any:
    """The value of a field. UsageError for one of another type."""
    if field.name in _ENUMS:
        choices, _ = _ENUMS[field.name]
        if value not in choices:
            raise UsageError(f"{field.name} is {value!r}, not one of {', '.join(choices)}")
    elif field.type == "float":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{field.name} is {value!r}, not a number")
        try:
            value = float(value)
        except OverflowError:
            raise UsageError(f"{field.name} is too large a number") from None
    elif field.type == "bool":
        if not isinstance(value, bool):
            raise UsageError(f"{field.name} is {value!r}, not true or false")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{field.name} is {value!r}, not a whole number")
    return value


def _numbers(name: str, data: Any) -> tuple[float, ...]:
    """A list of numbers of float32."""
    good = isinstance(data, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e38 for x in data
    )
    if not good:
        raise UsageError(f"{name} is {data!r}, not a list of numbers")
    return tuple(float(x) for x in data)


def _layers(data: Any) -> tuple[Layer, ...]:
    """The records of `to_dict`."""
    if not isinstance(data, list):
        raise UsageError(f"layers is {data!r}, not a list of records")
    found = []
    for i, record in enumerate(data):
        if not isinstance(record, Mapping) or record.keys() != set(Layer._fields):
            raise UsageError(
                f"layers[{i}] is {record!r}, not a record of {', '.join(Layer._fields)}"
            )
        rope, theta, window = (record[name] for name in Layer._fields)
        whole = isinstance(window, int) and not isinstance(window, bool)
        number = isinstance(theta, int | float) and not isinstance(theta, bool)
        if not (isinstance(rope, bool) and number and whole):
            raise UsageError(f"layers[{i}] is {record!r}, not true or false, and two numbers")
        try:
            found.append(Layer(rope, float(theta), window))
        except OverflowError:
            raise UsageError(f"rope_theta of layers[{i}] is too large a number") from None
    return tuple(found)


@lru_cache(maxsize=1)
def presets() -> tuple[str, ...]:
    """The names that `GPTConfig.preset` knows."""
    ffi, lib, _ = library.load()
    names: list[str] = []
    while (name := lib.gpt_preset_name(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return tuple(names)


@lru_cache(maxsize=16)
def _parameters(config: GPTConfig) -> tuple[Parameter, ...]:
    config.check()
    ffi, lib, _ = library.load()
    struct = config.to_c()
    param = ffi.new("gpt_param *")
    found = []
    for i in range(lib.gpt_config_param_count(struct)):
        library.call("gpt_config_param", struct, i, param)
        shape = tuple(int(param.shape[k]) for k in range(param.n_dim))
        found.append(Parameter(ffi.string(param.name).decode(), shape, bool(param.decay)))
    return tuple(found)


def _did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
