"""Decodes samples of one or more prompts together.

    request = make_request(model, tokenizer, "Once upon a time", num_samples=3)
    decoder = Decoder(model, tokenizer, n_seq=3)
    for sample, piece in decoder.run(request.samples(tokenizer)):
        print(sample.index, piece)

The token at position p of sample i is drawn with (seed + i, p), so a call always gives the same
text, whatever else is in the batch. A sample ends at an end-of-text or begin-of-text token, before
a stop string, after max_tokens, or when the model's context is full. A constrained sample also ends
when its regex, grammar or JSON schema allows no further token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, overload

import numpy as np

from gptc.errors import DeadEnd, GptcError, python_names
from gptc.generation.request import Request, Sample, make_request, split_options
from gptc.generation.sampling import Draw, TokenLogprob, draw_tokens
from gptc.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from gptc.engine.arrays import FloatArray
    from gptc.engine.model import Model
    from gptc.engine.session import Session

# What a step gives for a row: its logits, or the token that was drawn from them.
_Given: TypeAlias = "FloatArray | tuple[int, TokenLogprob | None]"

MOST_AT_ONCE = 64  # samples of a request that are decoded together


class Draft(Protocol):
    """Proposes the next tokens of a sample, for the model to check in one step."""

    n_guessed: int
    n_right: int

    def guess(self, slot: int, sample: Sample, most: int) -> list[int]:
        """At most `most` draft tokens, perhaps none. A slot holds one sample at a time."""
        ...

    def learn(self, n_guessed: int, n_right: int) -> None:
        """Reports that `n_right` of `n_guessed` draft tokens were accepted."""
        ...


@dataclass
class _Slot:
    """A sequence of the session."""

    index: int
    sample: Sample | None = None
    begin: int = 0  # position in the sample's sequence at which the cache begins
    last: Sample | None = None  # the sample whose tokens are in the cache, ended or not
    prompt_of: Request | None = None  # the request whose prompt begins the cache


@dataclass(eq=False)
class _Prompt:
    """The logits after a prompt, kept while samples of it wait to begin."""

    logits: FloatArray
    n_waiting: int


class Decoder:
    """Decodes up to n_seq samples at a time; when one ends, the next begins.

    A prompt with several samples is computed once. A sample ends when the n_ctx tokens of its cache
    are full. With context_shift it continues from their newer half, which is recomputed as a new
    prefix; if the text began with the tokenizer's `bos`, so does that prefix.

    With `keep`, the cache stays until `close`, and a prompt that begins as the text before it did
    is computed from where the two differ.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        n_seq: int = 1,
        n_ctx: int | None = None,
        draft: Draft | None = None,
        keep: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._n_seq = n_seq
        self._n_ctx = n_ctx or model.config.block_size
        self._keep = keep
        self._session: Session | None = None  # that is kept
        self._draft = draft
        self._slots: list[_Slot] = []
        self._prompts: dict[Request, _Prompt] = {}

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
        """Yields (sample, piece of text) as pieces are decoded, and once when a sample ends."""
        if self._session:
            for slot in self._slots:
                slot.sample = slot.prompt_of = None
        else:
            self._slots = [_Slot(i) for i in range(self._n_seq)]
        self._prompts = {}
        if self._keep:
            self._session = self._session or self._model.session(self._n_seq, self._n_ctx)
            yield from self._run(self._session, samples)
        else:
            with self._model.session(self._n_seq, self._n_ctx) as session:
                yield from self._run(session, samples)

    def close(self) -> None:
        """Frees a cache that is kept; twice is harmless."""
        if self._session:
            self._session.close()
        self._session = None

    def _run(self, session: Session, samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
        waiting = iter(samples)
        coming = next(waiting, None)
        while True:
            while coming and (slot := self._place(coming)):
                yield from self._begin(session, slot, coming)
                coming = next(waiting, None)
            active = [slot for slot in self._slots if slot.sample]
            if active:
                yield from self._step(session, active)
            elif not coming:
                return

    def _place(self, sample: Sample) -> _Slot | None:
        """A free slot for the sample, if possible one with its prompt in the cache; else None."""
        request = sample.request
        beginning = any(
            slot.sample and slot.sample.request is request and slot.prompt_of is None
            for slot in self._slots
        )
        if beginning and sample.index > 0 and request not in self._prompts:
            return None  # another slot is about to compute its prompt
        free = [slot for slot in self._slots if not slot.sample]
        return min(free, key=lambda slot: slot.prompt_of is not request, default=None)

    def _begin(self, session: Session, slot: _Slot, sample: Sample) -> Iterator[tuple[Sample, str]]:
        request, known = sample.request, self._prompts.get(sample.request)
        source = next((s for s in self._slots if s.prompt_of is request), None)
        if len(request.prompt) > self._n_ctx and not request.options.context_shift:
            raise GptcError(
                f"the prompt has {len(request.prompt):,} tokens; the cache holds {self._n_ctx:,}: "
                "shorten it, or use a longer n_ctx"
            )
        n_known = self._n_known(session, slot, request.prompt) if self._keep else 0
        slot.sample, slot.begin, slot.last = sample, 0, sample
        if known:
            known.n_waiting -= 1
            if known.n_waiting == 0:
                del self._prompts[request]
        if known and source:
            session.fork(source.index, slot.index, len(request.prompt))
            slot.prompt_of = request
            yield from self._advance(slot, known.logits)
        else:
            session.rewind(slot.index, n_known)
            slot.prompt_of = None

    def _n_known(self, session: Session, slot: _Slot, prompt: Sequence[int]) -> int:
        """The number of tokens that the cache shares with a prompt, of which the last is fed.

        The last token of a sequence was never fed; in its place there may be those of a draft.
        """
        if slot.last is None or slot.begin:
            return 0
        n_sure = min(session.length(slot.index), len(slot.last.sequence) - 1)
        pairs = zip(slot.last.sequence[:n_sure], prompt[:-1], strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(n_sure, len(prompt) - 1))

    def _advance(self, slot: _Slot, given: _Given) -> Iterator[tuple[Sample, str]]:
        """Appends the next token: drawn already, or from its logits."""
        sample = slot.sample
        assert sample
        if isinstance(given, tuple):
            piece = sample.take(*given, self._n_ctx)
        else:
            piece = sample.advance(given, self._n_ctx)
        if sample.finish:
            slot.sample = None
        if piece or sample.finish:
            yield sample, piece

    def _feed(self, session: Session, slot: _Slot, sample: Sample) -> list[int]:
        """The tokens of the sample that are not yet in the cache."""
        if len(sample.sequence) - slot.begin > self._n_ctx:
            session.rewind(slot.index, 0)
            slot.begin = len(sample.sequence) - max(1, self._n_ctx // 2)
            slot.prompt_of = None
            half = sample.sequence[slot.begin :]
            if sample.sequence[0] == self._tokenizer.bos and len(half) > 1:
                half[0] = sample.sequence[0]
            return half
        return sample.sequence[slot.begin + session.length(slot.index) :]

    def _guess(self, slot: _Slot, sample: Sample, feed: list[int]) -> list[int]:
        room = self._n_ctx - (len(sample.sequence) - slot.begin)
        most = min(room, sample.request.options.max_tokens - sample.n_tokens - 1)
        if not self._draft or len(feed) != 1 or most < 1:
            return []
        with suppress(DeadEnd):  # of the draft only; the sample may still continue
            return self._draft.guess(slot.index, sample, most)
        return []

    def _step(self, session: Session, active: list[_Slot]) -> Iterator[tuple[Sample, str]]:
        tokens: list[int] = []
        seqs: list[int] = []
        want: list[bool] = []
        guesses: list[list[int]] = []
        for slot in active:
            assert slot.sample
            feed = self._feed(session, slot, slot.sample)
            guess = self._guess(slot, slot.sample, feed)
            tokens += feed + guess
            seqs += [slot.index] * (len(feed) + len(guess))
            want += [False] * (len(feed) - 1) + [True] * (1 + len(guess))
            guesses.append(guess)
        given: Sequence[_Given]
        draws = self._draws(active, guesses)
        if draws is None:
            logits = session.decode(np.array(tokens, np.int32), np.array(seqs, np.int32), want)
            given = list(logits)
        else:
            given = draw_tokens(session, tokens, seqs, want, draws)
        row = 0
        for slot, guess in zip(active, guesses, strict=True):
            yield from self._check(session, slot, guess, given[row : row + 1 + len(guess)])
            row += 1 + len(guess)

    def _draws(self, active: list[_Slot], guesses: list[list[int]]) -> list[Draw] | None:
        """A draw for each row of the step; None if the logits of one are needed here."""
        draws: list[Draw] = []
        for slot, guess in zip(active, guesses, strict=True):
            assert slot.sample
            of_sample = slot.sample.draws(guess)
            if of_sample is None or self._others(slot, slot.sample):
                return None
            draws += of_sample
        return draws

    def _check(
        self, session: Session, slot: _Slot, guess: list[int], given: Sequence[_Given]
    ) -> Iterator[tuple[Sample, str]]:
        """Takes one token after another, until one differs from the draft.

        So a draft changes the speed and never the text.
        """
        sample = slot.sample
        assert sample
        self._remember_prompt(slot, sample, given[0])
        n_right = 0
        for i in range(len(given)):
            yield from self._advance(slot, given[i])
            if sample.finish or i == len(guess) or sample.sequence[-1] != guess[i]:
                break
            n_right += 1
        if self._draft and guess:
            self._draft.learn(len(guess), n_right)
            if not sample.finish:
                session.rewind(slot.index, len(sample.sequence) - 1 - slot.begin)

    def _others(self, slot: _Slot, sample: Sample) -> int:
        """The number of samples that wait for the logits after this one's prompt."""
        request = sample.request
        first = sample.n_tokens == 0 and slot.begin == 0 and slot.prompt_of is None
        if not first or request in self._prompts:
            return 0
        return request.options.num_samples - sample.index - 1

    def _remember_prompt(self, slot: _Slot, sample: Sample, given: _Given) -> None:
        """Keeps the logits after the first sample's prompt, for the request's other samples."""
        if sample.n_tokens == 0 and slot.begin == 0 and slot.prompt_of is None:
            if (others := self._others(slot, sample)) and not isinstance(given, tuple):
                self._prompts[sample.request] = _Prompt(given.copy(), others)
            slot.prompt_of = sample.request


def start(
    model: Model, tokenizer: Tokenizer, request: Request, draft: Draft | None = None
) -> tuple[list[Sample], Iterator[tuple[Sample, str]]]:
    """The samples of one request, and an iterator that decodes them.

    The iterator raises DeadEnd if a sample cannot match its regex, grammar or JSON schema.
    """
    (samples,), pieces = _start_all(model, tokenizer, [request], draft)
    return samples, pieces


def _start_all(
    model: Model, tokenizer: Tokenizer, requests: Sequence[Request], draft: Draft | None
) -> tuple[list[list[Sample]], Iterator[tuple[Sample, str]]]:
    """As `start`, for several requests: the samples of each."""
    each = [list(request.samples(tokenizer)) for request in requests]
    samples = [sample for some in each for sample in some]
    n_ctx = max(request.n_ctx(model.config.block_size) for request in requests)
    decoder = Decoder(model, tokenizer, min(len(samples), MOST_AT_ONCE), n_ctx, draft)
    return each, _or_raise(decoder.run(samples))


def _or_raise(pieces: Iterator[tuple[Sample, str]]) -> Iterator[tuple[Sample, str]]:
    for sample, piece in pieces:
        if sample.error:
            raise sample.error
        yield sample, piece


class Generation:
    """Samples of one prompt, decoded together. Iterate to get (sample index, piece of text).

    `samples` holds the texts so far; `n_prompt` is the prompt's length in tokens. Options are those
    of `make_request`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompt: str | Sequence[int],
        draft: Draft | None = None,
        **options: Any,
    ) -> None:
        request = make_request(model, tokenizer, prompt, **options)
        self.n_prompt = len(request.prompt)
        self.samples, self._pieces = start(model, tokenizer, request, draft)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((sample.index, piece) for sample, piece in self._pieces if piece)


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt, from `generate` with `return_details`."""

    text: str
    tokens: list[int]
    """Token ids, without the one that ended the text."""
    logprobs: list[TokenLogprob]
    """One for each token, if `logprobs` was given; natural logarithms."""
    finish: str
    """"stop" (end of text, or a stop string), "length" (max_tokens) or "context" (it is full)."""
    n_prompt: int
    """Tokens of the prompt."""


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] = "",
    *,
    draft: Draft | None = None,
    **options: Any,
) -> Iterator[str]:
    """The continuation of `prompt`, a text or a list of tokens, in pieces as they are decoded.

    `options` are the fields of `TextOptions` and `Sampling` (generation/options.py). Without a
    prompt, the model begins a document. With `regex`, `grammar` (GBNF) or `json_schema` (a dict, or
    its text), the continuation matches it. GptcError if the prompt is longer than the model's
    context. A text ends when the context is full; with `context_shift` it continues from the newer
    half.
    """
    with python_names():
        generation = Generation(model, tokenizer, prompt, draft, **split_options(options))
    return (piece for _, piece in generation)


@overload
def generate(
    model: Model, tokenizer: Tokenizer, prompt: str | Sequence[int] = "", *,
    draft: Draft | None = None, return_details: Literal[False] = False, **options: Any,
) -> list[str]: ...  # fmt: skip
@overload
def generate(
    model: Model, tokenizer: Tokenizer, prompt: str | Sequence[int] = "", *,
    draft: Draft | None = None, return_details: Literal[True], **options: Any,
) -> list[Completion]: ...  # fmt: skip
@overload
def generate(
    model: Model, tokenizer: Tokenizer, prompt: list[str], *,
    draft: Draft | None = None, return_details: bool = False, **options: Any,
) -> list[Any]: ...  # fmt: skip
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | list[str] = "",
    *,
    draft: Draft | None = None,
    return_details: bool = False,
    **options: Any,
) -> list[Any]:
    """`num_samples` continuations of `prompt`, decoded together; sample i uses `seed + i`.

    They are texts, or `Completion` objects with `return_details`. For a list of prompts, which are
    decoded together too, the result is a list of such lists. `options` are those of `stream`.
    """
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str)
    prompts: Sequence[Any] = prompt if several else [prompt]
    with python_names():
        requests = [
            make_request(model, tokenizer, text, **split_options(options)) for text in prompts
        ]
        each, pieces = _start_all(model, tokenizer, requests, draft)
        for _ in pieces:
            pass
    of = _completion if return_details else lambda sample: sample.text
    results = [[of(sample) for sample in some] for some in each]
    return results if several else results[0]


def _completion(sample: Sample) -> Completion:
    return Completion(
        sample.text, sample.tokens, sample.logprobs, str(sample.finish), len(sample.request.prompt)
    )
