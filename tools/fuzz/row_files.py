"""Valid small rows and datasets of conversations, and the functions that read them."""

from __future__ import annotations

import gzip
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import mutate
from data_files import Unchecked, unchecked
from gptc.convert.verify import verify
from gptc.data import json_array
from gptc.data.chat_cache import check_rows, is_chat_file
from gptc.data.chat_loader import all_batches, make_loader, n_windows
from gptc.data.chats import COLUMNS, recognised
from gptc.data.dataset import Dataset
from gptc.data.description import SPLITS
from gptc.data.objects import objects
from gptc.data.preparation import prepare
from gptc.data.readers import Reading
from gptc.data.rows import Tally
from gptc.errors import GptcError
from gptc.tokenizer.registry import make_tokenizer
from model_files import Target

_PIECE = 7  # characters
_ASKED, _TOLD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "It is 7.", "thinking": "So."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        "system": "Be kind.",
    },
    "completion": {"prompt": [_ASKED], "completion": "Hello"},
    "instruction": {"instruction": "Add.", "input": "2 and 3", "output": "5", "system": "Be kind."},
    "preference": {"prompt": "Hi", "chosen": [_ASKED, _TOLD], "rejected": "No"},
}


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each sort, made in `folder`."""
    found: dict[str, Target] = {}
    for name, row in _LAYOUTS.items():
        path = folder / f"{name}.jsonl"
        path.write_text(3 * (json.dumps(row) + "\n"))
        found[f"chats.jsonl-{name}"] = Target(path, partial(read_rows, path), mutate.lines)
    _arrays(folder, found)
    turns = json.dumps(_LAYOUTS["messages"]["messages"]).replace('"', '""')
    table = folder / "chats.csv"
    table.write_text(f'n,messages\n1,"{turns}"\n2,"{turns}"\n')
    found["chats.csv"] = Target(table, partial(read_rows, table), mutate.lines)
    if (packed := _parquet()) is not None:
        path = folder / "chats.parquet"
        path.write_bytes(packed)
        found["chats.parquet"] = Target(path, partial(read_rows, path), mutate.parquet)
    _prepared(folder, found)
    return found


def _arrays(folder: Path, found: dict[str, Target]) -> None:
    """Arrays of rows, read as a whole and in pieces that end anywhere, plain and compressed."""
    data, other = (
        json.dumps(3 * [_LAYOUTS[name]], indent=1).encode() for name in ("messages", "instruction")
    )
    inner = mutate.mutator(mutate.json_value, data)
    files: dict[str, tuple[bytes, mutate.Structure]] = {
        "chats.json": (data, mutate.json_value),
        "chats-pieces.json": (other, mutate.json_value),
        "chats.json.gz": (
            gzip.compress(data, mtime=0),
            lambda _: lambda random: gzip.compress(inner(random), 1, mtime=0),
        ),
    }
    for name, (content, structure) in files.items():
        path = folder / name
        path.write_bytes(content)
        n = _PIECE if "pieces" in name else json_array._PIECE
        found[name] = Target(path, partial(_read_array, path, n), structure)


def _read_array(path: Path, n: int) -> None:
    """Reads an array of rows, `n` characters at a time, and tells whether it has conversations."""
    before, json_array._PIECE = json_array._PIECE, n
    try:
        is_chat_file(str(path))
        read_rows(path)
        check_rows(str(path))
    finally:
        json_array._PIECE = before


def _parquet() -> bytes | None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    out, rows = io.BytesIO(), [[_ASKED, _TOLD]] * 4
    text = [json.dumps(row) for row in rows]
    table = pyarrow.table({"messages": rows, "tools": [None] * 3 + ["[]"], "more": text})
    pyarrow.parquet.write_table(table, out, row_group_size=2)
    return out.getvalue()


def read_rows(path: Path) -> None:
    """Reads all rows as `prepare` does; a bad one is left out, as with --on-bad-row skip."""
    kind, error = None, None
    for where, row in objects(path, path.name, Reading(), COLUMNS, Tally()):
        try:
            if isinstance(row, GptcError):
                raise row
            kind = kind or recognised(row)
            if kind is not None:
                kind.chats(row, where)
        except GptcError as one:
            if "\n" in str(one):
                raise AssertionError(f"an error of several lines: {one}") from one
            error = one
    if error is not None:
        raise error


def _prepared(folder: Path, found: dict[str, Target]) -> None:
    """A dataset of conversations: the whole preparation, and its files."""
    rows = folder / "rows.jsonl"
    pairs = ({"prompt": f"Hi {n}", "completion": "Hello"} for n in range(6))
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dataset, out = folder / "dataset", folder / "again"
    options = {"tokenizer": "bytes", "val_fraction": 0.3, "progress": lambda *_: None}
    prepare([str(rows)], dataset, **options)

    def again() -> None:
        prepare([str(rows)], out, force=True, on_bad_row="skip", **options)

    found["chats-prepared"] = Target(rows, again, mutate.lines)
    read = partial(read_dataset, dataset)
    (mask,) = Dataset.open(dataset).masks("train")
    found["mask"] = Target(mask, read, mutate.same_size)
    found["mask-verify"] = Target(mask, partial(verify, dataset), mutate.same_size)
    found["dataset.json-chats"] = Target(unchecked(dataset), read, mutate.json_value)
    tokens = mask.with_suffix(".bin")
    found["shard-chats"] = Target(tokens, read, mutate.same_size)


def read_dataset(path: Path) -> None:
    """Reads all windows of a dataset of conversations, and draws a batch."""
    dataset = Unchecked.open(path)
    json.dumps(dataset.describe())
    for split in SPLITS:
        n_windows(dataset, split, 200)
        for _ in all_batches(dataset, split, 2, 200):
            pass
    loader = make_loader(dataset, "train", 2, 250, packing="fit")
    loader.next_rows()
    assert make_tokenizer("bytes").vocab_size == dataset.vocab_size
