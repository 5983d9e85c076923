"""The kinds of tokens say exactly what the assistant says, with its end of turn, by any template.

The class of fault: a mask that is shifted by a token, that holds a part of a prompt, or that misses
the end of a turn, so that a model never learns to stop; a message that becomes a special token. The
masks are compared with a search for the texts of the answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chat_templates import OURS, PUBLISHED, message
from chat_tokenizers import SORTS, write_folder
from gptc.errors import GptcError
from gptc.tokenizer import chat, conversations
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.chat import chat_prompt
from gptc.tokenizer.conversations import (
    FIRST,
    LAST,
    SAID,
    Encoded,
    encode_conversations,
    with_template,
)
from gptc.tokenizer.native import BpeTokenizer
from gptc.tokenizer.registry import make_tokenizer

ANSWERS = ["Hello, the hill. 'naïve' 東京", "It <|im_start|> is."]
TURNS = [
    message("user", "Say <|im_end|> it"),
    message("assistant", ANSWERS[0]),
    message("user", "And\nnow?"),
    message("assistant", ANSWERS[1]),
]
ENDS = ("<|im_end|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


@pytest.fixture(scope="module", params=SORTS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("tokenizers")
    return make_tokenizer(str(write_folder(tmp_path_factory.mktemp("chat"), request.param)))


def runs(found: Encoded, kind: int) -> list[tuple[int, int]]:
    """The first and the end of each run of tokens of a kind."""
    marked = np.concatenate(([0], (found.kinds & kind) > 0, [0])).astype(np.int8)
    edges = np.flatnonzero(np.diff(marked))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def text(tokenizer: Tokenizer, tokens: Any) -> str:
    return tokenizer.decode_bytes(tokens).decode()


def encoded(tokenizer: Tokenizer, messages: list[Any], template: str) -> list[Encoded]:
    (found,) = encode_conversations(tokenizer, [{"messages": messages}], template)
    if isinstance(found, GptcError):
        raise found
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_masks_are_the_answers_with_their_ends(tokenizer: Tokenizer, name: str) -> None:
    sequences = encoded(tokenizer, TURNS, PUBLISHED[name])
    spoken = [(found, *run) for found in sequences for run in runs(found, SAID)]
    assert len(spoken) == 2
    for (found, begin, end), answer in zip(spoken, ANSWERS, strict=True):
        said = text(tokenizer, found.tokens[begin:end])
        at = said.index(answer)
        assert said[:at].replace("<think>", "").replace("</think>", "").strip() == ""
        assert said[at + len(answer) :].strip().startswith(ENDS)
        assert said.rstrip() == said  # no line end after the end of turn
        assert int(found.tokens[end - 1]) in tokenizer.specials
        assert answer not in text(tokenizer, found.tokens[:begin])
    (last,) = [run for found in sequences for run in runs(found, LAST)]
    assert last == spoken[-1][1:]
    for found in sequences:
        assert np.flatnonzero(found.kinds & FIRST).tolist() == [0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_answer_follows_the_prompt_of_inference(tokenizer: Tokenizer, name: str) -> None:
    found = encoded(tokenizer, TURNS, PUBLISHED[name])[-1]
    ((begin, _),) = runs(found, LAST)
    prompt = chat_prompt(tokenizer, TURNS[:-1], chat_template=PUBLISHED[name])
    assert found.tokens[:begin].tolist() == prompt


def test_a_template_that_changes_earlier_turns_gives_a_sequence_for_each(
    tokenizer: Tokenizer,
) -> None:
    first, second = encoded(tokenizer, TURNS, PUBLISHED["Qwen3"])
    assert len(runs(first, SAID)) == len(runs(second, SAID)) == 1
    assert runs(first, LAST) == []
    assert "<think>" in text(tokenizer, first.tokens)
    begins = text(tokenizer, second.tokens).index(ANSWERS[0])
    assert "<think>" not in text(tokenizer, second.tokens)[:begins]


def test_tokens_across_the_border_are_cut(tokenizer: Tokenizer) -> None:
    """A prompt that ends within a token of the whole: `t` of " t", or `l` of "ll"."""
    template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else m.content + eos_token }}"
        "{% endfor %}"
    )
    turns = [message("user", "the hil"), message("assistant", "ll the")]
    (found,) = encoded(tokenizer, turns, template)
    ((begin, end),) = runs(found, SAID)
    assert text(tokenizer, found.tokens[begin:end]) == "ll the</s>"
    prompt = chat_prompt(tokenizer, turns[:1], chat_template=template)
    assert found.tokens[:begin].tolist() == prompt
    assert end == len(found.tokens)


def test_templates_that_cannot_be_trained_on(tokenizer: Tokenizer) -> None:
    with pytest.raises(GptcError, match=r"does not continue its prompt when it writes the answer$"):
        encoded(tokenizer, TURNS, OURS["everything"])
    system = [message("system", "Be brief."), *TURNS]
    requests = [{"messages": system}, {"messages": TURNS}]
    refused, fine = encode_conversations(tokenizer, requests, PUBLISHED["Gemma"])
    assert isinstance(refused, GptcError)
    assert "System role not supported" in str(refused)
    assert not isinstance(fine, GptcError)


def test_a_tokenizer_without_a_template_gets_one(tokenizer: Tokenizer) -> None:
    before = tokenizer.marks
    try:
        assert with_template(tokenizer)
        assert not with_template(tokenizer)
        (found,) = encoded(tokenizer, TURNS, tokenizer.marks.templates["default"])
        end = tokenizer.special_texts()["<|im_end|>"]
        assert [found.tokens[last - 1] for _, last in runs(found, SAID)] == [end, end]
        assert tokenizer.marks.ends[0] == end
    finally:
        tokenizer.marks = before


def test_a_vocabulary_without_marks_has_them_as_text() -> None:
    ours = BpeTokenizer.train("Hello, the hill. And now? It is. " * 20, 300)
    assert with_template(ours)
    (found,) = encoded(ours, TURNS, ours.marks.templates["default"])
    assert [found.tokens[last - 1] for _, last in runs(found, SAID)] == [ours.end_of_text] * 2
    plain = make_tokenizer("bytes")
    with_template(plain)
    (found,) = encoded(plain, TURNS[:2], plain.marks.templates["default"])
    ((begin, end),) = runs(found, SAID)
    assert text(plain, found.tokens[begin:end]) == ANSWERS[0] + "<|im_end|>\n"


@pytest.mark.parametrize("name", [*PUBLISHED, *OURS])
def test_masks_do_not_depend_on_where_a_text_is_divided(
    tokenizer: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text up to a border is encoded from its last special token on, or from its begin."""
    turns = [*TURNS, message("user", "<|im_end|>\n\n ."), message("assistant", "</s> the <s> ")]
    template = {**PUBLISHED, **OURS}[name]
    (found,) = encode_conversations(tokenizer, [{"messages": turns}], template)
    monkeypatch.setattr(conversations._Cutter, "_places", lambda self, text, tokens: [(0, 0, 0)])
    (plain,) = encode_conversations(tokenizer, [{"messages": turns}], template)
    if isinstance(found, GptcError):
        assert str(found) == str(plain)
        return
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.kinds.tolist() == theirs.kinds.tolist()


@pytest.mark.parametrize("name", ["SmolLM2", "Qwen3"])
def test_a_long_conversation_is_not_repeated_for_each_answer(
    tokenizer: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is rendered, received and encoded grows as the conversation; Qwen3's texts differ."""
    monkeypatch.setattr(chat, "_IN_ALL", 1 << 22)  # of all texts: 200 times the length
    n_encoded = 0
    encode_parts = type(tokenizer).encode_parts

    def counted(self: Tokenizer, parts: Any) -> Any:
        nonlocal n_encoded
        n_encoded += sum(len(part) for part in parts if isinstance(part, str))
        return encode_parts(self, parts)

    monkeypatch.setattr(type(tokenizer), "encode_parts", counted)
    turns = [message("user", "the hill " * 12), message("assistant", "Hello " * 20)] * 100
    length = sum(len(turn["content"]) for turn in turns)
    found = encoded(tokenizer, turns, PUBLISHED[name])
    assert sum(len(runs(one, SAID)) for one in found) == 100
    if name == "SmolLM2":
        assert n_encoded < 3 * length
        monkeypatch.setattr(chat, "_IN_ALL", 0)
        assert len(encoded(tokenizer, turns, PUBLISHED[name])) == 1
    else:
        monkeypatch.setattr(chat, "_IN_ALL", 50 * length)
        with pytest.raises(GptcError, match=r"writes more than .* of one conversation: divide it"):
            encoded(tokenizer, turns, PUBLISHED[name])
