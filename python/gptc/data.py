"""Token shards on disk: how text becomes a dataset, and how training draws batches from it.

    dataset = prepare(["book.txt"], Path("data/book"), tokenizer="gpt2")
    loader = Loader(dataset, "train", batch_size=12, seq_len=64, seed=1)
    inputs, targets = loader.next()  # int32 (B, T) each

A dataset is a folder of shards in llm.c's format (`train_000000.bin`, `val_000000.bin`, ...),
`gptc_tokenizer.json`, and `dataset.json`, which is written last: where it is, the rest is whole.
Letters in shapes: B is batch_size, T is seq_len, N the number of tokens of a split.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc import __version__
from gptc.errors import GptcError, UsageError
from gptc.tokenizer import (
    END_OF_TEXT,
    FILE_NAME,
    ByteTokenizer,
    CharTokenizer,
    Progress,
    Tokenizer,
    Tokens,
    Utf8Decoder,
    bpe_size,
    cache_folder,
    character_cut,
    download,
    is_spec,
    load_tokenizer,
    make_tokenizer,
    write_file,
)

Batch: TypeAlias = tuple[Tokens, Tokens]
Shard: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
Order: TypeAlias = Literal["random", "sequential"]

SPLITS = ("train", "val")
DATASET_FILE = "dataset.json"
SHARD_TOKENS = 100_000_000
STORIES_BYTES = 5_000_000
_DATASET_VERSION = 1

_HEADER_BYTES = 1024  # 256 int32
_Format: TypeAlias = tuple[int, int, np.dtype[np.unsignedinteger[Any]]]  # magic, version, token
_NARROW: _Format = (20240520, 1, np.dtype("<u2"))
_WIDE: _Format = (20240801, 7, np.dtype("<u4"))
_MAX_SHARD_TOKENS = 2**31 - 1  # the count in the header is an int32

_BLOCK_BYTES = 1 << 20  # text in memory at a time
_LONGEST_RUN_BYTES = 64 << 20  # text without a place to cut that is still encoded in one piece

_DOWNLOADS = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
KNOWN_DATASETS = ("stories", *_DOWNLOADS)


# ---- shards ----


def _format(vocab_size: int) -> _Format:
    return _NARROW if vocab_size <= 65536 else _WIDE


class _ShardFile:
    """A shard while it is written: tokens are appended, and the header is filled in at the end."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.n_tokens = 0
        self._format = _format(vocab_size)
        self._file = path.open("xb")
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, tokens: npt.NDArray[np.integer[Any]]) -> None:
        self._file.write(tokens.astype(self._format[2]).data)
        self.n_tokens += len(tokens)

    def close(self) -> None:
        """Completes the file and flushes it to disk."""
        header = np.zeros(256, dtype="<i4")
        header[:3] = *self._format[:2], self.n_tokens
        with self._file as file:
            file.seek(0)
            file.write(header.data)
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Closes a file that will not be completed; harmless after close."""
        self._file.close()


def write_shard(path: Path, tokens: npt.ArrayLike, vocab_size: int) -> None:
    """Writes `tokens` (N,) as one shard, whole or not at all.

    GptcError when an id is outside [0, vocab_size), or when there are more than 2^31 - 1 tokens.
    """
    ids = np.asarray(tokens).reshape(-1)
    if len(ids) > _MAX_SHARD_TOKENS:
        raise GptcError(f"{len(ids)} tokens are too many for one shard: write several")
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise GptcError(
            f"cannot write {path}: the tokens {ids.min()} to {ids.max()} do not fit a vocabulary "
            f"of {vocab_size}"
        )
    path = Path(path)
    shard = _ShardFile(path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial"), vocab_size)
    try:
        shard.append(ids)
        shard.close()
        shard.path.replace(path)
    finally:
        shard.abandon()
        shard.path.unlink(missing_ok=True)


def read_shard(path: Path) -> Shard:
    """The tokens of a shard, uint16 or uint32 (N,), mapped from the file and read-only.

    GptcError names the file and what is wrong with it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(_HEADER_BYTES), dtype=np.uint8)
            n_bytes = os.fstat(file.fileno()).st_size
    except OSError as e:
        raise GptcError(f"cannot read the shard {path}: {e.strerror}") from None
    if len(header) < _HEADER_BYTES:
        raise GptcError(f"{path} is no token shard: it has {n_bytes} bytes, fewer than a header")
    magic, version, n_tokens = (int(n) for n in header.view("<i4")[:3])
    formats = {known: (number, dtype) for known, number, dtype in (_NARROW, _WIDE)}
    if magic not in formats:
        raise GptcError(f"{path} is no token shard: it begins with {magic}, not with {_NARROW[0]}")
    number, dtype = formats[magic]
    if version != number:
        raise GptcError(f"{path} is a token shard of version {version}; only {number} is known")
    expected = _HEADER_BYTES + n_tokens * dtype.itemsize
    if n_tokens < 0 or n_bytes != expected:
        raise GptcError(
            f"{path} is damaged: its header promises {n_tokens} tokens, {expected} bytes, and it "
            f"has {n_bytes} bytes: copy it again, or prepare the dataset again"
        )
    if n_tokens == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype, "r", _HEADER_BYTES, (n_tokens,)).view(np.ndarray)


# ---- datasets ----


class Dataset:
    """A prepared dataset: its tokenizer and the shards of its splits, "train" and "val"."""

    folder: Path
    meta: dict[str, Any]
    """The content of dataset.json."""
    tokenizer: Tokenizer
    vocab_size: int
    already_there: bool
    """True when `prepare` found it as asked for, and wrote nothing."""

    def __init__(self, folder: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.meta = meta
        self.tokenizer = tokenizer
        self.vocab_size = int(meta["vocab_size"])
        self.already_there = False
        self._open: dict[tuple[str, int], Shard] = {}
        self._begins = {
            split: [
                0,
                *accumulate(int(shard["tokens"]) for shard in meta["splits"][split]["shards"]),
            ]
            for split in SPLITS
        }

    @classmethod
    def open(cls, folder: Path | str) -> Dataset:
        """Opens a folder that `gptc prepare` wrote.

        GptcError when the folder, its dataset.json or a shard is missing, or a size is wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise GptcError(
                f"no dataset at {folder}: make one with gptc prepare SOURCE --out {folder}"
            )
        meta = _read_meta(folder)
        if meta is None:
            raise GptcError(
                f"{folder} holds no {DATASET_FILE}, so it is no prepared dataset: make one of its "
                f"files with gptc prepare {folder} --out DIR"
            )
        again = "copy the dataset again, or prepare it again with --force"
        try:
            tokenizer = load_tokenizer(folder)
            if tokenizer.fingerprint() != meta["tokenizer"]["fingerprint"]:
                raise GptcError(
                    f"{folder / FILE_NAME} is not the tokenizer that the dataset was made with: "
                    f"{again}"
                )
            dataset = cls(folder, meta, tokenizer)
            itemsize = _format(dataset.vocab_size)[2].itemsize
            for split in SPLITS:
                for shard in meta["splits"][split]["shards"]:
                    path = folder / shard["file"]
                    if not path.is_file():
                        raise GptcError(f"the shard {path} is missing: {again}")
                    n_bytes = path.stat().st_size
                    expected = _HEADER_BYTES + shard["tokens"] * itemsize
                    if n_bytes != expected:
                        raise GptcError(
                            f"the shard {path} has {n_bytes} bytes instead of {expected}: {again}"
                        )
        except OSError as e:
            raise GptcError(f"cannot read {e.filename}: {e.strerror}") from None
        except (KeyError, TypeError, ValueError):
            raise GptcError(
                f"{folder / DATASET_FILE} was altered or is incomplete: {again}"
            ) from None
        return dataset

    def n_tokens(self, split: str) -> int:
        """The number of tokens of a split."""
        return self._begins[split][-1]

    def bytes_per_token(self, split: str) -> float:
        """Bytes of text that a token stands for on average.

        A loss in nats per token is loss / ln 2 / bytes_per_token bits per byte.
        """
        if not self.n_tokens(split):
            raise self.too_small(split, 1)
        return float(self.meta["splits"][split]["bytes"] / self.n_tokens(split))

    def shards(self, split: str) -> list[Path]:
        """The files that hold the tokens of a split, in order."""
        return [self.folder / shard["file"] for shard in self.meta["splits"][split]["shards"]]

    def shard(self, split: str, i: int) -> Shard:
        """The tokens of the i-th shard of a split (N_i,), read-only.

        They are compared with vocab_size at the first call; GptcError names a shard that fails.
        """
        tokens = self._open.get((split, i))
        if tokens is None:
            path = self.shards(split)[i]
            tokens = read_shard(path)
            if len(tokens) and self.vocab_size <= np.iinfo(tokens.dtype).max:
                largest = int(tokens.max())
                if largest >= self.vocab_size:
                    raise GptcError(
                        f"the shard {path} holds token {largest}, outside the vocabulary of "
                        f"{self.vocab_size}: prepare the dataset again with --force"
                    )
            self._open[split, i] = tokens
        return tokens

    def read(self, split: str, begin: int, out: Tokens) -> None:
        """Fills `out` (n,) with the tokens of a split from position `begin` on, across shards."""
        begins = self._begins[split]
        i = bisect_right(begins, begin) - 1
        done = 0
        while done < len(out):
            at = begin + done - begins[i]
            part = self.shard(split, i)[at : at + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            i += 1

    def too_small(self, split: str, n_needed: int) -> GptcError:
        """The error for a split with fewer than `n_needed` tokens."""
        n = self.n_tokens(split)
        fix = f"use --seq-len {n - 1} or less, or prepare more text" if n > 1 else ""
        if split == "val":
            fix = fix or "prepare it again with a larger --val-fraction"
        return GptcError(
            f"the {split} split of {self.folder} has {n} tokens, and {n_needed} are needed: "
            f"{fix or 'prepare more text'}"
        )

    def describe(self) -> dict[str, Any]:
        """What `gptc info` shows: counts, tokenizer, a decoded sample of each split."""
        return {
            "folder": str(self.folder),
            "created_by": self.meta["created_by"],
            "sources": self.meta["sources"],
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.vocab_size,
            "splits": {split: self._describe(split) for split in SPLITS if self.n_tokens(split)},
        }

    def _describe(self, split: str) -> dict[str, Any]:
        n_seen = min(self.n_tokens(split), 10_000_000)  # enough to judge a vocabulary by
        seen = np.empty(n_seen, dtype=np.int32)
        self.read(split, 0, seen)
        return {
            "tokens": self.n_tokens(split),
            "bytes": self.meta["splits"][split]["bytes"],
            "bytes_per_token": self.bytes_per_token(split),
            "shards": len(self.shards(split)),
            "tokens_seen": n_seen,
            "vocab_used": int(np.count_nonzero(np.bincount(seen))),
            "sample": self.tokenizer.decode(seen[:200]),
        }

    def verify(self, progress: Progress | None = None) -> None:
        """Reads every shard. GptcError names one whose content is not what was written."""
        n_done, n_bytes = 0, sum(path.stat().st_size for s in SPLITS for path in self.shards(s))
        for split in SPLITS:
            for i, path in enumerate(self.shards(split)):
                if _sha256(path) != self.meta["splits"][split]["shards"][i]["sha256"]:
                    raise GptcError(
                        f"the shard {path} is damaged (wrong SHA-256): copy the dataset again, or "
                        "prepare it again with --force"
                    )
                self.shard(split, i)
                n_done += path.stat().st_size
                if progress:
                    progress("verifying", n_done, n_bytes)


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """The content of dataset.json, None when there is no such file."""
    path = folder / DATASET_FILE
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
    except ValueError:
        meta = None
    keys = {"version", "sources", "tokenizer", "vocab_size", "splits", "options", "created_by"}
    if not isinstance(meta, dict) or not meta.keys() >= keys:
        raise GptcError(f"{path} is damaged: prepare the dataset again with --force")
    if meta["version"] != _DATASET_VERSION:
        raise GptcError(
            f"{path} has version {meta['version']}, and this gptc knows {_DATASET_VERSION}: "
            "pip install --upgrade gptc"
        )
    return meta


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


# ---- batches ----

_U64: TypeAlias = npt.NDArray[np.uint64]
_CHUNK = 1024  # sequences whose places are computed at once


class Loader:
    """Draws batches from a split; what it draws is a function of the seed and `position` only.

    In "random" order an epoch starts at a random offset below 2 T, cuts the split into windows of T
    tokens from there on, and visits each once, shuffled. In "sequential" order windows follow each
    other from the start of the split. A new epoch begins when the windows are used up.
    """

    position: int
    """Sequences drawn so far. Set it to go on from there."""
    n_windows: int
    """Sequences in an epoch."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        order: Order = "random",
    ) -> None:
        """GptcError when the split has fewer than seq_len + 1 tokens."""
        if batch_size < 1 or seq_len < 1:
            raise UsageError("--batch-size and --seq-len must be at least 1")
        if order not in ("random", "sequential"):
            raise UsageError(f"unknown order {order!r}: choose random or sequential")
        n_tokens = dataset.n_tokens(split)
        if n_tokens < seq_len + 1:
            raise dataset.too_small(split, seq_len + 1)
        self.dataset = dataset
        self.split = split
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.order = order
        self.position = 0
        # A window reads one token more than it is long: the last target.
        if order == "random":
            # At least T offsets, so that windows begin everywhere; fewer where the split is short.
            self.n_windows = max(1, n_tokens // seq_len - 1)
        else:
            self.n_windows = (n_tokens - 1) // seq_len
        self._n_offsets = n_tokens - self.n_windows * seq_len
        self._chunk = -1
        self._starts: list[int] = []

    def next(self) -> Batch:
        """The next inputs and targets, int32 (B, T) each; targets are one token further on."""
        starts = [self._start(self.position + b) for b in range(self.batch_size)]
        self.position += self.batch_size
        return _batch(self.dataset, self.split, starts, self.seq_len)

    def _start(self, position: int) -> int:
        """Where in the split the sequence at `position` of the stream begins."""
        chunk, i = divmod(position, _CHUNK)
        if chunk != self._chunk:
            self._starts = self._chunk_starts(chunk)
            self._chunk = chunk
        return self._starts[i]

    def _chunk_starts(self, chunk: int) -> list[int]:
        positions = np.arange(_CHUNK, dtype=np.uint64) + np.uint64(chunk * _CHUNK)
        epoch, window = np.divmod(positions, np.uint64(self.n_windows))
        offset = np.zeros_like(window)
        if self.order == "random":
            seed = np.full(_CHUNK, self.seed % 2**64, dtype=np.uint64)
            key = _mix(seed, epoch)
            offset = _mix(key, 0) % np.uint64(self._n_offsets)
            window = _permute(window, self.n_windows, key)
        starts: list[int] = (offset + window * np.uint64(self.seq_len)).tolist()
        return starts


def eval_batches(
    dataset: Dataset, split: str, batch_size: int, seq_len: int, n_batches: int | None = None
) -> Iterator[Batch]:
    """Inputs and targets, int32 (B, T) each, the same at every call.

    The windows do not overlap and are spread evenly over the split: at most `n_batches` batches of
    them, or all with None. The last batch may have fewer rows (weight losses by x.size); fewer than
    T targets at the end of the split are left out. GptcError when it has no seq_len + 1 tokens.
    """
    if batch_size < 1 or seq_len < 1 or (n_batches is not None and n_batches < 1):
        raise UsageError("--batch-size, --seq-len and --eval-batches must be at least 1")
    n_windows = (dataset.n_tokens(split) - 1) // seq_len
    if n_windows < 1:
        raise dataset.too_small(split, seq_len + 1)
    n = n_windows if n_batches is None else min(n_windows, n_batches * batch_size)
    for first in range(0, n, batch_size):
        rows = range(first, min(first + batch_size, n))
        starts = [i * n_windows // n * seq_len for i in rows]
        yield _batch(dataset, split, starts, seq_len)


def _batch(dataset: Dataset, split: str, starts: Sequence[int], seq_len: int) -> Batch:
    x = np.empty((len(starts), seq_len), dtype=np.int32)
    y = np.empty_like(x)
    row = np.empty(seq_len + 1, dtype=np.int32)
    for b, start in enumerate(starts):
        dataset.read(split, start, row)
        x[b] = row[:-1]
        y[b] = row[1:]
    return x, y


def _mix(key: _U64, value: _U64 | int) -> _U64:
    """A hash of both: the finalizer of SplitMix64 (Steele et al. 2014)."""
    step = np.atleast_1d(value).astype(np.uint64) + np.uint64(1)  # an array, which may overflow
    z = key ^ step * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _U64 = z ^ (z >> np.uint64(31))
    return mixed


def _permute(x: _U64, n: int, key: _U64) -> _U64:
    """The place of each x in a shuffle of [0, n) chosen by its key, without storing the shuffle.

    A Feistel network over pairs (left, right) of rows x columns numbers, a few more than n; what
    falls outside [0, n) goes through again (Black and Rogaway 2002).
    """
    n_rows = math.isqrt(n - 1) + 1
    rows, columns = np.uint64(n_rows), np.uint64(-(-n // n_rows))
    left, right = np.divmod(x, columns)
    for i in range(4):
        left = (left + _mix(_mix(key, 2 * i + 1), right) % rows) % rows
        right = (right + _mix(_mix(key, 2 * i + 2), left) % columns) % columns
    out: _U64 = left * columns + right
    outside = out >= np.uint64(n)
    if outside.any():
        out[outside] = _permute(out[outside], n, key[outside])
    return out


# ---- sources ----


@dataclass
class _Part:
    """A file that is part of the text, and what to call it."""

    path: Path
    name: str
    n_bytes: int


class _Text:
    """Files read as one text, in blocks."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        self._begins = [0, *accumulate(part.n_bytes for part in parts)]
        self.n_bytes = self._begins[-1]

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end), in blocks of at most _BLOCK_BYTES."""
        for part, first in zip(self.parts, self._begins, strict=False):
            at, stop = max(begin, first) - first, min(end, first + part.n_bytes) - first
            if at >= stop:
                continue
            with part.path.open("rb") as file:
                file.seek(at)
                while at < stop:
                    block = file.read(min(_BLOCK_BYTES, stop - at))
                    if not block:
                        raise GptcError(f"{part.name} shrank while it was read: prepare again")
                    yield block
                    at += len(block)

    def where(self, offset: int) -> str:
        """A byte offset in words."""
        i = min(bisect_right(self._begins, offset), len(self.parts)) - 1
        return f"{self.parts[i].name}: byte {offset - self._begins[i]}"


def _gather(
    source: str, out: Path, spool: Path, stories: tuple[int, int], progress: Progress
) -> list[_Part]:
    """The files of a source; what is no file on disk is first stored below `spool`."""
    if source == "stories":
        from gptc.stories import corpus

        return [_spool(corpus(*stories), spool, source, "writing stories", stories[0], progress)]
    if source in _DOWNLOADS or re.match(r"https?://", source):
        url, sha256 = _DOWNLOADS.get(source, (source, None))
        path = spool / secrets.token_hex(8)
        download(url, path, sha256=sha256, progress=progress)
        return [_Part(path, source, path.stat().st_size)]
    if source == "-":
        blocks = iter(lambda: sys.stdin.buffer.read(_BLOCK_BYTES), b"")
        return [_spool(blocks, spool, "standard input", "reading", None, progress)]
    path = Path(source)
    if path.is_dir():
        if path.resolve() == out.resolve():
            raise GptcError(f"--out {out} is also a source: choose another --out")
        files = list(_walk(path, out.resolve()))
        if not files:
            raise GptcError(f"the folder {path} holds no files: name one that does")
    elif path.is_file():
        files = [path]
    elif path.exists():  # a pipe, such as <(zcat text.gz)
        with path.open("rb") as pipe:
            blocks = iter(lambda: pipe.read(_BLOCK_BYTES), b"")
            return [_spool(blocks, spool, source, "reading", None, progress)]
    else:
        # Path.glob takes no absolute pattern.
        found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207
        files = [file for name in found if (file := Path(name)).is_file()]
        if not files:
            raise GptcError(
                f"no file, folder or URL {source!r}, and no dataset of that name: check the path, "
                f"or use one of {', '.join(KNOWN_DATASETS)}"
            )
    return [_Part(file, str(file), file.stat().st_size) for file in files]


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    """The files below a folder, sorted; hidden ones and the dataset to be written are left out."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.resolve() == out:
            continue
        if entry.is_dir() and not entry.is_symlink():  # a link could lead in a circle
            yield from _walk(entry, out)
        elif entry.is_file():
            yield entry


def _spool(
    blocks: Iterable[bytes],
    spool: Path,
    name: str,
    action: str,
    n_bytes: int | None,
    progress: Progress,
) -> _Part:
    """Stores what can be read only once, since preparing reads it twice."""
    path = spool / secrets.token_hex(8)
    n_done = 0
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            n_done += len(block)
            progress(action, n_done, n_bytes)
    return _Part(path, name, n_done)


# ---- preparing ----


@dataclass
class _Scan:
    """What the first reading of a text finds out."""

    sha256: list[str] = field(default_factory=list)  # of each source
    marked: bool = False  # END_OF_TEXT occurs
    borders: array[int] = field(default_factory=lambda: array("q"))  # bytes where documents begin
    characters: list[str] = field(default_factory=list)  # that occur, for a new char tokenizer
    n_characters: int = 0
    blocks: list[tuple[int, int]] = field(default_factory=list)  # (first byte, characters before)


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bytes",
    val_fraction: float = 0.1,
    val_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    jobs: int = 1,
    force: bool = False,
    stories_bytes: int = STORIES_BYTES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """Turns text into a dataset at `out`, which appears complete or not at all.

    `sources` are files, folders (every file below, sorted), globs, "-" (standard input), URLs, or
    names in KNOWN_DATASETS; they are joined in order, with nothing in between. `tokenizer` is as in
    `make_tokenizer`. The end of the text becomes the validation split: the last `val_tokens`
    tokens, else the last `val_fraction` of its documents where it marks them with <|endoftext|>,
    else that fraction of its bytes (with the bytes tokenizer) or characters. `stories_bytes` and
    `seed` choose the text of "stories". `jobs` threads encode.

    Where `out` already holds just this dataset it is returned as it is, with `already_there` set.
    UsageError for options out of range; GptcError for sources that are missing, empty or no UTF-8
    (unless the tokenizer is "bytes"), and for an `out` that holds anything else, without `force`.
    """
    out = Path(out)
    report = progress or (lambda action, n_done, n_bytes: None)
    _check_options(sources, val_fraction, val_tokens, shard_tokens, jobs, stories_bytes)
    # A tokenizer that learns from the text is made when the text has been read once.
    learns = tokenizer == "char" or bpe_size(tokenizer) is not None
    given = None if learns else make_tokenizer(tokenizer)
    options: dict[str, Any] = {
        "tokenizer": given.fingerprint() if given and not is_spec(tokenizer) else tokenizer,
        "val_fraction": val_fraction,
        "val_tokens": val_tokens,
        "shard_tokens": shard_tokens,
    }
    if "stories" in sources:
        options["stories"] = _stories_options(stories_bytes, seed)

    created = not out.exists()
    work = out / f".{secrets.token_hex(4)}.partial"
    try:
        there = None if force else _dataset_at(out)
        if there and there["options"] != options:
            raise _occupied(out)
        remote = all(_is_remote(source) for source in sources)
        if there and remote and [source["source"] for source in there["sources"]] == list(sources):
            return _already_there(out)  # without downloading it again to compare

        (work / "sources").mkdir(parents=True)
        (work / "dataset").mkdir()
        gathered = []
        for source in sources:
            parts = _gather(source, out, work / "sources", (stories_bytes, seed), report)
            if not sum(part.n_bytes for part in parts):
                raise GptcError(f"the source {source} is empty: name one that holds text")
            gathered.append(parts)
        text = _Text([part for parts in gathered for part in parts])
        scan = _scan(text, gathered, given, report)
        found = [
            {"source": source, "bytes": sum(part.n_bytes for part in parts), "sha256": sha256}
            for source, parts, sha256 in zip(sources, gathered, scan.sha256, strict=True)
        ]
        if there:
            same = [(s["bytes"], s["sha256"]) for s in there["sources"]]
            if same != [(s["bytes"], s["sha256"]) for s in found]:
                raise _occupied(out)
            return _already_there(out)
        if given is None and tokenizer != "char":
            report("training the tokenizer", 0, None)
            given = make_tokenizer(tokenizer, text.read(0, text.n_bytes))
        chosen = given or CharTokenizer(scan.characters)
        if is_spec(tokenizer) and tokenizer != "gpt2":
            chosen.start = _start(chosen, scan.marked)
        begin = text.n_bytes
        if val_tokens is None:
            begin = _val_begin(text, scan, val_fraction, by_byte=isinstance(chosen, ByteTokenizer))
        tokens = _split(text, partial(_encode, text, chosen, jobs), begin, val_tokens)
        splits = _write_splits(work / "dataset", tokens, text.n_bytes, chosen, shard_tokens, report)
        chosen.save(work / "dataset")
        meta = {
            "version": _DATASET_VERSION,
            "sources": found,
            "tokenizer": {"kind": chosen.kind, "fingerprint": chosen.fingerprint()},
            "vocab_size": chosen.vocab_size,
            "splits": splits,
            "options": options,
            "created_by": f"gptc {__version__}",
        }
        _install(work / "dataset", out, meta)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise GptcError(
            f"cannot prepare {out}: {where}{e.strerror or e}; check the path, its permissions and "
            "the free space"
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if created and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return Dataset.open(out)


def resolve_dataset(
    name_or_path: str,
    tokenizer: str = "bytes",
    *,
    stories_bytes: int = STORIES_BYTES,
    seed: int = 0,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Dataset:
    """The dataset of that name: a prepared folder, a name in KNOWN_DATASETS, or a file of text.

    The latter two are prepared with `tokenizer` into the user's cache at first use. A prepared
    folder keeps the tokenizer it has. GptcError when there is nothing of that name.
    """
    path = Path(name_or_path)
    if path.is_dir() and (name_or_path not in KNOWN_DATASETS or (path / DATASET_FILE).exists()):
        return Dataset.open(path)
    key: dict[str, Any] = {"version": _DATASET_VERSION, "tokenizer": tokenizer}
    if name_or_path == "stories":
        key["stories"] = _stories_options(stories_bytes, seed)
    elif name_or_path not in KNOWN_DATASETS:
        if not path.is_file():
            raise GptcError(
                f"no dataset {name_or_path!r}: name a folder made by gptc prepare, a text file, or "
                f"one of {', '.join(KNOWN_DATASETS)}"
            )
        try:
            key["sha256"] = _sha256(path)
        except OSError as e:
            raise GptcError(f"cannot read {path}: {e.strerror}") from None
    kind = tokenizer
    if is_spec(tokenizer):
        kind = tokenizer.split(":")[0]
    else:
        given = make_tokenizer(tokenizer)
        kind, key["tokenizer"] = given.kind, given.fingerprint()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    stem = re.sub(r"[^\w.-]", "_", path.stem)
    out = cache_folder() / "datasets" / f"{stem}-{kind}-{digest}"
    try:
        return Dataset.open(out)
    except GptcError:  # not there yet, or damaged: the cache is ours to repair
        return prepare(
            [name_or_path],
            out,
            tokenizer=tokenizer,
            force=out.exists(),
            jobs=jobs,
            stories_bytes=stories_bytes,
            seed=seed,
            progress=progress,
        )


def _check_options(
    sources: Sequence[str],
    val_fraction: float,
    val_tokens: int | None,
    shard_tokens: int,
    jobs: int,
    stories_bytes: int,
) -> None:
    if not sources:
        raise UsageError(f"name a SOURCE: a file, a folder, a URL, {' or '.join(KNOWN_DATASETS)}")
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} must be at least 0 and less than 1")
    if val_tokens is not None and val_tokens < 0:
        raise UsageError(f"--val-tokens {val_tokens} must be at least 0")
    if not 1 <= shard_tokens <= _MAX_SHARD_TOKENS:
        raise UsageError(f"--shard-tokens {shard_tokens} must be from 1 to {_MAX_SHARD_TOKENS}")
    if jobs < 1 or stories_bytes < 1:
        raise UsageError("--jobs and --stories-bytes must be at least 1")


def _stories_options(n_bytes: int, seed: int) -> dict[str, Any]:
    """What determines the text of "stories": its size, its seed, and what it is drawn from."""
    from gptc import stories

    module = Path(stories.__file__)
    folders = (module.parent / "data" / "stories", module.parents[2] / "data" / "stories")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    digest = hashlib.sha256()
    for path in [module, *sorted(folder.glob("*.txt"))]:
        digest.update(path.read_bytes())
    return {"bytes": n_bytes, "seed": seed, "grammar_sha256": digest.hexdigest()}


def _is_remote(source: str) -> bool:
    return source in KNOWN_DATASETS or re.match(r"https?://", source) is not None


def _dataset_at(out: Path) -> dict[str, Any] | None:
    """The dataset.json at `out`, None where a dataset may be written."""
    if out.exists() and not out.is_dir():
        raise GptcError(f"{out} is a file: choose another --out")
    meta = _read_meta(out)
    if meta is None and out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise GptcError(
            f"{out} holds other files: choose another --out, or write among them with --force"
        )
    return meta


def _occupied(out: Path) -> GptcError:
    return GptcError(
        f"{out} already holds a dataset made of other sources or with other options: choose "
        "another --out, or replace it with --force"
    )


def _already_there(out: Path) -> Dataset:
    dataset = Dataset.open(out)
    dataset.already_there = True
    return dataset


def _start(tokenizer: Tokenizer, marked: bool) -> str:
    """What begins a document in a text whose end-of-text marks, if any, are plain characters."""
    start = f"{END_OF_TEXT}\n" if marked else "\n"
    if tokenizer.end_of_text is not None and marked:
        return END_OF_TEXT
    if isinstance(tokenizer, CharTokenizer) and "\n" not in tokenizer.characters:
        return END_OF_TEXT if marked else tokenizer.characters[0]
    return start


def _scan(
    text: _Text, sources: Sequence[Sequence[_Part]], given: Tokenizer | None, report: Progress
) -> _Scan:
    """Reads the text once. GptcError where the tokenizer (None: char, still to be made) refuses."""
    scan = _Scan()
    mark = END_OF_TEXT.encode()
    known = np.zeros(sys.maxunicode + 1, dtype=np.bool_)  # code points that occur
    decoder = Utf8Decoder(text.where)
    tail = b""  # of the block before: a mark may lie across the border
    n_done = 0
    for parts in sources:
        digest = hashlib.sha256()
        for block in text.read(n_done, n_done + sum(part.n_bytes for part in parts)):
            digest.update(block)
            window = tail + block
            first = n_done - len(tail)
            scan.borders.extend(first + m.start() for m in re.finditer(re.escape(mark), window))
            tail = window[-(len(mark) - 1) :]
            if not isinstance(given, ByteTokenizer):
                scan.blocks.append((n_done, scan.n_characters))
                scan.n_characters += int(np.count_nonzero(_begins_character(block)))
                begin = decoder.n_done
                characters = decoder.push(block)
                if given is None:
                    known[np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")] = True
                elif isinstance(given, CharTokenizer):
                    at = given.unknown(characters)
                    if at is not None:
                        where = text.where(begin + len(characters[:at].encode()))
                        raise GptcError(f"{where}: {given.refusal(characters[at])}")
            n_done += len(block)
            report("reading", n_done, text.n_bytes)
        scan.sha256.append(digest.hexdigest())
    decoder.finish()
    scan.characters = [chr(code) for code in np.flatnonzero(known)]
    scan.marked = len(scan.borders) > 0
    # A mark at the very beginning or end separates nothing.
    if scan.borders and scan.borders[0] == 0:
        scan.borders.pop(0)
    if scan.borders:
        rest = text.read(scan.borders[-1] + len(mark), text.n_bytes)
        if not any(block.strip() for block in rest):
            scan.borders.pop()
    return scan


def _begins_character(block: bytes) -> npt.NDArray[np.bool_]:
    """Which bytes of UTF-8 text are the first of a character."""
    begins: npt.NDArray[np.bool_] = np.frombuffer(block, dtype=np.uint8) & 0xC0 != 0x80
    return begins


def _val_begin(text: _Text, scan: _Scan, val_fraction: float, by_byte: bool) -> int:
    """The byte at which the last `val_fraction` of the text begins."""
    if val_fraction == 0:
        return text.n_bytes
    if scan.borders:
        n_documents = len(scan.borders) + 1
        n_train = min(max(int(n_documents * (1 - val_fraction)), 1), n_documents - 1)
        return scan.borders[n_train - 1]
    if by_byte:
        return int(text.n_bytes * (1 - val_fraction))
    n_train = int(scan.n_characters * (1 - val_fraction))
    if n_train == scan.n_characters:
        return text.n_bytes
    first, n_before = scan.blocks[
        bisect_right(scan.blocks, n_train, key=lambda block: block[1]) - 1
    ]
    block = next(text.read(first, text.n_bytes))
    return first + int(np.flatnonzero(_begins_character(block))[n_train - n_before])


def _write_splits(
    folder: Path,
    tokens: Iterable[tuple[str, Tokens]],
    n_bytes: int,
    tokenizer: Tokenizer,
    shard_tokens: int,
    report: Progress,
) -> dict[str, Any]:
    """Writes the shards of both splits; returns what dataset.json says about them."""
    with ExitStack() as files:
        writers = {
            split: _SplitWriter(folder, split, tokenizer, shard_tokens, files) for split in SPLITS
        }
        n_done = 0
        for split, some in tokens:
            n_done += writers[split].append(some)
            report("encoding", n_done, n_bytes)
        if n_done != n_bytes:
            raise GptcError(
                f"the tokens stand for {n_done} bytes instead of {n_bytes}: did a source change "
                "meanwhile? Prepare again"
            )
        if not writers["train"].n_tokens:
            raise GptcError(
                f"of {writers['val'].n_tokens} tokens none would be left to train on: prepare more "
                "text, or choose a smaller --val-tokens or --val-fraction"
            )
        return {split: writer.finish() for split, writer in writers.items()}


class _SplitWriter:
    """Writes the shards of a split, `shard_tokens` in each but the last."""

    def __init__(
        self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int, files: ExitStack
    ) -> None:
        """`files` closes, at its end, what an error has left open."""
        self._files = files
        self._prefix = folder / split
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._shards: list[_ShardFile] = []
        self.n_tokens = 0
        self.n_bytes = 0

    def append(self, tokens: Tokens) -> int:
        """Writes tokens; returns the number of bytes that they stand for."""
        n_bytes = self._tokenizer.count_bytes(tokens)
        self.n_tokens += len(tokens)
        self.n_bytes += n_bytes
        while len(tokens):
            if not self._shards or self._shards[-1].n_tokens == self._shard_tokens:
                self._next_shard()
            room = self._shard_tokens - self._shards[-1].n_tokens
            self._shards[-1].append(tokens[:room])
            tokens = tokens[room:]
        return n_bytes

    def _next_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()
        path = Path(f"{self._prefix}_{len(self._shards):06d}.bin")
        shard = _ShardFile(path, self._tokenizer.vocab_size)
        self._files.callback(shard.abandon)
        self._shards.append(shard)

    def finish(self) -> dict[str, Any]:
        """Completes the last shard; returns what dataset.json says about the split."""
        if self._shards:
            self._shards[-1].close()
        shards = [
            {"file": shard.path.name, "tokens": shard.n_tokens, "sha256": _sha256(shard.path)}
            for shard in self._shards
        ]
        return {"tokens": self.n_tokens, "bytes": self.n_bytes, "shards": shards}


def _split(
    text: _Text, encode: Callable[[int, int], Iterator[Tokens]], begin: int, val_tokens: int | None
) -> Iterator[tuple[str, Tokens]]:
    """The tokens of the text and their split, which is decided by byte `begin` or by count."""
    if val_tokens is None:
        yield from (("train", tokens) for tokens in encode(0, begin))
        yield from (("val", tokens) for tokens in encode(begin, text.n_bytes))
        return
    held: deque[Tokens] = deque()  # what could still be among the last val_tokens
    n_held = 0
    for tokens in encode(0, text.n_bytes):
        held.append(tokens)
        n_held += len(tokens)
        while held and n_held - len(held[0]) >= val_tokens:
            n_held -= len(held[0])
            yield "train", held.popleft()
    rest = np.concatenate([*held, np.zeros(0, dtype=np.int32)])
    n_train = max(0, len(rest) - val_tokens)
    yield "train", rest[:n_train]
    yield "val", rest[n_train:]


def _encode(text: _Text, tokenizer: Tokenizer, jobs: int, begin: int, end: int) -> Iterator[Tokens]:
    """The tokens of the bytes [begin, end), in order, by `jobs` threads."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting: deque[Future[Tokens]] = deque()
        for piece in _pieces(text.read(begin, end), tokenizer):
            waiting.append(pool.submit(tokenizer.encode_bytes, piece))
            if len(waiting) > jobs:  # bounds what is in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _pieces(blocks: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The same bytes, cut where the tokens on both sides do not depend on each other."""
    pending = bytearray()
    for block in blocks:
        pending += block
        if len(pending) < _BLOCK_BYTES:
            continue
        cut = tokenizer.cut(pending)
        if not cut and len(pending) >= _LONGEST_RUN_BYTES:
            cut = character_cut(pending)  # rather a token border too many than no memory left
        if cut:
            yield bytes(pending[:cut])
            del pending[:cut]
    if pending:
        yield bytes(pending)


def _install(built: Path, out: Path, meta: dict[str, Any]) -> None:
    """Moves a finished dataset to its place; dataset.json leaves first and arrives last."""
    description = (json.dumps(meta, indent=2) + "\n").encode()
    there = out / DATASET_FILE
    if there.exists() and there.read_bytes() != description:
        # Where it is the same, another process was faster, and may be in use of the files.
        there.unlink()
    for path in built.iterdir():
        path.replace(out / path.name)
    wanted = {shard["file"] for split in meta["splits"].values() for shard in split["shards"]}
    for path in out.glob("*.bin"):
        if re.fullmatch(r"(train|val)_\d{6}\.bin", path.name) and path.name not in wanted:
            path.unlink()
    _sync_folder(out)
    write_file(there, description)
    _sync_folder(out)


def _sync_folder(folder: Path) -> None:
    """Flushes the names of the files in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
