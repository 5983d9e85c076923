"""Files and folders that appear whole or not at all.

Each is written under a temporary name in the same folder, flushed to disk, then renamed. So a full
disk or a kill never leaves an incomplete one under its final name.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes bytes or chunks to a file. It is on disk when this returns."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write_chunks(partial, [content] if isinstance(content, bytes) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a new file under its own name and flushes it to disk."""
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            del chunk  # a tensor: free it before the next one is read
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces `path` when the block ends without an error."""
    with scratch_folder(path) as folder:
        yield folder
        sync_folder(folder)
        _rename(folder, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path`, removed at the end if it is still there.

    It is locked as long as this process lives: see `clean_up`.
    """
    clean_up(path.parent)
    folder = path.parent / f".{path.name}.tmp-{os.getpid()}"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def move(source: Path, path: Path) -> None:
    """Renames a finished file or folder to `path`; a folder replaces a folder, a file a file."""
    if source.is_dir():
        _rename(source, path)
    else:
        source.replace(path)
        sync_folder(path.parent)


def _rename(folder: Path, path: Path) -> None:
    """Renames a finished folder to `path`."""
    if path.exists():
        # A folder cannot replace one that holds files: the old one is renamed first, and restored
        # if the second rename fails.
        aside = folder.with_name(f".{path.name}.tmp-old-{os.getpid()}")
        path.rename(aside)
        try:
            folder.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        folder.rename(path)
    sync_folder(path.parent)


def discard(folder: Path) -> None:
    """Removes a folder; its name disappears in one step."""
    aside = folder.with_name(f".{folder.name}.tmp-old-{os.getpid()}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean_up(parent: Path) -> None:
    """Removes the temporary folders in `parent` whose writers have ended."""
    for folder in parent.glob(".*.tmp-*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            # Fails while the writer, which holds this lock, is alive.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's names to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
