"""Folders with small tokenizers whose special tokens are those of many chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptc.tokenizer.byte_level import ByteLevel
from gptc.tokenizer.definition import Added, byte_level_definition, scored_definition
from gptc.tokenizer.patterns import GPT2
from gptc.tokenizer.scored import Scored
from vocabularies import PIECES, TYPES

SORTS = ("byte-level", "scored", "scored, with the first space only")
CONTROL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
WORDS = ["<think>", "</think>", "<tool_call>"]  # added, though not special
STRIPPED = ("<|end|>", "<|user|>")  # with the space to their right, as in Phi-3


def _added(first: int) -> dict[int, Added]:
    texts = enumerate([*CONTROL, *WORDS], first)
    return {
        id: Added(id, text, special=text not in WORDS, rstrip=text in STRIPPED)
        for id, text in texts
    }


def definition(sort: str) -> dict[str, Any]:
    """A tokenizer.json of this sort."""
    if sort == "byte-level":
        merges = [
            (b"h", b"e"),
            (b"l", b"l"),
            (b" ", b"t"),
            (b"<", b"|"),
            (b"|", b">"),
            (b"i", b"m"),
        ]
        pieces = [bytes([i]) for i in range(256)] + [a + b for a, b in merges]
        special = {text: len(pieces) + i for i, text in enumerate(("<unk>", "<s>", "</s>"))}
        pieces += [text.encode() for text in special]
        saved = byte_level_definition(ByteLevel(pieces, special, GPT2, merges))
        n = len(pieces)
    else:
        scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)]
        first_only = sort != "scored"
        saved = scored_definition(Scored(PIECES, scores, TYPES), first_only)
        n = len(PIECES)
    saved["added_tokens"] += [token._asdict() for token in _added(n).values()]
    return saved


def write_folder(folder: Path, sort: str) -> Path:
    """tokenizer.json and tokenizer_config.json of this sort."""
    (folder / "tokenizer.json").write_text(json.dumps(definition(sort)))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<|end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
