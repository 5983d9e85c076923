"""A checkpoint is a folder: the model, its tokenizer and what training needs to go on.

    config.json            the model's shape, as Hugging Face's gpt2 or llama where that fits
    model.safetensors      the weights, under the names of that class
    gptc_tokenizer.json    the tokenizer; beside it, where a class of Hugging Face fits, its files
    trainer.json           step, options and loader position; only in a run's checkpoints
    optimizer.safetensors  AdamW's moments; likewise
    checksums.json         size and checksum of every other file

It is written beside its place, flushed to disk and renamed, so it appears whole or not at all.
A run folder holds checkpoints named ckpt-STEP. A Hugging Face folder is a checkpoint too, and a
model in a format of others (gptc.formats) can stand wherever one is read.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import gptc
from gptc import formats, pretrained
from gptc import tokenizer as tokenizers
from gptc.checksum import file_checksum, recorded_checksum
from gptc.config import GPTConfig
from gptc.errors import UPGRADE, GptcError
from gptc.formats import TensorFile, hf, hub, tensor_chunks, vocabulary
from gptc.formats.binary import is_plain_name, parse_json
from gptc.formats.layout import Part, Placement, Tensors
from gptc.formats.numbers import F32, Codec
from gptc.formats.safetensors import INDEX, open_tensors
from gptc.formats.source import FloatArray, Source, check_finite
from gptc.model import Model
from gptc.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"
CHECKSUMS = "checksums.json"

ROOT = Path("runs")  # where runs are that are not told otherwise

VERSION = 1  # of trainer.json
CHECKSUMS_VERSION = 2  # 1 recorded a SHA-256
MOMENTS = {"m": "moment1", "v": "moment2"}

logger = logging.getLogger("gptc")


class Checkpoint(Source):
    """A checkpoint folder that has been found: its sizes are right, its weights not read yet."""

    format = "hf"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            raise GptcError(f"{path} is no checkpoint: it has no {CONFIG}")
        self._recorded = _read_checksums(path)
        problem = _size_problem(path, self._recorded)
        if problem:
            raise GptcError(problem + _way_out(path))
        self._verify(CONFIG)
        self.config = hf.config_from_json(_read_json(path / CONFIG), str(path / CONFIG))

    @property
    def step(self) -> int | None:
        """Training steps that made it; None for a model that was not trained by gptc."""
        trainer = self.trainer()
        return None if trainer is None else int(trainer["step"])

    def trainer(self) -> dict[str, Any] | None:
        """What trainer.json says, or None where there is none."""
        file = self.path / TRAINER
        if not file.is_file():
            return None
        self._verify(TRAINER)
        data = _read_json(file)
        _check_version(data, file, VERSION)
        return data

    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside, ours or theirs; GPT-2's own for a GPT-2 model without a file."""
        for name in (tokenizers.FILE_NAME, *pretrained.FILES):
            if (self.path / name).is_file():
                self._verify(name)
                if name == tokenizers.FILE_NAME:
                    return tokenizers.load_tokenizer(self.path)
                self._verify(pretrained.CONFIG)
                theirs = pretrained.read_file(self.path / name)
                if theirs is not None:
                    return vocabulary.simplest(theirs, str(self.path / name))
        gpt2 = tokenizers.Gpt2Tokenizer
        if hf.model_type(self.config) == "gpt2" and self.config.vocab_size >= gpt2.vocab_size:
            return tokenizers.make_tokenizer("gpt2")
        raise GptcError(
            f"{self.path} has no {tokenizers.FILE_NAME}; copy that file from the dataset "
            "it was trained on"
        )

    def read(self, name: str) -> FloatArray:
        _ = self._weights_are_whole
        return super().read(name)

    @cached_property
    def _weights_are_whole(self) -> bool:
        self._verify(WEIGHTS)
        return True

    def load_into(self, model: Model) -> None:
        """Gives the weights to a model; their checksum is computed meanwhile."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            whole = pool.submit(lambda: self._weights_are_whole)
            try:
                for name, _, _ in self.config.parameters():
                    model.lend(name, self.placement.read(name))
            finally:
                whole.result()  # says more than what a damaged file made of the above

    @cached_property
    def tensors(self) -> Tensors:
        """The weights as they are stored, in one file or several."""
        found = open_tensors(self.path)
        if found is None:
            raise GptcError(_no_weights(self.path))
        return found

    def parts(self) -> list[Part]:
        return hf.parts(self.config)

    @cached_property
    def placement(self) -> Placement:
        where = INDEX if (self.path / INDEX).is_file() else WEIGHTS
        try:
            return hf.place(self.config, self.tensors, str(self.path / where))
        except GptcError:
            _ = self._weights_are_whole  # says more, where they are not
            raise

    @property
    def optimizer_step(self) -> int | None:  # type: ignore[override]
        return self.step if (self.path / OPTIMIZER).is_file() else None

    def read_moment(self, name: str, moment: str) -> FloatArray:
        tensors, stored = self._moments, f"{moment}.{name}"
        if stored not in tensors.shapes:
            raise GptcError(f"{tensors.path} lacks {stored}")
        return tensors.read(stored)

    @cached_property
    def _moments(self) -> TensorFile:
        self._verify(OPTIMIZER)
        return TensorFile(self.path / OPTIMIZER)

    def restore_optimizer(self, model: Model) -> None:
        """Gives `model` the moments and the step count that were saved with it."""
        trainer = self.trainer()
        if trainer is None or not (self.path / OPTIMIZER).is_file():
            raise GptcError(
                f"{self.path} holds no optimizer state; start a new run from it with "
                f"--init-from {self.path}"
            )
        tensors = self._moments
        for name, shape, _ in self.config.parameters():
            for prefix, moment in MOMENTS.items():
                stored = f"{prefix}.{name}"
                if tensors.shapes.get(stored) != shape:
                    raise GptcError(f"{tensors.path} lacks {stored} with the shape {shape}")
                model.write(name, moment, tensors.read(stored))
        model.step = trainer["step"]

    def check(self) -> list[str]:
        """Checks every file's checksum and every number; returns what was found in order."""
        found = [f"{name}: its checksum is right" for name in self.verify()]
        found += super().check()
        if self.optimizer_step is not None:
            for name in self._moments.shapes:
                check_finite(self._moments.read(name), f"{self._moments.path}: {name}")
            found.append(f"{len(self._moments.shapes)} moments, every number finite")
        return found

    def verify(self) -> list[str]:
        """Checks the checksum of every file; returns their names."""
        for name in self._recorded:
            self._verify(name)
        return list(self._recorded)

    def _verify(self, name: str) -> None:
        """Checks a file before it is used."""
        if name not in self._recorded:
            return
        path, recorded = self.path / name, recorded_checksum(self._recorded[name])
        try:
            found = file_checksum(path, like=recorded)
        except OSError as error:
            raise GptcError(f"cannot read {path}: {error.strerror}") from None
        if found != recorded:
            raise GptcError(
                f"{path} was altered or damaged: its checksum is wrong" + _way_out(self.path)
            )


# ---- finding ----


def open_checkpoint(path: str | Path | None = None, root: str | Path = ROOT) -> Source:
    """The model at `path`: a checkpoint, a run's newest one, or a model in another format.

    What is no path may be the name of a model of the Hugging Face hub, which is then downloaded.
    """
    if path is not None and not Path(path).exists() and hub.is_name(str(path)):
        return Checkpoint(hub.fetch(str(path)))
    if path is not None and formats.is_foreign(Path(path)):
        return formats.open_model(Path(path))
    return Checkpoint(find_checkpoint(path, root))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a run's newest checkpoint."""
    return open_checkpoint(path).tokenizer()


def find_checkpoint(path: str | Path | None = None, root: str | Path = ROOT) -> Path:
    """The folder itself if it is a checkpoint, else the newest whole checkpoint of that run.

    With no path, the newest of all runs under `root`.
    """
    if path is None:
        runs = [run for run in _folders(Path(root)) if list_checkpoints(run)]
        if not runs:
            raise GptcError(f"there is no checkpoint under {root}/; make one with: gptc train")
        newest = max(runs, key=lambda run: list_checkpoints(run)[-1].stat().st_mtime_ns)
        return find_checkpoint(newest)

    folder = Path(path)
    if folder.is_file():
        raise GptcError(f"{folder} is a file; give the folder of a checkpoint or a run")
    if not folder.exists():
        raise GptcError(f"{folder} does not exist; train a model with: gptc train --out {folder}")
    if (folder / CONFIG).is_file():
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise GptcError(f"{folder} holds no checkpoint{_what_instead(folder)}")
    problems: list[str] = []
    for checkpoint in reversed(checkpoints):
        problem = _run_problem(checkpoint)
        if problem is None:
            for skipped in problems:
                logger.warning("warning: %s; using %s", skipped, checkpoint)
            return checkpoint
        problems.append(problem)
    raise GptcError(f"{folder} holds no whole checkpoint: {problems[0]}")


def _what_instead(folder: Path) -> str:
    """What a folder without a checkpoint is, and what to type."""
    config = folder / "config.toml"
    if config.is_file():
        return (
            " yet: its run ended before the first; begin it again with "
            f"gptc train --config {config} --out {folder}"
        )
    if (folder / "dataset.json").is_file():
        return f": it is a dataset; train on it with gptc train --data {folder}"
    runs = [run for run in _folders(folder) if list_checkpoints(run)]
    if runs:
        return f": it is a folder of runs; name one of them, such as {min(runs)}"
    return f": neither {CONFIG} nor folders ckpt-STEP"


def tokenizer_name(name: str) -> str:
    """What `make_tokenizer` calls a tokenizer: a run's folder stands for its newest checkpoint."""
    folder = Path(name)
    if tokenizers.is_spec(name) or not list_checkpoints(folder):
        return name
    return str(find_checkpoint(folder))


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [f for f in _folders(run) if re.fullmatch(r"ckpt-\d+", f.name)]
    return sorted(found, key=step_of)


def checkpoint_name(step: int) -> str:
    """The folder name of a run's checkpoint after `step` steps."""
    return f"ckpt-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step in a name that `checkpoint_name` made."""
    return int(checkpoint.name.removeprefix("ckpt-"))


# ---- writing ----


def save(
    path: str | Path,
    model: Model | Source,
    *,
    tokenizer: Tokenizer | None = None,
    trainer: Mapping[str, Any] | None = None,
    replace: bool = False,
    codec: Codec = F32,
) -> None:
    """Writes a checkpoint folder; with `trainer`, what training needs to go on too.

    A model of another format is copied a tensor at a time. On any failure nothing is left behind
    and what was there is untouched; a full disk is a GptcError that says so. `replace` allows a
    folder of that name to exist, `codec` stores other numbers than float32.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise GptcError(f"{path} exists already; choose another name or remove it")
    config = model.config
    special = (tokenizer.end_of_text, tokenizer.bos) if tokenizer else (None, None)
    read = model.get if isinstance(model, Model) else model.read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as folder:
            _write(folder / CONFIG, [_json(hf.config_to_json(config, *special, codec))])
            file_parts = {part.name: part for part in hf.parts(config)}
            _write(
                folder / WEIGHTS,
                tensor_chunks(
                    {name: part.shape for name, part in file_parts.items()},
                    lambda name: hf.export_tensor(file_parts[name], read(file_parts[name].ours)),
                    codec,
                ),
            )
            if tokenizer is not None:
                tokenizer.save(folder)
                if hf.model_type(config) != "gptc":  # so that AutoTokenizer reads it too
                    for name, content in _hf_files(tokenizer, config.block_size).items():
                        _write(folder / name, [content])
            if trainer is not None:
                stamp = {"version": VERSION, "gptc_version": gptc.__version__}
                _write(folder / TRAINER, [_json({**stamp, **trainer})])
                _write(folder / OPTIMIZER, _optimizer_chunks(model))
            sums = {file.name: _record(file) for file in sorted(folder.iterdir())}
            _write(folder / CHECKSUMS, [_json({"version": CHECKSUMS_VERSION, "files": sums})])
            _sync_folder(folder)
            _rename(folder, path)
    except OSError as error:
        needed = size_of(config, training=trainer is not None)
        raise GptcError(f"cannot save {path}: {_explain(error, path, needed)}") from error


def size_of(config: GPTConfig, training: bool) -> int:
    """About how many bytes a checkpoint takes; with what training needs to go on, or without."""
    n_numbers = sum(math.prod(shape) for _, shape, _ in config.parameters())
    return 4 * (3 if training else 1) * n_numbers


def _hf_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    try:
        return vocabulary.hf_files(tokenizer, block_size)
    except GptcError as error:
        logger.warning("warning: without a tokenizer.json: %s", error)
        return {}


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint; like writing, this happens at one moment."""
    aside = checkpoint.with_name(f".{checkpoint.name}.tmp-old-{os.getpid()}")
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean_up(parent: Path) -> None:
    """Removes the temporary folders that writers which are gone have left in `parent`."""
    for folder in parent.glob(".*.tmp-*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            # Its writer holds this lock for as long as it lives.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A locked folder beside `path`, which is gone afterwards unless it was renamed."""
    clean_up(path.parent)
    folder = path.parent / f".{path.name}.tmp-{os.getpid()}"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _rename(folder: Path, path: Path) -> None:
    """Puts the finished folder in its place."""
    if path.exists():
        # A folder cannot be renamed onto one that holds files: the old one steps aside first, and
        # returns if the new one cannot take its place.
        aside = folder.with_name(f".{path.name}.tmp-old-{os.getpid()}")
        path.rename(aside)
        try:
            folder.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        folder.rename(path)
    _sync_folder(path.parent)


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            del chunk  # a tensor: it must be gone before the next one is read
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_chunks(model: Model | Source) -> Iterator[bytes | memoryview]:
    shapes = {
        f"{prefix}.{name}": shape
        for name, shape, _ in model.config.parameters()
        for prefix in MOMENTS
    }

    def read(stored: str) -> Any:
        prefix, _, name = stored.partition(".")
        if isinstance(model, Source):
            return model.read_moment(name, prefix)
        return model.read(name, MOMENTS[prefix])

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


# ---- reading ----


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise GptcError(f"cannot read {path}: {error.strerror}") from None
    except GptcError:
        raise GptcError(f"{path} is damaged: it is no JSON" + _way_out(path.parent)) from None
    if not isinstance(data, dict):
        raise GptcError(f"{path} is damaged: it is no JSON object" + _way_out(path.parent))
    return data


def _check_version(data: Mapping[str, Any], file: Path, newest: int) -> None:
    version = data.get("version")
    if type(version) is not int or not 1 <= version <= newest:
        raise GptcError(f"{file} has version {version}, this gptc reads up to {newest}: {UPGRADE}")


def _read_checksums(path: Path) -> dict[str, dict[str, Any]]:
    """What checksums.json records by file name; nothing for a folder without one."""
    file = path / CHECKSUMS
    if not file.is_file():
        return {}
    data = _read_json(file)
    _check_version(data, file, CHECKSUMS_VERSION)
    try:
        files = dict(data["files"])
        for name, record in files.items():
            recorded_checksum(record)
            if type(record["size"]) is not int or not is_plain_name(name):
                raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise GptcError(f"{file} is damaged" + _way_out(path)) from None
    return files


def _size_problem(path: Path, recorded: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the files' sizes, at no cost but a look at each."""
    for name, record in recorded.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        found, expected = file.stat().st_size, record["size"]
        if found != expected:
            what = "is truncated" if found < expected else "has grown"
            return f"{file} {what}: {expected:,} bytes expected, {found:,} found"
    if not (path / CONFIG).is_file():
        return f"{path / CONFIG} is missing"
    return None


def _run_problem(checkpoint: Path) -> str | None:
    """What is wrong with a run's checkpoint, which always has its checksums."""
    if not (checkpoint / CHECKSUMS).is_file():
        return f"{checkpoint / CHECKSUMS} is missing"
    try:
        return _size_problem(checkpoint, _read_checksums(checkpoint))
    except GptcError as error:
        return str(error)


def _way_out(path: Path) -> str:
    """The end of an error about a damaged checkpoint: what to do instead."""
    if re.fullmatch(r"ckpt-\d+", path.name):
        for other in reversed(list_checkpoints(path.parent)):
            if other.name != path.name and (other / CHECKSUMS).is_file():
                return f"; use {other} instead"
    return "; copy it again from its source"


def _no_weights(path: Path) -> str:
    pickled = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        return f"{path} holds pickled weights ({pickled[0]}); gptc reads only {WEIGHTS}"
    return f"{path} has no {WEIGHTS}"


def _record(path: Path) -> dict[str, Any]:
    """What checksums.json says about a file."""
    return {"size": path.stat().st_size, "checksum": file_checksum(path)}


def _folders(parent: Path) -> list[Path]:
    return [f for f in parent.iterdir() if f.is_dir()] if parent.is_dir() else []
