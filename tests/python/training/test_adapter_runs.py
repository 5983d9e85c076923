"""A run that trains adapters changes nothing else, and is resumed exactly; it makes models."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import GPTConfig, Model
from gptc.checkpoint.find import find_checkpoint, open_checkpoint
from gptc.engine.lora import Lora, targets_named
from gptc.engine.options import Options, plan_for
from gptc.errors import GptcError, UsageError
from gptc.training.curves import read_curves
from gptc.training.run import train
from runs import metrics, reproducible
from small_models import SHAPES, batch, make_checkpoint, make_config

Given = dict[str, Any]
Gptc = Callable[..., Any]


@pytest.fixture(params=sorted(SHAPES))
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Given:
    """Options of a run that trains adapters of a base of each family."""
    make_checkpoint(make_config(request.param), folder=tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog sat on the cat. " * 60)
    return {
        "data": str(text),
        "init_from": str(tmp_path / "base"),
        "out": str(tmp_path / "run"),
        "steps": 8,
        "batch_size": 2,
        "seq_len": 24,
        "eval_every": 4,
        "eval_batches": 2,
        "lr": 1e-2,
        "threads": 1,
        "dtype": "fp32",
        "lora_rank": 3,
    }


def test_training_adapters_lowers_the_loss_and_leaves_the_base_alone(given: Given) -> None:
    base = open_checkpoint(given["init_from"])
    before = {name: base.read(name).copy() for name, _, _ in base.config.parameters()}
    summary = train({**given, "steps": 60})
    assert summary.val_loss is not None
    file = open_checkpoint(given["out"])
    with Model.load(given["out"], threads=1) as tuned, Model.load(given["init_from"]) as plain:
        x, _ = batch(B=1)
        assert not np.allclose(tuned.logits(x), plain.logits(x), atol=1e-3)
        for name, values in before.items():
            np.testing.assert_array_equal(tuned.get(name), values)
    assert summary.train_loss is not None
    assert summary.train_loss < 0.9 * metrics(given["out"])[0]["train_loss"]
    files = {path.name for path in file.path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json"} <= files
    assert "model.safetensors" not in files
    assert (file.path / "adapter_model.safetensors").stat().st_size < 100_000


def test_a_run_of_adapters_is_described_checked_and_drawn(given: Given, gptc: Any) -> None:
    train(given)
    described = gptc("info", given["out"])
    assert described.code == 0, described.err
    assert "rank 3, alpha 6, of " in described.out
    assert gptc("info", Path(given["out"]) / "ckpt-000008").code == 0
    verified = gptc("verify", given["out"])
    assert verified.code == 0, verified.err
    assert "ckpt-000008: adapter_model.safetensors: its checksum is right" in verified.out
    assert "moments, every number finite" in verified.out
    shutil.rmtree(given["init_from"])
    for command in ("info", "verify"):
        ran = gptc(command, given["out"])
        assert ran.code == 1
        assert "base" in ran.err
        assert len(ran.err.splitlines()) == 1
    assert len(read_curves(given["out"]).records) == 8


def test_moments_that_are_not_finite_are_found(given: Given, gptc: Any) -> None:
    train({**given, "steps": 1})
    folder = find_checkpoint(given["out"])
    (folder / "checksums.json").unlink()
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    verified = gptc("verify", folder)
    assert verified.code == 1
    assert "optimizer.safetensors" in verified.err


def test_a_resumed_run_ends_with_the_same_bits(given: Given, tmp_path: Path) -> None:
    given = {**given, "lora_dropout": 0.2, "lora_kind": "rslora", "lora_alpha": 5.0}
    parts = {**given, "out": str(tmp_path / "parts")}
    train(given)

    def interrupt(step: int, model: Model) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(parts, on_step=interrupt).step == 3
    # Memory may be traded for time in the middle: the results are the same bits.
    train({"recompute": "block"}, resume=tmp_path / "parts")
    ends = [find_checkpoint(folder) for folder in (given["out"], parts["out"])]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert reproducible(metrics(given["out"])) == reproducible(metrics(parts["out"]))


def test_a_resumed_run_takes_the_alpha_that_it_has(given: Given) -> None:
    """Twice the rank, where none was given."""
    train({**given, "steps": 1})
    assert train({"steps": 2, "lora_alpha": 6.0}, resume=given["out"]).step == 2
    with pytest.raises(UsageError, match=r"--lora-alpha cannot change on --resume \(it was 6"):
        train({"steps": 3, "lora_alpha": 5.0}, resume=given["out"])


def test_a_base_that_has_gone_or_changed_is_named(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(given)
    base, moved = Path(given["init_from"]), tmp_path / "moved"
    base.rename(moved)
    with pytest.raises(GptcError, match=r"is an adapter of .*base, which is not there"):
        open_checkpoint(given["out"])
    config = open_checkpoint(moved).config
    shutil.rmtree(moved)
    with Model.create(config, seed=99) as other:
        other.save(base)
    open_checkpoint(given["out"])
    assert "trained with another model" in caplog.text
    shutil.rmtree(base)
    make_checkpoint(make_config("gpt2", n_embd=48), folder=base)
    with pytest.raises(GptcError, match="of another"):
        open_checkpoint(given["out"])


def test_what_adapters_cannot_be_trained_with_is_refused(given: Given) -> None:
    with pytest.raises(UsageError, match="needs --init-from"):
        train({"lora_rank": 4, "preset": "tiny"})
    with pytest.raises(UsageError, match=r"is not a layer of this model; it has .*all"):
        train({**given, "lora_targets": "q_proj"})
    with pytest.raises(UsageError, match="train adapters with --lora-rank"):
        train({**given, "lora_rank": 0, "dtype": "int8"})
    train(given)
    with pytest.raises(UsageError, match="--lora-rank cannot change on --resume"):
        train({"lora_rank": 5}, resume=given["out"])
    again = {**given, "out": given["out"] + "-2"}
    with pytest.raises(UsageError, match="holds adapters"):
        train({**again, "init_from": given["out"]})


@pytest.mark.parametrize("given", ["llama"], indirect=True)
def test_adapters_are_merged_as_advised(given: Given, tmp_path: Path, gptc: Gptc) -> None:
    train(given)
    run, again = given["out"], ("--steps", 1, "--seq-len", 8, "--out", tmp_path / "again")
    for i, command in enumerate(
        (
            ("train", "--init-from", run, "--data", given["data"]),
            ("finetune", "-m", run, "--data", given["data"]),
            ("train", "--resume", run, "--lora-rank", 5),
            ("train", "--resume", Path(run) / "ckpt-000004", "--steps", 20),
            ("import", run, "--out", tmp_path / "imported"),
        )
    ):
        ran = gptc(*command)
        assert ran.code == 2
        merged = tmp_path / f"merged {i}"
        _, _, advice = ran.err.partition("gptc export ")
        words = shlex.split(advice.splitlines()[0])
        words[words.index("CKPT")] = str(merged)
        assert gptc("export", *words).code == 0
    begun = gptc("train", "--init-from", merged, "--data", given["data"], *again)
    assert begun.code == 0, begun.err
    assert not (tmp_path / "imported").exists()


def test_names_of_targets() -> None:
    llama, gpt2 = make_config("llama"), make_config("gpt2")
    assert targets_named(llama, "qkv, up") == ("q", "k", "v", "up")
    assert targets_named(llama, "fc,mlp_proj") == ("gate", "up", "mlp_proj")
    assert targets_named(gpt2, "all") == ("qkv", "proj", "fc", "mlp_proj")
    with pytest.raises(UsageError, match="'gate'"):
        targets_named(gpt2, "gate")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rounded_weights_can_have_adapters_trained(given: Given, dtype: str) -> None:
    summary = train({**given, "dtype": dtype, "recompute": "mlp", "steps": 40})
    assert summary.dtype == dtype
    assert summary.train_loss is not None
    assert summary.train_loss < 0.9 * metrics(given["out"])[0]["train_loss"]


def test_adapters_take_a_small_part_of_the_memory() -> None:
    config = make_config("gpt2", n_embd=256, n_head=4, n_layer=8)
    lora = Lora(8, 16.0, targets_named(config, "all"))
    full, small = (
        plan_for(config, Options("cpu", dtype="bf16", max_batch=1, max_seq=8, lora=which))
        for which in (None, lora)
    )
    assert small.total_bytes < full.total_bytes / 3
    assert small.grad_bytes < full.grad_bytes / 15
    assert small.optimizer_bytes < full.optimizer_bytes / 15


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_small_adapters_count_where_outputs_are_rounded(dtype: str) -> None:
    """A part of an output that is less than half a unit in its last place is not lost."""
    x = np.random.default_rng(0).integers(0, 96, (2, 32)).astype(np.int32)
    config = GPTConfig.preset("tiny", vocab_size=96, block_size=32)
    lora = Lora(4, 8.0, targets_named(config, "all"))

    def changes(dtype: str) -> Any:
        """What B of 3e-5 changes in the logits, for several signs of it."""
        options = {"device": "cpu", "threads": 1, "training": True, "max_batch": 2, "seed": 1}
        with Model.create(config, dtype=dtype, lora=lora, **options) as model:
            before, found = model.logits(x), []
            for seed in range(4):
                signs = np.random.default_rng(seed)
                for name in (p.name for p in model.trained if p.name.endswith("lora_b")):
                    b = signs.choice([-3e-5, 3e-5], size=model.get(name).shape)
                    model.set(name, b.astype(np.float32))
                found.append(model.logits(x) - before)
        return np.array(found).ravel()

    expected, got = changes("fp32"), changes(dtype)
    assert got @ expected == pytest.approx(expected @ expected, rel=0.2)
