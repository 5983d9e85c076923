"""An import keeps the moments and takes little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.engine.config import GPTConfig
from small_models import make_checkpoint

Config = Callable[..., GPTConfig]


@pytest.mark.parametrize(("to", "dtype"), [("llm.c", "fp32"), ("llm.c", "bf16"), ("gguf", "bf16")])
def test_importing_takes_little_more_than_its_largest_tensor(
    config: Config, tmp_path: Path, to: str, dtype: str
) -> None:
    shape = config("gpt2", vocab_size=20_000, n_embd=64)
    source = make_checkpoint(shape, "", tmp_path / "source")
    export_model(source, to, tmp_path / "model.bin", dtype=dtype)
    tracemalloc.start()
    import_model(tmp_path / "model.bin", tmp_path / "again")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * 20_000 * 64
    assert peak < 1.2 * largest + 1_000_000


def test_moments_travel(config: Config, tmp_path: Path) -> None:
    shape = config("byte", n_head=8)
    with Model.create(shape, threads=1, max_batch=2, max_seq=12) as model:
        x = np.random.default_rng(0).integers(0, 256, (2, 12))
        for _ in range(3):
            model.train_step(x, np.roll(x, -1, 1), lr=1e-3)
        from gptc.checkpoint.writer import save

        save(tmp_path / "a", model, trainer={"step": 3})
        moments = {name: model.read(name, "moment2") for name in model.parameters()}
    export_model(Checkpoint(tmp_path / "a"), "heimerl", tmp_path / "_gpt.bin")
    source = import_model(tmp_path / "_gpt.bin", tmp_path / "b", n_head=8, block_size=48)
    assert source.optimizer_step == 3
    again = Checkpoint(tmp_path / "b")
    assert again.optimizer_step == 3
    with load_model(again, training=True, threads=1) as model:
        again.restore_optimizer(model)
        assert model.step == 3
        for name, expected in moments.items():
            assert np.array_equal(model.read(name, "moment2"), expected), name
