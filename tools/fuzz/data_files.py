"""Valid small files of datasets, runs and sources of text, and the functions that read them."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mutate
from gptc.checkpoint.metrics import end_of, read_records
from gptc.checkpoint.reader import Checkpoint
from gptc.cli import prompts
from gptc.convert.verify import verify
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.data.readers import Reading, members
from gptc.data.rows import Tally
from gptc.data.shards import read_shard, write_shard
from gptc.errors import GptcError
from gptc.files import download
from gptc.generation.constraint import make_constraint
from gptc.generation.options import Sampling
from gptc.settings import read_toml
from gptc.tokenizer.registry import make_tokenizer
from gptc.tokenizer.utf8 import decode_utf8
from gptc.training.facade import train
from gptc.training.options import TrainOptions
from model_files import Target

_ROWS = [{"text": f"The cat sat {i} times.\n", "n": i, "more": [i, {"a": None}]} for i in range(6)]


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each sort, made in `folder`."""
    found: dict[str, Target] = {}
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    _of_dataset(folder, text, found)
    _of_run(folder, text, found)
    _sources(folder / "sources", found)
    _patterns(folder, found)
    return found


class Unchecked(Dataset):
    """A dataset whose shards and masks have other contents than their checksums say."""

    def _check_content(self, record: Mapping[str, Any], found: str) -> None:
        pass


def unchecked(dataset: Path) -> Path:
    """The dataset.json of a dataset, from now on without a checksum, so that damage is read."""
    file = dataset / "dataset.json"
    meta = json.loads(file.read_bytes())
    del meta["checksum"]
    file.write_text(json.dumps(meta, indent=2))
    return file


def _of_dataset(folder: Path, text: Path, found: dict[str, Target]) -> None:
    dataset = folder / "dataset"
    prepare([str(text)], dataset, tokenizer="bytes")
    file = unchecked(dataset)

    def describe() -> None:
        opened = Unchecked.open(dataset)
        json.dumps(opened.describe())

    found["dataset.json"] = Target(file, partial(verify, dataset), mutate.json_value)
    found["dataset.json-info"] = Target(file, describe, mutate.json_value)
    for name, size in (("shard", 256), ("shard-wide", 70_000)):
        shard = folder / f"{name}.bin"
        write_shard(shard, np.arange(500) % 256, size)
        found[name] = Target(shard, partial(_read_shard, shard))


def _read_shard(path: Path) -> None:
    tokens = read_shard(path)
    if len(tokens):
        tokens.max()


def _of_run(folder: Path, text: Path, found: dict[str, Target]) -> None:
    """The files of a run of two steps."""
    run = folder / "run"
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 8, "batch_size": 2, "threads": 1}
    train(data=str(text), tokenizer="bytes", out=str(run), steps=2, eval_every=1, **sizes)
    checkpoint = run / "ckpt-000002"
    (checkpoint / "checksums.json").unlink()
    metrics = run / "metrics.jsonl"

    def read_metrics() -> None:
        json.dumps(read_records(metrics))
        with metrics.open("rb") as file:
            end_of(file, 1)

    def read_config() -> None:
        TrainOptions(**read_toml(TrainOptions, run / "config.toml"))

    found["metrics.jsonl"] = Target(metrics, read_metrics, mutate.lines)
    found["config.toml"] = Target(run / "config.toml", read_config, mutate.lines)
    found["trainer.json"] = Target(
        checkpoint / "trainer.json", lambda: Checkpoint(checkpoint).trainer(), mutate.json_value
    )
    lines = folder / "prompts.jsonl"
    asked = {"prompt": "Once", "max_tokens": 3, "stop": ["."], "temperature": 0.5, "top_k": 3}
    lines.write_text(json.dumps(asked) + "\n" + json.dumps("Twice") + "\n")
    found["prompts.jsonl"] = Target(lines, partial(_read_prompts, lines), mutate.lines)
    etag = folder / "file.etag"
    etag.write_text('"33a64df551425fcc55e4d42a148795d9f25f89d4"')
    found["etag"] = Target(etag, lambda: download._stored_etag(etag))


def _read_prompts(path: Path) -> None:
    for line in prompts._lines(path):
        try:
            prompts._settings(prompts._read(line), {"sampling": Sampling()}, 1)
        except GptcError as error:
            if "\n" in str(error):  # it becomes the line's answer
                raise


# ---- sources of text ----


def _sources(folder: Path, found: dict[str, Target]) -> None:
    folder.mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
    table = b'n,text\n1,"The cat, \nsat."\n2,on\n3,\n'
    text = b"the cat sat on the mat. " * 40
    files: dict[str, tuple[bytes, mutate.Structure | None]] = {
        "rows.jsonl": (rows, mutate.lines),
        "rows.csv": (table, mutate.lines),
        "rows.tsv": (b"n\ttext\n1\tThe cat\n2\tsat\n3\t\n", mutate.lines),
        "text.gz": (gzip.compress(text, mtime=0), None),
        "text.bz2": (bz2.compress(text), None),
        "text.xz": (lzma.compress(text), None),
        "files.tar": (_tar(rows), mutate.tar),
        "files.zip": (_zip(rows), None),
        "rows.jsonl.gz": (gzip.compress(rows, mtime=0), _packed(rows)),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        files["text.zst"] = zstandard.ZstdCompressor().compress(text), None
    if importlib.util.find_spec("pyarrow"):
        for name, options in (("plain", {"compression": "none"}), ("snappy", {})):
            files[f"{name}.parquet"] = _parquet(**options), mutate.parquet
    for name, (content, structure) in files.items():
        path = folder / name
        path.write_bytes(content)
        found[name] = Target(path, partial(_read_source, path), structure)


def _read_source(path: Path) -> None:
    """Reads all texts of a source, as `prepare` does."""
    for _, blocks in members(path, path.name, Reading(), Tally()):
        for _ in blocks:
            pass


def _packed(content: bytes) -> mutate.Structure:
    """Damage before the packing."""
    inner = mutate.lines(content)
    return lambda data: lambda random: gzip.compress(inner(random), 1, mtime=0)


def _tar(rows: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.txt", "b.jsonl", "deep/" + "long" * 40 + ".txt"):
            info = tarfile.TarInfo(name)
            info.size = len(rows)
            archive.addfile(info, io.BytesIO(rows))
    return out.getvalue()


def _zip(rows: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "the cat sat")
        archive.writestr("b.jsonl", rows)
        archive.writestr("c.txt", "on the mat", zipfile.ZIP_STORED)
        archive.writestr("d.txt", "on the mat", zipfile.ZIP_LZMA)
    return out.getvalue()


def _parquet(**options: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    table = pyarrow.table(
        {"n": [row["n"] for row in _ROWS], "text": [row["text"] for row in _ROWS]}
    )
    pyarrow.parquet.write_table(table, out, row_group_size=4, **options)
    return out.getvalue()


# ---- grammars ----

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "born": {"type": "integer", "minimum": 1900, "maximum": 2030},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "more": {"$ref": "#/$defs/more"},
    },
    "required": ["name"],
    "$defs": {"more": {"anyOf": [{"type": "null"}, {"type": "number", "multipleOf": 0.5}]}},
}


def _patterns(folder: Path, found: dict[str, Target]) -> None:
    grammar = folder / "json.gbnf"
    grammar.write_bytes((Path(__file__).parents[2] / "docs" / "json.gbnf").read_bytes())
    schema = folder / "schema.json"
    schema.write_text(json.dumps(_SCHEMA))
    of: dict[str, tuple[Path, Callable[[bytes], mutate.Mutate]]] = {
        "grammar": (grammar, mutate.lines),
        "json-schema": (schema, mutate.json_value),
    }
    for name, (file, structure) in of.items():
        read = partial(_follow_pattern, name.replace("-", "_"), file)
        found[name] = Target(file, read, structure)


def _follow_pattern(kind: str, file: Path) -> None:
    """Reads a grammar or JSON schema, and makes a short text of bytes that begins like a match."""
    pattern = {kind: decode_utf8(file.read_bytes())}
    state = make_constraint(make_tokenizer("bytes"), 256, **pattern).begin()
    for i in range(20):
        if state.ended or not len(state.allowed):
            break
        state.take(int(state.allowed[7 * i % len(state.allowed)]))
