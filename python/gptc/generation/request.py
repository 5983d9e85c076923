"""A request for text, and its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model
from gptc.errors import DeadEnd, GptcError, PromptTooLong, UsageError, about, half_a_pair
from gptc.files.elsewhere import meant
from gptc.generation.options import Sampling, TextOptions
from gptc.generation.sampling import (
    MOST_TOP,
    Draw,
    StopFilter,
    TokenLogprob,
    sample_token,
    token_logprob,
)
from gptc.settings import declared
from gptc.tokenizer.base import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from gptc.engine.session import AdapterCopy
    from gptc.generation.constraint import Constraint

Finish = Literal["stop", "length", "context", "error"]
Pooling = Literal["mean", "last"]  # of the states after all tokens, or of that after the last one


@dataclass(eq=False)
class Request:
    """A prompt and its options. Made by `make_request`."""

    prompt: list[int]
    sampling: Sampling
    options: TextOptions
    constraint: Constraint | None = None  # that the text must match
    prompt_logprobs: int | None = None  # as `options.logprobs`, of the prompt's tokens
    adapter: AdapterCopy | None = None  # None: the model's own parameters
    pooling: Pooling | None = None  # of an embedding: the prompt's states, and no text

    def n_ctx(self, block_size: int) -> int:
        """Length of a sample's cache, in tokens: the last token drawn is never fed back."""
        return min(block_size, len(self.prompt) + self.options.max_tokens - 1)

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """New samples, without any tokens, each made when it is asked for."""
        return (Sample(i, self, tokenizer) for i in range(self.options.num_samples))


def check_loaded(model: object, tokenizer: object) -> None:
    """UsageError for paths in place of what is loaded from them."""
    for value, what, how in (
        (model, "model", "it with gptc.Model.load(PATH)"),
        (tokenizer, "tokenizer", "the model's with gptc.load_tokenizer(PATH)"),
    ):
        if value is None or isinstance(value, str | Path):
            raise UsageError(f"the {what} is {value!r:.60}; load {how}")


def make_request(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] = "",
    *,
    sampling: Sampling | None = None,
    **options: Any,
) -> Request:
    """A checked request. `options` are the fields of `TextOptions`.

    The prompt is a text, or a list of tokens that is used as it is. An empty prompt begins a
    document.
    """
    check_loaded(model, tokenizer)
    sampling = sampling or Sampling()
    sampling.check()
    texts = TextOptions(**options)
    texts.check()
    with about("bias"):
        _check_bias(sampling, tokenizer)
    with about("prompt"):
        tokens = _tokens_of(tokenizer, prompt)
        _check_prompt(model, tokens, texts.context_shift)
    constraint = None
    if texts.patterns:
        from gptc.generation.constraint import make_constraint  # rarely needed

        n_tokens = min(tokenizer.vocab_size, model.config.vocab_size)
        with about(next(iter(texts.patterns))):
            constraint = make_constraint(tokenizer, n_tokens, **texts.patterns)
    return Request(tokens, sampling, texts, constraint)


def _check_bias(sampling: Sampling, tokenizer: Tokenizer) -> None:
    for token, _ in sampling.bias:
        if not 0 <= token < tokenizer.vocab_size:
            raise UsageError(
                f"the bias for token {token} is outside the vocabulary of {tokenizer.vocab_size}"
            )


def _tokens_of(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The tokens of a prompt, of either sort. UsageError for another."""
    if isinstance(prompt, bytes) or not (isinstance(prompt, str) or _are_tokens(prompt)):
        raise UsageError(
            f"the prompt is {prompt!r:.100}; it must be one text, or a list of token ids"
        )
    tokens = prompt_tokens(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    return tokens or prompt_tokens(tokenizer, "")


def split_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, with the fields of `Sampling` as one.

    UsageError for unknown names, and for values of the wrong type.
    """
    drawing, writing = declared(Sampling), declared(TextOptions)
    if isinstance(options.get("stop"), str):
        options = {**options, "stop": (options["stop"],)}
    for name, value in options.items():
        if name not in drawing and name not in writing:
            known = [*writing, *drawing]
            close = meant(name, known)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(known)}"
            raise UsageError(f"unknown option {name!r}; {hint}")
        if name != "json_schema" or not isinstance(value, dict | bool):
            plain = value.item() if isinstance(value, np.generic) else value
            (drawing | writing)[name].check_type(plain, name)
    if not all(isinstance(text, str) for text in options.get("stop", ())):
        raise UsageError(f"stop is {options['stop']!r}; it must be text, or a list of texts")
    biases = options.get("bias", ())
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in biases):
        raise UsageError(f"bias is {biases!r}; it must be a list of (token id, number)")
    sampling = Sampling(**{name: options[name] for name in drawing if name in options})
    return {"sampling": sampling, **{n: options[n] for n in writing if n in options}}


def _check_prompt(model: Model, tokens: Sequence[int], context_shift: bool) -> None:
    if len(tokens) > model.config.block_size and not context_shift:
        raise PromptTooLong(
            f"the prompt has {len(tokens):,} tokens, more than the model's context of "
            f"{model.config.block_size:,}; shorten it, or continue from its newer half with "
            "--context-shift",
            len(tokens),
        )
    if max(tokens) >= model.config.vocab_size:
        raise GptcError(
            f"the prompt holds token {max(tokens)}, outside the model's vocabulary of "
            f"{model.config.vocab_size}; use the model's own tokenizer"
        )


def _are_tokens(prompt: object) -> bool:
    if type(prompt) is list and set(map(type, prompt)) == {int}:  # fast for long prompts
        return bool(min(prompt) >= 0)
    return isinstance(prompt, (Sequence, np.ndarray)) and all(
        isinstance(token, (int, np.integer)) and token >= 0 for token in prompt
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one gives the tokens that begin a document.

    If the tokenizer has a `bos`, it comes first, and only once even if the text spells it out.
    Bytes that are not UTF-8 (kept by Python's surrogateescape) become single-byte tokens.
    """
    if tokenizer.bos is not None and not prompt:
        return [tokenizer.bos]
    if (
        not prompt
        and tokenizer.start == tokenizer.start_text()
        and tokenizer.end_of_text is not None
    ):
        return [tokenizer.end_of_text]
    text = prompt or tokenizer.start
    try:
        text.encode()
    except UnicodeEncodeError as stray:
        try:
            data = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise _not_text(error) from None
        if tokenizer.byte_ids is None:
            raise _not_text(stray) from None
        tokens = tokenizer.encode_raw(data)
    else:
        tokens = tokenizer.encode(text)
    ids: list[int] = np.asarray(tokens).tolist()
    return ids if tokenizer.bos is None or ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def _not_text(error: UnicodeEncodeError) -> GptcError:
    return GptcError(f"character {error.start} of the prompt is {half_a_pair(error)}")


class Sample:
    """One text while it is generated. `finish` is the reason for its end; None until then.

    If that is "error", `error` holds the error.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.sampling = replace(request.sampling, seed=request.sampling.seed + index)
        self.pieces: list[str] = []
        self.sequence = list(request.prompt)
        """Prompt and continuation."""
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt's tokens but the first, if the request asks for them."""
        self.finish: Finish | None = None
        self.error: DeadEnd | None = None
        self.grammar = request.constraint.begin() if request.constraint else None
        """The tokens that its regex, grammar or JSON schema allows; None without one."""
        self.pooled: npt.NDArray[np.float64] | None = None
        """Of an embedding: the sum of the prompt's states so far, or the last one: (C,)."""
        self._tokenizer = tokenizer
        begins = request.prompt in ([], [tokenizer.bos])
        # What a pattern matches keeps its spaces.
        self._decoder = StreamDecoder(tokenizer, continued=not begins or bool(request.constraint))
        self._filter = StopFilter(request.options.stop)

    @property
    def text(self) -> str:
        """The continuation's text so far, without a possible start of a stop string."""
        return "".join(self.pieces)

    @property
    def tokens(self) -> list[int]:
        """The continuation's tokens."""
        return self.sequence[len(self.request.prompt) :]

    @property
    def n_tokens(self) -> int:
        """The continuation's length in tokens."""
        return len(self.sequence) - len(self.request.prompt)

    @property
    def unscored(self) -> int:
        """The number of the prompt's tokens whose log-probabilities are still missing."""
        if self.request.prompt_logprobs is None:
            return 0
        return len(self.request.prompt) - 1 - len(self.prompt_logprobs)

    def score(self, logits: FloatArray) -> None:
        """Adds the log-probability of the prompt's next token, if there is one left."""
        top = self.request.prompt_logprobs
        if top is not None and self.unscored:
            token = self.request.prompt[len(self.prompt_logprobs) + 1]
            found = token_logprob(logits, token, top, self._tokenizer.vocab_size)
            self.prompt_logprobs.append(found)

    def pool(self, states: FloatArray) -> None:
        """Takes the states (N, C) of the prompt's next tokens, as far as its pooling needs them."""
        if len(states):
            total = states.sum(0, dtype=np.float64)
            self.pooled = total if self.pooled is None else self.pooled + total

    def draws(self, guess: Sequence[int] = ()) -> list[Draw] | None:
        """The draws of the next token, and of those after each of `guess`.

        None if the sample needs the logits: for its grammar, or for many likeliest tokens.
        """
        top = self.request.options.logprobs
        if self.grammar or (top or 0) > MOST_TOP:
            return None
        text = [*self.sequence, *guess] if guess else self.sequence
        n, size = len(self.sequence), self._tokenizer.vocab_size
        return [
            Draw(self.sampling, at, size, text[:at] if guess else text, top)
            for at in range(n, n + 1 + len(guess))
        ]

    def advance(self, logits: FloatArray, n_ctx: int) -> str:
        """Draws the next token and returns the text that it completes.

        At a dead end of the grammar, this sample fails; the others continue.
        """
        try:
            token = self._draw(logits)
            wanted = self.request.options.logprobs
            size = self._tokenizer.vocab_size
            logprob = None if wanted is None else token_logprob(logits, token, wanted, size)
            return self.take(token, logprob, n_ctx)
        except DeadEnd as error:
            self.error, self.finish = error, "error"
            return ""

    def _draw(self, logits: FloatArray) -> int:
        """Draws the next token. DeadEnd if the grammar allows none."""
        position, size = len(self.sequence), self._tokenizer.vocab_size
        if not self.grammar:
            return sample_token(logits, self.sampling, position, size, self.sequence)
        allowed = self.grammar.allowed
        if not len(allowed):
            raise self.grammar.dead_end()
        return sample_token(logits, self.sampling, position, size, self.sequence, allowed)

    def take(self, token: int, logprob: TokenLogprob | None, n_ctx: int) -> str:
        """Appends a token that was drawn and returns the text that it completes."""
        n_before = self.n_tokens
        piece = self.append(token, n_ctx)
        if logprob and self.n_tokens > n_before:
            self.logprobs.append(logprob)
        return piece

    def append(self, token: int, n_ctx: int) -> str:
        """Appends a token and returns the text that it completes.

        The last token is never fed back, so it may be one past the context.
        """
        piece = ""
        if token in self._tokenizer.ends:
            self.finish = "stop"
        else:
            self.sequence.append(token)
            piece = self._filter.push(self._decoder.push(token))
            if self.grammar:
                self.grammar.take(token)
            if self._filter.stopped or (self.grammar and self.grammar.ended):
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
