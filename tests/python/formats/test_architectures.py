"""Families whose layers differ from Llama's: in, out, decoded token by token, and refused.

test_parity.py compares them with golden files of transformers.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import family_table
import reference
from gptc import Model
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora
from gptc.errors import GptcError, UsageError
from gptc.formats import gguf_names, gguf_write, hf, peft
from gptc.formats.registry import open_model

ROOT = Path(__file__).parents[3]
CASES = [pytest.param(case, id=case.name) for case in reference.ARCHITECTURES]
NOT_IN_GGUF = {
    "gptj": "models of the family gptj",
    "phi-grouped": "phi with tie_word_embeddings true",
    "cerebras-gpt": "the activation gelu_erf in gpt2, only gelu",
    "gpt2-relu": "the activation relu in gpt2",
    "smollm3-list": "these no_rope_layers, only each 4th layer",
    "neox-in-turn": "the activation gelu in gpt_neox, only gelu_erf",
    "gemma2-plain": "another scale of scores",
    "gemma3-types": "another scale of scores",
    "qwen3-moe-odds": "qwen3_moe with norm_topk_prob false",
}


def published(case: reference.Case, folder: Path) -> dict[str, Any]:
    """Writes a folder as another program would; returns its tensors."""
    parts = hf.parts(hf.config_from_json(case.config, "x"), hf.family_of(case.config))
    shapes = {part.name: part.shape for part in parts}
    tensors = reference.weights(shapes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_a_folder_comes_back_as_it_was(case: reference.Case, tmp_path: Path) -> None:
    tensors = published(case, tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    assert GPTConfig.from_dict(source.config.to_dict()) == source.config
    export_model(source, "hf", tmp_path / "again", weights_only=True)
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["model_type"] == case.kind
    assert Checkpoint(tmp_path / "again").config == source.config
    stored = load_file(tmp_path / "again/model.safetensors")
    assert stored.keys() == tensors.keys()
    for name, values in tensors.items():  # Gemma's norms are stored minus 1
        np.testing.assert_allclose(stored[name], values, atol=2e-7, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_has_the_model_or_names_what_is_lacking(
    case: reference.Case, tmp_path: Path
) -> None:
    published(case, tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    if reason := NOT_IN_GGUF.get(case.name):
        assert (case.name, "GGUF in") in family_table.MISSING
        with pytest.raises(GptcError, match=f"llama.cpp lacks {reason}") as caught:
            export_model(source, "gguf", tmp_path / "m.gguf", weights_only=True)
        assert "\n" not in str(caught.value)
        return
    export_model(source, "gguf", tmp_path / "m.gguf", weights_only=True)
    back = open_model(tmp_path / "m.gguf")
    assert back.config == replace(source.config, router_loss=0.0)  # which is of training alone
    for name, _, _ in source.config.parameters():
        assert np.array_equal(back.read(name), source.read(name)), name


def test_an_older_file_of_phi2_has_joined_queries_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(case_of("phi"), tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_write, "naming", partial(gguf_names.naming, joined=True))
        export_model(source, "gguf", tmp_path / "m.gguf", weights_only=True)
    back = open_model(tmp_path / "m.gguf")
    assert "blk.1.attn_qkv.bias" in back.tensors.shapes
    for name, _, _ in source.config.parameters():
        assert np.array_equal(back.read(name), source.read(name)), name


def test_longrope_goes_by_the_context_and_says_so(tmp_path: Path) -> None:
    published(case_of("phi3-short"), tmp_path / "model")
    imported = import_model(tmp_path / "model", tmp_path / "copy")
    assert any("more than 30 tokens, shorter texts" in note for note in imported.notes)
    tokens = np.arange(8, dtype=np.int32)
    with Model.load(tmp_path / "model", threads=1, max_batch=1, max_seq=30) as model:
        short = model.logits(tokens[None])[0, -1]
        assert np.allclose(model.session(1, 30).decode(tokens), short, atol=1e-5)
        longer = model.session(1, 31).decode(tokens)
    assert np.abs(longer - short).max() > 0.01


def test_adapters_of_channels_in_another_order_are_refused() -> None:
    config = hf.config_from_json(case_of("gptj").config, "config.json")
    with pytest.raises(GptcError, match=r"adapters of .*q_proj.weight are not supported"):
        peft.places(config, Lora(2, 4.0, ("q",)))
    assert len(peft.places(config, Lora(2, 4.0, ("proj", "fc", "mlp_proj")))) == 6


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("smollm3", "attention_bias", True),
        ("smollm3", "mlp_bias", True),
        ("olmo2", "attention_bias", True),
        ("gemma2", "attention_bias", True),
        ("gemma3", "attention_bias", True),
        ("pythia", "attention_bias", False),
    ],
)
def test_biases_that_llama_cpp_does_not_read_are_refused(
    name: str, key: str, value: bool, tmp_path: Path
) -> None:
    case = case_of(name)
    published(case._replace(config={**case.config, key: value}), tmp_path / "model")
    wanted = f"llama.cpp lacks {case.kind} with {key} {str(value).lower()}; export it with --to hf"
    with pytest.raises(GptcError, match=wanted):
        export_model(Checkpoint(tmp_path / "model"), "gguf", tmp_path / "m", weights_only=True)


def test_scores_of_models_that_llama_cpp_scales_by_the_width(tmp_path: Path) -> None:
    """Gemma 2 27B, which llama.cpp knows by its 46 layers."""
    case = case_of("gemma2")
    sizes = {"num_hidden_layers": 46, "query_pre_attn_scalar": 10}  # 40 / 4, and heads of 16
    published(case._replace(config={**case.config, **sizes}), tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    assert source.config.score_scale == pytest.approx(10**-0.5)
    export_model(source, "gguf", tmp_path / "m.gguf", weights_only=True)
    found = open_model(tmp_path / "m.gguf").config.score_scale
    assert found == pytest.approx(source.config.score_scale, rel=1e-7)
    sizes["query_pre_attn_scalar"] = 16  # the head size, of which 46 layers make another scale
    published(case._replace(config={**case.config, **sizes}), tmp_path / "other")
    with pytest.raises(GptcError, match=r"llama.cpp lacks another scale of scores"):
        export_model(Checkpoint(tmp_path / "other"), "gguf", tmp_path / "n", weights_only=True)


def test_a_gemma2_without_soft_caps_has_no_gguf_file(tmp_path: Path) -> None:
    case = case_of("gemma2")
    config = {**case.config, "attn_logit_softcapping": None}
    published(case._replace(config=config), tmp_path / "model")
    wanted = "llama.cpp lacks gemma2 without soft caps of scores and logits; export it with --to hf"
    with pytest.raises(GptcError, match=wanted):
        export_model(Checkpoint(tmp_path / "model"), "gguf", tmp_path / "m", weights_only=True)


@pytest.mark.parametrize("value", [0.0, -50.0, math.nan, math.inf, "x"])
@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_caps_of_a_gguf_file_are_numbers_above_0(
    key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(case_of("gemma2"), tmp_path / "model")
    source, metadata = Checkpoint(tmp_path / "model"), gguf_write._metadata
    with monkeypatch.context() as patch:
        changed = {f"gemma2.{key}": value}
        patch.setattr(gguf_write, "_metadata", lambda *given: {**metadata(*given), **changed})
        (tmp_path / "m.gguf").write_bytes(b"".join(gguf_write.model_chunks(source, None)))
    with pytest.raises(GptcError, match=rf"gemma2.{key} is {value!r}, not a number") as caught:
        open_model(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["score_cap", "logit_cap"])
def test_soft_caps_of_a_shape_are_0_or_above(field: str, value: float) -> None:
    config = hf.config_from_json(case_of("gemma2").config, "config.json")
    with pytest.raises(UsageError, match=rf"{field} is .*; it must be 0 .none. or above"):
        replace(config, **{field: value}).check()


def test_a_phi3_that_turns_whole_heads_is_a_mistral(tmp_path: Path) -> None:
    case = case_of("phi3")
    whole = {key: v for key, v in case.config.items() if key != "partial_rotary_factor"}
    tensors = published(case._replace(config=whole), tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    assert hf.model_type(source.config) == "mistral"
    export_model(source, "hf", tmp_path / "again", weights_only=True)
    stored = load_file(tmp_path / "again/model.safetensors")
    for fused, names in (("mlp.gate_up", ("gate", "up")), ("self_attn.qkv", ("q", "k", "v"))):
        kind = fused.partition(".")[0]
        parts = [stored[f"model.layers.1.{kind}.{name}_proj.weight"] for name in names]
        assert np.array_equal(np.concatenate(parts), tensors[f"model.layers.1.{fused}_proj.weight"])


@pytest.mark.parametrize("case", CASES)
def test_a_session_continues_as_a_batch(case: reference.Case, tmp_path: Path) -> None:
    published(case, tmp_path / "model")
    tokens = reference.batches(case)[0, 0, :-1].astype(np.int32)
    with Model.load(tmp_path / "model", threads=1, max_batch=1, max_seq=len(tokens)) as model:
        session, want = model.session(1, len(tokens)), model.logits(tokens[None])[0]
        session.decode(tokens[:5])
        for i in range(5, len(tokens)):
            got = session.decode(tokens[i : i + 1])
            assert np.linalg.norm(got - want[i]) < 1e-5 * np.linalg.norm(want[i]), i


def test_the_page_of_architectures_is_current() -> None:
    command = [sys.executable, ROOT / "tools" / "architectures_table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def case_of(name: str) -> reference.Case:
    return next(case for case in reference.ARCHITECTURES if case.name == name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pythia", {"rotary_pct": 0}, "rotary_pct is 0, not a number above 0 up to 1"),
        ("pythia", {"rotary_pct": 0.3}, "rotary_pct 0.3 turns 3 of 12 channels"),
        ("pythia", {"use_parallel_residual": "x"}, "'x', not true or false"),
        ("pythia", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported, only 'gelu'"),
        ("cerebras-gpt", {"activation_function": "quick_gelu"}, "only 'gelu_new'"),
        ("cerebras-gpt", {"scale_attn_by_inverse_layer_idx": 1}, "is 1, not true or false"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is not a list of 0 or 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True is not supported, only False"),
        ("phi", {"partial_rotary_factor": 0.3}, "partial_rotary_factor 0.3 turns 3 of 12 channels"),
        (
            "gptj",
            {"rotary_dim": 5},
            "rotary_dim is 5; it must be even, and at most the 12",
        ),
        ("gptj", {"rotary_dim": 14}, "rotary_dim is 14; it must be even, and at most the 12"),
        ("gptj", {"rotary_dim": None}, "lacks rotary_dim"),
        ("gptj", {"n_head": 5}, "n_head 5 does not divide n_embd 48"),
        ("olmo2", {"num_key_value_heads": 2}, "qk_norm over the width needs n_kv_head equal"),
        (
            "gemma2",
            {"attn_logit_softcapping": 0},
            "attn_logit_softcapping is 0, not a number above",
        ),
        ("gemma2", {"attn_logit_softcapping": math.nan}, "attn_logit_softcapping is nan, not a"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0, not a"),
        ("gemma2", {"final_logit_softcapping": math.inf}, "final_logit_softcapping is inf, not a"),
        ("gemma2", {"final_logit_softcapping": True}, "final_logit_softcapping is True, not a"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0, not a whole number above 0"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not"),
        ("gemma3", {"sliding_window": 0}, "sliding_window is 0, not a whole number above 0"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, not a number"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types must be full_attention or"),
        ("gemma3", {"rope_local_base_freq": 5e3}, "rotary base of 5000.0 of windowed layers"),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_type 'linear'"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope"}},
            "needs short_factor and long_factor, lists",
        ),
        (
            "phi3-long",
            {"original_max_position_embeddings": 0},
            "embeddings is 0, not a whole number",
        ),
        (
            "phi3-long",
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
                "max_position_embeddings": 10**400,
            },
            "max_position_embeddings is 10{39}, not a whole number",
        ),
        (
            "phi3-long",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": 5}},
            "needs short_factor and long_factor, lists",
        ),
        ("phi3-long", {"head_dim": 8}, "rope_divisors has 10 numbers, not 8"),
        (
            "phi3-long",
            {"rope_scaling": {"type": "su", "short_factor": [1.0, 0], "long_factor": [1.0, 1.0]}},
            "short_factor of rope_scaling is 0, not a number above 0",
        ),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual True is not"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm True is not supported"),
    ],
)
def test_what_is_not_computed_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GptcError, match=message) as caught:
        hf.config_from_json({**case_of(name).config, **changes}, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("x", "not a list of records"),
        ([{"rope": True}] * 5, r"layers\[0\] is .* not a record of rope, rope_theta, window"),
        ([{"rope": 1, "rope_theta": 1e4, "window": 0}] * 5, "not true or false, and two numbers"),
        ([{"rope": True, "rope_theta": 1e4, "window": 0}] * 4, "4 records, and n_layer is 5"),
        ([{"rope": True, "rope_theta": 1e4, "window": -1}] * 5, "window of layer 0 is -1"),
    ],
)
def test_records_of_layers_are_checked(layers: Any, message: str) -> None:
    config = hf.config_from_json(case_of("smollm3").config, "x").to_dict()
    with pytest.raises(GptcError, match=message):
        GPTConfig.from_dict({**config, "layers": layers}).check()
