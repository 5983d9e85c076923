"""A removal that fails on a full or read-only disk never hides the error that matters."""

from __future__ import annotations

import http.server
import os
from pathlib import Path
from typing import Any

import pytest

from gptc.data.preparation import prepare
from gptc.errors import GptcError
from gptc.files.download import download
from gptc.files.whole import remove
from serving import serving


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def fail(path: Any, **options: Any) -> None:
        if os.path.lexists(path) and str(path).endswith((".partial", ".etag", "journal.jsonl")):
            raise OSError(30, "Read-only file system")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", fail)


def test_a_file_stays(tmp_path: Path, read_only: None) -> None:
    (tmp_path / "a.partial").touch()
    remove(tmp_path / "a.partial")
    assert (tmp_path / "a.partial").exists()


class Short(http.server.BaseHTTPRequestHandler):
    """Answers with eight bytes."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"internet")

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"n_bytes": 9}, "8 bytes instead of 9"), ({"sha256": "0" * 64}, "wrong SHA-256")],
)
def test_the_fault_of_a_download_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_only: None,
    facts: dict[str, Any],
    message: str,
) -> None:
    with serving(monkeypatch, http.server.HTTPServer(("127.0.0.1", 0), Short)) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        with pytest.raises(GptcError, match=message):
            download(url, tmp_path / "x", **facts)


def test_the_fault_of_a_preparation_is_named(tmp_path: Path, read_only: None) -> None:
    (tmp_path / "text").write_text("one text")
    with pytest.raises(GptcError, match="none would be left to train on"):
        prepare([str(tmp_path / "text")], tmp_path / "out", val_tokens=100)
