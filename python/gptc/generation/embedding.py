"""Embeddings: one vector for each text, of the states that a model has after its tokens.

    vectors = embed(model, tokenizer, ["a cat", "a dog"])    # (2, n_embd)
    vectors @ vectors.T                                      # cosines

A state is the output of the final norm, transformers' last_hidden_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.errors import UsageError
from gptc.generation.decoder import Decoder
from gptc.generation.request import Pooling, Request, Sample, make_request
from gptc.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from gptc.engine.model import Model

POOLING: tuple[str, ...] = get_args(Pooling)
_MOST_AT_ONCE = 8  # texts that are read together
_BLOCK = 32  # tokens of a text that a step reads at least


def embed(
    model: Model,
    tokenizer: Tokenizer,
    texts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    pooling: Pooling = "mean",
    normalize: bool = True,
) -> FloatArray:
    """The vectors of texts: (N, C), or (C,) of one text.

    A text may also be a list of tokens, to which nothing is added. A vector is the mean of the
    states after each token, or with `pooling` "last" the state after the last one; with `normalize`
    its length is 1. GptcError for a text that exceeds the model's context.
    """
    each: Sequence[str | Sequence[int]] = [texts] if isinstance(texts, str) else texts
    requests = [embedding(model, tokenizer, text, pooling) for text in each]
    if not requests:
        return np.empty((0, model.config.n_embd), np.float32)
    samples = [sample for request in requests for sample in request.samples(tokenizer)]
    n_ctx = max(len(request.prompt) for request in requests)
    n_seq = min(len(samples), _MOST_AT_ONCE)
    for _ in Decoder(model, tokenizer, n_seq, n_ctx, chunk=_BLOCK).run(samples):
        pass
    vectors = np.stack([vector_of(sample, normalize) for sample in samples])
    return vectors[0] if isinstance(texts, str) else vectors


def embedding(
    model: Model, tokenizer: Tokenizer, text: str | Sequence[int], pooling: str = "mean"
) -> Request:
    """A checked request whose one sample is an embedding: see `vector_of`."""
    for kind in get_args(Pooling):
        if pooling == kind:
            request = make_request(model, tokenizer, text, max_tokens=1)
            request.pooling = kind
            return request
    raise UsageError(f"pooling is {pooling!r}; it must be {' or '.join(POOLING)}")


def vector_of(sample: Sample, normalize: bool = True) -> FloatArray:
    """The vector (C,) of an embedding that has ended."""
    assert sample.pooled is not None
    vector = sample.pooled
    if sample.request.pooling == "mean":
        vector = vector / len(sample.request.prompt)
    length = float(np.linalg.norm(vector)) if normalize else 1.0
    return (vector / (length or 1.0)).astype(np.float32)
