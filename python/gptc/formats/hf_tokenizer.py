"""Tokenizer files of a Hugging Face folder, from which AutoTokenizer makes the same tokenizer."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from gptc.errors import GptcError
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer
from gptc.tokenizer.definition import bpe_model, byte_level_definition, scored_definition, shell
from gptc.tokenizer.marks import NONE
from gptc.tokenizer.native import CharTokenizer
from gptc.tokenizer.probe import check_tokens
from gptc.tokenizer.vocabulary import byte_level, scored
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer


def special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of special tokens, as a config.json has them."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    ends = list(tokenizer.named_ends)
    end = ends if len(ends) > 1 else next(iter(ends), None)
    pad = tokenizer.marks.pad
    padding = {} if pad is None else {"pad_token_id": pad}
    return {"bos_token_id": _begin(tokenizer), "eos_token_id": end, **padding}


def _begin(tokenizer: Tokenizer) -> int | None:
    """The token to name as BOS.

    As in GPT-2, <|endoftext|> has both names if no other is known. Another end of a text has not.
    """
    if tokenizer.named_begin is not None or isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.named_begin
    end = tokenizer.end_of_text
    return end if end is not None and tokenizer.start_text() == END_OF_TEXT else None


def hf_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """The files from which AutoTokenizer makes the same tokenizer; empty when there are none.

    GptcError when a tokenizer.json would cut text in another way, and as `merges_of`.
    """
    return _files(tokenizer, block_size, tokenizer.bos, tokenizer.marks)


@lru_cache(maxsize=4)
def _files(tokenizer: Tokenizer, block_size: int, *_changing: object) -> dict[str, bytes]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        files["tokenizer.model"] = tokenizer.proto
        definition = _same_by_merges(tokenizer)
        if definition is not None:
            files["tokenizer.json"] = definition
        else:  # AutoTokenizer reads the model itself
            config["tokenizer_class"] = "LlamaTokenizer"
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        text = tokenizer.mapping()["definition"]
        same = tokenizer.own_bos() == tokenizer.bos
        files["tokenizer.json"] = (
            text.encode() if same else _dump(_begun(json.loads(text), tokenizer))
        )
    elif isinstance(tokenizer, CharTokenizer):
        vocab = {char: i for i, char in enumerate(tokenizer.characters)}
        fused = {"pre_tokenizer": None, "decoder": {"type": "Fuse"}, "model": bpe_model(vocab, [])}
        files["tokenizer.json"] = _dump(_begun({**shell(()), **fused}, tokenizer))
    else:
        vocabulary = byte_level(tokenizer)
        if vocabulary is None:
            return {}
        files["tokenizer.json"] = _dump(_begun(byte_level_definition(vocabulary), tokenizer))
    # Characters are tokens: there is nothing to cut, and only AutoTokenizer reads such a file.
    if not isinstance(tokenizer, SentencePieceTokenizer | CharTokenizer):
        _check(tokenizer, files["tokenizer.json"])
    marks = tokenizer.marks
    named = {"bos_token": _begin(tokenizer), "pad_token": marks.pad}
    named["eos_token"] = next(iter(tokenizer.named_ends), None)
    config |= {key: _name(tokenizer, id) for key, id in named.items() if id is not None}
    templates = [{"name": name, "template": text} for name, text in marks.templates.items()]
    if templates:
        config["chat_template"] = templates if marks.named_templates else marks.chat_template
    config |= {"add_bos_token": tokenizer.bos is not None}
    config |= {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    files["tokenizer_config.json"] = _dump(config)
    if marks != NONE:
        files["generation_config.json"] = _dump(special_ids(tokenizer))
    return files


def _same_by_merges(tokenizer: SentencePieceTokenizer) -> bytes | None:
    """A tokenizer.json of merges that gives the same ids; None where there is none."""
    try:
        weighted = scored(tokenizer)
        if weighted is None:
            return None
        definition = _dump(_begun(scored_definition(weighted), tokenizer))
        _check(tokenizer, definition)
    except GptcError:
        return None
    return definition


def _check(tokenizer: Tokenizer, definition: bytes) -> None:
    check_tokens(tokenizer, HuggingFaceTokenizer(definition), "tokenizer.json")


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
