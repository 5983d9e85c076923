"""Files and folders that appear whole or not at all.

Each is written under a temporary name in the same folder, flushed to disk, then renamed. So a full
disk or a kill never leaves an incomplete one under its final name, and never loses the one that is
replaced: both change places in one step.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_SCRATCH = re.compile(r"\.(.+)\.tmp-(\d{1,9})-[0-9a-f]{8}", re.DOTALL)  # a name of scratch_folder
_MARK = ".gptc-scratch"  # a file in each folder of scratch_folder; other folders are not ours
_MARKED_S = 60.0  # in which a new folder has its mark
_REPLACED = ".replaced"  # in a scratch folder: what must return to its place after a kill
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def write_file(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes bytes or chunks to a file. It is on disk when this returns."""
    _remove_partials(path)
    file, partial = _new_partial(path)
    try:
        with file:
            _put(file, [content] if isinstance(content, bytes) else content)
            partial.replace(path)
    except BaseException:
        remove(partial)
        raise


def check_place(path: Path) -> None:
    """OSError if `write_file` cannot make a file here, before its content is there."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    file, partial = _new_partial(path)
    file.close()
    remove(partial)


def _new_partial(path: Path) -> tuple[BinaryIO, Path]:
    """A temporary file next to `path`, locked as long as this process writes it."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        file = partial.open("xb")
        with suppress(OSError):  # a filesystem without locks: nobody removes it
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file, partial
        file.close()  # another process took it for one that was left


def _remove_partials(path: Path) -> None:
    """Removes the temporary files of `path` whose writers have ended."""
    name = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{8}" + re.escape(".partial"))
    with suppress(OSError):
        for partial in [other for other in path.parent.iterdir() if name.fullmatch(other.name)]:
            with suppress(OSError), partial.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is written
                partial.unlink()


def remove(path: Path) -> None:
    """Removes a file that is not needed any more, if that is possible.

    On a full or read-only disk it is not, and an error about it would hide the one that matters.
    """
    with suppress(OSError):
        path.unlink()


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a new file under its own name and flushes it to disk."""
    with path.open("xb") as file:
        _put(file, chunks)


def _put(file: BinaryIO, chunks: Iterable[bytes | memoryview]) -> None:
    for chunk in chunks:
        file.write(chunk)
        del chunk  # a tensor: free it before the next one is read
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def whole_folder(path: Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """A temporary folder that replaces `path` when the block ends without an error.

    `check` is called just before that; its exception leaves `path` as it is.
    """
    with scratch_folder(path) as work:
        folder = work / path.name
        folder.mkdir()
        yield folder
        sync_folder(folder)
        if check is not None:
            check()
        move(folder, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path`, removed at the end.

    It is marked as ours, and locked as long as this process lives: see `clean_up`.
    """
    clean_up(path.parent)
    folder = path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # Without the mark it is never taken for one whose writer has ended: so the lock is first,
        # and a filesystem without locks has no marks.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            (folder / _MARK).touch()
        yield folder
    finally:
        _end(folder)
        if descriptor >= 0:
            os.close(descriptor)


def move(source: Path, path: Path) -> None:
    """Renames a finished file or folder in a scratch folder to `path`, and replaces that.

    A folder may replace anything, a file a file. A kill leaves the old one or the new one: on a
    filesystem that cannot exchange two names, `restore` brings the old one back.
    """
    if not source.is_dir():
        source.replace(path)
    elif not os.path.lexists(path):
        source.rename(path)
    elif not _exchange(source, path):
        aside = source.parent / _REPLACED / path.name
        aside.parent.mkdir()
        path.rename(aside)
        try:
            source.rename(path)
        except BaseException:
            aside.rename(path)
            raise
    sync_folder(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system or the filesystem cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = ctypes.c_int(-100)  # AT_FDCWD
    names = ctypes.c_char_p(os.fsencode(one)), here, ctypes.c_char_p(os.fsencode(other))
    if renameat2(here, *names, ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def discard(folder: Path) -> None:
    """Removes a folder; its name disappears in one step."""
    with scratch_folder(folder) as work:
        folder.rename(work / folder.name)


def clean_up(parent: Path) -> None:
    """Removes the scratch folders in `parent` whose writers have ended, and restores from them."""
    for folder in _abandoned(parent):
        _end(folder)


def restore(path: Path) -> None:
    """Brings back the folder `path` if a kill took it away while it was replaced."""
    if not os.path.lexists(path):
        for folder in _abandoned(path.parent):
            _restore_from(folder)


def _abandoned(parent: Path) -> Iterator[Path]:
    """The scratch folders in a folder whose writers have ended, each locked meanwhile.

    A folder that another program made is not among them, whatever its name.
    """
    try:
        folders = [path for path in parent.iterdir() if _SCRATCH.fullmatch(path.name)]
    except OSError:
        return
    for folder in folders:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            # Fails while the writer, which holds this lock, is alive.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / _MARK).is_file():
                yield folder
            elif _is_left_unmarked(folder):
                folder.rmdir()  # which takes none with content
        except OSError:
            continue
        finally:
            os.close(descriptor)


def _is_left_unmarked(folder: Path) -> bool:
    """Whether a kill has come between the making of a scratch folder and its mark."""
    found = _SCRATCH.fullmatch(folder.name)
    if found is None or time.time() - folder.stat().st_mtime < _MARKED_S:
        return False
    try:
        os.kill(int(found[2]), 0)
    except ProcessLookupError:
        return True
    return False


def _restore_from(scratch: Path) -> bool:
    """Renames what a scratch folder has replaced, where nothing has come in its place.

    False if that failed: then the folder has the only copy.
    """
    try:
        replaced = scratch / _REPLACED
        for old in replaced.iterdir() if replaced.is_dir() else ():
            if not os.path.lexists(scratch.parent / old.name):
                old.rename(scratch.parent / old.name)
    except OSError:
        return False
    return True


def _end(scratch: Path) -> None:
    """Removes a scratch folder: its mark at the end, so that an interrupted removal is repeated."""
    if _restore_from(scratch):
        with suppress(OSError):
            empty(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def empty(scratch: Path) -> None:
    """Removes the content of a scratch folder."""
    for path in scratch.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _MARK:
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Flushes a folder's names to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
