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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from gptc.errors import python_names
from gptc.generation.batch import Batch
from gptc.generation.drafts import Draft
from gptc.generation.request import Request, Sample, make_request, split_options
from gptc.generation.sampling import TokenLogprob
from gptc.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from gptc.engine.model import Model
    from gptc.engine.session import Session

MOST_AT_ONCE = 64  # samples of a request that are decoded together


class Decoder:
    """Decodes up to n_seq samples at a time; when one ends, the next begins. See `Batch`.

    With `keep`, the cache stays until `close`, and a prompt that begins as the text before it did
    is computed from where the two differ. `chunk` is that of `Batch`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        n_seq: int = 1,
        n_ctx: int | None = None,
        draft: Draft | None = None,
        keep: bool = False,
        chunk: int | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._n_seq = n_seq
        self._n_ctx = n_ctx or model.config.block_size
        self._keep = keep
        self._chunk = chunk
        self._draft = draft
        self._kept: Batch | None = None

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
        """Yields (sample, piece of text) as pieces are decoded, and once when a sample ends."""
        if self._keep:
            self._kept = self._kept or self._batch(self._model.session(self._n_seq, self._n_ctx))
            self._kept.clear()
            yield from _run(self._kept, samples)
        else:
            with self._model.session(self._n_seq, self._n_ctx) as session:
                yield from _run(self._batch(session), samples)

    def close(self) -> None:
        """Frees a cache that is kept; twice is harmless."""
        if self._kept:
            self._kept.session.close()
        self._kept = None

    def _batch(self, session: Session) -> Batch:
        return Batch(
            session, self._tokenizer, draft=self._draft, keep=self._keep, chunk=self._chunk
        )


def _run(batch: Batch, samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
    waiting = iter(samples)
    coming = next(waiting, None)
    while True:
        while coming and batch.has_room(coming):
            yield from batch.join(coming)
            coming = next(waiting, None)
        if batch.active:
            yield from batch.step()
        elif not coming:
            return


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
