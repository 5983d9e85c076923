"""Every preset is valid, and the error of an invalid configuration names the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptc.engine.config import GPTConfig, presets
from gptc.errors import UsageError


def test_every_preset_can_exist_and_survives_a_dictionary() -> None:
    assert {"tiny", "byte", "gpt2"} <= set(presets())
    for name in presets():
        config = GPTConfig.preset(name)
        config.check()
        assert GPTConfig.from_dict(config.to_dict()) == config
        assert GPTConfig._from_c(config.to_c()) == config


def test_preset_floats_are_the_decimals_that_were_meant() -> None:
    assert GPTConfig.preset("gpt2").norm_eps == 1e-5
    assert GPTConfig.preset("byte").norm_eps == 1e-6


def test_an_overridden_width_takes_the_feed_forward_layer_along() -> None:
    assert GPTConfig.preset("gpt2", n_embd=96).n_ff == 384
    base = GPTConfig.preset("tiny")
    scaled = GPTConfig.preset("tiny", n_embd=96)
    assert scaled.n_ff % 8 == 0
    assert abs(scaled.n_ff - 96 * base.n_ff / base.n_embd) <= 4
    assert GPTConfig.preset("tiny", n_embd=96, n_ff=100).n_ff == 100
    assert GPTConfig.preset("gpt2", n_head=6).n_kv_head == 6


def test_parameters_are_named_and_shaped() -> None:
    config = GPTConfig.preset("llama-15m", n_embd=32, n_head=4, n_kv_head=2, n_ff=40, n_layer=1)
    by_name = {name: (shape, decay) for name, shape, decay in config.parameters()}
    assert by_name["h.0.attn.qkv.weight"] == ((8 * (4 + 2 * 2), 32), True)
    assert by_name["h.0.mlp.fc.weight"] == ((80, 32), True)
    assert by_name["norm_f.weight"] == ((32,), False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 4}, "unknown model field 'n_heads'; did you mean 'n_head'"),
        ({"n_head": None}, "n_head is None, not a whole number"),
        ({"n_head": True}, "n_head is True, not a whole number"),
        ({"bias": 1}, "bias is 1, not true or false"),
        ({"norm_eps": "small"}, "norm_eps is 'small', not a number"),
        ({"pos": "alibi"}, "pos is 'alibi', not one of learned, rope, rope_wide"),
    ],
)
def test_a_wrong_dictionary_names_the_field(change: dict[str, object], message: str) -> None:
    data = {**GPTConfig.preset("tiny").to_dict(), **change}
    with pytest.raises(UsageError, match=message):
        GPTConfig.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": "256"}, "vocab_size is '256', not a whole number"),
        ({"n_embd": 9.5}, r"n_embd is 9\.5, not a whole number"),
        ({"norm_eps": "x"}, "norm_eps is 'x', not a number"),
        ({"bias": 1}, "bias is 1, not true or false"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm', not one of layernorm, rmsnorm"),
        ({"n_head": 5}, "n_head 5 does not divide"),
    ],
)
def test_a_preset_with_wrong_fields_names_one(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GPTConfig.preset("tiny", **change)
    wide = GPTConfig.preset("tiny", vocab_size=np.int64(300), rope_theta=20_000)
    assert (type(wide.vocab_size), type(wide.rope_theta)) == (int, float)


def test_impossible_shapes_and_unknown_presets_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="n_head 5 does not divide n_embd 96"):
        GPTConfig.preset("tiny", n_head=5).check()
    with pytest.raises(UsageError, match="did you mean 'gpt2'"):
        GPTConfig.preset("gtp2")
    with pytest.raises(UsageError, match="the model's n_layer is missing"):
        GPTConfig.from_dict({"vocab_size": 256, "block_size": 8})
