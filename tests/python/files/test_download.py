"""A download is complete and verified, or fails, when a server cuts, stalls or refuses."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptc.data.dataset import Dataset
from gptc.data.known import KNOWN_DATASETS, licence
from gptc.data.preparation import prepare, resolve_dataset
from gptc.errors import GptcError
from gptc.files import download as module
from gptc.files.download import download
from serving import serving

DATA = bytes(i * 7 % 256 for i in range(300_000))
SHA256 = hashlib.sha256(DATA).hexdigest()

Answer = Callable[[http.server.BaseHTTPRequestHandler, int], None]


class Server(http.server.ThreadingHTTPServer):
    """Answers each path as `answers` says, and records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.ranges: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.answers[self.path.split("?")[0]](self, len(self.server.ranges))

    def log_message(self, *args: object) -> None:
        pass

    def begin(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def asked_from(self) -> int:
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found else 0

    def give(self, upto: int = len(DATA), **headers: str) -> None:
        """Sends the data from the requested offset, as a correct server does, up to a limit."""
        first = self.asked_from()
        if first >= len(DATA):
            self.begin(416, 0, Content_Range=f"bytes */{len(DATA)}")
            return
        if first:
            headers["Content_Range"] = f"bytes {first}-{len(DATA) - 1}/{len(DATA)}"
        self.begin(206 if first else 200, len(DATA) - first, **headers)
        self.wfile.write(DATA[first:upto])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch, Server()) as httpd:
        yield httpd


def fetched(server: Server, path: Path, answer: Any, **options: Any) -> bytes:
    server.answers["/file"] = answer
    download(f"{server.url}/file", path, sha256=SHA256, **options)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]  # no other file remains
    return path.read_bytes()


def test_a_cut_is_gone_on_from(server: Server, tmp_path: Path) -> None:
    steps: list[int] = []
    data = fetched(
        server,
        tmp_path / "file",
        lambda handler, n: handler.give(100_000 * n, ETag='"v1"'),
        progress=lambda action, n_done, n_all: steps.append(n_done),
    )
    assert data == DATA
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert steps == sorted(steps)
    assert steps[-1] == len(DATA)


def test_a_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    server.answers["/file"] = lambda handler, n: handler.give(150_000)
    with pytest.raises(GptcError, match="ended after 150000 of 300000 bytes"):
        download(f"{server.url}/file", tmp_path / "file", attempts=2)
    assert not (tmp_path / "file").exists()
    server.ranges.clear()
    assert fetched(server, tmp_path / "file", lambda handler, n: handler.give()) == DATA
    assert server.ranges == ["bytes=150000-"]


def test_many_cuts_do_not_use_up_the_attempts(server: Server, tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        handler.give(10_000 * n)

    assert fetched(server, tmp_path / "file", answer, attempts=2) == DATA
    assert len(server.ranges) == 30


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        handler.begin(200, len(DATA))
        handler.wfile.write(DATA[: 100_000 if n == 1 else None])

    assert fetched(server, tmp_path / "file", answer) == DATA


def test_a_partial_file_of_another_version_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"old" * 1000)
    assert fetched(server, tmp_path / "file", lambda handler, n: handler.give()) == DATA
    assert server.ranges == ["bytes=3000-", None]  # restarted after a wrong checksum


def test_the_validator_is_sent_along(server: Server, tmp_path: Path) -> None:
    seen = []

    def answer(handler: Any, n: int) -> None:
        seen.append(handler.headers.get("If-Range"))
        handler.give(100_000 if n == 1 else len(DATA), ETag='"v1"')

    fetched(server, tmp_path / "file", answer)
    assert seen == [None, '"v1"']


def test_a_stall_is_not_waited_for(server: Server, tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        handler.give(131_072 if n == 1 else len(DATA))
        if n == 1:
            handler.wfile.flush()
            time.sleep(2)

    assert fetched(server, tmp_path / "file", answer, timeout_s=0.3) == DATA
    assert len(server.ranges) == 2
    server.answers["/file"] = lambda handler, n: time.sleep(1)
    with pytest.raises(GptcError, match="timed out"):
        download(f"{server.url}/file", tmp_path / "again", timeout_s=0.2, attempts=2)


def test_lies_about_lengths_are_found(server: Server, tmp_path: Path) -> None:
    def short(handler: Any, n: int) -> None:  # sends less than it promises, always
        handler.begin(200, len(DATA) + 5)
        handler.wfile.write(DATA)

    server.answers["/file"] = short
    with pytest.raises(GptcError, match="ended after 300000 of 300005 bytes"):
        download(f"{server.url}/file", tmp_path / "file", attempts=2)
    (tmp_path / "file.partial").unlink()

    def long(handler: Any, n: int) -> None:  # promises less than there is
        handler.begin(200, 1000)
        handler.wfile.write(DATA)

    server.answers["/file"] = long
    with pytest.raises(GptcError, match="1000 bytes instead of 300000"):
        download(f"{server.url}/file", tmp_path / "file", n_bytes=len(DATA))
    with pytest.raises(GptcError, match="wrong SHA-256"):
        download(f"{server.url}/file", tmp_path / "file", sha256=SHA256)

    def elsewhere(handler: Any, n: int) -> None:  # not the requested range
        if handler.asked_from():
            handler.begin(206, 10, Content_Range=f"bytes 0-9/{len(DATA)}")
            handler.wfile.write(DATA[:10])
        else:
            handler.give(100_000 if n == 1 else len(DATA))

    server.ranges.clear()
    assert fetched(server, tmp_path / "file", elsewhere) == DATA


def test_refusals_for_good_are_told_at_once(server: Server, tmp_path: Path) -> None:
    for status in (401, 403, 404, 410):
        server.ranges.clear()
        server.answers["/file"] = lambda handler, n, status=status: handler.begin(status, 0)
        with pytest.raises(GptcError, match=f"HTTP {status}"):
            download(f"{server.url}/file", tmp_path / "file")
        assert len(server.ranges) == 1


def test_refusals_for_now_are_waited_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 1.0)

    def answer(handler: Any, n: int) -> None:
        if n <= 3:
            handler.begin(503 if n != 2 else 429, 0, **({"Retry_After": "7"} if n == 2 else {}))
        else:
            handler.give()

    assert fetched(server, tmp_path / "file", answer) == DATA
    assert waits == [1, 7, 4]  # doubled each time, and at least the server's Retry-After
    server.answers["/file"] = lambda handler, n: handler.begin(503, 0)
    with pytest.raises(GptcError, match="HTTP 503"):
        download(f"{server.url}/file", tmp_path / "more", attempts=3)


def test_a_range_that_is_not_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(DATA)  # complete, but not yet renamed
    assert fetched(server, tmp_path / "file", lambda handler, n: handler.give()) == DATA
    (tmp_path / "file").unlink()
    (tmp_path / "file.partial").write_bytes(DATA + b"more")
    assert fetched(server, tmp_path / "file", lambda handler, n: handler.give()) == DATA


def test_proxies_are_honoured(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", server.url)
    server.answers["http://far.away/file"] = lambda handler, n: handler.give()
    download("http://far.away/file", tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == DATA


def test_no_server_says_why(server: Server, tmp_path: Path) -> None:
    for url, why in [
        ("http://127.0.0.1:1/", "refused"),
        ("http://no-such-host.invalid/", "not known|resolution|resolve"),
        ("http://[", "[Ii]nvalid|Failed to parse"),
    ]:
        with pytest.raises(GptcError, match=why) as caught:
            download(url, tmp_path / "file", attempts=2)
        assert "\n" not in str(caught.value)


# ---- datasets by name ----


def hub(server: Server, repository: str, revision: str, files: dict[str, bytes]) -> None:
    """Lets the server answer as the Hugging Face hub does, in pages of one file."""
    entries = [
        {
            "type": "file",
            "path": name,
            "size": len(data),
            "lfs": {"oid": hashlib.sha256(data).hexdigest()},
        }
        for name, data in files.items()
    ]
    folder = next(iter(files)).rpartition("/")[0]
    listing = f"/api/datasets/{repository}/tree/{revision}/{folder}".rstrip("/")

    def answer(handler: Any, n: int) -> None:
        page = int(handler.path.partition("?page=")[2] or 0)
        body = json.dumps([entries[page], {"type": "directory", "path": "x"}]).encode()
        following = f'<{server.url}{listing}?page={page + 1}>; rel="next"'
        more = {"Link": following} if page + 1 < len(entries) else {}
        handler.begin(200, len(body), **more)
        handler.wfile.write(body)

    server.answers[listing] = answer
    for name, data in files.items():

        def give(handler: Any, n: int, data: bytes = data) -> None:
            handler.begin(200, len(data))
            handler.wfile.write(data)

        server.answers[f"/datasets/{repository}/resolve/{revision}/{name}"] = give


def test_a_dataset_of_the_hub(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    files = {
        "TinyStoriesV2-GPT4-valid.txt": b"Last.\n<|endoftext|>\n",
        "README.md": b"no story",
        "TinyStoriesV2-GPT4-train.txt": b"First.\n<|endoftext|>\nSecond.\n<|endoftext|>\n",
    }
    hub(server, "roneneldan/TinyStories", "main", files)
    told: list[str] = []
    dataset = prepare(["tinystories"], tmp_path / "out", notify=told.append)
    text = b"".join(dataset.tokenizer.decode_bytes(dataset.shard(s, 0)) for s in ("train", "val"))
    assert text == files["TinyStoriesV2-GPT4-train.txt"] + files["TinyStoriesV2-GPT4-valid.txt"]
    size = f"{len(text):,} bytes in 2 files"
    assert told[0] == f"tinystories: licence {licence('tinystories')}, {size}"
    assert hashlib.sha256(files["TinyStoriesV2-GPT4-valid.txt"]).hexdigest() in told[2]
    assert dataset.meta["sources"][0]["licence"] == licence("tinystories")
    n_asked = len(server.ranges)
    again = prepare(["tinystories"], tmp_path / "char", tokenizer="char")
    assert again.tokenizer.kind == "char"
    assert len(server.ranges) == n_asked + len(files)  # the listing, and no file


def test_what_a_dataset_sets_apart_validates(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    story = b"Once.\n<|endoftext|>\n"
    valid, train = b"Last.\n<|endoftext|>\n" * 9, story * 5
    names = ("TinyStoriesV2-GPT4-valid.txt", "TinyStoriesV2-GPT4-train.txt")
    hub(server, "roneneldan/TinyStories", "main", dict(zip(names, (valid, train), strict=True)))
    more = tmp_path / "more.txt"
    more.write_bytes(b"More.")

    def splits(folder: Path) -> list[bytes]:
        dataset = Dataset.open(folder)
        return [dataset.tokenizer.decode_bytes(dataset.shard(s, 0)) for s in ("train", "val")]

    def made(name: str, *sources: str, **options: Any) -> list[bytes]:
        return splits(prepare(sources, tmp_path / name, **options).folder)

    assert made("own", "tinystories") == [train, valid]
    assert made("char", "tinystories", tokenizer="char") == [train, valid]
    # It stays apart when other sources follow; their order and checksums stay theirs.
    assert made("joined", "tinystories", str(more)) == [train + b"More.", valid]
    sizes = [source["bytes"] for source in Dataset.open(tmp_path / "joined").meta["sources"]]
    assert sizes == [len(train + valid), 5]
    assert prepare(["tinystories"], tmp_path / "own").already_there
    # A split that is asked for is made.
    n_val = 2 * len(valid) // 9
    assert made("tokens", "tinystories", val_tokens=n_val)[1] == valid[-n_val:]
    part = made("part", "tinystories", val_fraction=0.1, val_by="order")[1]
    assert valid.endswith(part)
    assert 0 < len(part) < len(valid) // 2
    assert splits(resolve_dataset("tinystories").folder) == [train, valid]


def test_parquet_of_a_converted_branch(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "made")
    data = (tmp_path / "made").read_bytes()
    name = "plain_text/train/0000.parquet"
    hub(server, "Skylion007/openwebtext", "refs%2Fconvert%2Fparquet", {name: data})
    dataset = prepare(["openwebtext"], tmp_path / "out", val_fraction=0)
    text = dataset.tokenizer.decode(dataset.shard("train", 0))
    assert text == "one\n<|endoftext|>\ntwo\n<|endoftext|>\n"


def test_a_hub_that_has_moved_its_files_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    hub(server, "roneneldan/TinyStories", "main", {"other.txt": b"x"})
    with pytest.raises(GptcError, match="lists no files of tinystories"):
        prepare(["tinystories"], tmp_path / "out")
    server.answers["/api/datasets/roneneldan/TinyStories/tree/main"] = lambda handler, n: (
        handler.begin(404, 0)
    )
    with pytest.raises(GptcError, match="HTTP 404"):
        prepare(["tinystories"], tmp_path / "out")


def test_every_known_dataset_has_a_licence() -> None:
    assert all(licence(name) for name in KNOWN_DATASETS)
    assert licence("https://host/file") is None
