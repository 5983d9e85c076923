"""Ranks that encode a text together: rank 0 reads it and writes the shards, all encode.

Rank 0 cuts the text into the pieces of one process, so that shards and journal are the same for any
number of ranks. The others need neither the sources nor the folder of the dataset. In a round, each
rank gets a run of neighbouring pieces; while these are encoded, rank 0 writes those before.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from gptc.data.encode import Block, Encoder, Piece, cut_text
from gptc.data.options import Errors
from gptc.data.shards import Shard
from gptc.data.sources import Readable
from gptc.engine.world import World
from gptc.tokenizer.base import FILE_NAME, Tokenizer
from gptc.tokenizer.registry import read_tokenizer

_END, _TOKENIZER, _TEXT, _TOKENS = range(4)  # what rank 0 announces

_T = TypeVar("_T")
_Waiting: TypeAlias = deque[list[Future[Shard]]]


class Crew:
    """The ranks of `world`, of which this is rank 0. The others are in `serve`."""

    def __init__(self, world: World, jobs: int) -> None:
        """`jobs` are the threads of a rank."""
        self._world, self._jobs = world, jobs

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._world.is_ending:
            self._tell(_END, lambda: None)

    def encode(
        self,
        text: Readable,
        tokenizer: Tokenizer,
        errors: Errors,
        begin: int,
        end: int,
        pool: ThreadPoolExecutor,
        continued: bool = False,
    ) -> Iterator[Piece]:
        """As `encode_text`, by all ranks."""
        message = _packed(tokenizer, errors)
        self._tell(_TOKENIZER, lambda: self._world.broadcast_bytes(message))
        encoder = Encoder(tokenizer, errors)
        blocks = cut_text(text, tokenizer, begin, end, continued)
        rounds: deque[list[list[Block]]] = deque()
        own: _Waiting = deque()
        n_each = 2 * self._jobs
        while every := list(islice(blocks, n_each * self._world.size)):
            n = -(-len(every) // self._world.size)  # the last round may be small
            shares = [every[n * rank : n * (rank + 1)] for rank in range(self._world.size)]
            self._share([b"", *map(_text_of, shares[1:])])
            own.append([pool.submit(encoder, *block[1:]) for block in shares[0]])
            rounds.append(shares)
            if len(rounds) > 1:
                yield from self._collect(rounds.popleft(), own.popleft(), encoder.dtype)
        while rounds:
            yield from self._collect(rounds.popleft(), own.popleft(), encoder.dtype)

    def _collect(
        self, shares: list[list[Block]], own: list[Future[Shard]], dtype: npt.DTypeLike
    ) -> Iterator[Piece]:
        """The pieces of a round, in order."""
        found = self._tell(_TOKENS, lambda: self._world.collect(b""))
        for rank, share in enumerate(shares):
            tokens = [job.result() for job in own] if not rank else _arrays(found[rank], dtype)
            for block, some in zip(share, tokens, strict=True):
                yield Piece(block.begin, block.begin + len(block.data), some)

    def _share(self, parts: list[bytes]) -> None:
        self._tell(_TEXT, lambda: self._world.scatter(parts))

    def _tell(self, what: int, then: Callable[[], _T]) -> _T:
        """Lets the others do their part of `then`. If a rank is lost in it, the job ends."""
        with self._world.ending_together():
            self._world.broadcast_bytes(bytes([what]))
            return then()


def serve(world: World, jobs: int) -> None:
    """Encodes for rank 0 until it has done its work, in `jobs` threads."""
    encoder: Encoder | None = None
    waiting: _Waiting = deque()
    with ThreadPoolExecutor(jobs) as pool:
        while (what := world.broadcast_bytes(b"")[0]) != _END:
            if what == _TOKENIZER:
                encoder = _unpacked(world.broadcast_bytes(b""))
                waiting.clear()
            elif what == _TEXT:
                assert encoder is not None
                blocks = _blocks(world.scatter(None))
                waiting.append([pool.submit(encoder, *block[1:]) for block in blocks])
            else:
                world.collect(_tokens_of([job.result() for job in waiting.popleft()]))


# ---- messages ----


def _packed(tokenizer: Tokenizer, errors: Errors) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return errors.encode() + b"\n" + Path(folder, FILE_NAME).read_bytes()


def _unpacked(message: bytes) -> Encoder:
    errors, _, content = message.partition(b"\n")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, FILE_NAME).write_bytes(content)
        tokenizer = read_tokenizer(Path(folder))
    return Encoder(tokenizer, "bytes" if errors == b"bytes" else "replace")


def _parts(counts: Sequence[int], contents: Sequence[bytes]) -> bytes:
    """Numbers, after their own number, and then bytes."""
    return np.array([len(counts), *counts], "<i8").tobytes() + b"".join(contents)


def _counts(message: bytes) -> tuple[list[int], int]:
    """The numbers of `_parts`, and where its bytes begin."""
    if not message:
        return [], 0
    n = int(np.frombuffer(message, "<i8", 1)[0])
    return np.frombuffer(message, "<i8", n, 8).tolist(), 8 * (n + 1)


def _text_of(blocks: Sequence[Block]) -> bytes:
    counts = [n for block in blocks for n in (len(block.data), int(block.continued))]
    return _parts(counts, [block.data for block in blocks])


def _blocks(message: bytes) -> Iterator[Block]:
    counts, at = _counts(message)
    for n, continued in zip(counts[::2], counts[1::2], strict=True):
        yield Block(at, message[at : at + n], bool(continued))
        at += n


def _tokens_of(arrays: Sequence[Shard]) -> bytes:
    return _parts([len(some) for some in arrays], [some.tobytes() for some in arrays])


def _arrays(message: bytes, dtype: npt.DTypeLike) -> Iterator[Shard]:
    counts, at = _counts(message)
    for n in counts:
        some = np.frombuffer(message, dtype, n, at)
        yield some
        at += some.nbytes
