"""Checksums have known values for files of any length, and wrong records are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gptc.files.checksum import Checksum, file_checksum, file_sha256, recorded_checksum


def test_known_values(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert file_checksum(path) == "xxh3_128:99aa06d3014798d86001c324468d497f"  # of nothing
    for n in (1, 17, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000):
        data = bytes(i * 7 % 251 for i in range(n))
        path.write_bytes(data)
        assert file_sha256(path) == hashlib.sha256(data).hexdigest()
        pieces = Checksum()
        for begin in range(0, n, 77_777):
            pieces.update(data[begin : begin + 77_777])
        assert file_checksum(path) == pieces.value()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert file_checksum(path) != pieces.value()


def test_a_record_names_its_algorithm() -> None:
    assert recorded_checksum({"checksum": "xxh3_128:ab"}) == "xxh3_128:ab"
    assert recorded_checksum({"sha256": "ab"}) == "sha256:ab"
    for record in ({}, {"checksum": "crc32:ab"}, {"checksum": 5}, {"checksum": None}):
        with pytest.raises(ValueError, match="no checksum"):
            recorded_checksum(record)
