"""Files of models that become shorter while they are read, and while the model is in use.

The class: a mapped page behind the end of its file, whose access ends the process with SIGBUS.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.errors import GptcError
from gptc.formats.binary import Binary
from gptc.formats.registry import open_model
from small_models import make_checkpoint, make_config

TOKENS = np.arange(200, 212, dtype=np.int32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(make_config("llama"), folder=tmp_path / "m")
    return tmp_path / "m"


def cut(path: Path, share: float) -> None:
    path.chmod(0o644)
    os.truncate(path, int(path.stat().st_size * share))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("share", [0, 0.001])
def test_a_model_in_use(folder: Path, dtype: str, share: float) -> None:
    with Model.load(folder, dtype=dtype) as model, model.session() as session:
        before = session.decode(TOKENS)
        cut(folder / "model.safetensors", share)
        again = model.session()
        for use in (
            lambda: again.decode(TOKENS),
            lambda: model.logits(TOKENS[None]),
            lambda: model.get("wte.weight"),
        ):
            with pytest.raises(GptcError, match="token embedding was changed or removed"):
                use()
        model.set("wte.weight", np.zeros((256, 32), np.float32))
        assert again.decode(TOKENS).shape == before.shape


def test_a_model_whose_file_was_replaced_is_as_before(folder: Path) -> None:
    with Model.load(folder, dtype="bf16") as model:
        before = model.logits(TOKENS[None])
        other = folder / "other"
        other.write_bytes(b"x")
        other.replace(folder / "model.safetensors")
        assert (model.logits(TOKENS[None]) == before).all()


def test_a_model_while_it_is_loaded(folder: Path) -> None:
    file = open_checkpoint(folder)
    _ = file.placement
    cut(folder / "model.safetensors", 0.5)
    with (
        pytest.raises(GptcError, match=r"damaged|became shorter"),
        Model.create(file.config, training=False, max_batch=0) as model,
    ):
        file.load_into(model)


def test_a_gguf_while_it_is_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    export_model(open_checkpoint(folder), "gguf", path)
    model = open_model(path)
    cut(path, 0.9)
    with pytest.raises(GptcError, match="became shorter while it was read"):
        model.check()


def test_bytes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    file = Binary(path)
    for begin, end in ((5, 5), (0, 8), (65_530, 65_550), (10, 150_000), (199_990, 300_000)):
        assert file.peek(begin, end) == data[begin:end]
    cut(path, 0.5)
    assert file.peek(199_990, 200_000) == data[-10:]  # of the window
    with pytest.raises(GptcError, match=r"no byte 100,000 now"):
        file.peek(99_000, 199_000)
