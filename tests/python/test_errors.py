"""The message of an error is one line that a terminal can show, whatever a file contains."""

from __future__ import annotations

from typing import Any

import pytest

from gptc.errors import EngineError, GptcError, UsageError


@pytest.mark.parametrize("kind", [GptcError, UsageError, lambda m: EngineError(m, 1)])
def test_a_message_is_one_line_whatever_a_file_calls_its_tensors(kind: Any) -> None:
    assert str(kind("the tensor a\nb\x1b[31m\u2028\udc80 is élan 語")) == (
        r"the tensor a\nb\x1b[31m\u2028\udc80 is élan 語"
    )
    for long in ("x://" * 50_000, "://" + "." * 100_000 + "x", "a://" + "@" * 100_000 + "/"):
        assert len(str(kind(long))) < 2100
    message = str(kind("begin " + "x" * 100_000 + " end"))
    assert len(message) < 2100
    assert message.startswith("begin x")
    assert message.endswith("x end")
