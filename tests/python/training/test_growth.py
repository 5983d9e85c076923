"""Steps that grow: --batch-size-warmup and --seq-len-warmup.

The class of fault: tokens that are counted as those of whole steps, a row that is drawn twice or
never, sizes that depend on an interrupt, ranks that share a small step wrongly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversing import rows, write_rows
from corpus import write_documents
from gptc.data.dataset import Dataset
from gptc.data.loader import Loader
from gptc.errors import UsageError
from gptc.training.growth import Growth, pieces
from gptc.training.horizon import Horizon
from gptc.training.options import TrainOptions
from gptc.training.plan import forecast
from gptc.training.progress import SilentProgress
from gptc.training.resolve import new_options
from gptc.training.run import train
from gptc.training.setup import set_up
from gptc.training.state import State
from gptc.training.trainer import Trainer
from mpi_jobs import job, lines_of, needs_mpi
from runs import content, metrics, reproducible

Options = dict[str, Any]
SIZES = [(4, 1, 0, 0), (4, 3, 9, 0), (1, 16, 100, 7), (6, 2, 1, 1), (5, 1, 8, 3)]


@pytest.fixture
def growing(options: Options) -> Options:
    """Options of a run whose batches grow in 6 of 8 steps, and whose rows in 3."""
    grown = {"batch_size": 3, "grad_accum": 2, "batch_size_warmup": 6, "seq_len_warmup": 3}
    return {**options, **grown, "device": "cpu", "dtype": "fp32", "threads": 1}


@pytest.mark.parametrize(("batch_size", "grad_accum", "n", "n_length"), SIZES)
def test_sizes_rise_and_tokens_are_their_sums(
    batch_size: int, grad_accum: int, n: int, n_length: int
) -> None:
    growth = Growth(
        TrainOptions(
            batch_size=batch_size, grad_accum=grad_accum, seq_len=40,
            batch_size_warmup=n, seq_len_warmup=n_length,
        )
    )  # fmt: skip
    sizes = [growth.size(step) for step in range(120)]
    sequences = [size.sequences for size in sizes]
    assert sequences == sorted(sequences)
    assert max(sequences) == sequences[n] == batch_size * grad_accum
    assert all(size.rows <= batch_size and size.batches <= grad_accum for size in sizes)
    if n >= 8:
        assert sequences[0] == -(-batch_size * grad_accum // 8)
    assert [size.cuts for size in sizes[:n_length]] == sorted(
        (size.cuts for size in sizes[:n_length]), reverse=True
    )
    assert all((size.cuts == 1) == (step >= n_length) for step, size in enumerate(sizes))
    for first, last in (0, 120), (0, 1), (3, 90), (7, 8), (50, 50):
        tokens = growth.tokens(first, last)
        assert tokens == 40 * sum(sequences[first:last])
        if last > first:
            assert growth.steps_for(first, tokens) == last - first
            assert growth.steps_for(first, tokens + 0.5) == last - first + 1
    assert growth.steps_for(2, 0) == growth.steps_for(2, -5) == 0


def test_windows_are_cut_into_rows_of_the_same_tokens(dataset_folder: Path) -> None:
    dataset = Dataset.open(dataset_folder)
    with closing(Loader(dataset, "train", 3, 40)) as loader:
        batch = loader.next_rows()
    found = list(pieces(batch, 4, dataset))
    assert [part.inputs.shape for part in found] == [(3, 10)] * 4
    for name in ("inputs", "targets"):
        joined = np.concatenate([getattr(part, name) for part in found], axis=1)
        np.testing.assert_array_equal(joined, getattr(batch, name))
    assert next(pieces(batch, 1, dataset)) is batch


def test_a_size_that_changes_draws_each_sequence_once(dataset_folder: Path) -> None:
    dataset = Dataset.open(dataset_folder)
    with closing(Loader(dataset, "train", 1, 16, seed=3, n_ahead=3)) as loader:
        expected = np.concatenate([loader.next_rows().inputs for _ in range(12)])
    with closing(Loader(dataset, "train", 4, 16, seed=3, n_ahead=3)) as loader:
        found = []
        for loader.batch_size in (1, 1, 3, 2, 4, 1):
            found.append(loader.next_rows().inputs)
        assert loader.position == 12
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_an_interrupted_run_ends_with_the_same_bits(growing: Options, tmp_path: Path) -> None:
    growing["save_every"] = 2
    train(growing)
    lines = metrics(growing["out"])
    # Stages 1, 2, 3, 5, 6, 7 of 8 for 6 sequences, each in batches of as many rows.
    sequences = [1, 2, 3, 4, 6, 6, 6, 6]
    assert [line["tokens"] for line in lines] == (16 * np.cumsum(sequences)).tolist()
    parts = {**growing, "out": str(tmp_path / "parts")}

    def crash(step: int, model: Any) -> None:
        if step == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(parts, on_step=crash)
    train({}, resume=parts["out"])
    assert reproducible(metrics(parts["out"])) == reproducible(lines)
    ends = [Path(o["out"]) / "ckpt-000008" for o in (growing, parts)]
    assert content(ends[0]) == content(ends[1])
    trainer = json.loads((ends[1] / "trainer.json").read_text())
    assert trainer["loader_position"] == sum(sequences)
    assert trainer["tokens"] == 16 * sum(sequences)


def test_a_short_row_has_its_own_context(growing: Options) -> None:
    """The loss of the first step is that of the rows alone."""
    train({**growing, "steps": 1, "batch_size_warmup": 0, "seq_len_warmup": 1, "lr": 1e-9})
    with closing(set_up(new_options(growing), None, SilentProgress())) as setup:
        drawn = [setup.loader.next_rows() for _ in range(2)]
        losses = [
            setup.model.loss(rows.inputs[:, at : at + 2], rows.targets[:, at : at + 2])
            for rows in drawn
            for at in range(0, 16, 2)
        ]
        whole = np.mean([setup.model.loss(*rows[:2]) for rows in drawn])
    found = metrics(growing["out"])[0]["train_loss"]
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(found - whole) > 1e-4


def test_limits_and_the_plan_count_growing_steps(growing: Options, tmp_path: Path) -> None:
    limited = {k: v for k, v in growing.items() if k != "steps"} | {"tokens": 500}
    summary = train(limited)
    assert summary.tokens == 16 * (1 + 2 + 3 + 4 + 6 + 6 + 6 + 6) == 544
    assert summary.steps == 8
    with closing(set_up(new_options(limited), None, SilentProgress())) as setup:
        found = forecast(setup, Trainer(setup, SilentProgress(), tmp_path), tmp_path)
        epoch = setup.loader.epoch_tokens
    assert (found.steps, found.tokens, found.step_tokens) == (8, 544, 96)
    assert found.epochs == pytest.approx(544 / epoch)
    whole_s = 544 / 96 * 2 * found.costs.pass_s + 8 * found.costs.update_s
    rest_s = found.n_eval_batches * found.costs.eval_s + found.costs.last_save_s
    rest_s += (found.n_saves - 1) * found.costs.save_s + found.costs.sample_s
    rest_s += found.start_s + found.costs.first_s
    assert found.seconds == pytest.approx(whole_s + rest_s)


@pytest.mark.parametrize(
    ("small_s", "at_first"),
    [
        (0.1, 0.15),  # the time of a sequence, so that small steps take less
        (0.0, 0.01),  # steps of any size take the same
        (-0.1, 0.3),  # short rows take longer than whole ones
    ],
)
def test_the_clock_times_small_steps_apart(small_s: float, at_first: float) -> None:
    """The number of steps is near the true one while no step has been a whole one."""
    options = TrainOptions(minutes=10.0, batch_size=8, grad_accum=1, batch_size_warmup=100)
    growth, spent, found = Growth(options), 0.0, []
    horizon = Horizon(options, State(), 10**9, step_s=0.8)
    while len(found) < horizon.steps:
        step_s = 0.8 - small_s * (8 - growth.size(len(found)).sequences)
        spent += 2 * step_s  # with evaluations
        horizon.follow_clock(len(found) + 1, spent, step_s)
        found.append(horizon.steps)
    assert spent == pytest.approx(600, abs=1.6)
    assert found[0] == pytest.approx(len(found), rel=at_first)
    assert found[100:] == pytest.approx([len(found)] * (len(found) - 100), abs=1)


def test_warm_ups_longer_than_the_time_are_noted(
    growing: Options, gptc: Callable[..., Any]
) -> None:
    given = {**growing, "minutes": 0.01, "batch_size_warmup": 10**7, "eval_every": 10**6}
    del given["steps"]
    arguments = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", v)]
    ran = gptc("train", *arguments)
    assert ran.code == 0, ran.err
    noted = "note: --batch-size-warmup 10000000 is longer than the run, which is estimated "
    assert re.search(noted + r"to have [\d,]+ steps?: ", ran.err)
    assert "note: the run ended within --batch-size-warmup 10000000" in ran.err
    assert "--seq-len-warmup 3 is" not in ran.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size_warmup": 9}, "--batch-size-warmup 9 is longer than the run, which has 8"),
        ({"seq_len_warmup": 9}, "--seq-len-warmup 9 is longer than the run, which has 8 steps"),
        ({"batch_size": 1, "grad_accum": 1}, "--batch-size-warmup 6 has nothing to grow to"),
        ({"seq_len": 15}, "--seq-len-warmup halves rows, and --seq-len 15 is odd: use --seq-len 1"),
        ({"data": "CHATS", "seq_len": 128}, "--seq-len-warmup 3 cuts texts, and .* conver"),
    ],
)
def test_warm_ups_that_a_run_cannot_have(
    growing: Options, tmp_path: Path, changes: Options, message: str
) -> None:
    chats = str(write_rows(tmp_path / "chats.jsonl", rows(20)))
    given = {k: chats if v == "CHATS" else v for k, v in changes.items()}
    with pytest.raises(UsageError, match=message):
        train({**growing, **given})
    assert not Path(growing["out"]).exists()


@pytest.mark.parametrize("name", ["batch_size_warmup", "seq_len_warmup"])
def test_preferences_have_steps_of_one_size(name: str) -> None:
    options = TrainOptions(dpo=True, init_from="x", **{name: 6})
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} 6 excludes --dpo"):
        options.check()


def test_conversations_have_batches_that_grow(growing: Options, tmp_path: Path) -> None:
    chats = str(write_rows(tmp_path / "chats.jsonl", rows(40)))
    train({**growing, "data": chats, "seq_len": 128, "seq_len_warmup": 0, "steps": 7})
    found = [line["tokens"] for line in metrics(growing["out"])]
    assert found == (128 * np.cumsum([1, 2, 3, 4, 6, 6, 6])).tolist()


def test_mfu_counts_the_keys_of_short_rows(growing: Options, tmp_path: Path) -> None:
    options = replace(new_options(growing), seq_len=64, batch_size_warmup=0)
    with closing(set_up(options, None, SilentProgress())) as setup:
        setup.peak_flops = 1e9
        trainer = Trainer(setup, SilentProgress(), tmp_path)
        at = [trainer.mfu(1e3)]
        for _ in range(4):
            trainer.step(lambda: None)
            at.append(trainer.mfu(1e3))
    assert at[1] < at[2] < at[3] < at[4] == at[0]


@needs_mpi
def test_two_ranks_share_steps_that_grow(growing: Options, tmp_path: Path) -> None:
    """The first step has one sequence, so that a rank has none; documents are kept apart."""
    growing |= {"data": str(write_documents(tmp_path)), "packing": "documents"}
    growing |= {"dropout": 0.1, "seq_len_warmup": 0}
    ran = job(tmp_path, growing, "train")
    assert ran.returncode == 0, ran.stderr
    train({**growing, "out": str(tmp_path / "alone")})
    pairs = list(zip(lines_of(tmp_path / "run"), lines_of(tmp_path / "alone"), strict=True))
    assert len(pairs) == 8
    for of_two, of_one in pairs:
        for name in of_one.keys() & {"train_loss", "grad_norm", "val_loss", "lr", "tokens"}:
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-5)
