"""The names of the tensors of GGUF files. A matrix is (out, in) as ours.

The matrices of a layer's experts are one tensor (experts, out, in), "blk.0.ffn_up_exps.weight".
Here each has a name, "blk.0.ffn_up_exps.3.weight".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gptc.engine.config import MOST_EXPERTS
from gptc.formats import layout
from gptc.formats.families import Family
from gptc.formats.layout import Naming
from gptc.formats.model_file import Entry

_STACKED = re.compile(r"(.*_exps)\.(weight)")
_EXPERT = re.compile(r"(.*_exps)\.\d+\.(weight)")


def naming(family: Family, joined: bool = False) -> Naming:
    """The names of a family's tensors. Older files of Phi-2 have queries, keys, values joined."""
    stems = {**family.gguf_stems}
    if joined and not family.paired:
        stems["attn.qkv"] = "blk.{}.attn_qkv"
    return Naming(layout.with_leaves(stems), paired=family.paired)


def split_experts(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a file, with a matrix of each expert in place of all of them."""
    found = {}
    for name, entry in entries.items():
        stacked, (codec, shape, offset) = _STACKED.fullmatch(name), entry
        if stacked is None or len(shape) != 3 or shape[0] > MOST_EXPERTS:
            found[name] = entry
            continue
        for i in range(shape[0]):
            place = offset + i * codec.n_bytes(shape[1:])
            found[f"{stacked[1]}.{i}.{stacked[2]}"] = Entry(codec, shape[1:], place)
    return found


def stacked(name: str) -> str:
    """The name of the tensor in a file that holds this one."""
    expert = _EXPERT.fullmatch(name)
    return f"{expert[1]}.{expert[2]}" if expert else name
