"""Our safetensors files are those of the library, and damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from gptc.errors import GptcError
from gptc.formats.safetensors import TensorFile, tensor_chunks


def test_safetensors_files_are_read_by_the_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(3, 5)), "b.c": rng.normal(size=7), "d": rng.normal(size=())}
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    path = tmp_path / "x.safetensors"
    shapes = {name: values.shape for name, values in tensors.items()}
    path.write_bytes(b"".join(tensor_chunks(shapes, tensors.__getitem__)))
    theirs = load_file(path)
    ours = TensorFile(path)
    for name, values in tensors.items():
        assert np.array_equal(theirs[name], values)
        assert np.array_equal(ours.read(name), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\xff" * 64, "not a whole safetensors file"),
        ((20).to_bytes(8, "little") + b"{'not': 'json'}     ", "damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"[]", "damaged safetensors header"),
    ],
)
def test_damaged_safetensors_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(GptcError, match=message):
        TensorFile(path)


@pytest.mark.parametrize("offsets", [[0, 40], [-4, 36], [40, 0], [0], "ab", [0, 2**62]])
def test_offsets_outside_the_file_are_refused(tmp_path: Path, offsets: Any) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": offsets}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(36))
    with pytest.raises(GptcError, match=r"x\.safetensors"):
        TensorFile(path)
