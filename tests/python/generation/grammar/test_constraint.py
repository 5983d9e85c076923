"""The allowed tokens are those that a brute-force search finds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from gptc.errors import GptcError
from gptc.generation.grammar import constraint
from gptc.generation.grammar.constraint import Constraint, Place, make_constraint
from gptc.generation.grammar.parser import parse_grammar
from gptc.tokenizer import scored, vocabulary
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.native import BpeTokenizer, CharTokenizer
from gptc.tokenizer.pretrained import SentencePieceTokenizer, TiktokenTokenizer
from gptc.tokenizer.registry import make_tokenizer
from machines import JSON_GRAMMAR


@pytest.fixture(scope="module")
def tokenizers(text_file: Path) -> dict[str, Tokenizer]:
    """A tokenizer of every kind that needs no download."""
    special = {"<|endoftext|>": 300, "<|other|>": 303}
    ranked = [bytes([i]) for i in range(256)] + [b"ab", b"\xc3\xa9", b"\xa9a", b'{"', b'": ', b'"}']
    found: dict[str, Tokenizer] = {
        "bytes": make_tokenizer("bytes"),
        "char": CharTokenizer('abc {}[]":,0123456789.-eé😀\n'),
        "bpe": BpeTokenizer.train(text_file.read_text() + 'é😀 {"a": [1, 2]}' * 50, 400),
        "tiktoken": TiktokenTokenizer("own", "[ -~]+", ranked, special),
    }
    found["tiktoken"].bos = 303
    return found


def by_force(place: Place) -> list[int]:
    """The tokens that leave a text completable, tested one by one."""
    machine, found = place.constraint.machine, []
    for token, piece in enumerate(place.constraint.pieces):
        stacks = place.stacks
        for byte in piece:
            stacks = machine.step(stacks, byte) if stacks else stacks
        if piece and stacks:
            found.append(token)
    return found


RULES = {
    "words": {"regex": "([abc]+ ){2,40}(é|😀)?"},
    "unicode": {"regex": "[^a-z]{1,20}"},
    "all": {"regex": r"[\s\S]*"},
    "json": {"grammar": JSON_GRAMMAR},
    "nested": {"grammar": 'root ::= "[" (root | [a-cé] root?)* "]" " "*'},
    "list": {"grammar": 'root ::= "a" ("b" | "c "){0,30} | "ab" | "abc" ".."'},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["bytes", "char", "bpe", "tiktoken"])
def test_allowed_tokens_are_those_that_fit(
    tokenizers: dict[str, Tokenizer], name: str, rules: str
) -> None:
    tokenizer, rng = tokenizers[name], random.Random(f"{name} {rules}")
    found = make_constraint(tokenizer, tokenizer.vocab_size, **RULES[rules])  # type: ignore[arg-type]
    assert found
    ends = sorted(token for token in {tokenizer.end_of_text, tokenizer.bos} if token is not None)
    n_seen = 0
    for _ in range(8):
        place = found.start
        for _ in range(30):
            fits, complete = by_force(place), None in place.stacks
            assert place.allowed.tolist() == sorted(fits + (ends if complete else []))
            assert place.ended == (complete and not fits)
            n_seen += 1
            if not fits:
                break
            place = place.after(rng.choice(fits))
    assert n_seen > 20


def test_allowed_tokens_of_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        gpt2 = make_tokenizer("gpt2")
    except GptcError:
        pytest.skip("GPT-2's vocabulary is not here")
    found = make_constraint(gpt2, gpt2.vocab_size, grammar=JSON_GRAMMAR)
    assert found
    text = '{"name": ["é😀", {"a": [1, 2.5e3, null]}'
    place = found.start
    for i, token in enumerate(gpt2.encode(text).tolist()):
        if i % 4 == 0:
            assert place.allowed.tolist() == by_force(place)
        place = place.after(token)
    assert gpt2.end_of_text not in place.allowed
    for token in gpt2.encode("]}").tolist():
        place = place.after(token)
    assert place.ended
    assert place.allowed.tolist() == [gpt2.end_of_text]


def test_special_tokens_are_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["tiktoken"]
    assert tokenizer.specials == {300, 303}
    found = make_constraint(tokenizer, tokenizer.vocab_size, regex=r"<\|endoftext\|>(ab)?")
    assert found
    assert found.start.allowed.tolist() == [ord("<")]
    place = found.start
    for byte in b"<|endoftext|>":
        assert not {300, 303} & set(place.allowed.tolist())
        place = place.after(byte)
    assert place.allowed.tolist() == [ord("a"), 256, 300, 303]
    pytest.importorskip("sentencepiece")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a", "\u2581a"]
    kinds = [scored.UNKNOWN, *[scored.CONTROL] * 2, *[scored.BYTE] * 256]
    kinds += [scored.NORMAL] * 2
    scores = [-float(i) for i in range(len(kinds))]
    made = vocabulary.from_scored(scored.Scored(pieces, scores, kinds), "a test")
    assert isinstance(made, SentencePieceTokenizer)
    assert made.specials == {0, 1, 2}
    found = make_constraint(made, made.vocab_size, regex="(<s>)?( ?a)+")
    assert found
    assert found.start.allowed.tolist() == [3 + 0x20, 3 + ord("<"), 3 + ord("a"), 259, 260]
    assert found.start.after(260).allowed.tolist() == [2, 3 + 0x20, 3 + ord("a"), 259, 260]


def test_what_is_kept_is_bounded(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["bpe"]
    machine, pieces = parse_grammar(JSON_GRAMMAR), list(tokenizer.pieces)
    texts: list[list[tuple[int, list[int]]]] = []
    held = []
    for limits in ({}, {"MOST_BYTES": 20_000, "_MOST_STATES": 30}):
        for name, limit in limits.items():
            monkeypatch.setattr(constraint, name, limit)
        found, rng, most = Constraint(machine, pieces, []), random.Random(3), 0
        place, drawn = found.start, []
        for _ in range(300):
            token = rng.choice(place.allowed.tolist())
            drawn.append((token, place.allowed.tolist()))
            place = place.after(token)
            place = found.start if place.ended else place
            most = max(most, found._held)
        texts.append(drawn)
        held.append(most)
    assert texts[0] == texts[1]
    assert held[1] < 25_000 < held[0]
