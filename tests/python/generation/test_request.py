"""The prompt of a request as tokens."""

from __future__ import annotations

import time

from gptc.generation.request import _are_tokens, prompt_tokens
from gptc.tokenizer.registry import make_tokenizer


def test_a_prompt_of_millions_of_tokens_is_checked_soon() -> None:
    begin_s = time.process_time()
    tokens = prompt_tokens(make_tokenizer("bytes"), "a" * 4_000_000)
    assert _are_tokens(tokens)
    assert time.process_time() - begin_s < 1
    assert set(map(type, tokens)) == {int}  # Python's own
    assert not _are_tokens([*tokens, -1])
    assert not _are_tokens([*tokens, 1.5])
    assert not _are_tokens([True, "a"])
    assert _are_tokens([])
