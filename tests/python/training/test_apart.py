"""Sharded optimizer state (ZeRO-1), and ranks that train apart (DiLoCo)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model, UsageError
from gptc.checkpoint.find import open_checkpoint
from gptc.engine.model import Share
from gptc.engine.options import Options, plan_for
from gptc.formats.safetensors import TensorFile
from gptc.training.options import TrainOptions
from gptc.training.parallel import parts_of
from gptc.training.progress import SilentProgress
from gptc.training.resolve import new_options
from gptc.training.run import train
from gptc.training.schedule import learning_rate
from gptc.training.setup import set_up
from mpi_jobs import job, lines_of, needs_mpi
from small_models import make_config

OUTER_LR, OUTER_MOMENTUM = np.float32(0.7), np.float32(0.9)


# ---- without MPI ----


def test_parts_of_a_state_take_that_much_less_memory() -> None:
    config = make_config(n_embd=64, n_layer=6)
    whole = plan_for(config, Options("cpu")).optimizer_bytes
    parts = [plan_for(config, Options("cpu", n_shards=3, shard=i)) for i in range(3)]
    assert sum(part.optimizer_bytes for part in parts) == pytest.approx(whole, rel=0.01)
    assert max(part.optimizer_bytes for part in parts) < 0.5 * whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_every": 12}, "--eval-every is 12, .* --sync-every 5: use --eval-every 15"),
        ({"save_every": 4}, "--save-every 5"),
        ({"sample_every": 7}, "--sample-every 10"),
        ({"zero": 1}, "excludes --zero 1"),
        ({"ema": 0.9}, "excludes --ema"),
        ({"minutes": 3.0}, "excludes --minutes"),
        ({"on_nan": "skip"}, "excludes --on-nan skip"),
    ],
)
def test_options_that_exclude_diloco(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        new_options({"sync_every": 5, "eval_every": 10, **changes})


def test_one_process_takes_outer_steps_too(options: dict[str, Any], tmp_path: Path) -> None:
    """The outer step is a function of the options: a run of ranks is continued by one process."""
    options |= {"device": "cpu", "threads": 1, "steps": 4, "eval_every": 2, "sync_every": 2}
    options |= {"schedule": "constant", "warmup_steps": 0, "keep_last": 0}
    train(options)
    train({**options, "out": str(tmp_path / "reference"), "sync_every": 0, "steps": 2})
    found, moved = (
        open_checkpoint(tmp_path / name / "ckpt-000002") for name in ("run", "reference")
    )
    name = "h.0.attn.qkv.weight"
    with Model.create(found.config, seed=TrainOptions.seed, device="cpu", threads=1) as model:
        begin = model.get(name)
    gradient = begin - moved.read(name)
    outer = begin - OUTER_LR * (gradient + OUTER_MOMENTUM * gradient)
    np.testing.assert_allclose(found.read(name), outer, rtol=0, atol=1e-7)


# ---- with MPI ----


@pytest.fixture(scope="module")
def _made() -> dict[str, Path]:
    return {}


@pytest.fixture
def run_options(options: dict[str, Any]) -> dict[str, Any]:
    """Runs of two ranks of six steps, whose model has several blocks of gradients."""
    return {
        **options, "n_embd": 64, "n_ff": 96, "batch_size": 4, "threads": 1, "dropout": 0.1,
        "steps": 6, "eval_every": 3, "save_every": 3, "keep_last": 0, "dtype": "fp32",
        "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def runs(run_options: dict[str, Any], tmp_path: Path, _made: dict[str, Path]) -> Path:
    """The runs of ranks.py in all ways, made once."""
    if "runs" not in _made:
        ran = job(tmp_path, run_options, "ways")
        assert ran.returncode == 0, ran.stderr
        _made["runs"] = tmp_path
    return _made["runs"]


FILES = ("model.safetensors", "optimizer.safetensors")


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


@needs_mpi
def test_a_sharded_state_changes_no_bit(runs: Path) -> None:
    whole, sharded = lines_of(runs / "whole"), lines_of(runs / "sharded")
    assert len(whole) == len(sharded) == 6
    for a, b in zip(whole, sharded, strict=True):
        for name in ("train_loss", "grad_norm", "lr", *(a.keys() & {"val_loss"})):
            assert a[name] == b[name]
    for step in ("ckpt-000003", "ckpt-000006"):
        assert same_files(runs / "whole" / step, runs / "sharded" / step)


@needs_mpi
def test_parts_of_muon_are_whole_matrices(runs: Path) -> None:
    """The blocks of which the norm is added are others, so that its last bits may differ."""
    whole, sharded = lines_of(runs / "muon"), lines_of(runs / "sharded-muon")
    assert len(whole) == len(sharded) == 6
    for a, b in zip(whole, sharded, strict=True):
        for name in ("train_loss", "grad_norm", *(a.keys() & {"val_loss"})):
            assert a[name] == pytest.approx(b[name], rel=1e-6)
    one, other = (
        TensorFile(runs / way / "ckpt-000006" / "optimizer.safetensors")
        for way in ("muon", "sharded-muon")
    )
    assert one.shapes == other.shapes
    for name in one.shapes:
        np.testing.assert_allclose(one.read(name), other.read(name), rtol=1e-4, atol=1e-7)


@needs_mpi
def test_gradients_in_8_bits_change_little(runs: Path) -> None:
    whole, rounded = lines_of(runs / "whole"), lines_of(runs / "int8")
    assert rounded[0]["train_loss"] == whole[0]["train_loss"]
    for name, line in ("grad_norm", rounded[0]), ("train_loss", rounded[1]):
        wanted = whole[line["step"] - 1][name]
        assert line[name] != wanted
        assert line[name] == pytest.approx(wanted, rel=1e-2)
    tensors = TensorFile(runs / "int8" / "ckpt-000003" / "optimizer.safetensors")
    name = "h.0.attn.qkv.weight"
    first, second = (tensors.read(f"{rank}residual.{name}") for rank in ("", "rank1."))
    assert np.any(first != second)


@needs_mpi
@pytest.mark.parametrize("way", ["sharded", "sharded-muon", "diloco", "int8"])
def test_a_run_in_parts_ends_with_the_same_bits(runs: Path, way: str) -> None:
    assert same_files(runs / way / "ckpt-000006", runs / f"{way}-in-parts" / "ckpt-000006")
    assert (
        lines_of(runs / f"{way}-in-parts")[-1]["val_loss"] == lines_of(runs / way)[-1]["val_loss"]
    )


@needs_mpi
@pytest.mark.parametrize("way", ["sharded", "sharded-muon", "diloco", "int8"])
def test_one_process_continues_a_run_of_two(runs: Path, way: str, tmp_path: Path) -> None:
    run = tmp_path / "alone"
    run.mkdir()
    (run / "ckpt-000003").symlink_to(runs / way / "ckpt-000003")
    summary = train({}, resume=run)
    assert (summary.first_step, summary.step) == (3, 6)
    assert summary.val_loss == pytest.approx(lines_of(runs / way)[-1]["val_loss"], rel=2e-2)


def diloco_by_hand(options: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    """The weights after each outer step of two ranks, in one process, by NumPy."""
    show, every = SilentProgress(), options["save_every"]
    with ExitStack() as stack:
        setups = [set_up(new_options(options), None, show) for _ in range(2)]
        for setup in setups:
            stack.callback(setup.close)
        settled = setups[0].options
        weights = setups[0].model.parameters()
        momentum = {name: np.zeros_like(values) for name, values in weights.items()}
        for step in range(options["steps"]):
            rows = setups[0].loader.next_rows()
            for rank, setup in enumerate(setups):
                (part,) = parts_of(rank, 2, 1, options["batch_size"])
                own = slice(part.first, part.end)
                x, y = rows.inputs[own], rows.targets[own]
                setup.model.train_step(
                    [x], [y], lr=learning_rate(step, options["steps"], settled),
                    beta1=settled.beta1, beta2=settled.beta2, eps=settled.eps,
                    weight_decay=settled.weight_decay, grad_clip=settled.grad_clip,
                    share=Share(y.size, [(0, part.first)], lambda: None),
                )  # fmt: skip
            if (step + 1) % every == 0:
                for name, before in weights.items():
                    apart = [before - setup.model.get(name) for setup in setups]
                    gradient = (apart[0] + apart[1]) * np.float32(0.5)
                    momentum[name] = OUTER_MOMENTUM * momentum[name] + gradient
                    change = gradient + OUTER_MOMENTUM * momentum[name]
                    weights[name] = before - OUTER_LR * change
                    for setup in setups:
                        setup.model.set(name, weights[name])
                yield weights


@needs_mpi
def test_the_outer_step_is_that_of_the_paper(runs: Path, run_options: dict[str, Any]) -> None:
    by_hand = diloco_by_hand(run_options)
    for step in ("ckpt-000003", "ckpt-000006"):
        wanted, found = next(by_hand), open_checkpoint(runs / "diloco" / step)
        for name, values in wanted.items():
            np.testing.assert_array_equal(found.read(name), values, err_msg=f"{name} of {step}")


@needs_mpi
def test_a_checkpoint_of_diloco_has_the_state_of_each_rank(runs: Path) -> None:
    tensors = TensorFile(runs / "diloco" / "ckpt-000003" / "optimizer.safetensors")
    name = "h.0.attn.qkv.weight"
    first, second = (tensors.read(f"{rank}m.{name}") for rank in ("", "rank1."))
    assert np.any(first != second)
    assert np.any(tensors.read(f"outer.{name}") != 0)
