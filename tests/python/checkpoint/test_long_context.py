"""A config that claims a context of 2^20 tokens takes memory for the tokens that there are.

The class: a size from a file that memory is taken for before it is used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptc import Model
from small_models import make_checkpoint, make_config

POSITIONS = 1 << 20
CODE = """
import resource, sys
import gptc
from gptc import Model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
gptc.Model.create(gptc.GPTConfig.preset("tiny"), training=False, max_batch=0).close()
before = peak()
with Model.load(sys.argv[1], dtype=sys.argv[2]) as model, model.session(1, 64) as session:
    assert model.config.block_size == 1 << 20
    session.decode([1, 2, 3])
    assert session.decode([4]).shape == (256,)
    assert model.logits([[1, 2, 3]]).shape == (1, 3, 256)
print(peak() - before)
"""


def claim(folder: Path) -> Path:
    """A model with a head size of 64, whose config is changed afterwards."""
    make_checkpoint(make_config("llama", n_head=2, n_kv_head=1, n_embd=128), folder=folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = POSITIONS
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checksums.json").unlink()
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_long_context_takes_no_memory(tmp_path: Path, dtype: str) -> None:
    folder = claim(tmp_path / "m")
    size = (folder / "model.safetensors").stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", CODE, folder, dtype], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 2 * size + 200e6


def test_positions_far_behind_are_as_in_a_short_context(tmp_path: Path) -> None:
    """A table is filled in steps, as positions are reached."""
    folder = claim(tmp_path / "m")
    tokens = np.random.default_rng(0).integers(0, 256, 900)
    with Model.load(folder, dtype="fp32") as model:
        at_once = model.session(1, 1000).decode(tokens)
        bit_by_bit = model.session(1, 1000)
        for i in range(0, 900, 90):
            last = bit_by_bit.decode(tokens[i : i + 90])
        np.testing.assert_allclose(last, at_once, rtol=0, atol=1e-4)
