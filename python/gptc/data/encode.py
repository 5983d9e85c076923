"""The second reading of a text: tokens in shards, which an interrupted preparation resumes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptc.data import journal
from gptc.data.options import Errors
from gptc.data.shards import Shard, ShardFile, open_shard, shard_format
from gptc.data.sources import Readable
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.cutting import cut_inside
from gptc.tokenizer.native import ByteTokenizer

BLOCK_BYTES = 1 << 18  # text that is encoded at a time; more would not stay in the cache
_LONGEST_RUN_BYTES = 1 << 20  # text without a space from which it is cut at another place


class Piece(NamedTuple):
    """Tokens (n,) of the bytes [begin, end) of the text, as shards store them."""

    begin: int
    end: int
    tokens: Shard


class Block(NamedTuple):
    """Bytes of the text from `begin` on; `continued`: not its first."""

    begin: int
    data: bytes
    continued: bool


class Encoder:
    """Encodes blocks, by any number of threads."""

    def __init__(self, tokenizer: Tokenizer, errors: Errors) -> None:
        self.dtype = shard_format(tokenizer.vocab_size)[2]
        self._tokenizer, self._errors = tokenizer, errors
        self._own = threading.local()

    def __call__(self, data: bytes, continued: bool) -> Shard:
        """The tokens of a block, as shards store them."""
        own = self._own
        if not hasattr(own, "tokenizer"):
            own.tokenizer = self._tokenizer.twin()
        encode = own.tokenizer.encode_raw if self._errors == "bytes" else own.tokenizer.encode_bytes
        tokens: Shard = encode(data, continued).astype(self.dtype)
        return tokens


def cut_text(
    text: Readable, tokenizer: Tokenizer, begin: int, end: int, continued: bool
) -> Iterator[Block]:
    """The bytes [begin, end) in blocks whose tokens do not depend on each other."""
    for data in _pieces(text.read(begin, end), tokenizer, continued):
        yield Block(begin, data, continued)
        begin += len(data)
        continued = True


def encode_text(
    text: Readable,
    tokenizer: Tokenizer,
    errors: Errors,
    begin: int,
    end: int,
    jobs: int,
    pool: ThreadPoolExecutor,
    continued: bool = False,
) -> Iterator[Piece]:
    """The tokens of the bytes [begin, end), in order, by `jobs` threads of the pool.

    `continued`: a piece of the same text ends where they begin.
    """
    if isinstance(tokenizer, ByteTokenizer):
        dtype = shard_format(tokenizer.vocab_size)[2]

        def pieces(begin: int) -> Iterator[Piece]:
            for block in text.read(begin, end):
                yield Piece(begin, begin + len(block), np.frombuffer(block, np.uint8).astype(dtype))
                begin += len(block)

        yield from _ahead(pieces(begin), pool)
        return
    encoder = Encoder(tokenizer, errors)

    def work(block: Block) -> Piece:
        return Piece(
            block.begin, block.begin + len(block.data), encoder(block.data, block.continued)
        )

    waiting: deque[Future[Piece]] = deque()
    for block in cut_text(text, tokenizer, begin, end, continued):
        waiting.append(pool.submit(work, block))
        if len(waiting) > 2 * jobs:  # bounds what is in memory
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _ahead(pieces: Iterator[Piece], pool: ThreadPoolExecutor) -> Iterator[Piece]:
    """The same pieces; while the caller has one, a thread of the pool makes the next."""
    waiting = pool.submit(next, pieces, None)
    while (piece := waiting.result()) is not None:
        waiting = pool.submit(next, pieces, None)
        yield piece


def _pieces(blocks: Iterable[bytes], tokenizer: Tokenizer, continued: bool) -> Iterator[bytes]:
    """The same bytes, cut where the tokens on both sides do not depend on each other.

    The end of a piece depends only on the bytes from its beginning on, and on whether the text
    begins there, so that reading may begin with any piece.
    """
    pending = b""
    n_wanted = BLOCK_BYTES
    for block in blocks:
        pending += block
        at = 0  # up to here `pending` was given out
        while len(pending) - at >= n_wanted:
            window = pending[at : at + n_wanted]
            cut = tokenizer.cut(window)
            if not cut and n_wanted >= _LONGEST_RUN_BYTES:
                cut = cut_inside(tokenizer, window, continued)
            if cut:
                yield window[:cut]
                at += cut
                n_wanted = BLOCK_BYTES
                continued = True
            else:
                n_wanted *= 2
        pending = pending[at:]
    if pending:
        yield pending


class SplitWriter:
    """Writes the shards of a split, `shard_tokens` in each but the last, and a journal of them.

    A line of the journal also holds the position after its shard: `at`, the byte at which a piece
    begins, and `skip`, the number of its tokens that are already written.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        shard_tokens: int,
        done: Sequence[dict[str, Any]],
        log: Callable[[str], object],
        n_expected: int | None = None,
    ) -> None:
        """`done` are the lines of the shards that are there already.

        `n_expected` tokens will be appended, where this is known: see ShardFile.
        """
        self._n_expected = n_expected
        self._folder = folder
        self._split = split
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._log = log
        self._shards = [_entry(line) for line in done]
        self.n_bytes = sum(line["bytes"] for line in done)
        """Bytes of text in the tokens so far, without special tokens."""
        self._shard_bytes = 0  # of the shard that is open
        self._shard: ShardFile | None = None

    def append(self, piece: Piece, skip: int = 0) -> None:
        """Writes the tokens of a piece, without the first `skip`."""
        while skip < len(piece.tokens):
            if self._shard is None:
                path = self._folder / journal.shard_name(self._split, len(self._shards))
                n_planned = self._shard_tokens
                if self._n_expected is not None:
                    n_planned = min(n_planned, self._n_expected)
                self._shard = ShardFile(path, self._tokenizer.vocab_size, n_planned)
            some = piece.tokens[skip : skip + self._shard_tokens - self._shard.n_tokens]
            self._shard.append(some)
            self._shard_bytes += self._tokenizer.count_bytes(some)
            skip += len(some)
            if self._n_expected is not None:
                self._n_expected -= len(some)
            if self._shard.n_tokens == self._shard_tokens:
                self._close(piece.begin, skip)

    def _close(self, at: int, skip: int) -> None:
        assert self._shard is not None
        line = {
            "split": self._split,
            "file": self._shard.path.name,
            "tokens": self._shard.n_tokens,
            "bytes": self._shard_bytes,
            "checksum": self._shard.close(),
            "at": at,
            "skip": skip,
        }
        self.n_bytes += self._shard_bytes
        self._shard, self._shard_bytes = None, 0
        self._shards.append(_entry(line))
        self._log(journal.line_of(line))

    def finish(self, end: int) -> list[dict[str, Any]]:
        """Completes the last shard; returns the entries of all. `end` is a byte."""
        if self._shard is not None:
            self._close(end, 0)
        return self._shards

    def abandon(self) -> None:
        """Closes the shard that an error has left open."""
        if self._shard is not None:
            self._shard.abandon()


def _entry(line: dict[str, Any]) -> dict[str, Any]:
    """The entry of a shard in dataset.json."""
    return {key: line[key] for key in ("file", "tokens", "checksum")}


def move_tail(
    folder: Path, train: dict[str, Any], options: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Makes the last `val_tokens` tokens of the train split the val split."""
    n_train = count_tokens(train) - options["val_tokens"]
    val = SplitWriter(folder, "val", tokenizer, options["shard_tokens"], [], lambda line: None)
    kept, begin = [], 0
    for shard in train["shards"]:
        path = folder / shard["file"]
        cut = min(max(0, n_train - begin), shard["tokens"])  # tokens that stay
        tokens = open_shard(path)
        for first in range(cut, shard["tokens"], BLOCK_BYTES):
            some = tokens.read(first, min(first + BLOCK_BYTES, shard["tokens"]))
            val.append(Piece(0, 0, some))
        if cut == shard["tokens"]:
            kept.append(shard)
        elif cut:
            fewer = ShardFile(path.with_suffix(".cut"), tokenizer.vocab_size, cut)
            for first in range(0, cut, BLOCK_BYTES):
                fewer.append(tokens.read(first, min(first + BLOCK_BYTES, cut)))
            kept.append({**shard, "tokens": cut, "checksum": fewer.close()})
        begin += shard["tokens"]
    moved = val.finish(0)
    # Only now that the tail is safe may its shards go: without them the journal is not believed.
    for shard in train["shards"][len(kept) :]:
        (folder / shard["file"]).unlink()
    for path in folder.glob("*.cut"):
        path.replace(path.with_suffix(".bin"))
    return {
        "train": {"bytes": train["bytes"] - val.n_bytes, "shards": kept},
        "val": {"bytes": val.n_bytes, "shards": moved},
    }


def count_tokens(split: dict[str, Any]) -> int:
    """The tokens of a split."""
    return sum(shard["tokens"] for shard in split["shards"])
