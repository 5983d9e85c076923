"""A text ends at each of the tokens that the model's files name, however it is decoded.

The class: one end was known, guessed from a list of names.
"""

from __future__ import annotations

import pytest

from gptc import Model
from gptc.generation.beam import beam_search
from gptc.generation.decoder import start
from gptc.generation.options import Sampling
from gptc.generation.request import Request, make_request, prompt_tokens
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.marks import Marks
from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
from vocabularies import PATTERN, begun, llama_like


def drawn_towards(model: Model, tokenizer: Tokenizer, token: int) -> Request:
    """A request for one token, which is this one."""
    tokenizer.marks = Marks(ends=(65, 66))
    sampling = Sampling(bias=((token, 1e6),))
    return make_request(model, tokenizer, "x", sampling=sampling, max_tokens=1, stop=())


@pytest.mark.parametrize(
    ("token", "expected"), [(65, ("", "stop")), (66, ("", "stop")), (67, ("C", "length"))]
)
def test_each_end_stops(
    writer: Model, tokenizer: Tokenizer, token: int, expected: tuple[str, str]
) -> None:
    request = drawn_towards(writer, tokenizer, token)
    (sample,), pieces = start(writer, tokenizer, request)
    assert "".join(piece for _, piece in pieces) == expected[0]
    assert (sample.text, sample.finish) == expected
    (beam, _), *_ = beam_search(writer, tokenizer, request, 3)
    assert (beam.text, beam.finish) == expected


def test_a_grammar_may_end_with_each_of_them(writer: Model, tokenizer: Tokenizer) -> None:
    tokenizer.marks = Marks(ends=(65, 66))
    request = make_request(writer, tokenizer, "x", regex="[A-Z]+")
    assert request.constraint is not None
    state = request.constraint.begin()
    # Ends are not text, so "A" and "B" are not of [A-Z]; after a letter the text may end.
    assert state.allowed.tolist() == list(range(67, 91))
    state.take(67)
    assert state.allowed.tolist() == [65, 66, *range(67, 91)]


def test_an_empty_prompt_begins_with_the_end_of_a_text() -> None:
    assert prompt_tokens(llama_like(), "") == [2]
    assert prompt_tokens(begun(llama_like()), "") == [1]
    pieces = [bytes([i]) for i in range(256)]
    assert prompt_tokens(TiktokenTokenizer("it", PATTERN, pieces, {"<|end|>": 256}), "") == [10]
