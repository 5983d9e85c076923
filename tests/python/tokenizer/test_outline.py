"""A large tokenizer.json is read in little memory, and gives what its library gives.

The class: a file whose parsed values take far more memory than its text.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gptc.tokenizer.byte_level import ByteLevel, to_characters
from gptc.tokenizer.definition import byte_level_definition, scored_definition
from gptc.tokenizer.outline import dump_definition, outline_of, read_outline, with_joined_merges
from gptc.tokenizer.patterns import CUTS, Cut
from gptc.tokenizer.scored import BYTE, CONTROL, NORMAL, UNKNOWN, Scored
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from pretokenizers import LEVEL

tokenizers = pytest.importorskip("tokenizers")

N_TOKENS = 250_000
LEVELS = {**LEVEL, "use_regex": True}
SPACED = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
LETTERS = ["\u2581", *"abcde", "\u00e9", "\u65e5", "ab", "cd", "abcd", "\u2581ab", "\u2581a", "ee"]


def definition(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    added = [{**FLAGS, **token} for token in parts.pop("added_tokens", [])]
    return {"version": "1.0", **empty, "added_tokens": added, **parts, "model": model}


def byte_level(n_tokens: int, merge: Any = list) -> dict[str, Any]:
    """A tokenizer.json of bytes, all pairs of them, and threes: as long as there are tokens."""
    single = [to_characters(bytes([i])) for i in range(256)]
    vocab = {text: i for i, text in enumerate(single)}
    merges = []
    for pair in [*product(single, single), *product((a + b for a in single for b in "at"), single)]:
        if len(vocab) == n_tokens - 1:
            break
        vocab.setdefault("".join(pair), len(vocab))
        merges.append(merge(pair))
    rank = {pair: i for i, pair in enumerate(map(str, merges))}
    assert len(rank) == len(merges)
    end = [{"id": len(vocab), "content": "<|endoftext|>", "special": True}]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": None}
    return definition(model, pre_tokenizer=LEVELS, decoder=LEVELS, added_tokens=end)


def scored_pieces() -> dict[str, Any]:
    """One of the sort of Llama's, with tokens of single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *LETTERS]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(LETTERS)]
    return scored_definition(Scored(pieces, [-float(i) for i in range(len(pieces))], types, True))


def unigram() -> dict[str, Any]:
    vocab = [["<unk>", 0.0], *([text, -1.0 - i / 7] for i, text in enumerate(LETTERS))]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    return definition(model, pre_tokenizer=SPACED, decoder=SPACED)


def wordpiece() -> dict[str, Any]:
    words = {text: i for i, text in enumerate(["<unk>", "<s>", *LETTERS[:3], "</s>", *LETTERS[3:]])}
    model = {
        "type": "WordPiece",
        "unk_token": "<unk>",
        "vocab": words,
        "max_input_chars_per_word": 9,
    }
    model["continuing_subword_prefix"] = "##"
    added = [{"id": 5, "content": "</s>", "special": True}]
    return definition(model, pre_tokenizer=SPACED, decoder=SPACED, added_tokens=added)


KINDS = {
    "pairs": byte_level(3000),
    "texts": byte_level(3000, " ".join),
    "scored": scored_pieces(),
    "unigram": unigram(),
    "wordpiece": wordpiece(),
}


def texts(n: int) -> list[str]:
    """Texts of the letters above, of bytes, and of any character."""
    found = []
    for case in range(n):
        draw = random.Random(case)
        letters = ["abcde \u00e9\u65e5", "".join(map(chr, range(1, 256))), "a \n</s><|endoftext|>"]
        some = draw.choice(letters)
        characters = [draw.choice(some) for _ in range(draw.randrange(1, 80))]
        if not case % 5:
            characters.append(chr(draw.randrange(0xE000, 0x1FFFF)))
        found.append("".join(characters))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_pieces_are_those_of_the_library(kind: str) -> None:
    text = json.dumps(KINDS[kind], ensure_ascii=False)
    theirs = tokenizers.Tokenizer.from_str(text)
    ours = HuggingFaceTokenizer(text)
    assert ours._tokenizer.to_str() == theirs.to_str()
    assert ours.saved == KINDS[kind]
    assert ours.mapping()["definition"] == text
    names = theirs.get_vocab(with_added_tokens=True)
    assert ours.vocab_size == max(names.values()) + 1
    assert [ours.id_of(name) for name in names] == list(names.values())
    for some in texts(300):
        expected = theirs.encode(some, add_special_tokens=False).ids
        assert list(ours._encode(some)) == expected
        assert ours.decode(expected, continued=True) == "".join(
            b"".join(ours.pieces[id] for id in expected).decode("utf-8", "replace")
        )


def test_ids_that_two_tokens_share_are_those_of_the_mapping() -> None:
    """An added token takes the id that follows the number of tokens, which one may have."""
    content = byte_level(300)
    model = content["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    model["vocab"][last] += 1  # a hole before it; so the added token gets its id
    tokenizer = HuggingFaceTokenizer(json.dumps(content))
    assert tokenizer.vocab_size == 300
    assert tokenizer.id_of("<|endoftext|>") == tokenizer.id_of(last) == 299


# ---- memory ----

CODE = """
import resource, sys
from gptc.tokenizer.registry import make_tokenizer
def peak(who=resource.RUSAGE_SELF):
    return resource.getrusage(who).ru_maxrss << 10
import gptc.tokenizer.folder, tokenizers, numpy
before = peak()
tokenizer = make_tokenizer(sys.argv[1])
assert tokenizer.decode(tokenizer.encode("a cat")) == "a cat", tokenizer
print(peak() - before, peak(resource.RUSAGE_CHILDREN))
"""


@pytest.mark.parametrize("merge", [list, " ".join])
def test_a_quarter_of_a_million_tokens_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Any
) -> None:
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))  # so that it is tried, too
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(byte_level(N_TOKENS, merge), ensure_ascii=False))
    run = subprocess.run(
        [sys.executable, "-c", CODE, file], capture_output=True, text=True, check=True
    )
    bound = 2 * file.stat().st_size + 200e6
    ours, trial = map(int, run.stdout.split())
    assert ours < bound
    assert trial < bound


# ---- the parts of a definition ----


def test_pairs_become_texts() -> None:
    content = byte_level(2000)
    model = content["model"]
    for indent in (None, 2):
        data = json.dumps(content, indent=indent).encode()
        outline = read_outline(data, "x")
        assert outline["model"] == {
            "type": "BPE",
            "unk_token": None,
            "n_pairs": len(model["merges"]),
        }
        joined = json.loads(with_joined_merges(data, outline["model"]["n_pairs"]))
        expected = [" ".join(pair) for pair in model["merges"]]
        assert joined == {**content, "model": {**model, "merges": expected}}


@pytest.mark.parametrize(
    "merges",
    [
        [["a", "b c"]],
        [["#version", "a"]],
        [["a", "b"], "b c"],
        [["a", "b", "c"]],
        [["a", 1]],
        [],
        None,
        {"a": "b"},
    ],
)
def test_other_merges_are_left_as_they_are(merges: Any) -> None:
    data = json.dumps({"model": {"merges": merges}}).encode()
    assert read_outline(data, "x")["model"]["n_pairs"] == 0
    assert with_joined_merges(data, 0) == data


@pytest.mark.parametrize(
    "text",
    [
        '{"merges": [["a", "b"]], "model": {"merges": [["a", "b"]]}}',
        '{"model": {"m\\u0065rges": [["a", "b"]]}}',
        '{"merges": [["a", "b"], 1], "model": {"m\\u0065rges": [["a", "b"]]}}',
        '{"merges": [], "model": {"m\\u0065rges": [["a", "b"]]}}',
    ],
)
def test_a_list_that_may_be_another_one_is_left_as_it_is(text: str) -> None:
    assert read_outline(text.encode(), "x")["model"]["n_pairs"] == 1
    assert with_joined_merges(text.encode(), 1) == text.encode()


def test_escapes_in_pairs() -> None:
    merges = [['"', "\\"], ["\u65e5", "\n"], ["\\\\", '\\"']]
    for ascii_only in (True, False):
        data = json.dumps({"model": {"merges": merges}}, ensure_ascii=ascii_only).encode()
        joined = json.loads(with_joined_merges(data, 3))
        assert joined["model"]["merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("cut", [CUTS[name] for name in sorted(CUTS)])
def test_the_outline_of_a_definition_is_that_of_its_text(cut: Cut) -> None:
    pieces = [*(bytes([i]) for i in range(256)), b"ab", b"<s>", b"x y"]
    merges = [(b"a", b"b"), (b"\xc3", b"\xa9")]
    level = ByteLevel(pieces, {"<s>": 257, "x y": 258}, cut, merges, frozenset({258}))
    made = byte_level_definition(level)
    outline = outline_of(made)
    assert outline == read_outline(dump_definition(made), "it")
    assert outline["model"]["n_pairs"] == 2
    assert not {"vocab", "merges"} & outline["model"].keys()
    assert "vocab" in made["model"]


def test_a_definition_written_in_parts_is_the_same_text() -> None:
    values: list[Any] = [
        {},
        [],
        {"a": {}, "b": [], "\u65e5": [1, 2.5, None, True, "\ud800"]},
        {str(i): {"x": [i]} for i in range(1025)},
        {"model": {"vocab": {str(i): i for i in range(5000)}, "merges": [[1, 2]] * 2048}},
        list(range(1024)),
        list(range(1025)),
        KINDS["scored"],
    ]
    for value in values:
        text = json.dumps(value, ensure_ascii=False)
        assert dump_definition(value) == text.encode("utf-8", "surrogatepass")
