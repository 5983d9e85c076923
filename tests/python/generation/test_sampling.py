"""A draw is a function of seed and position, and filters, penalties and masks reach it.

The class, for log-probabilities: numbers of one name that are not those of other programs.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.errors import GptcError, UsageError
from gptc.generation.decoder import generate
from gptc.generation.options import Sampling
from gptc.generation.sampling import (
    Draw,
    StopFilter,
    draw_tokens,
    sample_token,
    token_logprob,
)
from gptc.tokenizer.base import Tokenizer
from small_models import softmax


def test_a_draw_among_some_is_as_if_the_others_were_banned() -> None:
    rng = np.random.default_rng(5)
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.6},
        {"min_p": 0.2}, {"typical_p": 0.5},
        {"repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"bias": ((3, 2.0), (17, -1.0), (5, float("-inf"))), "penalty_last_n": 0},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "temperature": 1e30},
    ]  # fmt: skip
    for trial in range(300):
        options = {"temperature": 1.0, **kinds[trial % len(kinds)]}
        logits = rng.normal(0, 2, 40).astype(np.float32)
        allowed = np.flatnonzero(rng.random(36) < 0.3)
        allowed = np.union1d(allowed, [2])
        history = rng.integers(0, 40, 20).tolist()
        own = Sampling(seed=trial, **options)
        bans = [(i, float("-inf")) for i in range(36) if i not in allowed]
        banned = Sampling(seed=trial, **{**options, "bias": (*own.bias, *bans)})
        mine = sample_token(logits, own, trial, 36, history, allowed)
        assert mine == sample_token(logits, banned, trial, 36, history)
        assert mine in allowed


def test_draws_follow_the_probabilities_of_what_is_allowed() -> None:
    logits = np.array([0.3, 2.0, -1.0, 1.0, 0.5, 3.0, -0.5], np.float32)
    allowed = np.array([0, 2, 3, 4, 6])
    n, expected = 20_000, np.exp(logits[allowed].astype(np.float64))
    expected *= n / expected.sum()
    draws = [sample_token(logits, Sampling(1.0, seed=s), 9, 7, (), allowed) for s in range(n)]
    counts = np.bincount(draws, minlength=7)
    assert counts[[1, 5]].sum() == 0
    chi_squared = ((counts[allowed] - expected) ** 2 / expected).sum()
    assert chi_squared < 23.5  # 4 degrees of freedom: one in 10,000 is above


def test_greedy_is_the_most_likely_token(writer: Model, tokenizer: Tokenizer) -> None:
    text = generate(writer, tokenizer, "ab", max_tokens=8, temperature=0, stop=())[0]
    tokens = [97, 98]
    for _ in range(8):
        tokens.append(int(writer.logits(np.array([tokens]))[0, -1].argmax()))
    assert text == tokenizer.decode(tokens[2:])


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    logits = np.zeros(256, np.float32)
    draws = {
        (seed, position): sample_token(logits, Sampling(1.0, seed=seed), position, 256)
        for seed in range(20)
        for position in range(20)
    }
    assert len(set(draws.values())) > 150  # uniform over 256
    for (seed, position), token in draws.items():
        assert sample_token(logits, Sampling(1.0, seed=seed), position, 256) == token


def test_tokens_beyond_the_tokenizers_vocabulary_are_never_drawn() -> None:
    logits = np.zeros(300, np.float32)
    logits[256:] = 50  # such as the padding rows of a published model
    drawn = {sample_token(logits, Sampling(1.0, seed=seed), 0, 256) for seed in range(50)}
    assert max(drawn) < 256


def test_filters_reach_the_sampler() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def drawn(**options: Any) -> set[int]:
        return {sample_token(logits, Sampling(1.0, seed=s, **options), 0, 4) for s in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(min_p=0.5) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.01}, "min_p is 1.01"),
        ({"seed": -1}, "seed is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_senseless_options_are_refused(
    writer: Model, tokenizer: Tokenizer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generate(writer, tokenizer, "a", **options)


# ---- stop strings ----


def test_the_stop_filter_against_a_search_of_the_whole() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice("ab<") for _ in range(rng.randrange(30)))
        stop = tuple("".join(rng.choice("ab<") for _ in range(rng.randrange(1, 5))) for _ in "12")
        stop_filter, out, at = StopFilter(stop), "", 0
        while at < len(text) and not stop_filter.stopped:
            step = rng.randrange(1, 4)
            out += stop_filter.push(text[at : at + step])
            at += step
            assert text.startswith(out)
        stopped = stop_filter.stopped
        out += stop_filter.flush()
        # The stop string that completes first wins; of several, the one that begins first.
        ends = [text.find(word) + len(word) for word in stop if word in text]
        assert stopped == bool(ends)
        if not ends:
            assert out == text
        else:
            assert not any(word in out for word in stop)
            assert any(text.startswith(out + word) for word in stop)


# ---- penalties and log-probabilities ----


def test_penalties_look_back_as_far_as_they_are_told() -> None:
    logits = np.zeros(8, np.float32)
    logits[3], logits[5] = 2.0, 1.9
    greedy = Sampling(0, presence_penalty=1.0, penalty_last_n=2)
    assert sample_token(logits, greedy, 0, 8, [3, 0, 0]) == 3
    assert sample_token(logits, greedy, 0, 8, [0, 3, 0]) == 5
    assert sample_token(logits, replace(greedy, penalty_last_n=0), 0, 8, [3, 0, 0]) == 5


def test_logprobs_count_padding_rows_and_list_none() -> None:
    logits = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    entry = token_logprob(logits, 1, 10, vocab_size=3)
    p = softmax(logits)
    assert entry.logprob == pytest.approx(np.log(p[1]), abs=1e-6)
    assert [token for token, _ in entry.top] == [2, 1, 0]
    assert [token for token, _ in token_logprob(logits, 1, 2, vocab_size=3).top] == [2, 1]


# ---- draws in a session ----


def test_draws_are_those_of_the_logits(writer: Model) -> None:
    """Also with biases, penalties and lists of likeliest tokens."""
    text = list(b"some prompt of the test, and some prompt of it")
    options = [
        Sampling(0.0),
        Sampling(1.1, seed=3),
        Sampling(0.9, top_k=9, top_p=0.8, seed=4, repetition_penalty=1.3, penalty_last_n=20),
        Sampling(2.0, min_p=0.1, typical_p=0.7, seed=5, bias=((7, -np.inf), (8, 2.5))),
    ]
    with writer.session(2) as drawn, writer.session(2) as decoded:
        tokens, seqs, want = text[:6], [0, 0, 0, 1, 1, 1], [True, False, True, True, False, False]
        for sampling in options:
            draws = [Draw(sampling, 30 + i, 250, text[: 30 + i], (None, 0, 3)[i]) for i in range(3)]
            got = draw_tokens(drawn, tokens, seqs, want, draws)
            logits = decoded.decode(np.array(tokens), np.array(seqs), want)
            for row, draw, (token, logprob) in zip(logits, draws, got, strict=True):
                assert token == sample_token(row, sampling, draw.position, 250, draw.history)
                if draw.top is None:
                    assert logprob is None
                    continue
                assert logprob
                wanted = token_logprob(row, token, draw.top, 250)
                assert logprob.token == token
                assert logprob.logprob == pytest.approx(wanted.logprob, abs=1e-5)
                assert [t for t, _ in logprob.top] == [t for t, _ in wanted.top]


def test_draws_that_cannot_be(writer: Model) -> None:
    draws = [Draw(Sampling(1.0, bias=tuple((i, -np.inf) for i in range(256))), 1, 256, (), None)]
    with writer.session() as session:
        with pytest.raises(GptcError, match="leave no token to draw"):
            draw_tokens(session, [1], [0], [True], draws)
        assert session.length() == 1
        with pytest.raises(GptcError, match="1 draws for 2 rows"):
            draw_tokens(session, [1, 2], [0, 0], [True, True], draws)
