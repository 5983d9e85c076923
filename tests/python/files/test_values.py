"""Numbers of JSON are finite floats, or refused: a whole number may be too large for a float."""

from __future__ import annotations

import math

import pytest

from gptc.files.values import is_finite
from gptc.serve.problems import BadRequest
from gptc.serve.schema import check
from gptc.settings import Range


@pytest.mark.parametrize("number", [10**400, -(10**400), math.inf, -math.inf, math.nan])
def test_what_no_float_holds_is_not_finite(number: float) -> None:
    assert not is_finite(number)
    assert not Range().holds(number)
    with pytest.raises(BadRequest, match="x is"):
        check({"type": "number"}, number, "x")


@pytest.mark.parametrize("number", [0, -1.5, 10**300, True])
def test_other_numbers_are_finite(number: float) -> None:
    assert is_finite(number)
