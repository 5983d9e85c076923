"""The names of the tensors of GGUF files. A matrix is (out, in) as ours."""

from __future__ import annotations

from gptc.formats import layout
from gptc.formats.families import Family
from gptc.formats.layout import Naming

GPT2 = Naming(
    layout.with_leaves(
        {
            "norm_1": "blk.{}.attn_norm",
            "norm_2": "blk.{}.ffn_norm",
            "attn.qkv": "blk.{}.attn_qkv",
            "attn.proj": "blk.{}.attn_output",
            "mlp.fc": "blk.{}.ffn_up",
            "mlp.proj": "blk.{}.ffn_down",
            "wte": "token_embd",
            "wpe": "position_embd",
            "norm_f": "output_norm",
            "lm_head": "output",
        }
    )
)
LLAMA = Naming(
    layout.with_leaves(
        {
            "norm_1": "blk.{}.attn_norm",
            "norm_2": "blk.{}.ffn_norm",
            "attn.qkv": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
            "attn.q_norm": "blk.{}.attn_q_norm",
            "attn.k_norm": "blk.{}.attn_k_norm",
            "attn.proj": "blk.{}.attn_output",
            "mlp.fc": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
            "mlp.proj": "blk.{}.ffn_down",
            "wte": "token_embd",
            "norm_f": "output_norm",
            "lm_head": "output",
        }
    )
)


def naming(family: Family) -> Naming:
    """The names of a family's tensors."""
    return GPT2 if family.gguf == "gpt2" else LLAMA._replace(paired=family.paired)
