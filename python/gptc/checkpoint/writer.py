"""Writing checkpoints: a folder appears whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from gptc._version import __version__
from gptc.checkpoint.names import (
    CHECKSUMS,
    CHECKSUMS_VERSION,
    CONFIG,
    MOMENTS,
    OPTIMIZER,
    OWN,
    PACKED,
    TRAINER,
    TRAINER_VERSION,
    WEIGHTS,
    logger,
)
from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig, Parameter
from gptc.engine.model import Model
from gptc.engine.snapshot import Snapshot
from gptc.errors import GptcError
from gptc.files.checksum import file_checksum
from gptc.files.whole import restore, whole_folder, write_chunks
from gptc.formats import gguf_types, gguf_write, hf
from gptc.formats.hf_tokenizer import hf_files, special_ids
from gptc.formats.model_file import ModelFile
from gptc.formats.numbers import F32, Codec
from gptc.formats.safetensors import tensor_chunks
from gptc.tokenizer.base import Tokenizer

Chunks = Iterable[bytes | memoryview]


class MoreState(Protocol):
    """State that resuming needs in addition to the optimizer's, as tensors by name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes, in the order in which `read` is called."""

    def read(self, stored: str) -> FloatArray:
        """A tensor."""


def save(
    path: str | Path,
    model: Model | Snapshot | ModelFile,
    *,
    tokenizer: Tokenizer | None = None,
    trainer: Mapping[str, Any] | None = None,
    replace: bool = False,
    codec: Codec = F32,
    packed: bool = False,
    notes: list[str] | None = None,
    own: Mapping[str, FloatArray] | None = None,
    more: MoreState | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Writes a checkpoint folder; with `trainer`, also the state that resuming needs.

    A model of another format is copied a tensor at a time. A failure leaves nothing behind and an
    existing folder untouched; a full disk is a GptcError that says so. `replace` allows a
    folder of that name to exist, `codec` stores other numbers than float32, and `packed` the
    tensors of a GGUF file as they are. What Hugging Face's files cannot hold is added to `notes`,
    or logged. `own` are the weights that training continues with, if the model has others now;
    `more` is further state for resuming. `check` is called before the folder gets its name: its
    exception is a failure.
    """
    config = model.config
    description = hf.config_to_json(config, special_ids(tokenizer), codec)
    read = model.read if isinstance(model, ModelFile) else model.get

    def files() -> Iterator[tuple[str, Chunks]]:
        yield CONFIG, [_json(description)]
        if packed and isinstance(model, ModelFile):
            known = gguf_write.expressible(tokenizer, config, [])  # the folder has it anyway
            yield PACKED, gguf_write.model_chunks(model, known, gguf_types.PACKED)
            return
        parts = {part.name: part for part in hf.parts(config)}
        yield (
            WEIGHTS,
            tensor_chunks(
                {name: part.shape for name, part in parts.items()},
                lambda name: hf.export_tensor(parts[name], read(parts[name].ours)),
                codec,
            ),
        )

    write_folder(
        path,
        model,
        files,
        tokenizer=tokenizer,
        trainer=trainer,
        replace=replace,
        notes=notes,
        own=own,
        more=more,
        check=check,
    )


def write_folder(
    path: str | Path,
    model: Model | Snapshot | ModelFile,
    files: Callable[[], Iterator[tuple[str, Chunks]]],
    *,
    tokenizer: Tokenizer | None,
    trainer: Mapping[str, Any] | None,
    replace: bool,
    notes: list[str] | None = None,
    own: Mapping[str, FloatArray] | None = None,
    more: MoreState | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Writes the named files of a model, then those that all checkpoints have."""
    path = Path(path)
    restore(path)
    if path.exists() and not replace:
        raise GptcError(f"{path} exists already; choose another name or remove it")
    config = model.config
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise GptcError(
            f"cannot save {path}: the {tokenizer.kind} tokenizer has {tokenizer.vocab_size:,} "
            f"tokens, and the model {config.vocab_size:,}; give the tokenizer of its training data"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(path, check) as folder:
            for name, chunks in files():
                write_chunks(folder / name, chunks)
            if tokenizer is not None:
                tokenizer.save(folder)
                if hf.model_type(config) != "gptc":  # so that AutoTokenizer reads it too
                    for name, content in _hf_files(tokenizer, config, notes).items():
                        write_chunks(folder / name, [content])
            if trainer is not None:
                stamp = {"version": TRAINER_VERSION, "gptc_version": __version__}
                write_chunks(folder / TRAINER, [_json({**stamp, **trainer})])
                write_chunks(folder / OPTIMIZER, _optimizer_chunks(model, own or {}, more))
            sums = {file.name: _record(file) for file in sorted(folder.iterdir())}
            write_chunks(folder / CHECKSUMS, [_json({"version": CHECKSUMS_VERSION, "files": sums})])
    except OSError as error:
        needed = size_of(_trained(model), training=trainer is not None)
        raise GptcError(f"cannot save {path}: {_explain(error, path, needed)}") from error


def _trained(model: Model | Snapshot | ModelFile) -> Iterable[Parameter]:
    """The parameters that a checkpoint stores, with moments where it is of a run."""
    return model.config.parameters() if isinstance(model, ModelFile) else model.trained


def size_of(parameters: Iterable[Parameter], training: bool) -> int:
    """About how many bytes a checkpoint takes; `training`: with the state that resuming needs."""
    n_numbers = sum(math.prod(shape) for _, shape, _ in parameters)
    return 4 * (3 if training else 1) * n_numbers


def get_ready(tokenizer: Tokenizer, config: GPTConfig) -> None:
    """Makes now what the first `save` would: libraries, and files of the tokenizer that are kept.

    So a plan that measures this process's memory has them.
    """
    if hf.model_type(config) != "gptc":
        _hf_files(tokenizer, config, [])


def _hf_files(tokenizer: Tokenizer, config: GPTConfig, notes: list[str] | None) -> dict[str, bytes]:
    try:
        return hf_files(tokenizer, config.block_size)
    except GptcError as error:
        if notes is None:
            logger.warning("warning: without a tokenizer.json: %s", error)
        else:
            notes.append(f"without a tokenizer.json: {error}")
        return {}


def _optimizer_chunks(
    model: Model | Snapshot | ModelFile, own: Mapping[str, FloatArray], more: MoreState | None
) -> Iterator[bytes | memoryview]:
    shapes: dict[str, tuple[int, ...]] = {}
    states: dict[str, str] = {}
    for name, shape, _ in _trained(model):
        known = ("moment1", "moment2") if isinstance(model, ModelFile) else model.states(name)
        for state in known:
            stored = f"{MOMENTS[state]}.{name}"
            own_shape = shape[:1] if state == "row_moment" else shape
            shapes[stored], states[stored] = own_shape, state
        if name in own:
            shapes[f"{OWN}.{name}"] = shape
    if more:
        shapes.update(more.shapes)

    def read(stored: str) -> Any:
        if more and stored in more.shapes:
            return more.read(stored)
        prefix, _, name = stored.partition(".")
        if prefix == OWN:
            return own[name]
        if isinstance(model, ModelFile):
            return model.read_moment(name, prefix)
        return model.read(name, states[stored])

    return tensor_chunks(shapes, read)


def _explain(error: OSError, path: Path, needed: int) -> str:
    reason = (error.strerror or str(error)).lower()
    parent = next((p for p in path.absolute().parents if p.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(parent).free
    except OSError:
        return reason
    if free < 2 * needed:
        return f"{reason} (it takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free)"
    return reason


def _json(data: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a path with bytes that are not UTF-8
        return (json.dumps(data, indent=2) + "\n").encode()


def _record(path: Path) -> dict[str, Any]:
    """The record of a file in checksums.json."""
    return {"size": path.stat().st_size, "checksum": file_checksum(path)}
