"""The modules of tools/fuzz: valid files of each format, their damage, and what reads them."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "fuzz"
sys.path.insert(0, str(FOLDER))

import body_files  # noqa: E402
import fuzz  # noqa: E402
import mutate  # noqa: E402
import openai_files  # noqa: E402

__all__ = ["FOLDER", "body_files", "fuzz", "mutate", "openai_files"]
