"""A grammar's objects hold memory of a library: copies are refused in one line of ours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

from gptc.errors import GptcError
from gptc.generation.constraint import make_constraint
from gptc.tokenizer.registry import make_tokenizer

pytest.importorskip("llguidance")


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_grammar_and_its_state_refuse_copies(way: Callable[[object], object]) -> None:
    tokenizer = make_tokenizer("bytes")
    constraint = make_constraint(tokenizer, tokenizer.vocab_size, regex="[0-9]+")
    for owner in (constraint, constraint.begin()):
        name = type(owner).__name__
        with pytest.raises(GptcError, match=f"a {name} cannot be copied or pickled"):
            way(owner)
