"""Each of llama.cpp's pre-tokenizers cuts as the tokenizer.json that has its name in llama.cpp.

The class of fault: a pattern that is read as another one, so that ids differ on rare characters.
The definitions here are those of the models, written with their own steps, and the library cuts.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from gptc.formats import gguf_tokenizer
from gptc.tokenizer.byte_level import to_characters
from gptc.tokenizer.definition import byte_level_of
from gptc.tokenizer.patterns import CUTS, Cut, cut_of, definition_of, name_of
from gptc.tokenizer.scored import CONTROL, NORMAL
from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from pretokenizers import FIXED, GPT_2, LEVEL, PUBLISHED, TEXTS, split, steps

tokenizers = pytest.importorskip("tokenizers")


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes and merges: of many pairs of bytes, so that ids depend on the cuts."""
    rng = random.Random(1)
    vocab = {to_characters(bytes([i])): i for i in range(256)}
    merges = []
    pairs = Counter(pair for text in TEXTS for pair in pairwise(text.encode()))
    for (a, b), _ in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:600]:
        left, right = to_characters(bytes([a])), to_characters(bytes([b]))
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    for _ in range(600):
        left, right = rng.choice(merges), rng.choice(merges)
        joined = "".join(left + right)
        if joined not in vocab:
            merges.append(("".join(left), "".join(right)))
            vocab[joined] = len(vocab)
    return vocab, merges


VOCAB, MERGES = vocabulary()


def keys(pre: str) -> dict[str, Any]:
    """The keys of GGUF for that vocabulary."""
    tokens = [*VOCAB, "<|im_end|>"]
    types = [NORMAL] * len(VOCAB) + [CONTROL]
    merges = [" ".join(merge) for merge in MERGES]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}


def published(pre: str) -> dict[str, Any]:
    """The tokenizer.json of a model of that sort, with the vocabulary above."""
    splitter, normalizer = PUBLISHED[pre]
    model = {"type": "BPE", "vocab": VOCAB, "merges": [list(merge) for merge in MERGES]}
    model["ignore_merges"] = CUTS[pre].whole
    token = {"id": len(VOCAB), "content": "<|im_end|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0", "added_tokens": [{**token, **flags}], "normalizer": normalizer,
        "pre_tokenizer": splitter, "decoder": {**LEVEL, "use_regex": True}, "model": model,
        "truncation": None, "padding": None, "post_processor": None,
    }  # fmt: skip


@pytest.mark.parametrize("pre", PUBLISHED)
def test_a_name_cuts_as_the_models_own_file(pre: str) -> None:
    ours = gguf_tokenizer.from_gguf(keys(pre), "it")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(published(pre)))
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == expected, repr(text)
    plain = theirs.decode(theirs.encode(FIXED[3]).ids)
    assert ours.decode(ours.encode(FIXED[3])) == plain


@pytest.mark.parametrize("pre", PUBLISHED)
def test_a_models_file_is_recognised_and_written(pre: str) -> None:
    saved = published(pre)
    theirs = HuggingFaceTokenizer(json.dumps(saved))
    level = byte_level_of(theirs)
    assert level is not None
    assert name_of(level.cut) == pre
    values = gguf_tokenizer.to_gguf(theirs, theirs.vocab_size)
    assert values["pre"] == pre
    assert values["merges"] == keys(pre)["merges"]
    again = gguf_tokenizer.from_gguf(values, "it")
    for text in TEXTS[:30]:
        assert again.encode(text).tolist() == theirs.encode(text).tolist()


@pytest.mark.parametrize("pre", CUTS)
def test_each_name_can_be_read_and_keeps_its_cut(pre: str) -> None:
    ours = gguf_tokenizer.from_gguf(keys(pre), "it")
    text = FIXED[3] + FIXED[7] + FIXED[9]
    assert ours.decode(ours.encode(text)) == text
    name = name_of(CUTS[pre])
    assert name is not None
    assert CUTS[name] == CUTS[pre]
    written = definition_of(CUTS[pre])
    assert cut_of({**written, "model": {"ignore_merges": CUTS[pre].whole}}) == CUTS[pre]


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
        {"pre_tokenizer": {**LEVEL, "add_prefix_space": True}},
        {"pre_tokenizer": steps(split("a", behavior="Removed"))},
        {"pre_tokenizer": steps({"type": "Whitespace"})},
        {"pre_tokenizer": steps()},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 7}},
    ],
)
def test_other_cuts_are_not_taken_for_one_of_these(changes: dict[str, Any]) -> None:
    found = cut_of({**published("qwen2"), **changes})
    assert found is None or name_of(found) is None


def test_gpt2s_pattern_may_be_written_in_full() -> None:
    found = cut_of({**published("gpt-2"), "pre_tokenizer": steps(split(GPT_2))})
    assert found == CUTS["gpt-2"]


def test_an_unknown_pattern_has_no_name() -> None:
    assert name_of(Cut(("x",))) is None
    assert name_of(Cut(CUTS["gpt-2"].patterns, composes=True)) is None


def test_a_token_that_no_merges_make_is_found_where_the_model_finds_it() -> None:
    """ignore_merges: Llama 3 and tekken have such tokens."""
    for pre, whole in (("llama-bpe", True), ("tekken", True), ("dbrx", False)):
        given = keys(pre)
        given["tokens"].insert(-1, "Ġunmerged")
        given["token_type"].insert(-1, NORMAL)
        # As its only merge would need another vocabulary, only ignore_merges reaches it.
        definition = published("llama-bpe")
        definition["model"] = {
            **definition["model"], "vocab": {**VOCAB, "Ġunmerged": len(VOCAB)},
            "ignore_merges": whole,
        }  # fmt: skip
        definition["added_tokens"] = []
        theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
        ids = gguf_tokenizer.from_gguf(given, "it").encode(" unmerged.").tolist()
        assert ids == theirs.encode(" unmerged.").ids
        assert (len(VOCAB) in ids) == whole


def test_a_missing_byte_is_left_out_as_in_the_library() -> None:
    """SmolLM2's vocabulary lacks 21 of the bytes."""
    given = keys("smollm")
    lost = [i for i, t in enumerate(given["tokens"][:256]) if t == to_characters(b"\x07")]
    given["tokens"][lost[0]] = "unused"
    given["merges"] = [m for m in given["merges"] if to_characters(b"\x07") not in m.split(" ")]
    ours = gguf_tokenizer.from_gguf(given, "it")
    assert isinstance(ours, HuggingFaceTokenizer)
    assert ours.decode(ours.encode("a\x07b")) == "ab"
    assert ours.byte_ids is not None
    assert ours.byte_ids[7] == -1


def test_tiktokens_class_takes_single_patterns_only() -> None:
    given = {**keys("gpt-4o"), "merges": []}
    given["tokens"] = [*[to_characters(bytes([i])) for i in range(256)], "<|endoftext|>"]
    given["token_type"] = [NORMAL] * 256 + [CONTROL]
    assert isinstance(gguf_tokenizer.from_gguf(given, "it"), TiktokenTokenizer)
    given["pre"] = "deepseek-v3"
    assert isinstance(gguf_tokenizer.from_gguf(given, "it"), HuggingFaceTokenizer)
