"""Valid small files that runs and preparations continue from, and the functions that read them."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mutate
from data_files import Unchecked, unchecked
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.data.dataset import Dataset
from gptc.data.pairs import PairLoader, Pairs
from gptc.data.preparation import prepare
from gptc.errors import GptcError
from gptc.formats.safetensors import tensor_chunks
from gptc.serve import server
from gptc.training import reference
from gptc.training.facade import train
from model_files import Target

_LENGTH = 200  # tokens of a row


class _Stop(Exception):
    """Ends a preparation before its time."""


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each sort, made in `folder`."""
    found: dict[str, Target] = {}
    _of_pairs(folder / "pairs", found)
    _of_preparation(folder / "preparation", found)
    optimizer_target(folder, found)
    keys = folder / "keys.txt"
    keys.write_text("# one a line\n" + "a1b2c3d4" * 6 + "\n" + "e5f6a7b8" * 6 + "\n")
    found["api-keys"] = Target(keys, partial(server._read_keys, keys), mutate.lines)
    return found


# ---- preferences ----


def _of_pairs(folder: Path, found: dict[str, Target]) -> None:
    """Rows with two answers: the whole preparation, the files of a dataset, and the reference."""
    folder.mkdir()
    rows, dataset, out = folder / "rows.jsonl", folder / "dataset", folder / "again"
    said = ({"prompt": f"Hi {n}", "chosen": f"Hello {n}", "rejected": "No"} for n in range(6))
    rows.write_text("".join(json.dumps(row) + "\n" for row in said))
    options: dict[str, Any] = {"tokenizer": "bytes", "val_fraction": 0.3}
    prepare([str(rows)], dataset, **options)

    def again() -> None:
        prepare([str(rows)], out, force=True, on_bad_row="skip", **options)
        read_pairs(out)

    found["pairs-prepared"] = Target(rows, again, mutate.lines)
    read = partial(read_pairs, dataset)
    (mask,) = Dataset.open(dataset).masks("train")
    found["pairs-mask"] = Target(mask, read, mutate.same_size)
    found["pairs-shard"] = Target(mask.with_suffix(".bin"), read, mutate.same_size)
    found["dataset.json-pairs"] = Target(unchecked(dataset), read, mutate.json_value)
    splits = {split: Pairs(Dataset.open(dataset), split, _LENGTH) for split in ("train", "val")}
    of = np.arange(17, dtype=np.float32)
    tensors = {split: np.zeros((len(pairs), 2), np.float32) for split, pairs in splits.items()}
    tensors["of"] = of
    file, old = folder / "reference.safetensors", folder / "reference-old.safetensors"
    reference._write(file, tensors)
    shapes = {name: values.shape for name, values in tensors.items()}
    old.write_bytes(b"".join(tensor_chunks(shapes, tensors.__getitem__)))

    def read_reference(path: Path, is_checked: bool) -> None:
        read = reference._read(path, splits, of)
        if read is None:  # it would be computed again
            raise GptcError(f"{path} is damaged")
        if is_checked:
            assert all(np.array_equal(read[name], tensors[name]) for name in splits)

    for path, is_checked in ((file, True), (old, False)):
        read = partial(read_reference, path, is_checked)
        found[path.name] = Target(path, read, mutate.safetensors)


def read_pairs(path: Path) -> None:
    """Reads all pairs of a dataset of preferences, whole and cut, and draws batches."""
    dataset = Unchecked.open(path)
    json.dumps(dataset.describe())
    for length in (_LENGTH, 12):
        for split in ("train", "val"):
            for _ in Pairs(dataset, split, length).batches(2):
                pass
    loader = PairLoader(dataset, "train", 2, _LENGTH)
    loader.next_rows()
    loader.pairs(0)


# ---- what was interrupted ----


def _of_preparation(folder: Path, found: dict[str, Target]) -> None:
    """The plan and the journal of a preparation that was interrupted."""
    folder.mkdir()
    text, out = folder / "text.txt", folder / "dataset"
    text.write_text("The cat sat on the mat. " * 60 + "\n")
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 300, "val_by": "order"}

    def stop(action: str, n_done: int, n_bytes: int | None) -> None:
        if action == "encoding" and n_done == n_bytes:
            raise _Stop

    with suppress(_Stop):
        prepare([str(text)], out, progress=stop, **options)
    work, kept = out / ".partial", folder / "kept"
    shutil.copytree(work, kept)
    whole = prepare([str(text)], folder / "whole", **options).meta["splits"]

    def again(name: str) -> None:
        """Continues, with the damaged file and all others as they were."""
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, work)
        shutil.copyfile(folder / name, work / name)
        assert prepare([str(text)], out, **options).meta["splits"] == whole

    for name, structure in (("plan.json", mutate.json_value), ("journal.jsonl", mutate.lines)):
        shutil.copyfile(kept / name, folder / name)
        found[f"prepare-{name}"] = Target(folder / name, partial(again, name), structure)


def optimizer_target(folder: Path, found: dict[str, Target]) -> None:
    """AdamW's moments, which a resumed run reads: of 4, 2 and 1 byte."""
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    for dtype in ("fp32", "bf16", "int8"):
        end = "" if dtype == "fp32" else f"-{dtype}"
        _of_moments(text, folder / f"run{end}", dtype, f"optimizer.safetensors{end}", found)


def _of_moments(text: Path, run: Path, dtype: str, name: str, found: dict[str, Target]) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 8, "batch_size": 2, "threads": 1}
    kind = {} if dtype == "fp32" else {"optimizer_dtype": dtype}
    shape = {"tokenizer": "bytes", "steps": 1, "eval_every": 1, **sizes, **kind}
    train(data=str(text), out=str(run), **shape)
    path = run / "ckpt-000001"
    (path / "checksums.json").unlink()

    def read() -> None:
        file = open_checkpoint(path)
        assert isinstance(file, Checkpoint)
        for name, *_ in file.trained():
            for moment in ("m", "v"):
                file.read_moment(name, moment)
        with load_model(file, threads=1, training=True, **kind) as model:
            file.restore_optimizer(model)
        file.check()

    found[name] = Target(path / "optimizer.safetensors", read, mutate.safetensors)
