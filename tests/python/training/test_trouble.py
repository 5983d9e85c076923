"""The first tensor of a step that was not finite, and the batches that are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptc import Model
from gptc.data.loader import Rows
from gptc.training.trouble import first_bad, save_batches
from small_models import batch, make_config


def test_the_first_bad_gradient_is_the_last_layer_s() -> None:
    x, y = batch()
    with Model.create(make_config("llama"), threads=1, max_batch=len(x)) as model:
        model.backward(x, y)
        assert first_bad(model).startswith("each gradient is finite")
        for name in ("h.0.attn.qkv.weight", "h.1.mlp.fc.weight", "h.0.norm_2.weight"):
            bad = model.read(name, "grad")
            bad.flat[1] = np.inf
            model.write(name, "grad", bad)
        assert first_bad(model) == "the gradient of h.1.mlp.fc.weight was the first"
        weights = model.get("norm_f.weight")
        weights[0] = np.nan
        model.set("norm_f.weight", weights)
        assert first_bad(model) == "norm_f.weight itself is not finite"


def test_batches_of_two_lengths_are_kept(tmp_path: Path) -> None:
    rows = [Rows(*(np.full((2, t), t, np.int32) for _ in range(2))) for t in (3, 5)]
    kept = np.load(save_batches(tmp_path, 7, rows))
    assert sorted(kept) == ["inputs", "targets"]
    assert kept["targets"].tolist()[0][1] == [3, 3, 3, -1, -1]
    assert kept["inputs"].tolist()[1][0] == [5] * 5
    files = {save_batches(tmp_path, 7, rows, n) for n in range(3)}
    assert len(files) == len(list(tmp_path.iterdir())) == 3
