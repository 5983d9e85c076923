"""Pointers of Git LFS, which `git clone` leaves in the place of large files."""

from __future__ import annotations

from pathlib import Path

from gptc.errors import GptcError

_BEGIN = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path | str, begin: bytes | memoryview) -> None:
    """GptcError if a file that begins so is a pointer."""
    if begin[: len(_BEGIN)] == _BEGIN:
        raise GptcError(
            f"{path} is a pointer of Git LFS to a file, and not the file: run git lfs pull in its "
            "folder, or download it"
        )
