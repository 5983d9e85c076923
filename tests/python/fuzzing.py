"""The fuzzer of tools/fuzz as a module, `fuzz`: its targets, its accidents and its writers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_FILE = Path(__file__).resolve().parents[2] / "tools" / "fuzz" / "fuzz.py"
_spec = importlib.util.spec_from_file_location("fuzz", _FILE)
assert _spec is not None
assert _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)
