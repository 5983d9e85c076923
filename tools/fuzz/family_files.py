"""Valid small models of each of Hugging Face's families, and the functions that read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mutate
from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.formats import families, hf
from gptc.tokenizer.registry import make_tokenizer
from model_files import Target, read_model

_GPT2 = {"vocab_size": 256, "n_positions": 8, "n_layer": 2, "n_embd": 8, "n_head": 2}
_LLAMA = {
    "vocab_size": 256, "max_position_embeddings": 8, "num_hidden_layers": 2, "hidden_size": 8,
    "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]}
# What a family has that its defaults lack; "longrope" is a second Phi-3.
_MORE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 3, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "norm_topk_prob": True,
    },
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": 4},
    "stablelm": {"partial_rotary_factor": 0.5},
    "gptj": {"rotary_dim": 2},
    "olmo2": {"num_key_value_heads": 4},
    "phi3": {"partial_rotary_factor": 0.5},
    "longrope": {"rope_scaling": _LONGROPE, "original_max_position_embeddings": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 4},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 4},
}  # fmt: skip
_IN_C = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gptc")
_OURS = {
    "n_layer": 2, "n_head": 4, "n_embd": 16, "n_ff": 16, "head_dim": 6, "pos": "rope",
    "rope_dim": 4,
    "parallel": True, "score_scale": 0.5, "score_cap": 9.0, "logit_cap": 9.0, "qk_norm": True,
    "embedding_scale": 2.0, "n_expert": 3, "mlp_bias": False, "qkv_bias": True,
    "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 4, "rope_low_freq": 0.5,
    "rope_high_freq": 2.0, "rope_attention": 1.5,
}  # fmt: skip
_DIVIDED = ("llama", "smollm3", "gpt_neox", "stablelm", "phi", "phi3", "longrope", "olmo2")


def targets(folder: Path) -> dict[str, Target]:
    """config.json of each family, read in Python with its weights and in C, and a GGUF file."""
    found: dict[str, Target] = {}
    kinds = {family.model_type: family for family in families.FAMILIES}
    for name, family in [*kinds.items(), ("longrope", kinds["phi3"])]:
        path = folder / name
        data = _config(name, family)
        _save(path, hf.config_from_json(data, "config.json"), family.model_type)
        _of_folder(path, name, found)
        if family.gguf:
            gguf = folder / f"{name}.gguf"
            export_model(open_checkpoint(path), "gguf", gguf)
            found[f"gguf-{name}"] = Target(gguf, partial(read_model, gguf, False), mutate.gguf)
    layers = [{"rope": rope, "rope_theta": 100.0, "window": 4} for rope in (True, False)]
    ours = GPTConfig.preset("byte", block_size=8, **_OURS)
    mixed = GPTConfig.from_dict({**ours.to_dict(), "layers": layers})
    for name, config in (("gptc", ours), ("gptc-layers", mixed)):
        _save(folder / name, config, "gptc")
        _of_folder(folder / name, name, found)
    return found


def _of_folder(path: Path, name: str, found: dict[str, Target]) -> None:
    file = path / "config.json"
    found[f"config.json-{name}"] = Target(file, partial(_read, path), mutate.json_value)
    if name in _IN_C:
        in_c = path.with_name(f"{name}-c")
        shutil.copytree(path, in_c)
        read = partial(_read_in_c, str(in_c).encode())
        found[f"c-config-{name}"] = Target(in_c / "config.json", read, mutate.json_value)


def _config(name: str, family: families.Family) -> dict[str, Any]:
    """A config.json with all that its family names."""
    sizes: Mapping[str, Any] = _GPT2 if family.gpt2_keys else _LLAMA
    found = {**family.defaults, **sizes, "model_type": family.model_type, **_MORE.get(name, {})}
    if name in _DIVIDED:  # no head_dim of their own
        found["hidden_size"] = found["num_attention_heads"] * found["head_dim"]
    return found


def _save(path: Path, config: GPTConfig, kind: str) -> None:
    """A folder without checksums, as that family's."""
    with Model.create(config, threads=1, training=False) as model:
        model.save(path, make_tokenizer("bytes"))
    (path / "checksums.json").unlink()
    written = json.loads((path / "config.json").read_bytes())
    assert written["model_type"] == kind, (written, kind)


def _read(path: Path) -> None:
    source = open_checkpoint(path)
    for name, _, _ in source.config.parameters():
        source.read(name)
    hf.config_to_json(source.config)


def _read_in_c(path: bytes) -> None:
    library.call("gpt_config_load", path, library.load().ffi.new("gpt_config *"))
