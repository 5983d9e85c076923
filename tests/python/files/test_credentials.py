"""Passwords and tokens in an address reach no file, message or log, and no refusal is repeated."""

from __future__ import annotations

import base64
import http.server
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.errors import GptcError, without_secrets
from gptc.files import download as module
from gptc.files.download import download, get_json
from serving import serving

TEXT = b"A text of some words. " * 400
USER, PASSWORD, TOKEN = "ann.user", "hunter2-secret", "tok3n-abcdef"


class Server(http.server.ThreadingHTTPServer):
    """Gives TEXT to those who know password and token; other paths are statuses or loops."""

    daemon_threads = True

    def __init__(self) -> None:
        self.n_requests = 0
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, path: str, *, secret: bool = True) -> str:
        user = f"{USER}:{PASSWORD}@" if secret else ""
        query = f"?token={TOKEN}" if secret else ""
        return f"http://{user}127.0.0.1:{self.server_port}{path}{query}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.n_requests += 1
        path, _, query = self.path.partition("?")
        known = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        status = int(path[1:]) if path[1:].isdecimal() else 200
        if self.headers.get("Authorization") != f"Basic {known}" or TOKEN not in query:
            status = 401
        self.send_response(302 if path == "/loop" else status)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        self.wfile.write(TEXT)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch, Server()) as httpd:
        yield httpd


def check_no_secret(text: str) -> None:
    for secret in (USER, PASSWORD, TOKEN):
        assert secret not in text


def test_no_file_and_no_output_has_a_secret(
    server: Server,
    tmp_path: Path,
    gptc: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG, "gptc")
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    ran = gptc("prepare", server.url("/text.txt"), "--out", out, "--json")
    assert ran.code == 0, ran.err
    shown = [ran, gptc("info", out), gptc("info", out, "--json"), gptc("verify", out)]
    shown.append(gptc("prepare", server.url("/404"), "--out", tmp_path / "other"))
    assert shown[-1].code == 1
    for each in shown:
        check_no_secret(each.out + each.err)
    check_no_secret(caplog.text)
    for file in tmp_path.rglob("*"):
        check_no_secret(file.name)
        if file.is_file():
            check_no_secret(file.read_bytes().decode("latin-1"))
    source = json.loads((out / "dataset.json").read_text())["sources"][0]["source"]
    assert source == f"http://127.0.0.1:{server.server_port}/text.txt?…"


def test_another_query_is_another_source(server: Server, tmp_path: Path) -> None:
    url = server.url("/text.txt")
    assert not prepare([url], tmp_path / "out").already_there
    n = server.n_requests
    assert prepare([url], tmp_path / "out").already_there
    assert server.n_requests == n
    assert prepare([url + "&page=2"], tmp_path / "out").already_there  # the same text, compared
    assert server.n_requests > n


def test_a_dataset_of_an_earlier_version_shows_no_secret(server: Server, tmp_path: Path) -> None:
    url = server.url("/text.txt")
    prepare([url], tmp_path / "out")
    file = tmp_path / "out" / "dataset.json"
    meta = json.loads(file.read_text())
    del meta["checksum"]
    meta["sources"][0] = {**meta["sources"][0], "source": url}
    file.write_text(json.dumps(meta))
    check_no_secret(str(Dataset.open(tmp_path / "out").meta))


@pytest.mark.parametrize("path", ["/400", "/401", "/403", "/404", "/410", "/451", "/501", "/loop"])
def test_a_permanent_error_is_asked_once_and_shows_no_secret(
    server: Server, tmp_path: Path, path: str
) -> None:
    most = 31 if path == "/loop" else 1  # redirects of one request
    for fetch in (lambda url: download(url, tmp_path / "file"), get_json):
        before = server.n_requests
        with pytest.raises(GptcError, match="cannot download") as error:
            fetch(server.url(path))
        check_no_secret(str(error.value))
        assert server.n_requests - before <= most


@pytest.mark.parametrize(
    "url",
    [
        f"http://{USER}:{PASSWORD}@127.0.0.1:99999/a?token={TOKEN}",
        f"http://{USER}:{PASSWORD}@/a?token={TOKEN}",
        f"http://{USER}:{PASSWORD}@{'a' * 80}/a?token={TOKEN}",
        f"http://{USER}:x/{PASSWORD}@127.0.0.1:1/a?token={TOKEN}",
        f"http://{USER}:{PASSWORD}@127.0.0.1:1/a#{TOKEN}",
        f"https://{USER}:{PASSWORD}@[::1/a?{TOKEN}",
        f"http://{USER}:{PASSWORD}@127.0.0.1:x/a?token={TOKEN}",
    ],
)
def test_an_address_that_cannot_be_asked_shows_no_secret(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.0)
    for fetch in (lambda: download(url, tmp_path / "f"), lambda: get_json(url)):
        with pytest.raises(GptcError) as error:
            fetch()
        check_no_secret(str(error.value))
    with pytest.raises(GptcError) as error:
        prepare([url], tmp_path / "out")
    check_no_secret(str(error.value))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("get https://a:b@h/p: no", "get https://h/p: no"),
        ("(https://h:80/p@1.2/q)", "(https://h:80/p@1.2/q)"),
        ("'ftp://a@h/p?x=1', or", "'ftp://h/p?…', or"),
        ("https://h/p?sig=1: check", "https://h/p?…: check"),
        ("https://[::1]:80/p.", "https://[::1]:80/p."),
        ("https://a:b/c@h:80/p", "https://h:80/p"),
        ("a@b.c and x:y@z", "a@b.c and x:y@z"),
    ],
)
def test_addresses_lose_what_is_secret_alone(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(GptcError(text)) == shown


@pytest.mark.parametrize("content", [b"\xff\xfe", b'"a\r\nX: y"', b"", b'W/"a"', b'"a' * 9999])
def test_a_damaged_etag_begins_the_download_again(
    server: Server, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "file.partial").write_bytes(b"of another version")
    (tmp_path / "file.etag").write_bytes(content)
    download(server.url("/text.txt"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == TEXT
