"""A request for text, and the samples that grow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model
from gptc.errors import DeadEnd, GptcError, UsageError
from gptc.generation.options import Sampling, TextOptions
from gptc.generation.sampling import (
    StopFilter,
    TokenLogprob,
    sample_token,
    token_logprob,
)
from gptc.settings import declared
from gptc.tokenizer.base import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from gptc.generation.grammar.constraint import Constraint

Finish = Literal["stop", "length", "context", "error"]


@dataclass(eq=False)
class Request:
    """A prompt, and how it is to be continued. Made by `make_request`."""

    prompt: list[int]
    sampling: Sampling
    options: TextOptions
    constraint: Constraint | None = None  # what the text must be

    def n_ctx(self, block_size: int) -> int:
        """The most tokens that a sample holds in a cache: the last one drawn is never fed back."""
        return min(block_size, len(self.prompt) + self.options.max_tokens - 1)

    def samples(self, tokenizer: Tokenizer) -> list[Sample]:
        """The texts that this asks for, not begun yet."""
        return [Sample(i, self, tokenizer) for i in range(self.options.num_samples)]


def make_request(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] = "",
    *,
    sampling: Sampling | None = None,
    **options: Any,
) -> Request:
    """A request whose every part was checked. `options` are the fields of `TextOptions`.

    The prompt is a text, or tokens to which nothing is added; without one, a document begins.
    """
    if tokenizer is None:
        raise UsageError("the tokenizer is None; take the model's: load_tokenizer(PATH)")
    if not isinstance(prompt, str) and not _are_tokens(prompt):
        raise UsageError(
            f"the prompt is {prompt!r}; it must be one text, or a list of tokens' numbers"
        )
    sampling = sampling or Sampling()
    sampling.check()
    texts = TextOptions(**options)
    texts.check()
    StopFilter(texts.stop)
    for token, _ in sampling.bias:
        if not 0 <= token < tokenizer.vocab_size:
            raise UsageError(
                f"a bias is for token {token}; the vocabulary has {tokenizer.vocab_size}"
            )
    tokens = prompt_tokens(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    tokens = tokens or prompt_tokens(tokenizer, "")
    _check_prompt(model, tokens, texts.context_shift)
    constraint = None
    if texts.regex is not None or texts.grammar is not None:
        from gptc.generation.grammar.constraint import make_constraint  # most texts need none

        n_tokens = min(tokenizer.vocab_size, model.config.vocab_size)
        constraint = make_constraint(tokenizer, n_tokens, regex=texts.regex, grammar=texts.grammar)
    return Request(tokens, sampling, texts, constraint)


def split_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options given by name, those of `Sampling` gathered into one. UsageError for others."""
    drawing, writing = declared(Sampling), declared(TextOptions)
    for name in options:
        if name not in drawing and name not in writing:
            known = ", ".join([*writing, *drawing])
            raise UsageError(f"a text has no option {name!r}; known: {known}")
    sampling = Sampling(**{name: options[name] for name in drawing if name in options})
    return {"sampling": sampling, **{n: options[n] for n in writing if n in options}}


def _check_prompt(model: Model, tokens: Sequence[int], context_shift: bool) -> None:
    if len(tokens) > model.config.block_size and not context_shift:
        raise GptcError(
            f"the prompt has {len(tokens):,} tokens, more than the model's context of "
            f"{model.config.block_size:,}; shorten it, or continue from its end with "
            "--context-shift"
        )
    if max(tokens) >= model.config.vocab_size:
        raise GptcError(
            f"the prompt holds token {max(tokens)}, outside the model's vocabulary of "
            f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
        )


def _are_tokens(prompt: object) -> bool:
    return isinstance(prompt, (Sequence, np.ndarray)) and all(
        isinstance(token, (int, np.integer)) and token >= 0 for token in prompt
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; with none, those that begin a document.

    The first is `bos` where the tokenizer has one, once: also where the text spells it out.
    Bytes that are no UTF-8, as Python's surrogateescape keeps them, become tokens of single bytes.
    """
    if tokenizer.bos is not None and not prompt:
        return [tokenizer.bos]
    text = prompt or tokenizer.start
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            tokens = tokenizer.encode_raw(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise GptcError(
                f"character {error.start} of the prompt is U+{ord(text[error.start]):04X}, half of "
                "a character; give it whole"
            ) from None
    else:
        tokens = tokenizer.encode(text)
    ids = [int(token) for token in tokens]
    return ids if tokenizer.bos is None or ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


class Sample:
    """One text while it grows. `finish` says why it ended; None while it goes on.

    Where it is "error", `error` holds that error.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.sampling = replace(request.sampling, seed=request.sampling.seed + index)
        self.pieces: list[str] = []
        self.sequence = list(request.prompt)
        """Prompt and continuation."""
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish | None = None
        self.error: DeadEnd | None = None
        self.place = request.constraint.start if request.constraint else None
        """Where the text stands in what it must be."""
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._filter = StopFilter(request.options.stop)

    @property
    def text(self) -> str:
        """The continuation's text, as far as it is certain."""
        return "".join(self.pieces)

    @property
    def tokens(self) -> list[int]:
        """The continuation."""
        return self.sequence[len(self.request.prompt) :]

    @property
    def n_tokens(self) -> int:
        """The continuation's length."""
        return len(self.sequence) - len(self.request.prompt)

    def draw(self, logits: FloatArray) -> int:
        """The token that follows. DeadEnd where none may."""
        position, size = len(self.sequence), self._tokenizer.vocab_size
        if not self.place:
            return sample_token(logits, self.sampling, position, size, self.sequence)
        allowed = self.place.allowed
        if not len(allowed):
            raise self.place.dead_end(self._tokenizer.decode(self.tokens))
        return sample_token(logits, self.sampling, position, size, self.sequence, allowed)

    def advance(self, logits: FloatArray, n_ctx: int) -> str:
        """Draws the next token and returns the text that it completes.

        Where none can follow, the text has failed, and no other with it.
        """
        n_before = self.n_tokens
        try:
            token = self.draw(logits)
            piece = self.append(token, n_ctx)
        except DeadEnd as error:
            self.error, self.finish = error, "error"
            return ""
        if self.request.options.logprobs is not None and self.n_tokens > n_before:
            wanted = self.request.options.logprobs
            self.logprobs.append(token_logprob(logits, token, wanted, self._tokenizer.vocab_size))
        return piece

    def append(self, token: int, n_ctx: int) -> str:
        """Takes in the next token and returns the text that it completes.

        The last token of a text is never fed back, so it may stand just past the context.
        """
        piece = ""
        if token in (self._tokenizer.end_of_text, self._tokenizer.bos):
            self.finish = "stop"
        else:
            self.sequence.append(token)
            piece = self._filter.push(self._decoder.push(token))
            if self.place:
                self.place = self.place.after(token)
            if self._filter.stopped or (self.place and self.place.ended):
                self.finish = "stop"
            elif self.n_tokens >= self.request.options.max_tokens:
                self.finish = "length"
            elif len(self.sequence) > n_ctx and not self.request.options.context_shift:
                self.finish = "context"
        if self.finish and not self._filter.stopped:
            piece += self._filter.push(self._decoder.flush()) + self._filter.flush()
        if piece:
            self.pieces.append(piece)
        return piece
