"""Starts gptc as separate processes, and records them for the fixture that ends them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

spawned: list[subprocess.Popen[Any]] = []


def spawn(*args: object, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """Starts `gptc` with these arguments; the fixture of cli/conftest.py ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gptc", *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    spawned.append(process)
    return process
