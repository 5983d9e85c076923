"""Checksums of the files that gptc writes, to detect damage on a disk or in a transfer.

    record = {"size": 1234, "checksum": file_checksum(path)}  # "xxh3_128:6c78e0e3bd51d358..."
    file_checksum(path, like=recorded_checksum(record)) == recorded_checksum(record)

XXH3 of 128 bits runs at the speed of memory. A checksum stored next to its file does not protect
against tampering; downloads are compared with their published SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

_BUFFER_BYTES = 1 << 20
_ALGORITHMS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}


class Checksum:
    """The checksum of a stream of bytes."""

    def __init__(self, algorithm: str = "xxh3_128") -> None:
        self._algorithm = algorithm
        self._state = _ALGORITHMS[algorithm]()

    def update(self, data: bytes | memoryview) -> None:
        """Adds bytes."""
        self._state.update(data)

    def value(self) -> str:
        """`algorithm:hex` of the bytes so far."""
        return f"{self._algorithm}:{self._state.hexdigest()}"


def file_checksum(path: Path, like: str = "xxh3_128:") -> str:
    """The checksum of a file, by the algorithm of `like`. Raises OSError."""
    checksum, buffer = Checksum(like.partition(":")[0]), memoryview(bytearray(_BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            checksum.update(buffer[:n])
    return checksum.value()


def value_checksum(value: Any) -> str:
    """The checksum of a value of JSON, whose objects have their names in order."""
    checksum = Checksum()
    checksum.update(json.dumps(value).encode())
    return checksum.value()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    return file_checksum(path, "sha256:").partition(":")[2]


def recorded_checksum(record: Mapping[str, Any]) -> str:
    """The checksum in a record; old versions wrote "sha256". ValueError if there is none."""
    recorded = record.get("checksum")
    if isinstance(older := record.get("sha256"), str):
        recorded = f"sha256:{older}"
    if not isinstance(recorded, str) or recorded.partition(":")[0] not in _ALGORITHMS:
        raise ValueError("no checksum of a known kind")
    return recorded
