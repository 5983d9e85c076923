"""Files, folders, pipes, URLs and stories are read in order, and bad sources are named."""

from __future__ import annotations

import http.server
import io
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from corpus import fake_stories, text_of, write_source
from gptc.data import known
from gptc.data.preparation import prepare
from gptc.errors import GptcError, UsageError
from gptc.files import download as downloads


def test_sources_are_joined_in_order(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b.txt", "a/z.txt", "a/c.txt", ".hidden", ".git/config", "out/old.txt"):
        write_source(root, f"{name};", name)
    (root / "a" / "circle").symlink_to(root)
    (root / "a" / "self").symlink_to("self")
    first = write_source(tmp_path, "first;", "first")
    sources = [first, str(root), str(root / "a" / "*.txt")]
    dataset = prepare(sources, root / "out", val_fraction=0, force=True)
    assert text_of(dataset, "train") == b"first;a/c.txt;a/z.txt;b.txt;a/c.txt;a/z.txt;"
    assert [source["bytes"] for source in dataset.meta["sources"]] == [6, 22, 16]
    assert dataset.meta["sources"][0] == {
        "source": first,
        "bytes": 6,
        "checksum": f"xxh3_128:{xxhash.xxh3_128_hexdigest(b'first;')}",
        "files": 1,
        "documents": 1,
    }


def test_standard_input_and_pipes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"stdin;")))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"pipe;",))
    writer.start()
    dataset = prepare(["-", str(pipe)], tmp_path / "out", val_fraction=0)
    writer.join()
    assert text_of(dataset, "train") == b"stdin;pipe;"


class Handler(http.server.BaseHTTPRequestHandler):
    n_requests = 0

    def do_GET(self) -> None:
        type(self).n_requests += 1
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", "99" if self.path == "/short" else "8")
        self.end_headers()
        self.wfile.write(b"internet")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_url_is_downloaded_once(tmp_path: Path, server: str) -> None:
    steps: list[tuple[str, int, int | None]] = []
    url = f"{server}/text"
    out = tmp_path / "out"
    dataset = prepare([url], out, val_fraction=0, progress=lambda *step: steps.append(step))
    assert text_of(dataset, "train") == b"internet"
    assert steps[0] == (f"downloading {url}", 8, 8)
    assert steps[-1] == ("encoding", 8, 8)
    n_requests = Handler.n_requests
    assert prepare([url], out, val_fraction=0).already_there
    assert Handler.n_requests == n_requests


def test_a_failed_download_says_why(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_FIRST_WAIT_S", 0.0)
    altered = known.Known("none", known.RemoteFile(f"{server}/text", 8, "0" * 64))
    monkeypatch.setitem(known._KNOWN, "shakespeare", altered)
    for source, why in [
        (f"{server}/missing", "HTTP 404"),
        (f"{server}/short", "after 8 of 99 bytes"),
        ("http://127.0.0.1:1/", "refused"),
        ("shakespeare", "wrong SHA-256"),
    ]:
        with pytest.raises(GptcError, match=why):
            prepare([source], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_stories_are_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    out = tmp_path / "out"
    dataset = prepare(["stories"], out, stories_bytes=2000, seed=7)
    assert text_of(dataset, "val").count(b"Story 7") == 2
    assert text_of(dataset, "train").count(b"Story 7") == 18
    assert dataset.tokenizer.start == "<|endoftext|>\n"
    assert prepare(["stories"], out, stories_bytes=2000, seed=7).already_there
    with pytest.raises(GptcError, match="--force"):
        prepare(["stories"], out, stories_bytes=2000, seed=8)


def test_the_built_in_stories_can_be_prepared(tmp_path: Path) -> None:
    dataset = prepare(["stories"], tmp_path / "out", stories_bytes=50_000)
    assert dataset.n_tokens("train") + dataset.n_tokens("val") >= 50_000
    assert text_of(dataset, "val").startswith(dataset.tokenizer.start.encode())


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    nothing = write_source(tmp_path, "", "nothing.txt")
    out = tmp_path / "out"
    for source, why in [
        (str(tmp_path / "missing"), "no file, folder or URL .*missing"),
        (str(tmp_path / "*.none"), "no file, folder or URL"),
        (str(tmp_path / "empty"), "empty holds no files"),
        (nothing, r"nothing\.txt is empty"),
    ]:
        with pytest.raises(GptcError, match=why):
            prepare([source], out)
        assert not out.exists()
    with pytest.raises(UsageError, match="SOURCE"):
        prepare([], out)


def test_globs_choose_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "sub/c.py", "sub/d.md", "tests/e.py"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name};")

    def chosen(out: str, **options: Any) -> str:
        source = str(tmp_path / "src")
        return text_of(prepare([source], tmp_path / out, val_fraction=0, **options)).decode()

    assert chosen("1", include=["*.py"]) == "a.py;sub/c.py;tests/e.py;"
    assert chosen("2", include=["*.py"], exclude=["tests/*"]) == "a.py;sub/c.py;"
    assert chosen("3", exclude=["*.py", "b.*"]) == "sub/d.md;"
    with pytest.raises(GptcError, match="--include"):
        chosen("4", include=["*.rs"])


def test_unreadable_files_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_text(name)
    really = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name in ("a", "c"):
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(GptcError, match=r"src/a \(Permission denied\), .*src/c \(Perm.*--exclude"):
        prepare([str(tmp_path / "src")], tmp_path / "out")


def test_files_are_documents(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{i}").write_text(str(i) * 100)
    dataset = prepare([str(tmp_path / "src")], tmp_path / "out", val_fraction=0.25, val_by="order")
    assert text_of(dataset, "val") == b"7" * 100 + b"8" * 100 + b"9" * 100
    bpe = prepare([str(tmp_path / "src")], tmp_path / "bpe", tokenizer="bpe:300", val_fraction=0)
    tokens = bpe.shard("train", 0).tolist()
    assert tokens.count(bpe.tokenizer.end_of_text) == 9  # between them
