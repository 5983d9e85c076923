"""gpt_model_load, in C, computes what Python loads from the same folder, for each kind of folder.

The class: two readers of one format that do not agree. Also the program docs/generate.c: it prints
the tokens that Python's greedy decoding gives. tests/c/test_load.c damages folders.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptc
from gptc import Model
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import save
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.errors import EngineError
from gptc.formats import families
from gptc.formats.hf import CODECS
from gptc.formats.safetensors import TensorFile, tensor_chunks
from small_models import make_config, make_model

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2, untied, odd": {"family": "gpt2", "tied": False, "n_embd": 34, "n_ff": 37},
    "gpt2 without biases": {"family": "gpt2", "bias": False},
    "llama": {"family": "llama"},
    "llama, tied, odd": {"family": "llama", "tied": True, "n_ff": 37, "n_layer": 3},
    "llama, linear scaling": {
        "family": "llama", "rope_scaling": "linear", "rope_factor": 2.5,
    },
    "llama3": {
        "family": "llama", "rope_scaling": "llama3", "rope_factor": 8.0, "rope_low_freq": 1.0,
        "rope_high_freq": 4.0, "rope_original": 24, "rope_theta": 500000.0,
    },
    "llama, heads of 12 channels": {"family": "llama", "head_dim": 12, "n_ff": 37},
    "gpt2, heads of 5 channels": {"family": "gpt2", "head_dim": 5},
    "llama with biases": {
        "family": "llama", "qkv_bias": True, "attn_proj_bias": True, "mlp_bias": True,
    },
    "mistral": {"family": "llama", "window": 5},
    "qwen2": {"family": "llama", "qkv_bias": True, "tied": True},
    "qwen2, window": {"family": "llama", "qkv_bias": True, "window": 3},
    "qwen3": {"family": "llama", "qk_norm": True, "head_dim": 12},
    "qwen3, all": {
        "family": "llama", "qk_norm": True, "qkv_bias": True, "attn_proj_bias": True, "window": 4,
        "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 8, "rope_low_freq": 0.5,
        "rope_high_freq": 2.0, "rope_attention": 1.25,
    },
    "dynamic": {
        "family": "llama", "rope_scaling": "dynamic", "rope_factor": 6.0, "rope_original": 8,
    },
    "of no family": {"family": "llama", "qk_norm": True, "mlp_bias": True, "window": 4},
    "parallel": {
        "family": "llama", "parallel": True, "rope_dim": 4, "score_scale": 0.3,
        "embedding_scale": 2.0, "score_by_layer": True, "activation": "gelu_erf",
    },
    "one norm": {
        "family": "llama", "parallel": True, "one_norm": True, "head_bias": True,
        "norm": "layernorm", "norm_bias": True, "activation": "gelu",
    },
    "norms around": {
        "family": "llama", "norm_at": "both", "activation": "geglu", "n_head": 4, "n_kv_head": 4,
        "wide_qk_norm": True, "norm": "layernorm", "norm_bias": True, "score_cap": 1.5,
        "logit_cap": 2.5,
    },
    "byte": {"family": "byte"},
    "experts": {"family": "byte", "n_expert": 3, "n_expert_used": 1, "expert_norm": False},
    "crossed": {
        "family": "byte", "norm": "layernorm", "norm_weight": True, "pos": "rope", "bias": True,
        "rope_scaling": "linear", "rope_factor": 4.0, "norm_eps": 3e-4,
    },
}  # fmt: skip
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]], np.int32)


def folder_of(shape: str, path: Path, codec: str = "fp32") -> Path:
    with make_model(make_config(**SHAPES[shape])) as model:
        save(path / "model", model, codec=CODECS[codec])
    return path / "model"


def c_config(folder: Path) -> GPTConfig:
    struct = library.load().ffi.new("gpt_config *")
    library.call("gpt_config_load", str(folder).encode(), struct)
    return GPTConfig._from_c(struct)


def c_logits(folder: Path, vocab_size: int) -> Any:
    ffi, lib, _ = library.load()
    options = library.new_struct("gpt_options", n_threads=1, max_batch=1)
    model = ffi.new("gpt_model **")
    library.call("gpt_model_load", str(folder).encode(), options, model)
    logits = np.empty((*TOKENS.shape, vocab_size), np.float32)
    library.call(
        "gpt_model_logits", model[0], ffi.from_buffer("int32_t[]", TOKENS), *TOKENS.shape,
        ffi.from_buffer("float[]", logits),
    )  # fmt: skip
    lib.gpt_model_free(model[0])
    return logits


def check(folder: Path) -> None:
    with Model.load(folder, threads=1) as model:
        wanted = model.logits(TOKENS)
        found = c_config(folder)
        for field, value in model.config.to_dict().items():
            if isinstance(value, float):
                value = pytest.approx(value, 1e-6)  # C's are float32
            assert getattr(found, field) == value, field
    np.testing.assert_array_equal(c_logits(folder, wanted.shape[-1]), wanted)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_python(shape: str, codec: str, tmp_path: Path) -> None:
    check(folder_of(shape, tmp_path, codec))


@pytest.mark.parametrize("preset", ["tiny", "byte"])
def test_logits_of_presets(preset: str, tmp_path: Path) -> None:
    changes = {"n_layer": 2} if preset == "byte" else {}
    with Model.create(GPTConfig.preset(preset, **changes), training=False, seed=5) as model:
        model.save(tmp_path / "model")
    check(tmp_path / "model")


def test_a_checkpoint_of_a_run(run: Path) -> None:
    check(run / "ckpt-000006")


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.model_type)
def test_a_family_is_read_or_is_for_python(family: families.Family, tmp_path: Path) -> None:
    config = {"model_type": family.model_type, "n_embd": 0, "hidden_size": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EngineError) as caught:
        c_config(tmp_path)
    read = family.model_type in ("gpt2", "llama", "mistral", "qwen2", "qwen3")
    wanted = "is missing, or not a whole number" if read else "load the model in Python"
    assert wanted in str(caught.value)
    assert read or f'"{family.model_type}"' in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["layers", "rope_divisors"])
def test_shapes_that_are_for_python(field: str, tmp_path: Path) -> None:
    folder = folder_of("byte", tmp_path)
    change_config(folder, **{field: []})
    with pytest.raises(EngineError, match=f"no models with {field}: load this one in Python"):
        c_config(folder)


# ---- files that transformers writes ----


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    (folder / "checksums.json").unlink(missing_ok=True)


def rewrite(folder: Path, change: Any) -> None:
    """The tensors of a folder, with other names, or more or fewer of them."""
    file = TensorFile(folder / "model.safetensors")
    found = {name: np.array(file.read(name)) for name in file.shapes}
    change(found)
    shapes = {name: values.shape for name, values in found.items()}
    (folder / "new").write_bytes(b"".join(tensor_chunks(shapes, found.__getitem__)))
    (folder / "new").rename(folder / "model.safetensors")
    (folder / "checksums.json").unlink(missing_ok=True)


def bare(found: dict[str, Any]) -> None:
    for name in list(found):
        found[name.removeprefix("transformer.").removeprefix("model.")] = found.pop(name)


def head_alone(found: dict[str, Any]) -> None:
    found["lm_head.weight"] = found.pop("model.embed_tokens.weight")


def other_head(found: dict[str, Any]) -> None:
    found["lm_head.weight"] = found["transformer.wte.weight"] * np.float32(1.5)


def computed_tables(found: dict[str, Any]) -> None:
    found["transformer.h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    found["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ("gpt2", bare),
        ("llama", bare),
        ("llama, tied, odd", head_alone),
        ("gpt2", other_head),
        ("gpt2", computed_tables),
    ],
)
def test_tensors_as_others_name_them(shape: str, change: Any, tmp_path: Path) -> None:
    folder = folder_of(shape, tmp_path)
    rewrite(folder, change)
    check(folder)
    assert Checkpoint(folder).config.tied == (change is not other_head and shape != "llama")


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("gpt2", {"n_inner": None}),
        ("gpt2", {"n_positions": ..., "activation_function": "gelu_pytorch_tanh"}),
        ("gpt2", {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"tie_word_embeddings": ..., "layer_norm_epsilon": ...}),
        ("llama", {"head_dim": 8, "rope_scaling": None, "partial_rotary_factor": None}),
        ("llama", {"rope_theta": ..., "rms_norm_eps": ...}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.5}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 99.0}}),
        ("llama3", {"rope_scaling": ..., "rope_parameters": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 16}}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": {}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": None}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7,
                                    "mscale_all_dim": 1.0, "attention_factor": None}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
                   "original_max_position_embeddings": 16}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}),
        ("llama", {"model_type": ..., "layer_types": ["full_attention"] * 2}),
        ("llama", {"model_type": "mistral", "sliding_window": ..., "num_experts": 0}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}),
        ("qwen2", {"sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": True}),
        ("qwen2, window", {"sliding_window": ...}),
        ("qwen2, window", {"max_window_layers": ...}),
        ("qwen2, window", {"use_sliding_window": ...}),
    ],
)  # fmt: skip
def test_configs_as_others_write_them(shape: str, values: Any, tmp_path: Path) -> None:
    folder = folder_of(shape, tmp_path)
    if values.get("n_inner", 0) is None:
        with make_model(make_config("gpt2", n_ff=128)) as model:
            save(folder, model, replace=True)
    change_config(folder, **values)
    check(folder)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("gpt2", {"activation_function": "quick_gelu"}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": 1}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"n_embd": 0}),
        ("gpt2", {"n_head": None}),
        ("gpt2", {"tie_word_embeddings": None}),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attention_bias": True}),  # and the tensors have none
        ("llama", {"attention_bias": "yes"}),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("llama", {"layer_types": ["sliding_attention"] * 2}),
        ("llama", {"num_experts": 8}),
        ("llama", {"final_logit_softcapping": 30.0}),
        ("llama", {"hidden_size": 33}),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": -1}}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 1e9}}),
        ("llama", {"model_type": ..., "architectures": ["MixtralForCausalLM"]}),
        ("llama", {"model_type": "qwen3"}),  # whose heads have 128 channels
        ("mistral", {"sliding_window": 0}),
        ("qwen2, window", {"max_window_layers": 1}),
        ("qwen2, window", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen2, window", {"layer_types": ["sliding_attention"]}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"head_dim": 7}),
        ("llama", {"head_dim": -8}),
        ("llama", {"head_dim": 4}),  # the tensors are those of 8
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}),
        ("llama", {"rope_scaling": [2.0]}),
        ("llama", {"rope_theta": None}),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("llama", {"model_type": "mixtral"}),
        ("byte", {"gptc_config_version": 2}),
        ("byte", {"sliding_window": 4}),
        ("byte", {"norm_eps": 1e300}),
    ],
)
def test_python_and_c_refuse_the_same(shape: str, values: Any, tmp_path: Path) -> None:
    folder = folder_of(shape, tmp_path)
    change_config(folder, **values)
    with pytest.raises(gptc.GptcError):
        Model.load(folder)
    with pytest.raises(EngineError, match=r"config\.json|model\.safetensors") as caught:
        c_config(folder)
    assert caught.value.status == library.load().lib.GPT_ERR_FILE


# ---- the program ----


def test_the_program_of_the_documents(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    source = Path(__file__).resolve().parents[3] / "docs" / "generate.c"
    path, header = library.find_library()
    program = tmp_path / "generate"
    built = subprocess.run(
        [compiler, "-Wall", "-Wextra", source, f"-I{header.parent}", f"-L{path.parent}", "-lgpt",
         f"-Wl,-rpath,{path.parent}", "-o", program],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert not built.stderr
    folder = folder_of("llama", tmp_path)
    prompt = [str(token) for token in TOKENS[0]]
    done = subprocess.run([program, folder, "12", *prompt], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Model.load(folder) as model:
        wanted = TOKENS[0].tolist()
        for _ in range(12):
            wanted.append(int(model.logits(np.array([wanted], np.int32))[0, -1].argmax()))
    assert [int(line) for line in done.stdout.split()] == wanted[len(prompt) :]

    missing = subprocess.run([program, tmp_path, "1", "0"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
    assert "config.json" in missing.stderr
