"""GGUF's special and added tokens are found in a text, and its ends of a text are all kept.

The class: keys and types of tokens that were passed over. The right tokens are those of llama.cpp
with special tokens parsed: a text is first cut at CONTROL and USER_DEFINED tokens, whatever their
ids; after one, a SentencePiece model adds its space again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.errors import GptcError
from gptc.formats import gguf_tokenizer
from gptc.formats.registry import open_model
from gptc.tokenizer.byte_level import to_characters
from gptc.tokenizer.marks import Marks
from gptc.tokenizer.native import BpeTokenizer
from gptc.tokenizer.scored import BYTE, CONTROL, NORMAL, USER_DEFINED
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from small_models import make_config, varied
from vocabularies import PIECES, TYPES, llama_like

pytest.importorskip("gguf")
BYTES = [to_characters(bytes([i])) for i in range(256)]
ADDED = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "spouse": USER_DEFINED}


def values(first: bool = True, **keys: Any) -> dict[str, Any]:
    """The keys of a byte-level vocabulary with added tokens, which come first or last."""
    words = list(ADDED)
    tokens = [*words, *BYTES, "sp", "spo"] if first else [*BYTES, "sp", "spo", *words]
    types = [ADDED.get(token, NORMAL) for token in tokens]
    merges = ["s p", "sp o"]
    found = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types}
    return {**found, "merges": merges, **keys}


@pytest.mark.parametrize("first", [True, False])
def test_special_and_added_tokens_are_found_in_a_text(first: bool) -> None:
    keys = values(first)
    ours = gguf_tokenizer.from_gguf(keys, "it")
    id_of = {token: i for i, token in enumerate(keys["tokens"])}
    expected = ["<|im_start|>", "a", "spouse", "spo", "s", "<|im_end|>", "\u010a"]
    assert ours.encode("<|im_start|>aspousespos<|im_end|>\n").tolist() == [
        id_of[token] for token in expected
    ]
    # Of the added tokens, only CONTROL ones are not text.
    specials = {id_of["<|im_start|>"], id_of["<|im_end|>"]}
    assert specials <= ours.specials
    assert id_of["spouse"] not in ours.specials


@pytest.mark.parametrize("first", [True, False])
def test_types_are_written_as_they_were_read(first: bool) -> None:
    """Not special, though added: llama.cpp prints USER_DEFINED tokens, and not CONTROL ones."""
    keys = values(first)
    written = gguf_tokenizer.to_gguf(gguf_tokenizer.from_gguf(keys, "it"), len(keys["tokens"]))
    for key in ("tokens", "token_type", "merges"):
        assert written[key] == keys[key], key


def test_added_tokens_of_a_scored_vocabulary() -> None:
    n = len(PIECES)
    keys: dict[str, Any] = {"model": "llama", "tokens": [*PIECES, "<|user|>", "spouse"]}
    keys["scores"] = [0.0] * 259 + [-float(i) for i in range(n - 257)]
    keys["token_type"] = [*TYPES, CONTROL, USER_DEFINED]
    assert BYTE in TYPES
    ours = gguf_tokenizer.from_gguf(keys, "it")
    plain: Any = llama_like()
    the, hat = (plain.encode(text).tolist() for text in ("the", "hat"))
    assert ours.encode("the<|user|>hatspouse").tolist() == [*the, n, *hat, n + 1]
    written = gguf_tokenizer.to_gguf(ours, n + 2)
    assert (written["tokens"], written["token_type"]) == (keys["tokens"], keys["token_type"])


# ---- ends ----


def test_each_key_of_an_end_counts() -> None:
    keys = {"eos_token_id": 1, "eot_token_id": 7, "eom_token_id": 8, "padding_token_id": 9}
    keys |= {"bos_token_id": 0}
    ours = gguf_tokenizer.from_gguf(values(chat_template={"default": "{{ x }}"}, **keys), "it")
    assert ours.marks == Marks(0, (1, 7, 8), 9, "{{ x }}")
    assert (ours.ends, ours.end_of_text, ours.bos) == ({1, 7, 8}, 1, None)
    assert ours.start == "<|im_end|>"
    written = gguf_tokenizer.to_gguf(ours, len(ours.pieces))
    assert keys.items() <= written.items()
    for wrong in (10**6, -1, "1", 1.0):
        assert gguf_tokenizer.from_gguf(values(eos_token_id=wrong), "it").marks.ends == (1,)


def named(*tokens: str, **keys: Any) -> list[str]:
    """The ends of a vocabulary with these control tokens, by name."""
    words = ["<|im_start|>", *tokens]
    found = values(**keys)
    found |= {"tokens": [*words, *BYTES], "merges": []}
    found["token_type"] = [CONTROL] * len(words) + [NORMAL] * 256
    return [found["tokens"][id] for id in gguf_tokenizer.from_gguf(found, "it").marks.ends]


def test_tokens_that_end_a_text_by_their_name_do_as_in_llama_cpp() -> None:
    assert named("<|eot_id|>", "<|im_sep|>", "<|eom_id|>") == ["<|eot_id|>", "<|eom_id|>"]
    assert named("<|endoftext|>", "<|im_end|>", eos_token_id=2) == ["<|im_end|>", "<|endoftext|>"]
    # An answer has several parts there, which <|end|> ends.
    assert named("<|end|>", "<|return|>") == ["<|end|>", "<|return|>"]
    assert named("<|end|>", "<|return|>", "<|call|>") == ["<|return|>", "<|call|>"]
    plain = values()
    plain["token_type"] = [
        NORMAL if t == "<|im_end|>" else ADDED.get(t, NORMAL) for t in plain["tokens"]
    ]
    assert gguf_tokenizer._ends_by_name(plain) == []  # text, not an added token


def test_a_file_keeps_ends_and_template(tmp_path: Path) -> None:
    ours = gguf_tokenizer.from_gguf(values(eos_token_id=1, eot_token_id=0), "it")
    ours.marks = Marks(0, (1, 0), 0, "{{ x }}")
    with varied(make_config("llama", vocab_size=ours.vocab_size)) as model:
        model.save(tmp_path / "m", ours)
    source = import_model(tmp_path / "m", tmp_path / "again")
    export_model(source, "gguf", tmp_path / "m.gguf")
    written: Any = open_model(tmp_path / "m.gguf")
    assert written.metadata["tokenizer.chat_template"] == "{{ x }}"
    assert written.tokenizer().marks == ours.marks
    import_model(tmp_path / "m.gguf", tmp_path / "back")
    back = import_model(tmp_path / "back", tmp_path / "twice")
    assert back.tokenizer().marks == ours.marks
    assert back.tokenizer().fingerprint() == ours.fingerprint()


def test_a_vocabulary_that_no_merges_make_is_refused() -> None:
    keys = values(first=True)
    keys["merges"] = ["s p", "sp q"]
    with pytest.raises(GptcError, match="has tokens that no merges of its bytes make"):
        gguf_tokenizer.from_gguf(keys, "it")


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(GptcError, match="it has 257 tokens, and the model 256"):
        gguf_tokenizer.to_gguf(BpeTokenizer([]), 256)


def test_our_own_tokenizers_stay_ours() -> None:
    learned = BpeTokenizer([b"th", b"the"])
    again = gguf_tokenizer.from_gguf(gguf_tokenizer.to_gguf(learned, 259), "it")
    assert again.to_json() == learned.to_json()
    assert not isinstance(again, HuggingFaceTokenizer)


@pytest.mark.parametrize(("pre", "whole"), [("gpt-2", False), ("llama-bpe", True)])
def test_a_piece_without_merges_is_a_token_where_llama_cpp_takes_it(pre: str, whole: bool) -> None:
    """llama.cpp takes a whole cut as a token before it merges, by the name of the pattern."""
    tokens = [*BYTES, "xyz", "sp", "spo"]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": ["s p", "sp o"]}
    ours = gguf_tokenizer.from_gguf({**keys, "token_type": [NORMAL] * len(tokens)}, "it")
    letters = [tokens.index(char) for char in "xyz"]
    assert ours.encode("xyz").tolist() == ([256] if whole else letters)
    assert ours.encode("xyzspo").tolist() == [*letters, 258]
    assert gguf_tokenizer.to_gguf(ours, len(tokens))["merges"] == keys["merges"]
    # The other way has another name there, or none, unless merges make every piece.
    definition = json.loads(ours.mapping()["definition"])
    assert definition["model"]["ignore_merges"] is whole
    definition["model"]["ignore_merges"] = not whole
    other = HuggingFaceTokenizer(json.dumps(definition))
    if whole:
        assert gguf_tokenizer.to_gguf(other, len(tokens))["pre"] == "dbrx"
    else:
        with pytest.raises(GptcError, match="would cut 'xyz' in another way"):
            gguf_tokenizer.to_gguf(other, len(tokens))


@pytest.mark.parametrize("key", ["token_type", "scores"])
def test_a_list_that_does_not_cover_the_tokens_is_refused(key: str) -> None:
    n = len(PIECES)
    keys = {"model": "llama", "tokens": PIECES, "scores": [0.0] * n, "token_type": TYPES}
    for wrong in (keys[key][:-1], [*keys[key], keys[key][0]]):
        with pytest.raises(GptcError, match=rf"ggml.{key} has .* numbers for {n} tokens"):
            gguf_tokenizer.from_gguf({**keys, key: wrong}, "it")


@pytest.mark.parametrize("name", ["token_type", "scores"])
def test_numbers_that_are_not_one_a_token_are_refused(name: str) -> None:
    for numbers in ([], [1]):
        with pytest.raises(GptcError, match=f"{name} has {len(numbers)} numbers for 261 tokens"):
            gguf_tokenizer.from_gguf(values(**{name: numbers}), "it")
