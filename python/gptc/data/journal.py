"""The journal of a preparation: a line of JSON for each finished shard, with a checksum.

A line is believed only if it is whole and its shard is: a disk may lose either of them. Lines are
read one by one, and no more of them than dataset.json has room for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gptc.data.description import most_shards
from gptc.data.shards import HEADER_BYTES, shard_format
from gptc.errors import GptcError
from gptc.files.checksum import file_checksum, value_checksum
from gptc.files.limits import open_regular
from gptc.files.words import plural
from gptc.tokenizer.base import Tokenizer

_TYPES = {"split": str, "file": str, "tokens": int, "bytes": int, "checksum": str}
_TYPES |= {"at": int, "skip": int}
_SUM = "line"  # the checksum of the rest of a line
_LONGEST = 1000  # bytes of a line


def shard_name(split: str, number: int) -> str:
    """The file of a shard of a split; the first is number 0."""
    return f"{split}_{number:06d}.bin"


def line_of(entry: dict[str, Any]) -> str:
    """The line of a finished shard: all of _TYPES, and the line's checksum."""
    content = {name: entry[name] for name in _TYPES}
    return json.dumps({**content, _SUM: value_checksum(content)}) + "\n"


def read_lines(
    path: Path, notify: Callable[[str], object] = lambda note: None, most: int | None = None
) -> list[dict[str, Any]]:
    """The lines of a journal, `most` at most, up to the first that was cut off, damaged or lost.

    `notify` is told of a journal that cannot be read, or not to its end.
    """
    found: list[dict[str, Any]] = []
    numbers = Counter[str]()
    most = most_shards(0) if most is None else most
    try:
        with open_regular(path) as file:
            for line in islice(iter(lambda: file.readline(_LONGEST), b""), most):
                entry = _entry(line)
                split = entry["split"] if entry else ""
                if entry is None or entry["file"] != shard_name(split, numbers[split]):
                    if line.endswith(b"\n") or file.read(1):  # more than was cut off
                        notify(
                            f"note: {path} is damaged after {plural(len(found), 'line')}{_AGAIN}"
                        )
                    return found
                numbers[split] += 1
                found.append(entry)
            if file.read(1):
                notify(f"note: {path} has more than {plural(most, 'line')}{_AGAIN}")
    except FileNotFoundError:
        pass
    except OSError as error:
        notify(f"note: cannot read {path}: {error.strerror}{_AGAIN}")
    except GptcError as error:
        notify(f"note: {error}{_AGAIN}")
    return found


def has_lines(path: Path) -> bool:
    """Whether a journal has a finished shard."""
    return bool(read_lines(path, most=1))


_AGAIN = "; the shards of the rest are made again"


def _entry(line: bytes) -> dict[str, Any] | None:
    """The content of a line; None for a damaged one, and one of an older version."""
    try:
        saved = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(saved, dict) or saved.keys() != {*_TYPES, _SUM}:
        return None
    entry = {name: saved[name] for name in _TYPES}
    if any(type(entry[name]) is not kind for name, kind in _TYPES.items()):
        return None
    return entry if saved[_SUM] == value_checksum(entry) else None


def intact(
    folder: Path, lines: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The lines of a journal up to the first whose shard is not what was written."""
    itemsize = shard_format(tokenizer.vocab_size)[2].itemsize
    found = []
    for line in lines:
        path = folder / line["file"]
        n_bytes = HEADER_BYTES + line["tokens"] * itemsize
        if not path.is_file() or path.stat().st_size != n_bytes:
            break
        if file_checksum(path) != line["checksum"]:
            break
        found.append(line)
    return found
