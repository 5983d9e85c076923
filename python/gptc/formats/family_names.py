"""The names of a family's tensors, in Hugging Face's folders and in GGUF files.

A stem of ours has one of theirs, or one for each part of its rows: queries, keys and values, or
gates and ups. {} is the layer, and in the names of experts a second one the expert.
"""

from __future__ import annotations

from collections.abc import Mapping

Stems = Mapping[str, str | tuple[str, ...]]

GPT2: Stems = {
    "norm_1": "transformer.h.{}.ln_1",
    "norm_2": "transformer.h.{}.ln_2",
    "attn.qkv": "transformer.h.{}.attn.c_attn",
    "attn.proj": "transformer.h.{}.attn.c_proj",
    "mlp.fc": "transformer.h.{}.mlp.c_fc",
    "mlp.proj": "transformer.h.{}.mlp.c_proj",
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "norm_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
LLAMA: Stems = {
    "norm_1": "model.layers.{}.input_layernorm",
    "norm_2": "model.layers.{}.post_attention_layernorm",
    "attn.qkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "attn.proj": "model.layers.{}.self_attn.o_proj",
    "mlp.fc": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "mlp.proj": "model.layers.{}.mlp.down_proj",
    "wte": "model.embed_tokens",
    "norm_f": "model.norm",
    "lm_head": "lm_head",
}
_MOE: Stems = {ours: name for ours, name in LLAMA.items() if ours not in ("mlp.fc", "mlp.proj")}
_BLOCK = "model.layers.{}.block_sparse_moe"
MIXTRAL: Stems = {
    **_MOE,
    "mlp.router": f"{_BLOCK}.gate",
    "mlp.experts.fc": (f"{_BLOCK}.experts.{{}}.w1", f"{_BLOCK}.experts.{{}}.w3"),
    "mlp.experts.proj": f"{_BLOCK}.experts.{{}}.w2",
}
_EXPERT = "model.layers.{}.mlp.experts.{}"
QWEN3_MOE: Stems = {
    **_MOE,
    "mlp.router": "model.layers.{}.mlp.gate",
    "mlp.experts.fc": (f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj"),
    "mlp.experts.proj": f"{_EXPERT}.down_proj",
}
PHI3: Stems = {
    **LLAMA,
    "attn.qkv": "model.layers.{}.self_attn.qkv_proj",
    "mlp.fc": "model.layers.{}.mlp.gate_up_proj",
}
GPT_NEOX: Stems = {
    "norm_1": "gpt_neox.layers.{}.input_layernorm",
    "norm_2": "gpt_neox.layers.{}.post_attention_layernorm",
    "attn.qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "attn.proj": "gpt_neox.layers.{}.attention.dense",
    "mlp.fc": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "mlp.proj": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "wte": "gpt_neox.embed_in",
    "norm_f": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
PHI: Stems = {
    "norm_1": "model.layers.{}.input_layernorm",
    "attn.qkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "attn.proj": "model.layers.{}.self_attn.dense",
    "mlp.fc": "model.layers.{}.mlp.fc1",
    "mlp.proj": "model.layers.{}.mlp.fc2",
    "wte": "model.embed_tokens",
    "norm_f": "model.final_layernorm",
    "lm_head": "lm_head",
}
GPTJ: Stems = {
    "norm_1": "transformer.h.{}.ln_1",
    "attn.qkv": tuple(f"transformer.h.{{}}.attn.{part}_proj" for part in "qkv"),
    "attn.proj": "transformer.h.{}.attn.out_proj",
    "mlp.fc": "transformer.h.{}.mlp.fc_in",
    "mlp.proj": "transformer.h.{}.mlp.fc_out",
    "wte": "transformer.wte",
    "norm_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
OLMO2: Stems = {
    **LLAMA,
    "attn.norm": "model.layers.{}.post_attention_layernorm",
    "mlp.norm": "model.layers.{}.post_feedforward_layernorm",
}
GEMMA3: Stems = {**OLMO2, "norm_2": "model.layers.{}.pre_feedforward_layernorm"}

_GGUF: Stems = {
    "norm_1": "blk.{}.attn_norm",
    "norm_2": "blk.{}.ffn_norm",
    "attn.proj": "blk.{}.attn_output",
    "attn.norm": "blk.{}.post_attention_norm",
    "mlp.proj": "blk.{}.ffn_down",
    "mlp.norm": "blk.{}.post_ffw_norm",
    "wte": "token_embd",
    "wpe": "position_embd",
    "norm_f": "output_norm",
    "lm_head": "output",
}
GGUF_JOINED: Stems = {**_GGUF, "attn.qkv": "blk.{}.attn_qkv", "mlp.fc": "blk.{}.ffn_up"}
GGUF_SPLIT: Stems = {
    **_GGUF,
    "attn.qkv": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    "attn.q_norm": "blk.{}.attn_q_norm",
    "attn.k_norm": "blk.{}.attn_k_norm",
    "mlp.fc": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
}
# Without gates.
GGUF_PLAIN: Stems = {**GGUF_SPLIT, "mlp.fc": "blk.{}.ffn_up"}
# A file has the matrices of all experts of a layer as one tensor; here each has a name.
GGUF_EXPERTS: Stems = {
    **{ours: name for ours, name in GGUF_SPLIT.items() if ours not in ("mlp.fc", "mlp.proj")},
    "mlp.router": "blk.{}.ffn_gate_inp",
    "mlp.experts.fc": ("blk.{}.ffn_gate_exps.{}", "blk.{}.ffn_up_exps.{}"),
    "mlp.experts.proj": "blk.{}.ffn_down_exps.{}",
}
