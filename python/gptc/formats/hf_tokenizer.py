"""Tokenizer files of a Hugging Face folder, from which AutoTokenizer makes the same tokenizer."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.definition import bpe_model, byte_level_definition, scored_definition, shell
from gptc.tokenizer.native import CharTokenizer
from gptc.tokenizer.pretrained import HuggingFaceTokenizer, SentencePieceTokenizer
from gptc.tokenizer.vocabulary import byte_level, scored


@lru_cache(maxsize=4)
def hf_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """The files from which AutoTokenizer makes the same tokenizer; empty when there are none.

    GptcError as `merges_of`.
    """
    last = tokenizer.end_of_text
    end = None if last is None else _name(tokenizer, last)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        weighted = scored(tokenizer)
        assert weighted is not None
        files["tokenizer.model"] = tokenizer.proto
        files["tokenizer.json"] = _dump(_begun(scored_definition(weighted), tokenizer))
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        text = tokenizer.mapping()["definition"]
        same = tokenizer.own_bos() == tokenizer.bos
        files["tokenizer.json"] = (
            text.encode() if same else _dump(_begun(json.loads(text), tokenizer))
        )
    elif isinstance(tokenizer, CharTokenizer):
        vocab = {char: i for i, char in enumerate(tokenizer.characters)}
        fused = {"pre_tokenizer": None, "decoder": {"type": "Fuse"}, "model": bpe_model(vocab, [])}
        files["tokenizer.json"] = _dump(_begun({**shell({}), **fused}, tokenizer))
    else:
        vocabulary = byte_level(tokenizer)
        if vocabulary is None:
            return {}
        files["tokenizer.json"] = _dump(_begun(byte_level_definition(vocabulary), tokenizer))
    begin = end if tokenizer.bos is None else _name(tokenizer, tokenizer.bos)
    named = {"bos_token": begin, "eos_token": end}
    config |= {key: name for key, name in named.items() if name is not None}
    config |= {"add_bos_token": tokenizer.bos is not None}
    config |= {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    files["tokenizer_config.json"] = _dump(config)
    return files


def _begun(definition: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json that begins texts with the tokenizer's `bos`, or with nothing."""
    token = tokenizer.bos
    if token is None:
        return {**definition, "post_processor": None}
    name = _name(tokenizer, token)
    begin: list[dict[str, Any]] = [{"SpecialToken": {"id": name, "type_id": 0}}]
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [*begin, first],
        "pair": [*begin, first, second],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
    return {**definition, "post_processor": template}


def _name(tokenizer: Tokenizer, token: int) -> str:
    """The text of a special token in files."""
    return tokenizer.pieces[token].decode("utf-8", "replace")


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
