"""Texts longer than the windows of a model's layers: the cache keeps what later tokens see."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.engine.session import Session, session_bytes
from gptc.errors import GptcError
from gptc.eval.likelihood import Scorer
from gptc.generation.decoder import Decoder, generate
from gptc.generation.options import Sampling
from gptc.generation.request import make_request
from gptc.tokenizer.registry import make_tokenizer

N_CTX = 700
WINDOW = 40


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    config = GPTConfig.preset(
        "tiny", vocab_size=256, block_size=8192, n_layer=2, n_embd=24, window=WINDOW
    )
    with Model.create(config, training=False, max_batch=1, max_seq=N_CTX) as model:
        rng = np.random.default_rng(5)
        for name, shape, decay in config.parameters():
            if decay:
                model.set(name, rng.normal(0, 0.5, shape).astype(np.float32))
        yield model


def greedy(session: Session, n: int) -> list[int]:
    text = [1, 2, 3]
    logits = session.decode(text)
    while len(text) < n:
        text.append(int(np.argmax(logits)))
        logits = session.decode(text[-1:])
    return text


def test_a_long_text_is_that_of_the_whole_model(model: Model) -> None:
    with model.session(1, N_CTX) as session:
        text = greedy(session, N_CTX)
    logits = model.logits([text])[0]
    assert text[3:] == [int(np.argmax(row)) for row in logits[2:-1]]
    assert len(set(text)) > 10


def test_the_cache_of_a_long_context_is_as_large_as_the_window(model: Model) -> None:
    rotations = 2 * 4 * model.config.head_size // 2  # bytes of a position, in one table
    short, long = session_bytes(model, 4, 1000), session_bytes(model, 4, 8000)
    assert long - short <= 7000 * rotations + 1024
    full = 2 * model.config.n_layer * model.config.n_embd * 4  # bytes of keys and values
    assert long < 4 * 8000 * full / 4


def test_a_sequence_goes_back_only_to_what_its_window_has(model: Model) -> None:
    with model.session(2, N_CTX) as session:
        text = greedy(session, N_CTX - 10)
        length = session.length()
        assert session.reachable(0, length - 64) == length - 64
        assert session.reachable(0, 100) == 0
        with pytest.raises(GptcError, match="no longer holds what a token after its first 100"):
            session.rewind(0, 100)
        with pytest.raises(GptcError, match="rewind it to 0"):
            session.fork(0, 1, 100)
        assert session.length() == length
        session.fork(0, 1, length - 64)
        again = session.decode(text[length - 64 : length], 1)
        session.rewind(0, length - 64)
        assert np.array_equal(session.decode(text[length - 64 : length]), again)


def test_continuations_longer_than_what_can_be_taken_back_are_scored_anew(model: Model) -> None:
    random = np.random.default_rng(2)
    context = random.integers(0, 256, 60).tolist()
    continuations = [random.integers(0, 256, n).tolist() for n in (600, 20, 600)]
    together = Scorer(model)
    for continuation in continuations:
        alone = Scorer(model)
        got, want = (each.score(context, continuation) for each in (together, alone))
        assert got.logprob == pytest.approx(want.logprob, rel=1e-5)
        alone.close()
    together.close()


def test_samples_of_a_prompt_begin_anew_where_its_cache_has_moved_on(model: Model) -> None:
    tokenizer = make_tokenizer("bytes", [])
    drawing = Sampling(temperature=0.9, seed=3)
    want = [
        generate(model, tokenizer, "x" * 50, max_tokens=600, stop=(), temperature=0.9, seed=3 + i)
        for i in range(2)
    ]
    decoder = Decoder(model, tokenizer, n_seq=1, n_ctx=N_CTX, keep=True)
    for _ in range(2):  # the second time, a cache of a like prompt has moved on
        request = make_request(
            model, tokenizer, "x" * 50, sampling=drawing, max_tokens=600, num_samples=2, stop=()
        )
        samples = list(request.samples(tokenizer))
        list(decoder.run(samples))
        assert [[sample.text] for sample in samples] == want
    decoder.close()
