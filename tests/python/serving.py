"""A server of files for one test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from typing import TypeVar

import pytest

from gptc.files import download

Served = TypeVar("Served", bound=HTTPServer)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, server: Served) -> Iterator[Served]:
    """Answers requests in a thread, past any proxy; a download does not wait to try again."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_FIRST_WAIT_S", 0.0)
    with server as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()
