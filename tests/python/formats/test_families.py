"""Folders of each family compute what their config.json asks for, and are given back as they came.

The class: a feature that is read wrongly, ignored, or lost on the way out. plain_llama.py computes
the same in NumPy; test_parity.py compares with transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import family_table
import plain_llama
import reference
from gptc import Model
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import families, gguf, gguf_write, hf, layout
from gptc.formats.registry import open_model
from small_models import make_checkpoint, make_config

LIKE_LLAMA = [case for case in reference.CASES if case.kind == "llama"] + reference.FAMILIES
IDS = [case.name for case in LIKE_LLAMA]


def published(case: reference.Case, folder: Path) -> dict[str, Any]:
    """Writes a folder as another program would; returns its tensors."""
    shapes = {part.name: part.shape for part in hf.parts(hf.config_from_json(case.config, "x"))}
    tensors = reference.weights(shapes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def logits_of(path: Path, tokens: Any) -> Any:
    with Model.load(path, threads=1, max_batch=1, max_seq=len(tokens)) as model:
        return model.logits(tokens[None])[0]


def error(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


# ---- in and out ----


@pytest.mark.parametrize("case", LIKE_LLAMA, ids=IDS)
def test_a_folder_a_gguf_file_and_back(case: reference.Case, tmp_path: Path) -> None:
    tensors = published(case, tmp_path / "model")
    tokens = reference.batches(case)[0, 0, :-1].astype(np.int32)
    wanted = plain_llama.logits(case.config, tensors, tokens)
    assert error(logits_of(tmp_path / "model", tokens), wanted) < 2e-5

    source = Checkpoint(tmp_path / "model")
    export_model(source, "hf", tmp_path / "again", weights_only=True)
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert Checkpoint(tmp_path / "again").config == source.config
    stored = load_file(tmp_path / "again/model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(np.array_equal(stored[name], tensors[name]) for name in tensors)
    assert error(plain_llama.logits(again, stored, tokens), wanted) < 1e-6

    if case.name == "qwen3-biases":
        with pytest.raises(GptcError, match=r"llama\.cpp lacks qwen3 with attention_bias true"):
            export_model(source, "gguf", tmp_path / "m.gguf", weights_only=True)
        return
    notes = export_model(source, "gguf", tmp_path / "m.gguf", weights_only=True).notes
    assert any("beta_fast 32" in note for note in notes) == (case.name == "qwen3-yarn")
    if source.config.rope_scaling == "dynamic":  # which llama.cpp lacks
        assert any("no dynamic rotary scaling" in note for note in notes)
        assert open_model(tmp_path / "m.gguf").config.block_size == source.config.rope_original
        return
    assert any("without attention windows" in note for note in notes) == bool(source.config.window)
    back = open_model(tmp_path / "m.gguf")
    assert back.config == source.config
    for name, _, _ in source.config.parameters():
        assert np.array_equal(back.read(name), source.read(name)), name
    for theirs, ours in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        for leaf in ("weight", "bias"):
            if (full := f"model.layers.1.self_attn.{theirs}.{leaf}") in tensors:
                heads = case.config[
                    f"num_{'attention' if theirs == 'q_proj' else 'key_value'}_heads"
                ]
                pairs = case.kind in ("llama", "mistral")  # llama.cpp's convert_hf_to_gguf.py
                wanted = permuted(tensors[full], heads) if pairs else tensors[full]
                assert np.array_equal(back.tensors.read(f"blk.1.{ours}.{leaf}"), wanted), full


def permuted(rows: Any, heads: int) -> Any:
    """Channel i of each head, then channel i + HS/2, and so on."""
    of_heads = rows.reshape(heads, len(rows) // heads, -1)
    half = of_heads.shape[1] // 2
    order = [channel for i in range(half) for channel in (i, i + half)]
    return of_heads[:, order].reshape(rows.shape)


@pytest.mark.parametrize("case", LIKE_LLAMA, ids=IDS)
def test_a_session_continues_as_a_batch(case: reference.Case, tmp_path: Path) -> None:
    published(case, tmp_path / "model")
    tokens = reference.batches(case)[0, 0, :-1].astype(np.int32)
    with Model.load(tmp_path / "model", threads=1, max_batch=1, max_seq=len(tokens)) as model:
        session = model.session(1, len(tokens))
        session.decode(tokens[:5])
        for i in range(5, len(tokens)):
            last = session.decode(tokens[i : i + 1])
            if case.name != "llama-dynamic" or i < 24:
                assert error(last, model.logits(tokens[None, : i + 1])[0, -1]) < 1e-5


def test_frequencies_grow_with_a_session_and_shrink_again(tmp_path: Path) -> None:
    """With dynamic scaling, a call has the frequencies of its longest sequence."""
    (case,) = [case for case in LIKE_LLAMA if case.name == "llama-dynamic"]
    tensors = published(case, tmp_path / "model")
    tokens = reference.batches(case)[0, 0, :-1].astype(np.int32)
    with Model.load(tmp_path / "model", threads=1, max_batch=1, max_seq=len(tokens)) as model:
        session = model.session(1, len(tokens))
        for length in (31, 40, 20, 36):  # beyond 24, further, within, and beyond again
            wanted = plain_llama.logits(case.config, tensors, tokens[:length])[-1]
            session.rewind(0, 0)
            assert error(session.decode(tokens[:length]), wanted) < 2e-5, length
            assert error(model.logits(tokens[None, :length])[0, -1], wanted) < 2e-5, length


# ---- the table ----


def test_c_refuses_the_same_features() -> None:
    """The list is written in Python and in C: the keys, and the numbers that ask for nothing."""
    source = Path(__file__).parents[3] / "csrc" / "files" / "config_json.c"
    rows = source.read_text().split("} features[] = {")[1].split("};")[0]
    in_c = dict(re.findall(r'\{"(\w+)", (\w+)\}', rows))
    assert list(in_c) == list(families.FEATURES)
    for key, (values, _) in families.FEATURES.items():
        numbers = {float(value) for value in values if isinstance(value, int | float)}
        assert numbers == (set() if in_c[key] == "NAN" else {float(in_c[key])}), key


def test_each_family_has_a_paper_and_is_found_by_its_names() -> None:
    for family in families.FAMILIES:
        assert "arXiv" in family.paper or "et al." in family.paper
        assert families.by_model_type(family.model_type) is family
        assert families.by_model_type(None, [family.model_class]) is family
        found = families.by_gguf(family.gguf)
        assert (found is None) == (not family.gguf)
        assert found is None or found.paired == family.paired


@pytest.mark.parametrize("case", LIKE_LLAMA, ids=IDS)
def test_gguf_files_have_the_tensors_that_the_gguf_package_lists(case: reference.Case) -> None:
    gguf_package = pytest.importorskip("gguf")
    config = hf.config_from_json(case.config, "x")
    family = families.of(config)
    assert family is not None
    architecture = {name: a for a, name in gguf_package.MODEL_ARCH_NAMES.items()}[family.gguf]
    tensors = gguf_package.MODEL_TENSORS[architecture]
    known = {gguf_package.TENSOR_NAMES[tensor].replace("{bid}", "{}") for tensor in tensors}
    ours = {part.name.rpartition(".")[0] for part in layout.parts(config, gguf.naming(family))}
    assert {re.sub(r"blk\.\d+", "blk.{}", name) for name in ours} <= known


@pytest.mark.parametrize("case", reference.FAMILIES, ids=[case.name for case in reference.FAMILIES])
def test_a_model_is_written_as_the_family_that_computes_it(case: reference.Case) -> None:
    config = hf.config_from_json(case.config, "x")
    expected = {"qwen3-biases": "qwen3", "smollm2": "llama"}.get(case.name, case.kind)
    assert hf.model_type(config) == expected
    written = hf.config_to_json(config)
    assert hf.config_from_json(written, "x") == config
    assert GPTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True, "mlp_bias": True},
        {"window": 4, "attn_proj_bias": True},
        {"attn_proj_bias": True},
        {
            "rope_scaling": "dynamic",
            "rope_factor": 2.0,
            "rope_original": 8,
        },  # for 16 tokens, not 48
        {"bias": True},
        {"n_embd": 30, "head_dim": 8, "qk_norm": False, "mlp_bias": True},
    ],
)
def test_a_model_of_no_family_keeps_our_names(changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(make_config("llama", **changes), folder=tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "gptc"
    assert Checkpoint(tmp_path / "model").config == source.config
    with pytest.raises(GptcError, match="with these biases, norms and windows"):
        export_model(source, "gguf", tmp_path / "m.gguf", weights_only=True)


@pytest.mark.parametrize(
    ("to", "family", "message"),
    [("llama2.c", "llama", "it has {}"), ("heimerl", "byte", "byte"), ("llm.c", "gpt2", "family")],
)
@pytest.mark.parametrize("field", [*families.BIASES, "qk_norm", "window"])
def test_other_formats_refuse_what_they_cannot_hold(
    to: str, family: str, message: str, field: str, tmp_path: Path
) -> None:
    if family == "gpt2" and field in families.BIASES:
        return  # it has them all
    changes = {field: 5 if field == "window" else True}
    source = make_checkpoint(make_config(family, **changes), folder=tmp_path / "model")
    with pytest.raises(GptcError, match=message.format(field)):
        export_model(source, to, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma", "final_logit_softcapping": 3.0, "hidden_activation": "quick"},
         r"'gemma' is not one of gpt2, llama, mistral, [^(]*gptc \(gptc lacks a soft cap on "
         r"logits, the activation quick\)"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, r"'deepseek_v3' .* lacks experts"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts is 0, not a whole"),
        ({"model_type": "mixtral", "num_experts": 3, "num_experts_per_tok": 4},
         "num_experts_per_tok is 4, and there are 3 experts"),
        ({"model_type": "mixtral", "num_experts_per_tok": 0}, "num_experts_per_tok is 0, not a wh"),
        ({"model_type": "mixtral", "num_local_experts": 129}, "n_expert is 129; it must be betw"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not"),
        ({"model_type": "mixtral", "output_router_logits": True, "router_aux_loss_coef": "x"},
         "router_aux_loss_coef is 'x', not a number above 0"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers \[0\] is not supp"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step 2 is not"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": 1}, "norm_topk_prob is 1, not true"),
        ({"model_type": "bloom"}, r"'bloom' is not one of [^(]*, gptc$"),
        ({"num_experts": 8}, "num_experts 8 is not supported, only None"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size 8192 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of several kinds"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
         "max_window_layers with layers of several kinds is not supported"),
        ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window is 'x', not a whole"),
        ({"hidden_size": 42}, "n_head 4 does not divide n_embd 42"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
         "rope_scaling needs short_factor and long_factor, lists of one length"),
        ({"rope_scaling": {"rope_type": "other", "factor": 2.0}},
         "rope_type 'other' is not supported, only linear, dynamic, llama3, yarn, longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": "x", "mscale_all_dim": 1}},
         "mscale of rope_scaling is 'x', not a number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 10**400}}, "too large a number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 10**400}}, "factor of rope_scaling is 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 10**400},
         "max_position_embeddings is 1000"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 10**400}},
         "attention_factor of rope_scaling is 1000"),
        ({"num_hidden_layers": 10**11, "layer_types": ["full_attention"]}, "layer_types with"),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, "'no', not true or false"),
        ({"model_type": "x", "hidden_act": "a\nb"}, r"\(gptc lacks its activation\)"),
        ({"model_type": "x", "hidden_act": {"a": 1}}, r"\(gptc lacks its activation\)"),
        ({"model_type": [1], "hidden_activation": []}, r"\(gptc lacks its activation\)"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "for full_attention alone"),
    ],
)  # fmt: skip
def test_a_config_json_with_other_features(changes: dict[str, Any], message: str) -> None:
    llama = next(case for case in reference.FAMILIES if case.name == "smollm2")
    with pytest.raises(GptcError, match=message) as caught:
        hf.config_from_json({**llama.config, **changes}, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "gemma", "gemma.final_logit_softcapping": 30.0},
         r"architecture is 'gemma', not one of gpt2, llama, [^(]* \(gptc lacks a soft cap"),
        ({"llama.expert_count": 8}, "llama.expert_used_count is None, not a whole number"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"llama.attention.sliding_window": "x"}, "sliding_window is 'x', not a whole number"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type 'longrope' is not supported"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
          "llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.5}, "at least 1"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
          "llama.rope.scaling.original_context_length": "x"}, "rope_original is 'x'"),
    ],
)  # fmt: skip
def test_a_gguf_file_with_other_features(
    keys: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(make_config("llama"), folder=tmp_path / "model")
    metadata = gguf_write._metadata
    with monkeypatch.context() as patch:
        patch.setattr(gguf_write, "_metadata", lambda *given: {**metadata(*given), **keys})
        (tmp_path / "m.gguf").write_bytes(b"".join(gguf.model_chunks(source, None)))
    with pytest.raises(GptcError, match=message) as caught:
        open_model(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the table of what was compared ----


def test_the_table_of_the_docs_has_each_family_and_each_comparison() -> None:
    """`pytest -m parity tests/python/test_parity.py --family-table` writes it."""
    _, inside, _ = family_table.parts_of_page()
    _, _, *rows = inside.splitlines()
    for case, row in zip(family_table.CASES, rows, strict=True):
        cells = row.strip("| ").split(" | ")
        assert cells[:2] == [case.name, case.kind]
        assert cells[2].strip() == family_table.features(case)
        for column, value in zip(family_table.COLUMNS, cells[3:], strict=True):
            if (case.name, column) in family_table.MISSING:
                assert value == "none"
            elif value not in ("same", "same bits"):
                assert 0 < float(value) < 1e-4, (case.name, column)
    assert {case.kind for case in family_table.CASES} == {f.model_type for f in families.FAMILIES}
