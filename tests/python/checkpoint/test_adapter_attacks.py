"""Adapters that are damaged after they were opened, closed, copied, or used in a forked child."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.merged import AdapterSet
from gptc.engine.session import AdapterCopy
from gptc.errors import GptcError
from small_models import make_adapter, make_checkpoint, make_config

TOKENS = np.arange(8, dtype=np.int32)[None]


def opened(folder: Path, **options: object) -> tuple[AdapterSet, Path, Path]:
    base = make_checkpoint(make_config("llama", block_size=64), folder=folder / "base").path
    one = make_adapter(folder / "one", base, "all", 2, **options)
    two = make_adapter(folder / "two", base, "all", 2, **options)
    return AdapterSet(open_checkpoint(base), [one, two]), base, two / "adapter_model.safetensors"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "shortened": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "replaced": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_an_adapter_that_is_damaged_after_it_was_opened(
    tmp_path: Path, damage: str, dora: bool
) -> None:
    """It is refused in one line, and the model computes with the adapter that it had."""
    files, base, weights = opened(tmp_path, dora=dora)
    with load_model(open_checkpoint(base), lora=files.lora, dtype="fp32", threads=1) as model:
        files.use(model, "one")
        before = model.logits(TOKENS)
        DAMAGE[damage](weights)
        with pytest.raises(GptcError) as caught:
            files.use(model, "two")
        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(model.logits(TOKENS), before)


def test_copies_of_adapters(tmp_path: Path) -> None:
    """They refuse to be copied, compute in a forked child, and end with their model."""
    files, base, _ = opened(tmp_path)
    with load_model(open_checkpoint(base), lora=files.lora, dtype="fp32", threads=1) as model:
        files.use(model, "one")
        adapter = AdapterCopy(model)
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(GptcError, match="AdapterCopy cannot be copied or pickled"):
                way(adapter)
        files.use(model, "two")
        before = model.logits(TOKENS)
        child = os.fork()
        if not child:
            signal.alarm(60)
            code = 1
            try:
                files.use(model, "one")
                del adapter
                model.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        np.testing.assert_array_equal(model.logits(TOKENS), before)
    with pytest.raises(GptcError, match="the model of this adapter is closed"):
        adapter._open()
