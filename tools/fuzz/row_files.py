"""Valid small rows and datasets of conversations, and the functions that read them."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import mutate
from gptc.convert.verify import verify
from gptc.data.chat_loader import all_batches, make_loader, n_windows
from gptc.data.chats import COLUMNS, recognised
from gptc.data.dataset import SPLITS, Dataset
from gptc.data.objects import objects
from gptc.data.preparation import prepare
from gptc.data.readers import Reading
from gptc.data.rows import Tally
from gptc.errors import GptcError
from gptc.tokenizer.registry import make_tokenizer
from model_files import Target

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
    plain = _LAYOUTS["conversations"]
    rows.write_text("".join(json.dumps(plain) + "\n" for _ in range(6)))
    dataset, out = folder / "dataset", folder / "again"
    options = {"tokenizer": "bytes", "val_fraction": 0.3, "progress": lambda *_: None}
    prepare([str(rows)], dataset, **options)

    def again() -> None:
        prepare([str(rows)], out, force=True, on_bad_row="skip", **options)

    found["chats-prepared"] = Target(rows, again, mutate.lines)
    read = partial(read_dataset, dataset)
    (mask,) = Dataset.open(dataset).masks("train")
    found["mask"] = Target(mask, read, _same_size)
    found["mask-verify"] = Target(mask, partial(verify, dataset), _same_size)
    found["dataset.json-chats"] = Target(dataset / "dataset.json", read, mutate.json_value)
    tokens = mask.with_suffix(".bin")
    found["shard-chats"] = Target(tokens, read, _same_size)


def _same_size(data: bytes) -> mutate.Mutate:
    """Damage that keeps the size, which is compared first."""
    return lambda random: mutate.damage(random, data)[: len(data)].ljust(len(data), b"\xff")


def read_dataset(path: Path) -> None:
    """Reads all windows of a dataset of conversations, and draws a batch."""
    dataset = Dataset.open(path)
    json.dumps(dataset.describe())
    for split in SPLITS:
        n_windows(dataset, split, 200)
        for _ in all_batches(dataset, split, 2, 200):
            pass
    loader = make_loader(dataset, "train", 2, 250, packing="fit")
    loader.next_rows()
    assert make_tokenizer("bytes").vocab_size == dataset.vocab_size
