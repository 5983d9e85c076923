"""The log-probability of a continuation after a context, token by token of a session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np

from gptc.engine.model import Model
from gptc.errors import GptcError
from gptc.generation.request import prompt_tokens
from gptc.tokenizer.base import Tokenizer

_ROWS = 64  # logits at a time: a row has as many as the vocabulary


class Likelihood(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether each token is the likeliest."""

    logprob: float
    greedy: bool
    tokens: int


class Scorer:
    """Scores continuations. Contexts that begin alike are computed once if they come in turn."""

    def __init__(self, model: Model) -> None:
        self._session = model.session(1)
        self._room = self._session.n_ctx
        self._cached: list[int] = []

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """The likelihood of tokens after others, at least one each.

        What does not fit into the model's context is cut off at the begin. GptcError for a
        continuation that does not fit alone.
        """
        n = len(continuation)
        if not n or not context:
            raise GptcError("a context and a continuation need at least one token each")
        if n > self._room:
            raise GptcError(f"a continuation has {n} tokens, the model's context {self._room}")
        tokens = [*context, *continuation][-(self._room + 1) :]
        wanted, tokens = np.asarray(tokens[-n:]), tokens[:-1]
        first = len(tokens) - n  # the row of logits for the first token of the continuation
        begin = self._session.reachable(0, min(_alike(tokens, self._cached), first))
        self._session.rewind(0, begin)
        self._cached = tokens[:begin]
        logprob, greedy = 0.0, True
        while begin < len(tokens):
            # The context at once; the continuation's rows a few at a time.
            end = first if begin < first else min(begin + _ROWS, len(tokens))
            rows = np.arange(begin, end) >= first
            logits = self._session.decode(tokens[begin:end], 0, rows).astype(np.float64)
            if len(logits):
                at = wanted[max(begin, first) - first : end - first]
                top = logits.max(axis=1)
                log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
                logprob += float((logits[np.arange(len(at)), at] - log_sum).sum())
                greedy = greedy and bool((logits.argmax(axis=1) == at).all())
            begin = end
        self._cached = tokens
        return Likelihood(logprob, greedy, n)

    def close(self) -> None:
        """Frees the session; twice is harmless."""
        self._session.close()


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with alike."""
    n = min(len(one), len(other))
    return next((i for i in range(n) if one[i] != other[i]), n)


def split_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """The tokens of a context and those of its continuation, cut as one text.

    As lm-evaluation-harness does: spaces at the context's end belong to the continuation, and the
    context's own tokens say where it begins.
    """
    if not context:
        return beginning(tokenizer), encoded(tokenizer, continuation, continued=True)
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    begin = encoded(tokenizer, context) if context else beginning(tokenizer)
    whole = encoded(tokenizer, context + continuation)
    return begin, whole[len(begin) :] if context else whole


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The context of a text without one, as in the harness: BOS, else the end of texts."""
    known = (tokenizer.named_begin, *tokenizer.all_ends)
    first = next((id for id in known if id is not None), None)
    return prompt_tokens(tokenizer, "") if first is None else [first]


def encoded(tokenizer: Tokenizer, text: str, continued: bool = False) -> list[int]:
    """The tokens of a text, after BOS where the model's texts begin with one."""
    tokens: list[int] = tokenizer.encode(text, continued).tolist()
    if continued or tokenizer.bos is None or tokens[:1] == [tokenizer.bos]:
        return tokens
    return [tokenizer.bos, *tokens]


def rolling_windows(
    tokens: Sequence[int], first: Sequence[int], room: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts and continuations of a text: each token once, after as many as the room allows.

    `first` is the context of the first token. The windows are those of lm-evaluation-harness.
    """
    done = min(room, len(tokens))
    if done:
        yield [first[-1]], list(tokens[:done])
    while done < len(tokens):
        n = min(len(tokens) - done, room)
        end = done + n
        yield list(tokens[end - room - 1 : end - n]), list(tokens[end - n : end])
        done = end


def scored(
    model: Model, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[Likelihood]:
    """The likelihood of each pair of a context and a continuation, in order."""
    with closing(Scorer(model)) as scorer:
        for context, continuation in pairs:
            yield scorer.score(context, continuation)
