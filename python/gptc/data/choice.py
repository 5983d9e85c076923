"""Which files of a folder and members of an archive are read: globs, and hidden names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_MAC = "__MACOSX"  # a folder of resource forks in zip files made on a Mac


@dataclass(frozen=True)
class Choice:
    """The globs of --include and --exclude.

    A path is that in the folder or archive, with "/". --include is compared with its last name and
    with all of it, --exclude also with each folder on the way.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def includes(self, path: str) -> bool:
        """Whether --include takes a path, if it is given."""
        names = (path.rpartition("/")[2], path)
        return not self.include or _matches(names, self.include)

    def leaves_out(self, path: str) -> bool:
        """Whether a path is hidden, or --exclude matches it or a folder on the way."""
        return is_hidden(path) or _matches(_on_the_way(path), self.exclude)

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)


def is_hidden(path: str) -> bool:
    """Whether a part of a path is hidden, as .git, .DS_Store and AppleDouble's ._name are."""
    return any(
        part == _MAC or (part.startswith(".") and part not in (".", ".."))
        for part in path.split("/")
    )


def _on_the_way(path: str) -> Iterator[str]:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for i, part in enumerate(parts, 1):
        yield part
        yield "/".join(parts[:i])


def _matches(names: Iterable[str], patterns: tuple[str, ...]) -> bool:
    globs = [pattern.rstrip("/") for pattern in patterns]
    return bool(globs) and any(fnmatch.fnmatchcase(name, g) for name in names for g in globs)
