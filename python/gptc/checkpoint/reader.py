"""A checkpoint is a folder: the model, its tokenizer, and the state that resuming needs.

    config.json            the model's shape, as a family of Hugging Face has it if one fits
    model.safetensors      the weights, under the names of that class
    model.gguf             in its place where quantized matrices were imported: see packed.py
    gptc_tokenizer.json    the tokenizer; also Hugging Face's files, if one of its classes fits
    trainer.json           step, options and loader position; only in a run's checkpoints
    optimizer.safetensors  the optimizer's state; likewise
    checksums.json         size and checksum of every other file

It is written under a temporary name, flushed to disk and renamed, so it appears whole or not at
all. A run folder holds checkpoints named ckpt-STEP. A Hugging Face folder is a checkpoint too. A
model in the format of another program (gptc.formats) can be read in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gptc.checkpoint.names import (
    ADAPTER,
    CHECKSUMS,
    CHECKSUMS_VERSION,
    CONFIG,
    MOMENTS,
    OPTIMIZER,
    OUTER,
    OWN,
    RESIDUAL,
    TRAINER,
    TRAINER_VERSION,
    WEIGHTS,
    list_checkpoints,
)
from gptc.checkpoint.trainer import check_trainer
from gptc.engine.arrays import FloatArray
from gptc.engine.config import Parameter
from gptc.engine.model import Model
from gptc.errors import UPGRADE, GptcError, NoTokenizer
from gptc.files.checksum import file_checksum, recorded_checksum
from gptc.files.limits import read_file
from gptc.files.values import parse_json
from gptc.formats import hf, pickled
from gptc.formats.binary import is_plain_name
from gptc.formats.layout import Part, Placement
from gptc.formats.model_file import ModelFile, check_finite
from gptc.formats.safetensors import ShardedTensors, TensorFile, has_tensors, open_tensors
from gptc.tokenizer import folder, vocabulary
from gptc.tokenizer.base import FILE_NAME, Tokenizer
from gptc.tokenizer.native import Gpt2Tokenizer
from gptc.tokenizer.registry import read_tokenizer


class Checkpoint(ModelFile):
    """A checkpoint folder that has been found: its sizes are right, its weights not read yet."""

    format = hf.NAME
    weights = WEIGHTS
    """The file whose checksum is checked before its weights are used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open(CONFIG)
        data = read_json_object(path / CONFIG)
        self.config = hf.config_from_json(data, str(path / CONFIG))
        self.family = hf.family_of(data)
        if self.config.tied and WEIGHTS not in self._recorded and _has_tensors(path):
            self.config = replace(
                self.config, tied=hf.is_tied(self.config, self.family, self.tensors)
            )

    def _open(self, config: str) -> None:
        """Checks the sizes of the files; `config` is the name of the one that is read first."""
        if not (self.path / config).is_file():
            raise GptcError(f"{self.path} is not a checkpoint: it has no {config}")
        self._recorded = read_checksums(self.path)
        problem = size_problem(self.path, self._recorded)
        if problem:
            raise GptcError(problem + _way_out(self.path))
        self._verify(config)

    @property
    def step(self) -> int | None:
        """Training steps that made it; None for a model that was not trained by gptc."""
        trainer = self.trainer()
        return None if trainer is None else int(trainer["step"])

    def trainer(self) -> dict[str, Any] | None:
        """The content of trainer.json; None when the file is missing."""
        file = self.path / TRAINER
        if not file.is_file():
            return None
        self._verify(TRAINER)
        data = read_json_object(file)
        _check_version(data, file, TRAINER_VERSION)
        check_trainer(data, str(file), _way_out(self.path))
        return data

    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside, ours or theirs; GPT-2's own for a GPT-2 model without a file."""
        for name in (FILE_NAME, *folder.NAMES):
            self._verify(name)
        if (self.path / FILE_NAME).is_file():
            return read_tokenizer(self.path)
        theirs = folder.read_files(self.path)
        if theirs is not None:
            return vocabulary.simplest(theirs, str(self.path))
        gpt2 = Gpt2Tokenizer
        if hf.model_type(self.config) == "gpt2" and self.config.vocab_size >= gpt2.vocab_size:
            return vocabulary.gpt2(self.path)
        raise NoTokenizer(
            f"{self.path} has no tokenizer: copy {FILE_NAME} into it from the dataset that it was "
            "trained on, or save the model with one, model.save(path, tokenizer)"
        )

    def read(self, name: str) -> FloatArray:
        _ = self._weights_are_whole
        return super().read(name)

    @cached_property
    def _weights_are_whole(self) -> bool:
        self._verify(self.weights)
        return True

    def load_into(self, model: Model) -> None:
        """Gives the weights to a model; their checksum is computed meanwhile."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            whole = pool.submit(lambda: self._weights_are_whole)
            try:
                self.give_all(model)
            finally:
                whole.result()  # its error says more than one that a damaged file caused above

    def give_all(self, model: Model) -> None:
        """Gives every weight to a model."""
        super().load_into(model)

    @cached_property
    def tensors(self) -> TensorFile | ShardedTensors | pickled.PickledTensors:
        """The weights as they are stored, in one file or several."""
        optional = {hf.HEAD} if self.config.tied else ()
        found = open_tensors(self.path, optional) or pickled.open_tensors(self.path, optional)
        if found is None:
            raise GptcError(_no_weights(self.path))
        return found

    def parts(self) -> list[Part]:
        return hf.parts(self.config, self.family)

    @cached_property
    def placement(self) -> Placement:
        try:
            return hf.place(self.config, self.family, self.tensors, str(self.tensors.path))
        except GptcError:
            _ = self._weights_are_whole  # says more, where they are not
            raise

    @property
    def optimizer_step(self) -> int | None:  # type: ignore[override]
        """AdamW's step; None for the state of another optimizer, which other formats lack."""
        if not (self.path / OPTIMIZER).is_file():
            return None
        wanted = {f"{moment}.{name}" for name, *_ in self.trained() for moment in ("m", "v")}
        return self.step if wanted <= self._moments.shapes.keys() else None

    def read_moment(self, name: str, moment: str) -> FloatArray:
        tensors, stored = self._moments, f"{moment}.{name}"
        if stored not in tensors.shapes:
            raise GptcError(f"{tensors.path} lacks {stored}")
        return tensors.read(stored)

    @cached_property
    def _moments(self) -> TensorFile:
        self._verify(OPTIMIZER)
        return TensorFile(self.path / OPTIMIZER)

    def restore_own(self, model: Model) -> None:
        """Gives `model` the weights that training continues with, if the folder has an average."""
        for name, shape, _ in self.trained() if (self.path / OPTIMIZER).is_file() else ():
            own = self.state(f"{OWN}.{name}", shape)
            if own is not None:
                model.set(name, own)

    def restore_optimizer(self, model: Model) -> None:
        """Gives `model` the moments and the step count that were saved with it."""
        trainer = self.trainer()
        if trainer is None or not (self.path / OPTIMIZER).is_file():
            raise GptcError(
                f"{self.path} holds no optimizer state; start a new run from it with {self.begin}"
            )
        tensors = self._moments
        for name, _, _ in self.trained():
            for state in model.states(name):
                stored, shape = f"{MOMENTS[state]}.{name}", model.state_shape(name, state)
                if tensors.shapes.get(stored) != shape:
                    raise GptcError(
                        f"{tensors.path} lacks {stored} with the shape {shape}: is it the state of "
                        "another optimizer?"
                    )
                model.write(name, state, tensors.read(stored))
        model.step = trainer["step"]

    def state(self, stored: str, shape: tuple[int, ...]) -> FloatArray | None:
        """A tensor of the file of the optimizer's state; None if it is not there."""
        found = self._moments.shapes.get(stored)
        if found is None:
            return None
        self._check_shape(stored, shape)
        return self._moments.read(stored)

    @property
    def n_states(self) -> int:
        """The number of tensors of the optimizer's state, those of all ranks together."""
        return len(self._moments.shapes)

    def _check_shape(self, stored: str, shape: tuple[int, ...]) -> None:
        found = self._moments.shapes[stored]
        if found != shape:
            raise GptcError(
                f"{self._moments.path} has {stored} with the shape {found}, not {shape}"
                + _way_out(self.path)
            )

    def trained(self) -> tuple[Parameter, ...]:
        """The parameters that have moments."""
        return self.config.parameters()

    def check(self) -> list[str]:
        """Checks every file's checksum and every number; returns a line for each check."""
        found = [f"{name}: its checksum is right" for name in self.verify()]
        return [*found, *super().check(), *self._check_moments()]

    def _check_moments(self) -> list[str]:
        if not (self.path / OPTIMIZER).is_file():
            return []
        self._check_states()
        for name in self._moments.shapes:
            check_finite(self._moments.read(name), f"{self._moments.path}: {name}")
        n_moments = sum(not name.startswith(f"{OWN}.") for name in self._moments.shapes)
        return [f"{n_moments} moments, every number finite"]

    def _check_states(self) -> None:
        """GptcError for a state that a resumed run would refuse."""
        states: dict[str, set[str]] = {}
        shapes = {name: shape for name, shape, _ in self.trained()}
        for stored in self._moments.shapes:
            kind, name = _of_rank(stored)
            if name in shapes and kind in _KINDS:
                n_dim = 1 if kind == MOMENTS["row_moment"] else None
                self._check_shape(stored, shapes[name][:n_dim])
            if stored == f"{kind}.{name}":
                states.setdefault(name, set()).add(kind)
        rows, muon = MOMENTS["row_moment"], {MOMENTS["momentum"]}
        if any(rows in kinds for kinds in states.values()):
            muon.add(rows)  # NorMuon has it for each matrix
        for name in shapes:
            if not any(kinds <= states.get(name, set()) for kinds in (_ADAMW, muon)):
                raise GptcError(
                    f"{self._moments.path} lacks the optimizer's state of {name}"
                    + _way_out(self.path)
                )

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


# ---- the optimizer's state ----

_KINDS = (*MOMENTS.values(), OWN, OUTER, RESIDUAL)  # prefixes of a parameter's name
_ADAMW = {MOMENTS["moment1"], MOMENTS["moment2"]}


def _of_rank(stored: str) -> tuple[str, str]:
    """The kind of a tensor of some rank's state, and its parameter."""
    kind, _, name = re.sub(r"^rank\d+\.", "", stored).partition(".")
    return kind, name


# ---- its files ----


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a file of a checkpoint."""
    try:
        content = read_file(path, "json")
    except OSError as error:
        raise GptcError(f"cannot read {path}: {error.strerror}") from None
    try:
        data = parse_json(content, str(path))
    except GptcError:
        raise GptcError(f"{path} is damaged: not JSON" + _way_out(path.parent)) from None
    if not isinstance(data, dict):
        raise GptcError(f"{path} is damaged: not a JSON object" + _way_out(path.parent))
    return data


def _check_version(data: Mapping[str, Any], file: Path, newest: int) -> None:
    version = data.get("version")
    if type(version) is not int or not 1 <= version <= newest:
        raise GptcError(f"{file} has version {version}, this gptc reads up to {newest}: {UPGRADE}")


def read_checksums(path: Path) -> dict[str, dict[str, Any]]:
    """The records of checksums.json by file name; empty for a folder without one."""
    file = path / CHECKSUMS
    if not file.is_file():
        return {}
    data = read_json_object(file)
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


def size_problem(path: Path, recorded: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first file with a wrong size, in words; None when all are right. Reads no contents."""
    for name, record in recorded.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        found, expected = file.stat().st_size, record["size"]
        if found != expected:
            what = "is truncated" if found < expected else "has grown"
            return f"{file} {what}: {expected:,} bytes expected, {found:,} found"
    if not (path / CONFIG).is_file() and not (path / ADAPTER).is_file():
        return f"{path / CONFIG} is missing"
    return None


def _way_out(path: Path) -> str:
    """The end of an error about a damaged checkpoint: the next thing to do."""
    if re.fullmatch(r"ckpt-\d+", path.name):
        for other in reversed(list_checkpoints(path.parent)):
            if other.name != path.name and (other / CHECKSUMS).is_file():
                return f"; use {other} instead"
    return "; copy it again"


def _has_tensors(path: Path) -> bool:
    """Whether a folder holds weights that can be read here."""
    return has_tensors(path) or (pickled.has_tensors(path) and pickled.is_available())


def _no_weights(path: Path) -> str:
    others = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
    if others:
        return (
            f"{path} holds pickled weights ({others[0]}); gptc reads {WEIGHTS}, or "
            f"{pickled.WEIGHTS} where PyTorch is installed"
        )
    return f"{path} has no {WEIGHTS}"
