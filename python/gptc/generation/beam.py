"""Beam search: the continuations of the highest total probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptc.errors import UsageError
from gptc.generation.sampling import TokenLogprob, token_logprob

if TYPE_CHECKING:
    from gptc.engine.arrays import FloatArray
    from gptc.engine.model import Model
    from gptc.engine.session import Session
    from gptc.generation.request import Request, Sample
    from gptc.tokenizer.base import Tokenizer


_NEVER = np.float32(-1e30)  # a logit of probability zero


@dataclass
class _Beam:
    tokens: list[int]
    logprobs: list[TokenLogprob]
    score: float  # sum of log-probabilities
    seq: int  # of the session
    end: int | None = None  # the token that ended it, not in `tokens`

    def mean(self, length_penalty: float) -> float:
        """The score with a length penalty: Wu et al. 2016, without the constant."""
        n = len(self.tokens) + (self.end is not None)
        return float(self.score / n**length_penalty)


def beam_search(
    model: Model,
    tokenizer: Tokenizer,
    request: Request,
    width: int,
    length_penalty: float = 1.0,
) -> list[tuple[Sample, float]]:
    """The num_samples best texts of `width` beams, best first, with their scores.

    The score is the sum of log-probabilities divided by (number of tokens)**length_penalty. Biases
    apply; temperature, filters, penalties and seed do not.
    """
    if width < 1:
        raise UsageError(f"beams is {width}; it must be at least 1")
    if request.options.context_shift:
        raise UsageError("beam search cannot shift the context: leave out --context-shift")
    if request.constraint:
        raise UsageError("beam search takes no regex, grammar or JSON schema: leave out --beams")
    if request.options.num_samples > width:
        raise UsageError(
            f"{width} beams cannot give {request.options.num_samples} samples; raise --beams"
        )
    n_ctx = request.n_ctx(model.config.block_size)
    most = n_ctx + 1 - len(request.prompt)
    ended: list[_Beam] = []
    with model.session(width, n_ctx) as session:
        beams = [_Beam([], [], 0.0, 0)]
        logits = session.decode(np.array(request.prompt, np.int32), 0)[None]
        while True:
            for token, bias in request.sampling.bias:
                logits[:, token] = np.maximum(logits[:, token] + bias, _NEVER)
            beams = _grow(session, tokenizer, beams, logits, ended, width)
            ended = sorted(ended, key=lambda b: -b.mean(length_penalty))[:width]
            if not beams or len(beams[0].tokens) >= most:
                break
            # Scores only fall: an upper bound of the beams that are still open.
            best = max(beam.score for beam in beams) / most**length_penalty
            if len(ended) == width and ended[-1].mean(length_penalty) >= best:
                break
            beams.sort(key=lambda b: b.seq)
            tokens = np.array([beam.tokens[-1] for beam in beams], np.int32)
            logits = session.decode(tokens, np.array([beam.seq for beam in beams], np.int32))
    found = sorted(ended + beams, key=lambda b: -b.mean(length_penalty))
    samples = request.samples(tokenizer)
    return [
        (_finished(sample, beam, tokenizer, n_ctx), beam.mean(length_penalty))
        for sample, beam in zip(samples, found, strict=False)
    ]


def _grow(
    session: Session,
    tokenizer: Tokenizer,
    beams: list[_Beam],
    logits: FloatArray,
    ended: list[_Beam],
    width: int,
) -> list[_Beam]:
    """The best continuations of the beams by one token; those that end go to `ended`."""
    candidates = []
    for beam, row in zip(beams, logits, strict=True):
        for token, logprob in token_logprob(row, 0, 2 * width, tokenizer.vocab_size).top:
            candidates.append((beam.score + logprob, beam, TokenLogprob(token, logprob)))
    candidates.sort(key=lambda c: (-c[0], c[1].seq, c[2].token))
    grown: list[tuple[float, _Beam, TokenLogprob]] = []
    for score, beam, chosen in candidates[: 2 * width]:
        if chosen.token in tokenizer.ends:
            logprobs = [*beam.logprobs, chosen]
            ended.append(_Beam(beam.tokens, logprobs, score, beam.seq, end=chosen.token))
        elif len(grown) < width:
            grown.append((score, beam, chosen))
    return _take_places(session, grown, width)


def _take_places(
    session: Session, grown: list[tuple[float, _Beam, TokenLogprob]], width: int
) -> list[_Beam]:
    """Gives each continuation a sequence: the beam's own to its first, free copies to others."""
    kept = {beam.seq for _, beam, _ in grown}
    free = [seq for seq in range(width) if seq not in kept]
    taken: set[int] = set()
    result = []
    for score, beam, chosen in grown:
        seq = beam.seq
        if seq in taken:
            seq = free.pop()
            session.fork(beam.seq, seq)
        taken.add(seq)
        tokens, logprobs = [*beam.tokens, chosen.token], [*beam.logprobs, chosen]
        result.append(_Beam(tokens, logprobs, score, seq))
    return result


def _finished(sample: Sample, beam: _Beam, tokenizer: Tokenizer, n_ctx: int) -> Sample:
    """The beam as a finished sample."""
    for token in beam.tokens if beam.end is None else [*beam.tokens, beam.end]:
        if sample.finish is None:
            sample.append(token, n_ctx)
    sample.finish = sample.finish or "context"
    if sample.request.options.logprobs is not None:
        sample.logprobs = beam.logprobs[: sample.n_tokens]
    return sample
