"""Text from a model: one sample piece by piece, or several at once.

The token at position p of sample i is drawn with (seed + i, p), so the same call writes the same
text. A sample ends at an end-of-text token, before a stop string, after max_tokens, or where the
model's context is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from gptc import _lib
from gptc.errors import GptcError, UsageError
from gptc.model import FloatArray, Model
from gptc.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from gptc.tokenizer import Tokens

Finish = Literal["stop", "length", "context"]
DEFAULT_STOP = ("<|endoftext|>",)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply after the temperature, in this order."""

    temperature: float = 0.7  # 0: always the most likely token
    top_k: int = 0  # keep the k most likely; 0: all
    top_p: float = 1.0  # keep the fewest tokens with this much probability; 1: all
    min_p: float = 0.0  # drop tokens less likely than min_p times the most likely; 0: none
    seed: int = 0

    def check(self) -> None:
        """Raises UsageError for a value outside its range."""
        ranges = (
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min-p", self.min_p, 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 or more"),
        )
        for name, value, valid, wanted in ranges:
            if not valid:
                raise UsageError(f"{name} is {value}; it must be {wanted}")


def sample_token(logits: FloatArray, sampling: Sampling, position: int, vocab_size: int) -> int:
    """Draws a token below `vocab_size` from logits (V,); a function of (seed, position)."""
    ffi = _lib.load().ffi
    token = ffi.new("int32_t *")
    settings = _lib.new_struct("gpt_sampling", **vars(sampling))
    row = ffi.from_buffer("float[]", np.ascontiguousarray(logits, np.float32))
    size = min(vocab_size, len(logits))
    _lib.call("gpt_sample", row, size, settings, position, token)
    return int(token[0])


class StopFilter:
    """Passes text on until a stop string appears, and never part of one that may be coming."""

    def __init__(self, stop: Sequence[str]) -> None:
        if any(not word for word in stop):
            raise UsageError("a stop string is empty; leave it out")
        self.stop = tuple(stop)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certainly wanted, now that `text` has arrived."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for word in self.stop if (at := self._held.find(word)) >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, word) for word in self.stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        out, self._held = self._held, ""
        return out


class Sample:
    """One text while it grows. `finish` says why it ended; None while it goes on."""

    def __init__(
        self, index: int, sampling: Sampling, tokenizer: Tokenizer, stop: Sequence[str]
    ) -> None:
        self.index = index
        self.text = ""
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._sampling = replace(sampling, seed=sampling.seed + index)
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._filter = StopFilter(stop)

    def advance(self, logits: FloatArray, position: int, room: int, max_tokens: int) -> str:
        """Draws the token at `position` and returns the text that it completes.

        `room` is how many positions are left in the context, this one included.
        """
        token = sample_token(logits, self._sampling, position, self._tokenizer.vocab_size)
        piece = ""
        if token == self._tokenizer.end_of_text:
            self.finish = "stop"
        else:
            self.tokens.append(token)
            piece = self._filter.push(self._decoder.push(token))
            if self._filter.stopped:
                self.finish = "stop"
            elif len(self.tokens) >= max_tokens:
                self.finish = "length"
            elif room <= 1:
                self.finish = "context"
        if self.finish and not self._filter.stopped:
            piece += self._filter.push(self._decoder.flush()) + self._filter.flush()
        self.text += piece
        return piece


class Generation:
    """Samples of one prompt, decoded together. Iterate to get (sample index, piece of text).

    `samples` holds what has been written so far; `n_prompt` is the prompt's length in tokens.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompt: str,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        num_samples: int = 1,
        stop: Sequence[str] = DEFAULT_STOP,
    ) -> None:
        sampling = sampling or Sampling()
        sampling.check()
        if num_samples < 1:
            raise UsageError(f"num-samples is {num_samples}; it must be at least 1")
        if max_tokens < 1:
            raise UsageError(f"max-tokens is {max_tokens}; it must be at least 1")
        block_size = model.config.block_size
        tokens = prompt_tokens(tokenizer, prompt)
        if len(tokens) > block_size:
            raise GptcError(
                f"the prompt has {len(tokens):,} tokens, more than the model's context of "
                f"{block_size:,}; shorten it"
            )
        if int(tokens.max()) >= model.config.vocab_size:
            raise GptcError(
                f"the prompt holds token {tokens.max()}, outside the model's vocabulary of "
                f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
            )
        self.n_prompt = len(tokens)
        self.samples = [Sample(i, sampling, tokenizer, stop) for i in range(num_samples)]
        self._pieces = self._run(model, tokens, max_tokens)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._pieces

    def _run(self, model: Model, prompt: Tokens, max_tokens: int) -> Iterator[tuple[int, str]]:
        # The last token drawn is never fed back, so a full context holds one more than is decoded.
        n_ctx = min(model.config.block_size, len(prompt) + max_tokens - 1)
        position = len(prompt)
        with model.session(len(self.samples), n_ctx) as session:
            alive = self.samples
            tokens = np.tile(prompt, len(alive))
            while True:
                seqs = np.repeat(
                    np.array([s.index for s in alive], np.int32), len(tokens) // len(alive)
                )
                logits = session.decode(tokens, seqs)
                room = model.config.block_size + 1 - position
                for sample, row in zip(alive, logits, strict=True):
                    piece = sample.advance(row, position, room, max_tokens)
                    if piece:
                        yield sample.index, piece
                alive = [sample for sample in alive if sample.finish is None]
                if not alive:
                    return
                tokens = np.array([sample.tokens[-1] for sample in alive], np.int32)
                position += 1


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = DEFAULT_STOP,
) -> Iterator[str]:
    """The continuation of `prompt`, in pieces as they come.

    Without a prompt, a document begins. Raises GptcError when the prompt is longer than the
    model's context; a text that reaches the context's end stops there.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    generation = Generation(
        model, tokenizer, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop
    )
    return (piece for _, piece in generation)


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    num_samples: int = 1,
    stop: Sequence[str] = DEFAULT_STOP,
) -> list[str]:
    """`num_samples` continuations of `prompt`, decoded together; sample i uses `seed + i`."""
    generation = Generation(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, seed),
        num_samples=num_samples,
        stop=stop,
    )
    for _ in generation:
        pass
    return [sample.text for sample in generation.samples]


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> Tokens:
    """The tokens of a prompt; with none, those that begin a document."""
    return tokenizer.encode(prompt or tokenizer.start)


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` that is a beginning, but not the whole, of `word`."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
