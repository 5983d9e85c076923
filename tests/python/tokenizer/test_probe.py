"""Two tokenizers that cut any text of the probe in different ways are not taken for the same.

The class: a check that compares too little. Each pair here differs in one thing alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptc.errors import GptcError
from gptc.tokenizer.probe import check_tokens
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from vocabularies import byte_level


def changed(folder: Path, change: Any) -> HuggingFaceTokenizer:
    """A small tokenizer of GPT-2's sort with one added word, after a change of its definition."""
    definition = json.loads(byte_level(folder).read_text())
    id = 1 + max(definition["model"]["vocab"].values())
    word = {**definition["added_tokens"][0], "id": id, "content": "spouse", "special": False}
    definition["added_tokens"].append(word)
    change(definition)
    return HuggingFaceTokenizer(json.dumps(definition))


def no_merges(definition: Any) -> None:
    definition["model"]["merges"].clear()


def without_word(definition: Any) -> None:
    del definition["added_tokens"][-1]


def word_takes_spaces(definition: Any) -> None:
    definition["added_tokens"][-1]["lstrip"] = True


def alone_only(definition: Any) -> None:
    definition["added_tokens"][-1]["single_word"] = True


def begins_with_space(definition: Any) -> None:
    definition["pre_tokenizer"]["add_prefix_space"] = True


def normalizes(definition: Any) -> None:
    definition["normalizer"] = {"type": "NFC"}


def lowers(definition: Any) -> None:
    definition["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    "change",
    [
        no_merges, without_word, word_takes_spaces, alone_only,
        begins_with_space, normalizes, lowers,
    ],
)  # fmt: skip
def test_a_difference_is_found(tmp_path: Path, change: Any) -> None:
    ours = changed(tmp_path, lambda definition: None)
    check_tokens(ours, changed(tmp_path, lambda definition: None), "it")
    with pytest.raises(GptcError, match=r"it would cut .* into other tokens"):
        check_tokens(ours, changed(tmp_path, change), "it")
