"""dataset.json: the sources of a dataset, its splits, shards and options, with a checksum.

The checksum is that of the rest of the file. Datasets of older versions have none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptc.errors import UPGRADE, GptcError, without_secrets
from gptc.files.checksum import recorded_checksum, value_checksum
from gptc.files.limits import limit, read_file, refuse
from gptc.files.values import check_values

SPLITS = ("train", "val")
DATASET_FILE = "dataset.json"
# Version 1 recorded the SHA-256 of shards, 2 counted the bytes of some end-of-text marks.
DATASET_VERSION = 3
CHATS_VERSION = 4  # of a dataset of conversations, whose shards have masks

_MOST = 1 << 62  # of a count
_CHECKSUM = "checksum"
_FEWER = "prepare the dataset with a larger --shard-tokens"
_ROOM = 1 << 10  # bytes of numbers and names that come with the shards


def with_checksum(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A description that ends with the checksum of the rest."""
    rest = {name: value for name, value in meta.items() if name != _CHECKSUM}
    return {**rest, _CHECKSUM: value_checksum(rest)}


def description_of(meta: Mapping[str, Any], where: Path, advice: str = _FEWER) -> bytes:
    """The content of dataset.json at `where`. GptcError for one that `read_meta` would refuse."""
    data = (json.dumps(with_checksum(meta), indent=2) + "\n").encode()
    if len(data) > limit("json"):
        raise refuse(str(where), "json", advice)
    check_values(data, str(where), "entries", advice)
    return data


def most_shards(n_bytes: int, masks: bool = False) -> int:
    """The shards that have room in a dataset.json whose other content has that many bytes."""
    checksum = f"xxh3_128:{0:032}"
    entry: dict[str, Any] = {"file": "train_000000.bin", "tokens": 1 << 31, "checksum": checksum}
    if masks:
        entry["mask"] = {"file": "train_000000.mask", "checksum": checksum}
    written = json.dumps({"splits": {"train": {"shards": [entry]}}}, indent=2)
    # The mark after it, for each value; the objects and lists around it have room.
    most = limit("entries") // (1 + written.count(","))
    n_each = len(written) - len(json.dumps({"splits": {"train": {"shards": []}}}, indent=2))
    return max(0, min(most, (limit("json") - n_bytes - _ROOM) // n_each))


def too_many_shards(where: Path) -> GptcError:
    """The error for more shards than `most_shards` at dataset.json `where`."""
    return refuse(f"{where} with all its shards", "json", _FEWER)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The content of dataset.json, None without such a file."""
    path = folder / DATASET_FILE
    try:
        data = read_file(path, "json", _FEWER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
    check_values(data, str(path), "entries", _FEWER)
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        meta = None
    damaged = GptcError(f"{path} is damaged: prepare the dataset again with --force")
    if not isinstance(meta, dict) or "version" not in meta:
        raise damaged
    if meta["version"] not in range(1, CHATS_VERSION + 1):
        raise GptcError(
            f"{path} has version {meta['version']}, and this gptc knows {CHATS_VERSION}: {UPGRADE}"
        )
    try:
        if _CHECKSUM in meta and meta != with_checksum(meta):
            raise damaged
        _check_meta(meta)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise damaged from None
    for source in meta["sources"]:
        source["source"] = without_secrets(source["source"])  # which older versions kept
    return meta


def _check_meta(meta: dict[str, Any]) -> None:
    """KeyError, TypeError or ValueError for a content that `prepare` would not have written."""
    _check(meta, created_by=str, vocab_size=int, sources=list, options=dict)
    _check(meta["tokenizer"], kind=str, fingerprint=str)
    if (meta["version"] == CHATS_VERSION) != ("chats" in meta):
        raise ValueError("chats")
    if "chats" in meta:
        _check(meta["chats"], layout=str, template=str, left_out=int, sequences=int)
    if not meta["sources"]:
        raise ValueError("sources")
    for source in meta["sources"]:
        recorded_checksum(source)
        _check(source, source=str, bytes=int)
        _check_there(source, files=int, documents=int, rows_without_text=int, licence=str)
    for split in SPLITS:
        found = meta["splits"][split]
        _check(found, bytes=int, shards=list)
        _check_there(found, documents=int, rows=int, said=int)
        if "chats" in meta:
            _check(found, rows=int, said=int)
        for shard in found["shards"]:
            recorded_checksum(shard)
            _check(shard, file=str, tokens=int)
            files = [shard["file"]]
            if "chats" in meta:
                recorded_checksum(shard["mask"])
                _check(shard["mask"], file=str)
                files.append(shard["mask"]["file"])
            if any("/" in file for file in files):
                raise ValueError(files)


def _check(values: dict[str, Any], **types: type) -> None:
    """KeyError or TypeError unless each of these values is there, of its type, and not below 0."""
    for name, kind in types.items():
        if type(values[name]) is not kind or (kind is int and not 0 <= values[name] < _MOST):
            raise TypeError(name)


def _check_there(values: dict[str, Any], **types: type) -> None:
    """The same for values that need not be there."""
    _check(values, **{name: kind for name, kind in types.items() if name in values})
