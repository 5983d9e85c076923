"""Beam search finds the best of all texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.errors import UsageError
from gptc.generation.beam import beam_search
from gptc.generation.decoder import generate
from gptc.generation.options import Sampling
from gptc.generation.request import make_request
from gptc.tokenizer.base import Tokenizer
from small_models import softmax, varied

Config = Callable[..., GPTConfig]


@pytest.fixture(params=["fp32", "bf16"])
def writer(config: Config, request: pytest.FixtureRequest) -> Iterator[Model]:
    with varied(config(), dtype=request.param) as model:
        yield model


class FourLetters:
    """A tokenizer of four letters, the last of which ends a text."""

    kind, vocab_size, start, bos, ends = "four", 4, "a", None, frozenset({3})
    strips_space = False

    def encode(self, text: str) -> Any:
        return np.array(["abcd".index(c) for c in text], np.int32)

    def decode_bytes(self, tokens: Any) -> bytes:
        return "".join("abcd"[t] for t in tokens).encode()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_of_all_texts(config: Config, length_penalty: float) -> None:
    tokenizer: Any = FourLetters()
    most, prompt = 4, [0, 1]
    with varied(config(vocab_size=4), seed=6) as model:
        request = make_request(
            model, tokenizer, "ab", max_tokens=most, num_samples=5, stop=(), logprobs=0
        )
        found = beam_search(model, tokenizer, request, 200, length_penalty)
        every = {}
        for length in range(1, most + 1):
            for text in itertools.product(range(4), repeat=length):
                ended = text[-1] == 3
                if 3 in text[:-1] or (length < most and not ended):
                    continue
                logits = model.logits(np.array([[*prompt, *text]]))[0]
                score = sum(
                    np.log(softmax(logits[len(prompt) - 1 + i]))[t] for i, t in enumerate(text)
                )
                every[text] = score / length**length_penalty
    best = sorted(every, key=lambda text: -every[text])[:5]
    assert [(*s.tokens, 3) if s.finish == "stop" else tuple(s.tokens) for s, _ in found] == best
    for (sample, score), text in zip(found, best, strict=True):
        assert score == pytest.approx(every[text], abs=1e-4)
        assert sample.text == "".join("abc"[t] for t in text if t != 3)
        assert len(sample.logprobs) == len(sample.tokens)


def test_a_search_ends_when_nothing_better_can_come(config: Config) -> None:
    tokenizer: Any = FourLetters()
    for seed in range(8):
        with varied(config(vocab_size=4), seed=seed) as model:
            request = make_request(model, tokenizer, "ab", max_tokens=12, num_samples=2, stop=())
            (_, first), (_, second) = beam_search(model, tokenizer, request, 64, 1.0)
            (_, narrow), *_ = beam_search(model, tokenizer, request, 2, 1.0)
            assert first >= second
            assert first >= narrow - 1e-6


def test_beams_heed_bans_and_the_context(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_tokens": 100, "stop": ()}
    plain = make_request(writer, tokenizer, "Once", **options)
    ((sample, _),) = beam_search(writer, tokenizer, plain, 2)
    assert sample.finish == "context"
    assert len(sample.sequence) == writer.config.block_size + 1
    first = sample.tokens[0]
    ban = Sampling(bias=((first, float("-inf")),))
    ((other, _),) = beam_search(
        writer, tokenizer, make_request(writer, tokenizer, "Once", sampling=ban, **options), 2
    )
    assert first not in other.tokens


def test_one_beam_is_greedy(writer: Model, tokenizer: Tokenizer) -> None:
    greedy = generate(writer, tokenizer, "Once", max_tokens=30, temperature=0, stop=())
    request = make_request(writer, tokenizer, "Once", max_tokens=30, stop=())
    assert [sample.text for sample, _ in beam_search(writer, tokenizer, request, 1)] == greedy


def test_more_beams_never_score_worse(writer: Model, tokenizer: Tokenizer) -> None:
    request = make_request(writer, tokenizer, "Once", max_tokens=5, stop=())
    scores = [beam_search(writer, tokenizer, request, n)[0][1] for n in (1, 100)]
    assert scores[0] <= scores[1] + 1e-5
    three = make_request(writer, tokenizer, "Once", max_tokens=8, num_samples=3, stop=())
    with pytest.raises(UsageError, match="2 beams cannot give 3 samples"):
        beam_search(writer, tokenizer, three, 2)
