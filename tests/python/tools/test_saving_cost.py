"""The cost of a checkpoint, from the times at which the steps of a run have ended."""

from __future__ import annotations

from itertools import accumulate

import pytest

from tool_files import load_tool

saving = load_tool("measure/saving")


def test_the_share_of_a_checkpoint() -> None:
    """80 ms after each save, in steps of 40 ms; nothing follows the last one."""
    steps_s = [0.04 + (0.08 if step % 100 == 2 and step > 100 else 0) for step in range(1, 1001)]
    shares = saving.shares(list(accumulate(steps_s)))
    assert shares == pytest.approx([0.08 / 4.08] * 9)
    assert saving.shares(list(accumulate([0.04] * 1000))) == pytest.approx([0.0] * 9, abs=1e-9)
