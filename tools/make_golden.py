"""Writes tests/golden/*.npz from PyTorch and transformers: pip install '.[parity]' first.

Run it when tests/python/reference.py changes: python tools/make_golden.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "python"))

import reference


def main() -> None:
    reference.GOLDEN.mkdir(exist_ok=True)
    for case in [*reference.CASES, *reference.ARCHITECTURES]:
        path = reference.golden_path(case)
        np.savez_compressed(path, **reference.run(case))
        print(f"{path.relative_to(Path.cwd())}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
