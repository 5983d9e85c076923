"""Counted n-grams in a folder: ngrams.json describes ngrams.bin, next to the tokenizer.

ngrams.bin has, for each order from 1 on, its n-grams' keys as little-endian int64, ascending, then
their counts and the numbers of different tokens before them, as uint32: see `Order`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptc._version import __version__
from gptc.errors import UPGRADE, GptcError
from gptc.eval.ngram import MOST_ORDER, NgramModel, Order
from gptc.files.checksum import file_checksum, recorded_checksum
from gptc.files.limits import read_file
from gptc.files.values import parse_json
from gptc.files.whole import whole_folder, write_chunks
from gptc.files.words import quoted
from gptc.tokenizer.base import FILE_NAME, Tokenizer
from gptc.tokenizer.registry import read_tokenizer

NGRAMS = "ngrams.json"
COUNTS = "ngrams.bin"

_FORMAT = "gptc n-grams"
_VERSION = 1
_BYTES = 16  # of an n-gram
_MOST_VOCABULARY = 2**31 - 1


@dataclass(frozen=True)
class NgramFile:
    """N-grams in a folder."""

    path: Path
    model: NgramModel
    tokenizer: Tokenizer
    meta: dict[str, Any]  # the content of ngrams.json

    def describe(self) -> dict[str, Any]:
        """The facts, for people."""
        return {
            "path": str(self.path),
            "order": self.model.order,
            "vocab_size": self.model.vocab_size,
            "tokenizer": self.tokenizer.kind,
            "data": self.meta["data"],
            "counted_tokens": self.meta["tokens"],
            "ngrams": self.meta["ngrams"],
            "created_by": self.meta["created_by"],
        }


def is_ngrams(path: str | Path) -> bool:
    """Whether a folder holds n-grams."""
    return (Path(path) / NGRAMS).is_file()


def check_free(path: Path, replace: bool) -> None:
    """GptcError if a folder cannot be written: it exists, and is not to be replaced."""
    if not path.exists():
        return
    if not is_ngrams(path):
        raise GptcError(f"{path} exists and holds no n-grams: choose another --out")
    if not replace:
        raise GptcError(f"{path} exists: add --force, or choose another --out")


def save_ngrams(
    path: Path, model: NgramModel, tokenizer: Tokenizer, data: str, replace: bool = False
) -> None:
    """Writes a folder, which appears whole or not at all. GptcError as `check_free`, and on a disk
    that is full.

    `data` is the name of what was counted. `replace` allows a folder of n-grams to exist.
    """
    check_free(path, replace)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(path) as folder:
            write_chunks(folder / COUNTS, _chunks(model))
            tokenizer.save(folder)
            meta = {
                "format": _FORMAT,
                "version": _VERSION,
                "created_by": f"gptc {__version__}",
                "data": data,
                "tokens": int(model.orders[0].counts.sum(dtype=np.int64)),
                "vocab_size": model.vocab_size,
                "ngrams": [len(order.keys) for order in model.orders],
                "checksum": file_checksum(folder / COUNTS),
                "tokenizer": tokenizer.fingerprint(),
            }
            write_chunks(folder / NGRAMS, [json.dumps(meta, indent=2).encode()])
    except OSError as error:
        raise GptcError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def _chunks(model: NgramModel) -> Iterator[bytes]:
    for order in model.orders:
        yield order.keys.astype("<i8").tobytes()
        yield order.counts.astype("<u4").tobytes()
        yield order.before.astype("<u4").tobytes()


def open_ngrams(path: str | Path, check_sum: bool = True) -> NgramFile:
    """Reads a folder of n-grams. GptcError, in one line, for a damaged one.

    `check_sum`: compare the checksum of the counts too.
    """
    path = Path(path)
    meta = _meta(path / NGRAMS)
    file = path / COUNTS
    try:
        n_bytes, expected = file.stat().st_size, _BYTES * sum(meta["ngrams"])
        if n_bytes != expected:
            raise _damaged(file, f"it has {n_bytes:,} bytes instead of {expected:,}")
        if check_sum and file_checksum(file, meta["checksum"]) != meta["checksum"]:
            raise _damaged(file, "its checksum is wrong")
        model = NgramModel(_read_orders(file, meta), meta["vocab_size"])
    except OSError as error:
        raise GptcError(f"cannot read {file}: {error.strerror}") from None
    if int(model.orders[0].counts.sum(dtype=np.int64)) != meta["tokens"]:
        raise _damaged(file, "its counts do not add up")
    tokenizer = read_tokenizer(path)
    if tokenizer.fingerprint() != meta["tokenizer"]:
        raise _damaged(path / FILE_NAME, "it is not the tokenizer of the n-grams")
    if tokenizer.vocab_size != model.vocab_size:
        raise _damaged(path / NGRAMS, f"the tokenizer has {tokenizer.vocab_size:,} tokens")
    return NgramFile(path, model, tokenizer, meta)


def _meta(file: Path) -> dict[str, Any]:
    try:
        meta = parse_json(read_file(file, "json"), str(file), True)
    except OSError as error:
        raise GptcError(f"cannot read {file}: {error.strerror}") from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise _damaged(file, "it does not describe n-grams")
    if meta.get("version") != _VERSION:
        raise GptcError(
            f"{file} has version {meta.get('version')!r}, and this gptc knows {_VERSION}: {UPGRADE}"
        )
    for name in ("data", "checksum", "tokenizer", "created_by"):
        if not isinstance(meta.get(name), str):
            raise _damaged(file, f"{name} is {meta.get(name)!r}")
    try:
        recorded_checksum(meta)
    except ValueError as error:
        raise _damaged(file, str(error)) from None
    ranges = {"tokens": (1, 2**32 - 1), "vocab_size": (1, _MOST_VOCABULARY)}
    for name, (least, most) in ranges.items():
        if not _is_within(meta.get(name), least, most):
            raise _damaged(file, f"{name} is {meta.get(name)!r}")
    sizes = meta.get("ngrams")
    if not isinstance(sizes, list) or not 1 <= len(sizes) <= MOST_ORDER:
        raise _damaged(file, "ngrams is not a list of sizes")
    if not all(_is_within(size, 1, meta["tokens"]) for size in sizes):
        raise _damaged(file, "ngrams is not a list of sizes")
    return meta


def _is_within(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _read_orders(file: Path, meta: dict[str, Any]) -> list[Order]:
    """The orders, each checked: keys ascend, and name contexts and tokens that there are."""
    orders: list[Order] = []
    n_contexts = 1
    with file.open("rb") as data:
        for k, size in enumerate(meta["ngrams"], 1):
            keys = np.fromfile(data, "<i8", size).astype(np.int64, copy=False)
            counts, before = (
                np.fromfile(data, "<u4", size).astype(np.uint32, copy=False) for _ in range(2)
            )
            if not len(keys) == len(counts) == len(before) == size:
                raise _damaged(file, "it has become shorter")
            inside = keys[0] >= 0 and keys[-1] < n_contexts * meta["vocab_size"]
            if not inside or not (keys[1:] > keys[:-1]).all():
                raise _damaged(file, f"the {k}-grams are not in order")
            if not counts.all() or not before.all():
                raise _damaged(file, f"a {k}-gram has a count of 0")
            orders.append(Order(keys, counts, before))
            n_contexts = size
    return orders


def _damaged(file: Path, how: str) -> GptcError:
    """The error of a damaged file; a value in `how` is cut."""
    how = how if len(how) <= 120 else how[:117] + "…"
    again = f"copy it again, or count again with gptc ngram --out {quoted(file.parent)} --force"
    return GptcError(f"{file} is damaged ({how}): {again}")
