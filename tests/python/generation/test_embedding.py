"""An embedding pools the states of a text, whatever is read at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gptc
from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.generation.batch import Batch
from gptc.generation.embedding import embedding, vector_of
from gptc.generation.request import make_request
from gptc.tokenizer.base import Tokenizer
from small_models import varied

TEXTS = ["a", "a longer text, of more than a block of tokens, and more than two of them", "b" * 33]


@pytest.fixture(params=["fp32", "bf16", "int8"])
def reader(config: Callable[..., GPTConfig], request: pytest.FixtureRequest) -> Iterator[Model]:
    with varied(config(block_size=96), dtype=request.param) as model:
        yield model


def states(model: Model, text: str) -> Any:
    """The states after each token of a text, read token by token."""
    with model.session() as session:
        return np.stack([session.states([token]) for token in text.encode()]).astype(float)


def assert_same(reader: Model, got: Any, want: Any) -> None:
    """The same vectors, but for the rounding of products of other numbers of rows."""
    np.testing.assert_allclose(got, want, atol=1e-5 if reader.dtype == "fp32" else 0.02)


def error(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_the_head_of_a_state_is_its_logits(config: Callable[..., GPTConfig]) -> None:
    with varied(config("gpt2")) as model, model.session(2) as session:
        seqs, want = [1, 1, 1, 0, 0], [True, False, True, True, False]
        found = session.states([5, 6, 7, 8, 9], seqs, want)
        assert found.shape == (3, model.config.n_embd)
        head = model.get("wte.weight")[: model.config.vocab_size]
        for seq in (0, 1):
            session.rewind(seq, 0)
        logits = session.decode([5, 6, 7, 8, 9], seqs, want)
        np.testing.assert_allclose(found @ head.T, logits, rtol=1e-4, atol=1e-4)
        assert session.states([1], 0, [False]).shape == (0, model.config.n_embd)
        with pytest.raises(GptcError, match="want has the shape"):
            session.states([1, 2], 0, [True])


def test_a_vector_is_the_mean_or_the_last_state(reader: Model, tokenizer: Tokenizer) -> None:
    tolerance = 1e-4 if reader.dtype == "fp32" else 0.05
    found = gptc.embed(reader, tokenizer, TEXTS, normalize=False)
    last = gptc.embed(reader, tokenizer, TEXTS, pooling="last", normalize=False)
    assert found.shape == last.shape == (3, reader.config.n_embd)
    for i, text in enumerate(TEXTS):
        expected = states(reader, text)
        assert error(found[i], expected.mean(0)) < tolerance
        assert error(last[i], expected[-1]) < tolerance
    unit = gptc.embed(reader, tokenizer, TEXTS[1])
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, found[1] / np.linalg.norm(found[1]), rtol=1e-6)
    by_ids = gptc.embed(reader, tokenizer, [list(TEXTS[1].encode())])
    np.testing.assert_array_equal(by_ids, unit[None])


def test_a_vector_is_its_own_among_others(reader: Model, tokenizer: Tokenizer) -> None:
    many = [text[i:] for text in TEXTS for i in range(0, len(text), 3)]
    together = gptc.embed(reader, tokenizer, many)
    for i in (0, 1, 9, len(many) - 1):
        assert_same(reader, together[i], gptc.embed(reader, tokenizer, many[i]))


def test_embeddings_and_texts_share_a_batch(reader: Model, tokenizer: Tokenizer) -> None:
    alone = gptc.embed(reader, tokenizer, TEXTS[1])
    text = gptc.generate(reader, tokenizer, "abc", max_tokens=20, stop=())[0]
    with reader.session(3) as session:
        batch = Batch(session, tokenizer, keep=True, chunk=32)
        writing = make_request(reader, tokenizer, "abc", max_tokens=20, stop=())
        asked = [embedding(reader, tokenizer, TEXTS[1], kind) for kind in ("last", "mean")]
        samples = [next(r.samples(tokenizer)) for r in (writing, *asked)]
        for sample in samples:
            list(batch.join(sample))
        while batch.active:
            list(batch.step())
        again = next(asked[1].samples(tokenizer))  # after a cache that holds its text
        list(batch.join(again))
        while batch.active:
            list(batch.step())
    if reader.dtype == "fp32":
        assert samples[0].text == text
    assert_same(reader, vector_of(samples[2]), alone)
    assert_same(reader, vector_of(again), alone)


def test_what_cannot_be_embedded(reader: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(GptcError, match="97 tokens"):
        gptc.embed(reader, tokenizer, ["a", "x" * 97])
    with pytest.raises(UsageError, match="pooling is 'max'; it must be mean or last"):
        gptc.embed(reader, tokenizer, "a", pooling="max")  # type: ignore[arg-type]
    assert gptc.embed(reader, tokenizer, []).shape == (0, reader.config.n_embd)
