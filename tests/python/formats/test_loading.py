"""A model gets each weight of its file, though the next ones are read meanwhile.

The class of fault: memory that two weights share is written before the first of them is copied.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.convert.export_model import export_model
from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.registry import open_model
from small_models import make_checkpoint, make_config


class Converted:
    """A placement in which every parameter is converted, to its number in the list."""

    def __init__(self, config: GPTConfig) -> None:
        self.shapes = {name: shape for name, shape, _ in config.parameters()}
        self.n_converted = max(map(math.prod, self.shapes.values()))

    def number(self, name: str) -> int:
        return list(self.shapes).index(name)

    def read(self, name: str, buffer: FloatArray) -> FloatArray:
        out = buffer[: math.prod(self.shapes[name])].reshape(self.shapes[name])
        out[:] = self.number(name)
        return out

    def stored(self, name: str) -> None:
        return None


@pytest.mark.parametrize("family", ["gpt2", "llama", "byte"])
def test_a_slow_model_gets_each_weight(tmp_path: Path, family: str) -> None:
    file = make_checkpoint(make_config(family), folder=tmp_path / "m")
    placement = file.placement = Converted(file.config)  # type: ignore[assignment]
    given = {}

    class Slow:
        def set(self, name: str, values: FloatArray) -> None:
            time.sleep(0.005)  # enough to read the next one
            given[name] = values.copy()

    file.load_into(Slow())  # type: ignore[arg-type]
    assert list(given) == list(placement.shapes)
    for name, values in given.items():
        np.testing.assert_array_equal(values, placement.number(name))


def test_a_weight_that_cannot_be_read_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_checkpoint(make_config("gpt2"), folder=tmp_path / "m")
    assert file.placement.n_converted == 4 * 32 * 32
    with Model.create(file.config, threads=1, training=False, init=False) as model:
        (tmp_path / "m" / "model.safetensors").write_bytes(b"")
        with pytest.raises(GptcError, match="was altered or damaged"):
            file.load_into(model)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_file_that_is_cut_before_its_weights_are_read(
    tmp_path: Path, family: str, dtype: str
) -> None:
    path = tmp_path / "x.gguf"
    export_model(make_checkpoint(make_config(family), "bytes", tmp_path / "m"), "gguf", path)
    file = open_model(path)
    assert file.placement.stored("h.1.mlp.proj.weight")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(GptcError, match=r"x\.gguf:? (the file )?became shorter"):
        load_model(file, dtype=dtype)
