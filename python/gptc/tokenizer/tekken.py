"""tekken.json, the file of Mistral's byte-level tokenizers, as the package mistral-common reads it.

Special tokens come first; after them, token r of the vocabulary has the id of their number + r.
"""

from __future__ import annotations

import base64
from typing import Any

from gptc.errors import GptcError
from gptc.tokenizer.byte_level import ByteLevel
from gptc.tokenizer.definition import byte_level_definition
from gptc.tokenizer.outline import dump_definition
from gptc.tokenizer.patterns import Cut
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer

# Of files that do not list them.
_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]  # fmt: skip
_MOST_SPECIAL = 1 << 16


def is_tekken(saved: Any) -> bool:
    """Whether the JSON of a file is that of a tekken.json."""
    config = saved.get("config") if isinstance(saved, dict) else None
    return isinstance(config, dict) and "pattern" in config and isinstance(saved.get("vocab"), list)


def read_tekken(saved: dict[str, Any], where: str) -> HuggingFaceTokenizer:
    """The tokenizer of a tekken.json. GptcError if the file is damaged."""
    try:
        names = _special(saved)
        n_pieces = int(saved["config"]["default_vocab_size"]) - len(names)
        entries = saved["vocab"][: max(n_pieces, 0)]
        ranked = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        in_order = [entry["rank"] for entry in entries] == list(range(len(entries)))
        cut = Cut((str(saved["config"]["pattern"]),), whole=True)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        in_order = False
    if not in_order or not 0 < n_pieces == len(set(ranked)) or b"" in ranked:
        raise GptcError(f"{where} is damaged, or not a tekken.json of Mistral: copy it again")
    special = {name: id for id, name in enumerate(names)}
    pieces = [name.encode() for name in names] + ranked
    definition = byte_level_definition(ByteLevel(pieces, special, cut))
    tokenizer = HuggingFaceTokenizer(dump_definition(definition), where=where)
    tokenizer.bos = special.get("<s>")
    return tokenizer


def _special(saved: dict[str, Any]) -> list[str]:
    """The names of special tokens by id. ValueError for two of one name."""
    n = int(saved["config"]["default_num_special_tokens"])
    listed = saved.get("special_tokens")
    given = enumerate(_SPECIAL[:n])
    if listed is not None:
        given = ((entry["rank"], entry["token_str"]) for entry in listed)  # type: ignore[assignment]
    names = {id: str(name) for id, name in given}
    if not 0 <= n <= _MOST_SPECIAL or not names.keys() <= set(range(n)):
        raise ValueError(n)
    found = [names.get(id, f"<SPECIAL_{id}>") for id in range(n)]
    if len(set(found)) < n:
        raise ValueError(n)
    return found
