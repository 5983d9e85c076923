"""The work that the key multipleOf of a JSON schema asks of llguidance, bounded before it begins.

llguidance divides a number digit by digit, with a state for each remainder, and looks for one from
which a multiple can be reached. Factors of ten are only places of digits.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from gptc.errors import UsageError
from gptc.files.values import is_finite

_KEY = "multipleOf"
MOST_REMAINDERS = 1 << 16  # half a second, and 30 MB


def check_multiples(schema: Any) -> None:
    """UsageError for a JSON schema whose values of multipleOf have too many remainders together.

    A number may have to be a multiple of several of them, so their least common multiple counts.
    """
    n, values = 1, [schema]
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            values += value.values()
            n = math.lcm(n, _without_tens(value.get(_KEY)))
        if n > MOST_REMAINDERS:
            raise UsageError(
                f"the JSON schema has values of {_KEY} with more than {MOST_REMAINDERS:,} "
                "remainders: give smaller ones, or powers of ten"
            )


def _without_tens(value: Any) -> int:
    """The digits of a number as a whole number, without zeros at its end; 1 for another value."""
    if type(value) not in (int, float) or not is_finite(value) or value <= 0:
        return 1
    digits = int("".join(map(str, Decimal(repr(value)).as_tuple().digits)))
    while digits % 10 == 0:
        digits //= 10
    return digits
