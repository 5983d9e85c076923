"""Whether this machine has what the sandbox for programs needs."""

from __future__ import annotations

import pytest

from gptc.errors import GptcError
from gptc.files.sandbox import run_code


def _problem() -> str:
    """Why no sandbox can be made here; "" if one can."""
    try:
        run_code("")
    except GptcError as error:
        return str(error)
    return ""


PROBLEM = _problem()
needs_sandbox = pytest.mark.skipif(PROBLEM != "", reason=PROBLEM)
