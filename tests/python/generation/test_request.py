"""The prompt of a request as tokens."""

from __future__ import annotations

import pytest

from gptc.generation.request import _are_tokens, prompt_tokens
from gptc.tokenizer.registry import make_tokenizer


def test_tokens_are_numbers_of_python() -> None:
    tokens = prompt_tokens(make_tokenizer("bytes"), "abc")
    assert tokens == [97, 98, 99]
    assert {type(token) for token in tokens} == {int}


@pytest.mark.parametrize("last", [-1, 1.5, "a", None])
def test_a_list_with_anything_else_is_not_a_list_of_tokens(last: object) -> None:
    assert _are_tokens([97, 98])
    assert not _are_tokens([97, 98, last])
