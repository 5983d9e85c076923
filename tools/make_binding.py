"""Parses the declarations of gpt.h when the package is built, into a module that loads fast.

    python tools/make_binding.py csrc/gpt.h _binding.py

Without that module, `gptc.engine.library` parses the header, which takes most of a command's
start-up time.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import cffi

from gptc.engine import library


def main() -> None:
    header, out = map(Path, sys.argv[1:])
    text = header.read_text("utf-8")
    ffi = cffi.FFI()
    ffi.set_source("gptc._binding", None)
    ffi.cdef(library.declarations(text))
    ffi.emit_python_code(str(out))
    with out.open("a", encoding="utf-8") as file:
        file.write(f"header = {library.fingerprint(text)!r}\n")


if __name__ == "__main__":
    main()
