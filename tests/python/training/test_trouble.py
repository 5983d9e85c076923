"""The first tensor of a step that was not finite, and the batches that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.data.loader import Rows
from gptc.engine.optim import AdamW
from gptc.engine.world import World
from gptc.errors import EngineError, GptcError
from gptc.training.run import train
from gptc.training.trouble import first_bad, first_output, save_batches
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


class Told(World):
    """Two ranks; this is the first, and the other one has found this."""

    def __init__(self, place: list[int], text: str) -> None:
        super().__init__()
        self.size, self._other = 2, [place, text]

    def gather_json(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value)), self._other]

    def named(self, rank: int) -> str:
        return f"rank {rank}"


def test_ranks_name_the_first_one_with_a_bad_output() -> None:
    """Rank 0 has a bad norm, of the sums over ranks; the rows of rank 1 have made them bad."""
    x, y = batch()
    output, gradient = (
        "out[3] of linear_forward is nan, the first",
        "the gradient of w was the first",
    )
    with Model.create(make_config("llama"), threads=1, max_batch=len(x)) as model:
        model.check_ops()
        model.backward(x, y)
        bad = model.read("h.1.mlp.fc.weight", "grad")
        bad.flat[1] = np.inf
        model.write("h.1.mlp.fc.weight", "grad", bad)
        with pytest.raises(EngineError):
            model.update(AdamW(1e-3))
        found = model.not_finite()
        assert found is not None
        assert found.op == "grad_norm"
        own = first_bad(model)
        assert own == "the gradient of h.1.mlp.fc.weight was the first"
        assert first_bad(model, Told([1, 0], output)) == f"{output}, of rank 1"
        assert first_bad(model, Told([2, 0], gradient)) == f"{gradient}, of rank 1"
        assert first_bad(model, Told([2, 99], gradient)) == f"{own}, of rank 0"
        assert first_bad(model, Told([2, 5], own)) == own  # the sums, which all ranks have


def test_batches_of_two_lengths_are_kept(tmp_path: Path) -> None:
    rows = [Rows(*(np.full((2, t), t, np.int32) for _ in range(2))) for t in (3, 5)]
    kept = np.load(save_batches(tmp_path, 7, rows))
    assert sorted(kept) == ["inputs", "targets"]
    assert kept["targets"].tolist()[0][1] == [3, 3, 3, -1, -1]
    assert kept["inputs"].tolist()[1][0] == [5] * 5
    files = {save_batches(tmp_path, 7, rows, n) for n in range(3)}
    assert len(files) == len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "byte"])
def test_checked_ops_name_the_first_output(family: str, dtype: str) -> None:
    """A weight of layer 1 is not finite: whatever comes before in the pass is not named."""
    x, y = batch()
    config = make_config(family)
    with Model.create(config, threads=2, dtype=dtype, max_batch=len(x), seed=1) as model:
        model.check_ops()
        model.backward(x, y)
        assert model.not_finite() is None
        weights = model.get("h.1.attn.proj.weight")
        weights[3, 0] = np.inf
        model.set("h.1.attn.proj.weight", weights)
        model.backward(x, y)
        found = model.not_finite()
        assert found is not None
        assert (found.op, found.tensor, found.layer) == ("linear_forward", "out", 1)
        assert found.at == 3
        assert not np.isfinite(found.value)
        assert first_output(found).startswith("out[3] of linear_forward in layer 1 is ")
        model.check_ops()  # from nothing
        assert model.not_finite() is None
        model.check_ops(False)
        model.backward(x, y)
        assert model.not_finite() is None


@pytest.mark.parametrize(
    ("name", "op", "tensor"),
    [
        ("h.0.attn.qkv.weight", "linear_backward", "dw"),
        ("h.1.mlp.fc.weight", "linear_backward", "dw"),
        ("norm_f.weight", "residual_norm_backward", "dw"),
    ],
)
def test_checked_ops_look_at_gradients(name: str, op: str, tensor: str) -> None:
    x, y = batch()
    with Model.create(make_config("gpt2"), threads=1, max_batch=len(x), seed=1) as model:
        model.backward(x, y)
        bad = model.read(name, "grad")
        bad.flat[5] = np.nan
        model.write(name, "grad", bad)  # to which the next pass adds
        model.check_ops()
        model.backward(x, y)
        found = model.not_finite()
        assert found is not None
        assert (found.op, found.tensor, found.at) == (op, tensor, 5)
        assert found.layer == (int(name[2]) if name.startswith("h.") else None)


def test_a_run_names_the_output(options: dict[str, Any], capsys: Any) -> None:
    def poison(step: int, model: Model) -> None:
        if step == 2:
            name = "h.1.mlp.fc.weight"
            model.set(name, np.full_like(model.get(name), 1e38))

    with pytest.raises(
        GptcError, match=r"step 3 \(\w+\[\d+\] of linear_forward in layer 1 is -?(inf|nan), "
    ):
        train({**options, "dtype": "fp32", "debug_nans": True}, on_step=poison)
    given = {**options, "out": options["out"] + "-2", "steps": 2, "debug_nans": True}
    train(given)
    assert "the first" not in capsys.readouterr().err
