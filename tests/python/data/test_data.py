"""Datasets: shards that others can read, text that comes back whole, batches that resume."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import random
import signal
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash
from test_tokenizer import MIXED, gpt2_folder, nasty_text, needs_gpt2

from gptc.data import encode, job, known, loader, prepare, readers, sources
from gptc.data.dataset import Dataset
from gptc.data.loader import Loader, eval_batches
from gptc.data.preparation import resolve_dataset
from gptc.data.shards import read_shard
from gptc.data.shards import write_shard as write_shard
from gptc.errors import GptcError, UsageError
from gptc.files import download as downloads
from gptc.tokenizer.native import CharTokenizer
from gptc.tokenizer.registry import make_tokenizer, read_tokenizer


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's cache, and the vocabulary where there is one."""
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    if folder := gpt2_folder():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))


def text_file(folder: Path, content: str | bytes, name: str = "text.txt") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def tokens_of(dataset: Dataset, split: str) -> list[int]:
    return [int(t) for i in range(len(dataset.shards(split))) for t in dataset.shard(split, i)]


def text_of(dataset: Dataset, split: str) -> bytes:
    return dataset.tokenizer.decode_bytes(tokens_of(dataset, split))


def set_block(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """Lets text be read in blocks of `n_bytes`."""
    for module in (readers, sources, encode):
        monkeypatch.setattr(module, "BLOCK_BYTES", n_bytes)


def counting(folder: Path, n: int, **options: Any) -> Dataset:
    """A dataset whose training tokens are their own positions, modulo 251."""
    data = bytes(i % 251 for i in range(n))
    return prepare([text_file(folder, data)], folder / "out", val_fraction=0, **options)


# ---- shards ----


def test_a_shard_has_the_published_layout(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 50256, 2], 50257)
    raw = (tmp_path / "a.bin").read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 3] + [0] * 253
    assert raw[1024:] == b"\x01\x00\x50\xc4\x02\x00"

    write_shard(tmp_path / "b.bin", [1, 128000], 128256)
    raw = (tmp_path / "b.bin").read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240801, 7, 2] + [0] * 253
    assert raw[1024:] == b"\x01\x00\x00\x00\x00\xf4\x01\x00"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.bin"]


@pytest.mark.parametrize("vocab_size", [65536, 65537])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_a_shard_comes_back(tmp_path: Path, n: int, vocab_size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab_size, n)
    write_shard(tmp_path / "a.bin", tokens, vocab_size)
    shard = read_shard(tmp_path / "a.bin")
    assert shard.tolist() == tokens.tolist()
    assert shard.dtype == (np.uint16 if vocab_size == 65536 else np.uint32)
    assert type(shard) is np.ndarray


def test_a_shard_is_read_only(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2], 256)
    shard = read_shard(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 7


@pytest.mark.parametrize("token", [-1, 256])
def test_a_token_outside_the_vocabulary_is_not_written(tmp_path: Path, token: int) -> None:
    with pytest.raises(GptcError, match="vocabulary of 256"):
        write_shard(tmp_path / "a.bin", [1, token], 256)
    assert list(tmp_path.iterdir()) == []


def header(*numbers: int) -> bytes:
    return np.array([*numbers, *[0] * (256 - len(numbers))], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "0 bytes, fewer than a header"),
        (header(20240520, 1, 0)[:-1], "1023 bytes, fewer than a header"),
        (header(1, 1, 1) + b"ab", "begins with 1"),
        (header(20240520, 2, 1) + b"ab", "version 2; only 1"),
        (header(20240801, 1, 1) + b"abcd", "version 1; only 7"),
        (header(20240520, 1, 2) + b"ab", "promises 2 tokens, 1028 bytes, and it has 1026"),
        (header(20240520, 1, 1) + b"abc", "promises 1 tokens, 1026 bytes, and it has 1027"),
        (header(20240520, 1, -1), "promises -1 tokens"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    path = text_file(tmp_path, content, "a.bin")
    with pytest.raises(GptcError, match=why) as caught:
        read_shard(Path(path))
    assert path in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(GptcError, match=r"none\.bin: No such file"):
        read_shard(tmp_path / "none.bin")


# ---- splitting ----


def test_bytes_are_split_by_position(tmp_path: Path) -> None:
    data = bytes(random.Random(0).randrange(256) for _ in range(10_007))
    dataset = prepare([text_file(tmp_path, data)], tmp_path / "out", shard_tokens=1000)
    n = int(len(data) * 0.9)
    assert text_of(dataset, "train") == data[:n]
    assert text_of(dataset, "val") == data[n:]
    assert [len(read_shard(path)) for path in dataset.shards("train")] == [1000] * 9 + [n % 1000]
    assert dataset.n_tokens("train") == n
    assert dataset.bytes_per_token("val") == 1.0
    assert dataset.tokenizer.start == "\n"


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99, 1e-17])
def test_characters_are_split_by_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, fraction: float
) -> None:
    set_block(monkeypatch, block)
    text = MIXED.replace("<|endoftext|>", "é") * 3
    dataset = prepare(
        [text_file(tmp_path, text)], tmp_path / "out", tokenizer="char", val_fraction=fraction
    )
    n = int(len(text) * (1 - fraction))
    assert text_of(dataset, "train").decode() == text[:n]
    assert text_of(dataset, "val").decode() == text[n:]
    n_bytes = len(text[:n].encode())
    assert dataset.bytes_per_token("train") == pytest.approx(n_bytes / n)


@pytest.mark.parametrize("block", [1, 7, 13, 4 << 20])
@pytest.mark.parametrize(
    ("text", "fraction", "train"),
    [
        ("a|b|c|d|e|f|g|h|i|j", 0.1, "a|b|c|d|e|f|g|h|i"),
        ("a|b|c|d", 0.5, "a|b"),
        ("a|b", 0.99, "a"),
        ("|aa|bb", 0.5, "|aa"),  # a mark at the beginning separates nothing
        ("a|b|c|\n", 0.34, "a|b"),  # nor does one at the end
        ("0123456789|\n", 0.5, "01234567890123456789"[:12]),  # one document: by position
    ],
)
def test_documents_are_kept_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    text: str,
    fraction: float,
    train: str,
) -> None:
    set_block(monkeypatch, block)
    text, train = (s.replace("|", "<|endoftext|>") for s in (text, train))
    dataset = prepare([text_file(tmp_path, text)], tmp_path / "out", val_fraction=fraction)
    assert dataset.tokenizer.start == "<|endoftext|>\n"
    if text.startswith("0123"):
        assert text_of(dataset, "train").decode() == text[: len(text) // 2]
        return
    assert text_of(dataset, "train").decode() == train
    assert text_of(dataset, "val").decode() == text[len(train) :]


@pytest.mark.parametrize("kind", ["bytes", "char"])
@pytest.mark.parametrize(("first", "second"), [(5, 995), (995, 5), (400, 600), (970, 30)])
def test_a_split_is_cut_out_of_a_document_that_would_leave_next_to_nothing(
    tmp_path: Path, kind: str, first: int, second: int
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a" * first)
    (folder / "b.txt").write_text("é" * (second // 2) + "b" * (second % 2))
    dataset = prepare([str(folder)], tmp_path / "out", tokenizer=kind)
    n_train = dataset.meta["splits"]["train"]["bytes"]
    assert 450 < n_train < 950


@pytest.mark.parametrize("kind", ["bytes", "char", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("n_val", [0, 1, 50, 200])
def test_val_tokens_counts_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, n_val: int
) -> None:
    set_block(monkeypatch, 64)
    text = "one two, three\n" * 100
    dataset = prepare(
        [text_file(tmp_path, text)], tmp_path / "out", tokenizer=kind, val_tokens=n_val
    )
    assert dataset.n_tokens("val") == n_val
    whole = make_tokenizer(kind, [text.encode()]).encode(text).tolist()
    assert tokens_of(dataset, "train") + tokens_of(dataset, "val") == whole


def test_val_tokens_must_leave_some(tmp_path: Path) -> None:
    source = text_file(tmp_path, "abc")
    with pytest.raises(GptcError, match="of 3 tokens none"):
        prepare([source], tmp_path / "out", val_tokens=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "start"),
    [("a\nb", "\n"), ("b a", " "), ("a<|endoftext|>", "<|endoftext|>")],
)
def test_the_start_of_a_char_dataset_can_be_encoded(tmp_path: Path, text: str, start: str) -> None:
    dataset = prepare([text_file(tmp_path, text)], tmp_path / "out", tokenizer="char")
    assert dataset.tokenizer.start == start
    assert len(dataset.tokenizer.encode(start)) == len(start)


# ---- encoding in blocks ----


@needs_gpt2
@pytest.mark.parametrize(("block", "jobs"), [(64, 1), (64, 3), (1000, 2)])
def test_gpt2_in_blocks_equals_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, jobs: int
) -> None:
    set_block(monkeypatch, block)
    text = nasty_text(random.Random(4), 5000)
    dataset = prepare(
        [text_file(tmp_path, text)], tmp_path / "out", tokenizer="gpt2", val_tokens=0, jobs=jobs
    )
    assert tokens_of(dataset, "train") == make_tokenizer("gpt2").encode(text).tolist()
    assert dataset.meta["splits"]["train"]["bytes"] == len(text.encode())


@needs_gpt2
def test_a_run_without_a_border_is_cut_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_block(monkeypatch, 10)
    monkeypatch.setattr(encode, "_LONGEST_RUN_BYTES", 50)
    text = "東" * 1000
    dataset = prepare([text_file(tmp_path, text)], tmp_path / "out", tokenizer="gpt2")
    assert (text_of(dataset, "train") + text_of(dataset, "val")).decode() == text


SHAKESPEARE = Path(__file__).parents[4] / "shared" / "data" / "tinyshakespeare.txt"


@needs_gpt2
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="no tinyshakespeare.txt")
def test_shakespeare_has_the_published_number_of_tokens(tmp_path: Path) -> None:
    dataset = prepare([str(SHAKESPEARE)], tmp_path / "gpt2", tokenizer="gpt2")
    assert (dataset.n_tokens("train"), dataset.n_tokens("val")) == (301_966, 36_059)
    dataset = prepare([str(SHAKESPEARE)], tmp_path / "char", tokenizer="char")
    assert (dataset.n_tokens("train"), dataset.n_tokens("val")) == (1_003_854, 111_540)
    assert dataset.vocab_size == 65


def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_block(monkeypatch, 1 << 16)
    monkeypatch.setattr(job, "_LARGE_BYTES", 0)  # which are only reserved
    source = text_file(tmp_path, "the quick brown fox\n" * 400_000)  # 8 MB
    tracemalloc.start()
    try:
        prepare([source], tmp_path / "out", tokenizer="char")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


# ---- sources ----


def test_sources_are_joined_in_order(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b.txt", "a/z.txt", "a/c.txt", ".hidden", ".git/config", "out/old.txt"):
        text_file(root, f"{name};", name)
    (root / "a" / "circle").symlink_to(root)
    first = text_file(tmp_path, "first;", "first")
    sources = [first, str(root), str(root / "a" / "*.txt")]
    dataset = prepare(sources, root / "out", val_fraction=0, force=True)
    assert text_of(dataset, "train") == b"first;a/c.txt;a/z.txt;b.txt;a/c.txt;a/z.txt;"
    assert [source["bytes"] for source in dataset.meta["sources"]] == [6, 22, 16]
    assert dataset.meta["sources"][0] == {
        "source": first,
        "bytes": 6,
        "checksum": f"xxh3_128:{xxhash.xxh3_128_hexdigest(b'first;')}",
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


def fake_stories(n_bytes: int, seed: int = 0, *, wide: bool = False) -> Iterator[bytes]:
    for i in range(-(-n_bytes // 100)):
        yield f"Story {seed} {i:04}".encode().ljust(85, b".") + b"\n<|endoftext|>\n"


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
    nothing = text_file(tmp_path, "", "nothing.txt")
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


@pytest.mark.parametrize("block", [1, 2, 4 << 20])
@pytest.mark.parametrize("tail", [b"\xff and more", b"\xc3"])
@pytest.mark.parametrize("kind", ["char", pytest.param("gpt2", marks=needs_gpt2)])
def test_a_file_that_is_no_utf8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tail: bytes, block: int
) -> None:
    set_block(monkeypatch, block)
    good = text_file(tmp_path, "äöü", "good.txt")
    bad = text_file(tmp_path, "éa".encode() + tail, "bad.txt")
    with pytest.raises(GptcError, match=r"bad\.txt: byte 3 .*--tokenizer bytes"):
        prepare([good, bad], tmp_path / "out", tokenizer=kind)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_another_dataset_is_used(tmp_path: Path) -> None:
    CharTokenizer("abcé\n", "b").save(tmp_path)
    source = text_file(tmp_path, "abé" * 10)
    dataset = prepare([source], tmp_path / "out", tokenizer=str(tmp_path))
    assert dataset.vocab_size == 5
    assert dataset.tokenizer.to_json() == read_tokenizer(tmp_path).to_json()
    source = text_file(tmp_path, "abéX", "other.txt")
    with pytest.raises(GptcError, match=r"other\.txt: byte 4: 'X' \(U\+0058\)"):
        prepare([source], tmp_path / "other", tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"val_fraction": 1.0},
        {"val_fraction": -0.1},
        {"val_fraction": float("nan")},
        {"val_tokens": -1},
        {"shard_tokens": 0},
        {"shard_tokens": 2**31},
        {"jobs": 0},
        {"tokenizer": "words"},
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        prepare([text_file(tmp_path, "text")], tmp_path / "out", **options)


# ---- the folder ----


def test_the_description_is_complete(tmp_path: Path) -> None:
    dataset = prepare([text_file(tmp_path, "text " * 100)], tmp_path / "out", shard_tokens=300)
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("dataset.json", "gptc_tokenizer.json"),
        *("train_000000.bin", "train_000001.bin", "val_000000.bin"),
    ]
    meta = json.loads((folder / "dataset.json").read_text())
    assert meta == dataset.meta
    assert meta["splits"]["train"]["tokens"] == 450
    assert meta["splits"]["val"]["bytes"] == 50
    assert meta["options"]["shard_tokens"] == 300
    assert meta["tokenizer"]["fingerprint"] == read_tokenizer(folder).fingerprint()
    for split in meta["splits"].values():
        for shard in split["shards"]:
            raw = (folder / shard["file"]).read_bytes()
            assert shard["checksum"] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(raw)}"


def test_datasets_of_before_xxh3_are_still_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([text_file(tmp_path, "text " * 100)], out)
    meta = json.loads((out / "dataset.json").read_text()) | {"version": 1}
    for split in meta["splits"].values():
        for shard in split["shards"]:
            del shard["checksum"]
            shard["sha256"] = hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest()
    for source in meta["sources"]:
        del source["checksum"]
        source["sha256"] = hashlib.sha256(b"text " * 100).hexdigest()
    (out / "dataset.json").write_text(json.dumps(meta))
    Dataset.open(out).verify()
    assert prepare([str(tmp_path / "text.txt")], out).already_there
    shard_file = out / "val_000000.bin"
    shard_file.write_bytes(shard_file.read_bytes()[:-2] + b"zz")
    with pytest.raises(GptcError, match="wrong checksum"):
        Dataset.open(out).verify()


def test_the_same_again_is_left_alone(tmp_path: Path) -> None:
    source = text_file(tmp_path, "text " * 100)
    out = tmp_path / "out"
    assert not prepare([source], out).already_there
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare([source], out).already_there
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_dataset_is_replaced_only_by_force(tmp_path: Path) -> None:
    source = text_file(tmp_path, "text " * 100)
    out = tmp_path / "out"
    prepare([source], out, shard_tokens=100)
    text_file(tmp_path, "other " * 10)
    for shard_tokens in (100, 200):
        with pytest.raises(GptcError, match=r"already holds .*--force"):
            prepare([source], out, shard_tokens=shard_tokens)
    assert Dataset.open(out).n_tokens("train") == 450
    prepare([source], out, force=True)
    assert text_of(Dataset.open(out), "train") == b"other " * 9
    assert len(list(out.glob("*.bin"))) == 2


def test_foreign_files_are_not_mixed_in(tmp_path: Path) -> None:
    source = text_file(tmp_path, "text " * 100)
    note = text_file(tmp_path, "mine", "out/train_notes.bin")
    with pytest.raises(GptcError, match="holds other files"):
        prepare([source], tmp_path / "out")
    prepare([source], tmp_path / "out", force=True)
    assert Path(note).read_text() == "mine"
    with pytest.raises(GptcError, match="is a file"):
        prepare([source], Path(source))
    with pytest.raises(GptcError, match="also a source"):
        prepare([str(tmp_path / "out")], tmp_path / "out", force=True)


def test_a_crash_leaves_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = text_file(tmp_path, "text " * 100)
    out = tmp_path / "out"
    prepare([source], out)

    def fail(path: Path, data: bytes) -> None:
        if path.name == "dataset.json":
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(data)

    with monkeypatch.context() as context:
        context.setattr(job, "write_file", fail)
        with pytest.raises(GptcError, match=r"dataset\.json: No space left"):
            prepare([source], out, force=True, shard_tokens=100)
    with pytest.raises(GptcError, match=r"holds no dataset\.json"):
        Dataset.open(out)
    assert prepare([source], out, force=True, shard_tokens=100).n_tokens("val") == 50


def test_a_dataset_that_is_not_there_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(GptcError, match=r"gptc prepare SOURCE --out .*none"):
        Dataset.open(tmp_path / "none")
    with pytest.raises(GptcError, match=r"no dataset\.json.*gptc prepare"):
        Dataset.open(tmp_path)


def test_a_damaged_dataset_is_refused(tmp_path: Path) -> None:
    out = counting(tmp_path, 1000, shard_tokens=400).folder
    good = {path: path.read_bytes() for path in out.iterdir()}

    def damaged(name: str, content: bytes | None, why: str) -> None:
        if content is None:
            (out / name).unlink()
        else:
            (out / name).write_bytes(content)
        with pytest.raises(GptcError, match=why) as caught:
            Dataset.open(out)
        assert str(out / name) in str(caught.value)
        for path, content in good.items():
            path.write_bytes(content)

    damaged("train_000001.bin", None, "is missing")
    damaged("train_000001.bin", good[out / "train_000001.bin"][:-2], "1822 bytes instead of 1824")
    damaged("dataset.json", good[out / "dataset.json"][:-20], "damaged")
    damaged("dataset.json", b"{}", "damaged")
    meta = json.loads(good[out / "dataset.json"])
    damaged("dataset.json", json.dumps(meta | {"splits": {}}).encode(), "altered or is incomplete")
    damaged("dataset.json", json.dumps(meta | {"sources": [{"bytes": 3}]}).encode(), "is damaged")
    damaged("dataset.json", json.dumps(meta | {"version": 3}).encode(), "version 3")
    damaged("gptc_tokenizer.json", None, "no tokenizer")
    CharTokenizer("ab").save(out)
    damaged("gptc_tokenizer.json", (out / "gptc_tokenizer.json").read_bytes(), "not the tokenizer")
    Dataset.open(out).verify()


def test_verify_finds_a_changed_token(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 1000, shard_tokens=400)
    path = dataset.shards("train")[1]
    raw = bytearray(path.read_bytes())
    raw[1100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(GptcError, match=r"train_000001\.bin is damaged"):
        Dataset.open(dataset.folder).verify()


def test_a_token_outside_the_vocabulary_is_found(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 1000, shard_tokens=400)
    write_shard(dataset.shards("train")[1], [7] * 399 + [256], 257)
    dataset = Dataset.open(dataset.folder)
    with pytest.raises(GptcError, match=r"train_000001\.bin holds token 256"):
        list(eval_batches(dataset, "train", 4, 9))


def test_describe_shows_what_is_inside(tmp_path: Path) -> None:
    text = "Once upon a time. " * 50
    dataset = prepare([text_file(tmp_path, text)], tmp_path / "out", tokenizer="char")
    told = dataset.describe()
    assert told["tokenizer"] == "char"
    assert told["splits"]["train"]["tokens"] == 810
    assert told["splits"]["train"]["vocab_used"] == dataset.vocab_size == len(set(text))
    assert told["splits"]["train"]["sample"] == text[:200]
    assert told["splits"]["val"]["sample"] == text[810:]
    json.dumps(told)


# ---- batches ----


def positions(x: np.ndarray[Any, Any]) -> list[int]:
    """Where sequences of a `counting` dataset of at most 251 tokens begin."""
    return [int(row[0]) for row in x]


def test_targets_are_one_token_further_on(tmp_path: Path) -> None:
    loader = Loader(counting(tmp_path, 1000, shard_tokens=70), "train", 5, 64, seed=3)
    for _ in range(50):
        x, y = loader.next()
        assert x.shape == y.shape == (5, 64)
        assert x.dtype == y.dtype == np.int32
        assert x.flags.c_contiguous
        assert y.flags.c_contiguous
        steps = np.diff(np.concatenate([x, y[:, -1:]], axis=1), axis=1) % 251
        assert (steps == 1).all()  # whole windows, across shards too
        assert (x[:, 1:] == y[:, :-1]).all()


def test_an_epoch_visits_every_window_once(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 251)
    loader = Loader(dataset, "train", 1, 10, seed=1)
    assert loader.n_windows == 24
    offsets, orders = set(), set()
    for _ in range(100):
        starts = [positions(loader.next()[0])[0] for _ in range(loader.n_windows)]
        offset = min(starts)
        assert sorted(starts) == [offset + 10 * i for i in range(24)]
        offsets.add(offset)
        orders.add(tuple(start - offset for start in starts))
    assert offsets == set(range(251 - 240))
    assert len(orders) == 100


def test_a_batch_depends_on_seed_and_position_only(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 5000, shard_tokens=1234)

    def loader(seed: int) -> Loader:
        return Loader(dataset, "train", 7, 3, seed=seed)

    one = loader(5)
    batches = [one.next() for _ in range(400)]  # several epochs
    assert one.position == 2800
    for k in (0, 1, 145, 146, 147, 399):  # 1,024 sequences are computed at once
        other = loader(5)
        other.position = 7 * k
        np.testing.assert_array_equal(other.next(), batches[k])
    assert not np.array_equal(loader(6).next(), batches[0])
    assert not np.array_equal(loader(-6).next(), batches[0])
    wide = Loader(dataset, "train", 14, 3, seed=5).next()[0]
    np.testing.assert_array_equal(wide, np.concatenate([batches[0][0], batches[1][0]]))


def test_the_next_batches_are_drawn_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = counting(tmp_path, 1000)
    really, drawn = dataset.read, threading.Semaphore(0)

    def read(*arguments: Any) -> None:
        really(*arguments)
        drawn.release()

    monkeypatch.setattr(dataset, "read", read)
    with closing(Loader(dataset, "train", 1, 10, n_ahead=3)) as loader:
        loader.next()
        for _ in range(1 + 3):  # nobody asks for the three that follow
            assert drawn.acquire(timeout=60)
        assert loader.position == 1
        assert not drawn.acquire(timeout=0.05)


def test_batches_drawn_ahead_are_forgotten_when_the_position_is_set(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 5000)
    with closing(Loader(dataset, "train", 2, 3, seed=5, n_ahead=0)) as plain:
        batches = [plain.next() for _ in range(600)]
    with closing(Loader(dataset, "train", 2, 3, seed=5, n_ahead=4)) as loader:
        for k in (0, 1, 2, 599, 3, 4, 0, 511, 512, 513):  # 1,024 sequences are computed at once
            loader.position = 2 * k
            np.testing.assert_array_equal(loader.next(), batches[k])
            assert loader.position == 2 * k + 2


def test_an_error_comes_with_the_batch_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = counting(tmp_path, 1000)
    with closing(Loader(dataset, "train", 1, 10, order="sequential", n_ahead=2)) as loader:
        with monkeypatch.context() as context:
            really = dataset.read

            def read(split: str, begin: int, out: Any) -> None:
                if begin == 20:
                    raise GptcError("torn")
                really(split, begin, out)

            context.setattr(dataset, "read", read)
            assert [positions(loader.next()[0]) for _ in range(2)] == [[0], [10]]
            for _ in range(2):
                with pytest.raises(GptcError, match="torn"):
                    loader.next()
        assert loader.position == 2
        assert [positions(loader.next()[0]) for _ in range(2)] == [[20], [30]]


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 1000)
    before = set(threading.enumerate())

    def begun() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in before]

    loader = Loader(dataset, "train", 2, 10)
    assert not begun()
    first = loader.next()
    assert len(begun()) == 1
    loader.close()
    loader.close()
    assert not begun()
    loader.position = 0
    np.testing.assert_array_equal(loader.next(), first)  # it may go on
    (thread,) = begun()
    del loader
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_fork_draws_for_itself(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 1000)
    with closing(Loader(dataset, "train", 2, 10)) as loader:
        loader.next()
        after = loader.next()
        loader.position = 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python, about the thread
            child = os.fork()
        if child == 0:
            same = False
            try:
                signal.alarm(60)
                same = bool(np.array_equal(loader.next(), after))
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        np.testing.assert_array_equal(loader.next(), after)


def test_shards_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = Loader(counting(tmp_path / "a", 1000), "train", 8, 33, seed=2)
    many = Loader(counting(tmp_path / "b", 1000, shard_tokens=7), "train", 8, 33, seed=2)
    for _ in range(20):
        np.testing.assert_array_equal(one.next(), many.next())


@pytest.mark.parametrize("n_tokens", [11, 12, 19, 20, 21, 30, 31])
def test_short_splits_are_used_up(tmp_path: Path, n_tokens: int) -> None:
    loader = Loader(counting(tmp_path, n_tokens), "train", 1, 10)
    seen: set[int] = set()
    for _ in range(300):
        x, y = loader.next()
        seen |= {*x[0].tolist(), *y[0].tolist()}
    assert seen == set(range(n_tokens))


@pytest.mark.parametrize("n_tokens", [1, 2, 10])
def test_too_few_tokens_say_what_to_type(tmp_path: Path, n_tokens: int) -> None:
    dataset = counting(tmp_path, n_tokens)
    fix = f"--seq-len {n_tokens - 1}" if n_tokens > 1 else "prepare more text"
    for split, why in (
        ("train", f"has {n_tokens} token{'' if n_tokens == 1 else 's'} of 11 .*{fix}"),
        ("val", "has 0.*--val-fraction"),
    ):
        with pytest.raises(GptcError, match=why):
            Loader(dataset, split, 1, 10)
        with pytest.raises(GptcError, match=why):
            next(eval_batches(dataset, split, 1, 10))
    with pytest.raises(GptcError, match="has 0"):
        dataset.bytes_per_token("val")


def test_sequential_order_goes_round(tmp_path: Path) -> None:
    loader = Loader(counting(tmp_path, 41), "train", 3, 10, order="sequential")
    assert [positions(loader.next()[0]) for _ in range(3)] == [
        *([0, 10, 20], [30, 0, 10], [20, 30, 0])
    ]


@pytest.mark.parametrize("n", [*range(1, 60), 1023, 4097])
def test_the_shuffle_is_a_permutation(n: int) -> None:
    x = np.arange(n, dtype=np.uint64)
    for key in range(5):
        out = loader._permute(x, n, np.full(n, key, dtype=np.uint64))
        assert sorted(out.tolist()) == list(range(n))


def test_the_shuffle_is_even() -> None:
    n, n_keys = 20, 20_000
    keys = loader._mix(np.arange(n_keys, dtype=np.uint64), 1)
    places = np.stack([loader._permute(np.full(n_keys, i, np.uint64), n, keys) for i in range(n)])
    counts = np.array([np.bincount(row.astype(int), minlength=n) for row in places])
    expected = n_keys / n
    # Chi-square with (n - 1)^2 degrees of freedom: mean 361, deviation 27.
    assert ((counts - expected) ** 2 / expected).sum() < 361 + 6 * 27
    followed = np.count_nonzero(places[1] == places[0] + 1) / n_keys
    assert followed == pytest.approx(1 / n, abs=0.01)


def test_a_huge_corpus_needs_no_table() -> None:
    n = 10**12
    out = loader._permute(np.arange(1000, dtype=np.uint64), n, np.full(1000, 9, np.uint64))
    assert len(set(out.tolist())) == 1000
    assert out.max() < n
    assert out.std() == pytest.approx(n / 12**0.5, rel=0.1)


def test_evaluation_is_spread_evenly(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 251, shard_tokens=60)

    def starts(n_batches: int | None, batch_size: int) -> list[list[int]]:
        batches = list(eval_batches(dataset, "train", batch_size, 10, n_batches))
        assert all((y == (x + 1) % 251).all() for x, y in batches)
        return [positions(x) for x, _ in batches]

    assert starts(None, 10) == [
        list(range(0, 100, 10)),
        list(range(100, 200, 10)),
        list(range(200, 250, 10)),
    ]
    assert starts(99, 10) == starts(None, 10)
    assert starts(2, 2) == [[0, 60], [120, 180]]
    assert starts(1, 3) == [[0, 80, 160]]
    assert starts(1, 3) == starts(1, 3)


@pytest.mark.parametrize(("batch_size", "seq_len"), [(0, 4), (4, 0)])
def test_impossible_shapes_are_refused(tmp_path: Path, batch_size: int, seq_len: int) -> None:
    dataset = counting(tmp_path, 100)
    with pytest.raises(UsageError):
        Loader(dataset, "train", batch_size, seq_len)
    with pytest.raises(UsageError):
        next(eval_batches(dataset, "train", batch_size, seq_len))


# ---- names ----


def test_a_known_name_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    first = resolve_dataset("stories", stories_bytes=2000)
    assert first.folder.parent == tmp_path / "cache" / "datasets"
    assert first.folder.name.startswith("stories-bytes-")
    monkeypatch.setattr("gptc.data.stories.corpus", lambda *_: pytest.fail("prepared again"))
    assert resolve_dataset("stories", stories_bytes=2000).folder == first.folder
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    folders = {
        resolve_dataset("stories", "char", stories_bytes=2000).folder,
        resolve_dataset("stories", stories_bytes=3000).folder,
        resolve_dataset("stories", stories_bytes=2000, seed=1).folder,
        first.folder,
    }
    assert len(folders) == 4


def test_a_damaged_cache_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    first = resolve_dataset("stories", stories_bytes=2000)
    first.shards("val")[0].unlink()
    again = resolve_dataset("stories", stories_bytes=2000)
    assert again.folder == first.folder
    again.verify()


def test_a_text_file_is_prepared_by_content(tmp_path: Path) -> None:
    source = text_file(tmp_path, "abc" * 100, "my text.txt")
    first = resolve_dataset(source)
    assert first.folder.name.startswith("my_text-bytes-")
    assert resolve_dataset(source).folder == first.folder
    text_file(tmp_path, "abd" * 100, "my text.txt")
    second = resolve_dataset(source)
    assert second.folder != first.folder
    assert text_of(second, "train") == b"abd" * 90
    assert resolve_dataset(str(second.folder), "char").tokenizer.kind == "bytes"


def test_an_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(GptcError, match="stories, stories-wide, shakespeare"):
        resolve_dataset("novels")
    with pytest.raises(GptcError, match=r"holds no dataset\.json"):
        resolve_dataset(str(tmp_path))


def test_a_folder_named_like_a_known_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").mkdir()
    assert resolve_dataset("stories", stories_bytes=2000).folder.parent.name == "datasets"
    prepare([text_file(tmp_path, "abc" * 100)], Path("stories"))
    assert resolve_dataset("stories").folder == Path("stories")
