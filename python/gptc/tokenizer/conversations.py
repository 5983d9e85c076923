"""Tokens of whole conversations, with the assistant's words told apart: data to train on.

    (found,) = encode_conversations(tokenizer, [[{"role": "user", "content": "Hello"}, …]])
    sequence = found[0]
    sequence.tokens[sequence.kinds & SAID > 0]  # the answers, each with its end of turn

The chat template writes every conversation several times: up to the prompt for each answer, and up
to the end of that answer. The difference of the two is what the assistant says there. So the
tokens before an answer are those of `gptc infer --messages`, whatever the template is.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.errors import GptcError
from gptc.tokenizer.base import Tokenizer, Tokens, any_of
from gptc.tokenizer.chat import (
    Difference,
    divided,
    named_tokens,
    parts_of,
    render_several,
    unused,
    whole_texts,
)

SAID, LAST, FIRST = 1, 2, 4
"""Bits of a token's kind: said by the assistant, in its last turn, first of a sequence."""

Kinds: TypeAlias = npt.NDArray[np.uint8]
Conversation: TypeAlias = Mapping[str, Any]
"""Variables of a template: messages, and perhaps tools."""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
_CHATML = (
    "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + ({end}) + '\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
_BEFORE = "a0.\n"
_PLAIN_END = "eos_token if message['role'] == 'assistant' and eos_token else '<|im_end|>'"


class Encoded(NamedTuple):
    """The tokens of a conversation (T,), and the kind of each (T,)."""

    tokens: Tokens
    kinds: Kinds


def with_template(tokenizer: Tokenizer) -> bool:
    """Gives a tokenizer without a chat template that of ChatML; returns whether it had none.

    Its marks are special tokens if the vocabulary has them, and <|im_end|> then ends a text.
    Otherwise they are plain characters, and an answer ends with the token that ends a text, if
    there is one.
    """
    marks = tokenizer.marks
    if marks.templates:
        return False
    names = tokenizer.special_texts()
    if IM_START in names and IM_END in names:
        ends = tuple(dict.fromkeys((names[IM_END], *tokenizer.named_ends)))
        template = _CHATML.format(end="'<|im_end|>'")
        tokenizer.marks = replace(marks, chat_template=template, ends=ends)
    else:
        tokenizer.marks = replace(marks, chat_template=_CHATML.format(end=_PLAIN_END))
    return True


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], template: str
) -> list[list[Encoded] | GptcError]:
    """The sequences of each conversation, or the fault of one that the template does not take.

    A conversation is one sequence. If the template changes earlier turns when others follow (some
    leave out old thoughts), it is a sequence for each answer: in each only the last answer is SAID.
    The last message must be the assistant's.
    """
    names = tokenizer.special_texts()
    mark = unused(json.dumps([template, conversations], ensure_ascii=False))
    pattern = any_of(names, re.IGNORECASE)
    requests = []
    for conversation in conversations:
        roles = [message["role"] for message in conversation["messages"]]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        ends = [(i + more, not more) for i in answers for more in (0, 1)]
        variables = {**named_tokens(tokenizer), **divided(conversation, pattern, mark)}
        requests.append((variables, ends))
    cutter = _Cutter(tokenizer, names, mark)
    found: list[list[Encoded] | GptcError] = []
    for texts in render_several(template, requests, mark):
        try:
            found.append(texts if isinstance(texts, GptcError) else list(_sequences(texts, cutter)))
        except GptcError as error:
            found.append(error)
    return found


def _sequences(differences: Sequence[Difference], cutter: _Cutter) -> Iterator[Encoded]:
    """The sequences of a conversation, of its text before and after each answer."""
    lengths = [n + len(rest) for n, rest in differences]
    if all(n == before for (n, _), before in zip(differences[1:], lengths[:-1], strict=True)):
        # Each text is the begin of the last one, of which alone there is a copy.
        spans = [(a, b, SAID) for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
        if any(begin == end for begin, end, _ in spans):
            raise _not_continued()
        whole = "".join(rest for _, rest in differences)
        yield cutter.sequence(whole, [*spans[:-1], (*spans[-1][:2], SAID | LAST)])
        return
    texts = whole_texts(differences)
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    for before, after in turns:
        if not after.startswith(before) or before == after:
            raise _not_continued()
    whole = turns[-1][1]
    if all(whole.startswith(after) for _, after in turns):
        spans = [(len(before), len(after), SAID) for before, after in turns]
        yield cutter.sequence(whole, [*spans[:-1], (*spans[-1][:2], SAID | LAST)])
        return
    for i, (before, after) in enumerate(turns):
        last = LAST if i == len(turns) - 1 else 0
        yield cutter.sequence(after, [(len(before), len(after), SAID | last)])


def _not_continued() -> GptcError:
    return GptcError("the chat template does not continue its prompt when it writes the answer")


class _Cutter:
    """Cuts texts into tokens at the borders of answers."""

    def __init__(self, tokenizer: Tokenizer, names: Mapping[str, int], mark: str) -> None:
        self._tokenizer, self._names, self._mark = tokenizer, names, mark

    def sequence(self, text: str, spans: Sequence[tuple[int, int, int]]) -> Encoded:
        """The tokens of a text whose spans (begin, end) have kinds."""
        borders = [0]
        for begin, end, _ in spans:
            borders += [begin, self._trimmed(text, begin, end)]
        tokens = self._tokens(text)
        places = self._places(text, tokens)
        ends = []
        for at in borders[1:]:
            begin, n = places[bisect_right(places, at, key=lambda place: place[2]) - 1][:2]
            some = self._tokens(text[begin:at])
            if not np.array_equal(tokens[n : n + len(some)], some):
                break
            ends.append(n + len(some))
        else:
            ends.append(len(tokens))
        if len(ends) < len(borders):
            # A token would hold the end of a prompt and the begin of an answer.
            pieces = [text[a:b] for a, b in zip(borders, [*borders[1:], len(text)], strict=True)]
            found = [self._tokens(piece, i > 0) for i, piece in enumerate(pieces)]
            tokens = np.concatenate(found)
            ends = np.cumsum([len(some) for some in found]).tolist()
        kinds = np.zeros(len(tokens), np.uint8)
        kinds[:1] = FIRST
        for (_, _, kind), begin, end in zip(spans, ends[:-1:2], ends[1::2], strict=True):
            kinds[begin:end] |= kind
        return Encoded(tokens, kinds)

    def _places(self, text: str, tokens: Tokens) -> list[tuple[int, int, int]]:
        """Where tokens depend on no text before: the place in the text, in the tokens, and the end.

        They are the begin, and each special token, which no other token of the text may equal.
        """
        found = list(any_of(self._names).finditer(text))
        ids = np.array([self._names[mark[0]] for mark in found], np.int64)
        at = np.flatnonzero(np.isin(tokens, ids))
        if not np.array_equal(tokens[at], ids):
            return [(0, 0, 0)]
        marked = zip(found, at.tolist(), strict=True)
        return [(0, 0, 0), *((mark.start(), n, mark.end()) for mark, n in marked)]

    def _parts(self, text: str) -> list[str | int]:
        return list(parts_of(text, self._names, self._mark))

    def _tokens(self, text: str, continued: bool = False) -> Tokens:
        """The tokens of a text that may follow other text.

        Some tokenizers add a space to a whole text. So a character comes first then, one that
        shares no token with the text.
        """
        for before in _BEFORE if continued else ():
            known, found = self._tokens(before), self._tokens(before + text)
            if np.array_equal(found[: len(known)], known):
                return found[len(known) :]
        return self._tokenizer.encode_parts(self._parts(text))

    def _trimmed(self, text: str, begin: int, end: int) -> int:
        """The end of an answer without white space after its last special token."""
        parts = self._parts(text[begin:end])
        last = parts[-1]
        if len(parts) > 2 and isinstance(last, str) and not last.strip():
            return end - len(last)
        return end
