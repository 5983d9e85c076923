"""The types of a GGUF file's tensors: one for each --dtype, or llama.cpp's mix of several.

The mixes are those of llama.cpp (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp):
finer types for the head, and for some layers' values and what leads back to the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from gptc.engine.config import GPTConfig
from gptc.formats.blocks import Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0
from gptc.formats.layout import Part
from gptc.formats.numbers import BF16, F16, F32, Codec


class Mix(NamedTuple):
    """Types by tensor; `file_type` is llama.cpp's number of the mix."""

    file_type: int
    usual: Codec
    head: Codec
    """Of the matrix that makes logits: the head, or an embedding that is one."""
    joined: Codec
    """Of queries, keys and values in one tensor."""
    finer: Codec
    """Of values and down projections in some layers."""


def _alone(file_type: int, codec: Codec) -> Mix:
    return Mix(file_type, codec, codec, codec, codec)


MIXES = {
    "fp32": _alone(0, F32),
    "fp16": _alone(1, F16),
    "bf16": _alone(32, BF16),
    "q8_0": _alone(7, Q8_0),
    "q6_k": _alone(18, Q6_K),
    "q5_k_m": Mix(17, Q5_K, Q6_K, Q6_K, Q6_K),
    "q4_k_m": Mix(15, Q4_K, Q6_K, Q5_K, Q6_K),
    "q4_0": Mix(2, Q4_0, Q6_K, Q4_0, Q4_0),
}
PACKED = "packed"
"""The dtype of an export whose tensors have the types of the model's own file."""
# llama.cpp's numbers of files whose matrices are mostly of one type (its enum llama_ftype).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10}
FILE_TYPES |= {"Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30}
FILE_TYPES |= {"BF16": 32, "F64": 0}
# For rows that are not whole blocks of 256, and then for those that are not of 32 either.
_SMALLER_BLOCKS: Mapping[Codec, Codec] = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}


def codec_of(part: Part, mix: Mix, config: GPTConfig) -> Codec:
    """The type of a tensor: as in llama.cpp, vectors, positions and routers stay float32.

    So does a matrix whose rows are not whole blocks of any of the types.
    """
    if len(part.shape) == 1 or part.name == "position_embd.weight" or "ffn_gate_inp" in part.name:
        return F32
    wanted = _wanted(part.name, mix, config)
    if not wanted.fits(part.shape):
        wanted = _SMALLER_BLOCKS.get(wanted, F32)
    return wanted if wanted.fits(part.shape) else F32


def _wanted(name: str, mix: Mix, config: GPTConfig) -> Codec:
    if name == ("token_embd.weight" if config.tied else "output.weight"):
        return mix.head
    if "attn_qkv" in name:
        return mix.joined
    layer = re.match(r"blk\.(\d+)\.(attn_v|ffn_down)\.", name)
    return mix.finer if layer and _is_finer(int(layer[1]), config.n_layer) else mix.usual


def _is_finer(layer: int, n_layer: int) -> bool:
    """Whether a layer has more bits: the first and the last eighth, and a third of the others."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2
