"""Draws tokens from logits, computes log-probabilities, and finds stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gptc.engine import library
from gptc.engine.arrays import FloatArray
from gptc.generation.options import Sampling

if TYPE_CHECKING:
    from gptc.engine.session import Session


@lru_cache(maxsize=1024)
def _settings(ffi: Any, sampling: Sampling) -> tuple[Any, Any]:
    """A gpt_sampling, and the array that it points to."""
    bias = ffi.new("gpt_bias[]", [list(pair) for pair in sampling.bias])
    names = {field.name for field in fields(Sampling)} - {"penalty_last_n", "bias"}
    struct = library.new_struct("gpt_sampling", **{name: getattr(sampling, name) for name in names})
    struct.bias, struct.n_bias = bias, len(sampling.bias)
    return struct, bias


def sample_token(
    logits: FloatArray,
    sampling: Sampling,
    position: int,
    vocab_size: int,
    history: Sequence[int] = (),
    allowed: npt.NDArray[np.integer[Any]] | None = None,
) -> int:
    """Draws a token below `vocab_size` from logits (V,); with `allowed`, one of these ids (n,).

    The draw is a function of (seed, position); penalties count the end of `history`. `allowed` is
    sorted.
    """
    past = history[-sampling.penalty_last_n :] if sampling.looks_back else ()
    if allowed is not None:
        # Draw from the allowed tokens alone, renumbered from 0.
        number = np.full(max(vocab_size, len(logits)), -1)
        number[allowed] = np.arange(len(allowed))
        past = number[list(past)].tolist()
        bias = [(int(number[token]), x) for token, x in sampling.bias if number[token] >= 0]
        own = replace(sampling, bias=tuple(bias)) if sampling.bias else sampling
        return int(allowed[sample_token(logits[allowed], own, position, len(allowed), past)])
    ffi = library.load().ffi
    token = ffi.new("int32_t *")
    settings, _ = _settings(ffi, sampling)
    row = ffi.from_buffer("float[]", np.ascontiguousarray(logits, np.float32))
    size = min(vocab_size, len(logits))
    seen = ffi.new("int32_t[]", list(past))
    library.call("gpt_sample", row, size, settings, seen, len(past), position, token)
    return int(token[0])


MOST_TOP = 32  # likeliest tokens that the engine lists with a draw: GPT_MAX_TOP


@dataclass(frozen=True)
class Draw:
    """A token to be drawn: by which options, at which position, after which tokens."""

    sampling: Sampling
    position: int
    vocab_size: int  # of the tokenizer
    history: Sequence[int]
    top: int | None  # also log-probabilities: of the token, and of so many of the likeliest


def draw_tokens(
    session: Session,
    tokens: npt.ArrayLike,
    seqs: npt.ArrayLike,
    want: npt.ArrayLike,
    draws: Sequence[Draw],
) -> list[tuple[int, TokenLogprob | None]]:
    """Appends tokens to the session's sequences and draws after each wanted one.

    The same tokens and log-probabilities as `sample_token` and `token_logprob` of the logits, which
    stay where the model is.
    """
    ffi = library.load().ffi
    out, kept = ffi.new("gpt_draw[]", len(draws)), []
    for to, draw in zip(out, draws, strict=True):
        sampling = draw.sampling
        settings, bias = _settings(ffi, sampling)
        past = draw.history[-sampling.penalty_last_n :] if sampling.looks_back else ()
        history = ffi.new("int32_t[]", list(past)) if past else ffi.NULL
        kept.append((bias, history))
        to.sampling = settings[0]
        to.history, to.n_history = history, len(past)
        to.vocab_size = min(draw.vocab_size, session.vocab_size)
        to.position = draw.position
        to.n_top = -1 if draw.top is None else min(draw.top, to.vocab_size)
    session.sample(tokens, out, seqs, want)
    return [(drawn.token, _logprob_of(drawn) if drawn.n_top >= 0 else None) for drawn in out]


def _logprob_of(drawn: Any) -> TokenLogprob:
    top = [(drawn.top_tokens[i], drawn.top_logprobs[i]) for i in range(drawn.n_top)]
    return TokenLogprob(drawn.token, drawn.logprob, tuple(top))


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, and the most likely tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: FloatArray, token: int, top: int, vocab_size: int) -> TokenLogprob:
    """The log-probability of a token below `vocab_size`, by logits (V,), at temperature 1.

    The probabilities of all V rows of the model add up to 1, padding included, as transformers has
    it; `top` lists tokens that exist.
    """
    ffi = library.load().ffi
    size = len(logits)
    n = min(top + max(0, size - vocab_size), size)  # padding may be among the most likely
    row = ffi.from_buffer("float[]", np.ascontiguousarray(logits, np.float32))
    logprob, tokens, logprobs = ffi.new("float *"), ffi.new("int32_t[]", n), ffi.new("float[]", n)
    library.call("gpt_logprobs", row, size, token, logprob, n, tokens, logprobs)
    best = [(tokens[i], logprobs[i]) for i in range(n) if tokens[i] < vocab_size]
    return TokenLogprob(token, float(logprob[0]), tuple(best[:top]))


class StopFilter:
    """Passes text on up to a stop string, and holds back a possible start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """Adds `text`; returns the text that cannot belong to a stop string."""
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
        """Returns the text held back, at the end of the input."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, word: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `word`."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
