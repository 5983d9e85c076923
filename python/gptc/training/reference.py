"""The reference of a run with --dpo: log-probabilities by the model before training, in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gptc.data.pairs import PairLoader, Pairs
from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model
from gptc.errors import GptcError
from gptc.files.checksum import Checksum
from gptc.files.whole import write_file
from gptc.formats.safetensors import TensorFile, tensor_chunks
from gptc.training.preference import Preference, reference_of
from gptc.training.progress import Progress
from gptc.training.setup import Setup

REFERENCE = "reference.safetensors"  # in a run's folder
_CHECKSUM = "checksum"


def prepare_preference(setup: Setup, folder: Path, show: Progress) -> Preference | None:
    """What a run with --dpo needs; None for another run.

    A new run computes the reference and stores it. A resumed one reads it, or computes it again
    with its adapters switched off if the file is missing, damaged or of other data.
    """
    options = setup.options
    if not options.dpo:
        return None
    loader = setup.loader
    assert isinstance(loader, PairLoader)
    assert isinstance(loader.windows, Pairs)
    val = Pairs(setup.dataset, "val", options.seq_len)
    splits, path = {"train": loader.windows, "val": val}, folder / REFERENCE
    digits = [int(digit, 16) for digit in setup.circumstances()["data_sha256"]]
    of = np.array([*digits, options.seq_len], np.float32)
    found = _read(path, splits, of) if setup.base is not None else None
    if found is None:
        if setup.state.step and not setup.model.options.lora:
            raise GptcError(
                f"{path} is missing, damaged or of other data: restore it, since all weights were "
                "trained and the model before training is not there; or start a new run"
            )
        show.note("computing the log-probabilities of all answers by the model before training")
        with without_adapters(setup.model):
            found = {
                split: reference_of(setup.model, pairs, options.batch_size)
                for split, pairs in splits.items()
            }
        if not all(np.isfinite(values).all() for values in found.values()):
            raise GptcError(
                "the answers' log-probabilities by the model before training are not finite: check "
                f"{options.init_from} with gptc verify, or train in --dtype fp32"
            )
        _write(path, {"of": of} | {split: values for split, values in found.items() if values.size})
    return Preference(setup.model, loader, val, options, found)


def _write(path: Path, tensors: dict[str, FloatArray]) -> None:
    """Writes the reference, with a checksum as another tensor."""
    tensors = {**tensors, _CHECKSUM: _checksum(tensors)}
    shapes = {name: values.shape for name, values in tensors.items()}
    write_file(path, b"".join(tensor_chunks(shapes, tensors.__getitem__)))


def _checksum(tensors: dict[str, FloatArray]) -> FloatArray:
    """The digits of the checksum of tensors and their names (32,)."""
    checksum = Checksum()
    for name in sorted(tensors):
        checksum.update(f"{name} {tensors[name].shape}".encode("utf-8", "surrogatepass"))
        checksum.update(tensors[name].tobytes())
    return np.array([int(digit, 16) for digit in checksum.value().partition(":")[2]], np.float32)


def _read(path: Path, splits: dict[str, Pairs], of: FloatArray) -> dict[str, FloatArray] | None:
    """The reference in a file; None if it is missing, damaged or of other data."""
    try:
        file = TensorFile(path)
        found = {name: file.read(name) for name in file.shapes}
    except (OSError, GptcError):
        return None
    checksum = found.pop(_CHECKSUM, None)  # files of older versions have none
    if checksum is not None and not np.array_equal(checksum, _checksum(found)):
        return None
    if found.keys() - {"of", *splits} or not np.array_equal(found.get("of", of * 0), of):
        return None
    found |= {split: np.empty((0, 2), np.float32) for split in splits if split not in found}
    for split, pairs in splits.items():
        if found[split].shape != (len(pairs), 2) or not np.isfinite(found[split]).all():
            return None
    return found


@contextmanager
def without_adapters(model: Model) -> Iterator[None]:
    """The model computes without its adapters within; they are as before afterwards."""
    if not model.options.lora:
        yield
        return
    kept = {p.name: model.get(p.name) for p in model.trained}
    model.init_adapters(0)
    try:
        yield
    finally:
        for name, values in kept.items():
            model.set(name, values)
