"""Data parallel training: the share of a rank, and whole jobs where MPI is installed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ranks
from gptc import GptcError
from gptc.engine import library
from gptc.engine import world as world_module
from gptc.engine.launch import STARTERS, Place, launched
from gptc.engine.world import JobError, World
from gptc.errors import EngineError
from gptc.training.options import TrainOptions
from gptc.training.parallel import check_options, lost_ranks, parts_of, settle, without_effect
from gptc.training.run import train
from gptc.training.signals import Received
from gptc.training.state import State
from mpi_jobs import (
    connected_job,
    environment,
    job,
    lines_of,
    mpirun,
    needs_mpi,
    ours,
    world_of,
)

# ---- without MPI ----


@pytest.mark.parametrize(
    ("size", "n_micro", "n_rows"),
    [(1, 2, 3), (2, 1, 4), (2, 3, 4), (3, 2, 6), (4, 4, 1), (6, 4, 3)],
)
def test_ranks_share_the_rows_of_a_step_in_their_order(
    size: int, n_micro: int, n_rows: int
) -> None:
    shares = [parts_of(rank, size, n_micro, n_rows) for rank in range(size)]
    rows = [
        (part.micro, row)
        for share in shares
        for part in share
        for row in range(part.first, part.end)
    ]
    assert rows == [(micro, row) for micro in range(n_micro) for row in range(n_rows)]
    assert len({sum(part.end - part.first for part in share) for share in shares}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4, "grad_accum": 2}, "8 sequences .* 3 ranks .* --batch-size 9"),
        ({"batch_size": 3, "dpo": True}, "--dpo trains in one process"),
        ({"batch_size": 3, "device": "cuda", "zero": 1}, "--zero 1 is for ranks on CPUs"),
        ({"batch_size": 3, "device": "cuda", "wire": "int8"}, "--wire int8 is for ranks on CPUs"),
    ],
)
def test_options_that_ranks_cannot_share(changes: dict[str, Any], message: str) -> None:
    options = replace(TrainOptions(device="cpu"), **changes)
    with pytest.raises(GptcError, match=message):
        check_options(options, world_of(3))
    check_options(options, World())


@pytest.mark.parametrize(("problem", "message"), [("", "ranks on CPUs"), ("no GPU", None)])
def test_a_device_that_becomes_a_gpu_is_one(
    monkeypatch: pytest.MonkeyPatch, problem: str, message: str | None
) -> None:
    monkeypatch.setattr(library, "gpu", lambda: SimpleNamespace(problem=problem))
    opened: list[bool] = []
    two = world_of(2)
    monkeypatch.setattr(two, "open_nccl", lambda: opened.append(True))
    check_options(TrainOptions(batch_size=2), two)
    assert opened == [True] * (message is not None)
    for changes in {"zero": 1}, {"wire": "int8"}:
        options = TrainOptions(batch_size=2, **changes)
        adapted = replace(options, lora_rank=4)  # whose device is the CPU
        for each, expected in (options, message), (adapted, None):
            if expected is None:
                check_options(each, two)
            else:
                with pytest.raises(GptcError, match=expected):
                    check_options(each, two)


def test_options_of_ranks_without_effect_are_noted() -> None:
    options = TrainOptions(zero=1, outer_lr=0.5)
    zero, outer = without_effect(options, 1)
    assert "--zero 1 has no effect in one process" in zero
    assert "--outer-lr 0.5 has no effect without --sync-every" in outer
    assert list(without_effect(options, 2)) == [outer]
    assert list(without_effect(TrainOptions(zero=0, sync_every=5, outer_lr=0.5), 1)) == []


class Late(World):
    """Two ranks; the other one has heard nothing, and a signal comes here during the exchange."""

    def __init__(self, signals: Received) -> None:
        super().__init__()
        self.size, self._signals = 2, signals

    def gather_equal(self, data: bytes) -> list[bytes]:
        self._signals.received = signal.SIGTERM
        return [data, bytes(len(data))]


def test_a_signal_ends_the_run_after_all_ranks_have_heard_of_it() -> None:
    signals, horizon = Received(n_ranks=2), SimpleNamespace(steps=9)
    settle(Late(signals), signals, horizon)
    assert (signals.received, signals.ending) == (signal.SIGTERM, None)
    settle(Late(signals), signals, horizon)
    assert signals.ending == signal.SIGTERM
    assert horizon.steps == 9


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", **OPEN_MPI}, (1, 2, 1, "mpirun")),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, (3, 4, 1, "mpirun")),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, (2, 3, 0, "srun")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, None),  # a batch script
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", **OPEN_MPI}, (1, 2, 0, "mpirun")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1, "torchrun")),
        ({"RANK": "one", "WORLD_SIZE": "2"}, None),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None),
    ],
)
def test_starters_are_known_by_their_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: tuple[object, ...] | None
) -> None:
    for starter in STARTERS:
        for name in starter[1:4]:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = launched()
    assert (place and (*place[:3], place.starter.name)) == found


@pytest.mark.parametrize(("rank", "spoken"), [(0, True), (1, False)])
def test_without_mpi_rank_0_says_so(tmp_path: Path, rank: int, spoken: bool) -> None:
    env = os.environ | {
        "PMI_RANK": str(rank),
        "PMI_SIZE": "2",
        "GPTC_MPI": str(tmp_path / "libmpi.so"),
    }
    command = [sys.executable, "-m", "gptc", "train", "--out", str(tmp_path / "run")]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    lines = ran.stderr.splitlines()
    assert len(lines) == spoken
    if spoken:
        assert "2 ranks need MPI: " in lines[0]
        assert str(tmp_path / "libmpi.so") in lines[0]


@pytest.mark.parametrize(("libraries", "named"), [(0, True), (1, False)])
def test_ranks_that_meet_nobody_name_the_network(
    monkeypatch: pytest.MonkeyPatch, libraries: int, named: bool
) -> None:
    """A later rank speaks too, after a while: rank 0 may have met all others."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    lost = EngineError("no answer from rank 2 for 5 s", library.GPT_ERR_COMM)

    def create(*arguments: object) -> None:
        assert arguments[3] == 5
        raise lost

    monkeypatch.setattr(library, "call", create)
    for rank in (0, 1):
        with pytest.raises(JobError) as caught:
            world_module._join(Place(rank, 3, 0, STARTERS[libraries]), 5)
        assert str(caught.value).startswith("no answer from rank 2 for 5 s; let these hosts")
        assert ("btl_tcp_if_include" in str(caught.value)) == named
        assert not caught.value.silent
        assert len(waited) == rank


# ---- with MPI ----


@pytest.mark.parametrize("how", [pytest.param("MPI", marks=needs_mpi), "TCP"])
def test_two_ranks_train_the_model_of_one_process(
    options: dict[str, Any], tmp_path: Path, how: str
) -> None:
    options |= {
        "batch_size": 2, "grad_accum": 2, "threads": 1, "dropout": 0.1, "dtype": "fp32",
        "device": "cpu", "eval_batches": 3,
    }  # fmt: skip
    if how == "MPI":
        ran = job(tmp_path, options, "train")
        assert ran.returncode == 0, ran.stderr
        errors = ran.stderr
    else:
        codes, (errors, of_second) = connected_job(tmp_path, options, "train")
        assert codes == [0, 0], (errors, of_second)
        assert of_second == ""
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert f"ranks   2 on 1 host, 1 thread each; {how}, sums" in errors
    assert errors.count("val loss") == 2  # of rank 0 alone

    alone = train({**options, "out": str(tmp_path / "alone")})
    pairs = list(zip(lines_of(tmp_path / "run"), lines_of(tmp_path / "alone"), strict=True))
    assert len(pairs) == 8
    for of_two, of_one in pairs:
        assert of_two.keys() == of_one.keys()
        for name in of_two.keys() & {"train_loss", "grad_norm", "val_loss", "lr", "tokens"}:
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-5)
    assert found[0]["val_loss"] == pytest.approx(alone.val_loss, rel=1e-5)
    # Written once, by rank 0, and continued by one process.
    assert Path(found[0]["saved"]).name == "ckpt-000008"
    resumed = train({"steps": 10}, resume=tmp_path / "run")
    assert (resumed.first_step, resumed.step) == (8, 10)
    check_step(tmp_path, found[0]["step"])


def check_step(folder: Path, result: list[float]) -> None:
    """The ranks' step has the bits of one process that adds the gradients of each rank's part."""
    with ranks.new_model() as model:
        x, y = ranks.micro_batches(model)
        n_all, sums, loss = int((y >= 0).sum()), {}, np.float32(0)
        for rank in (0, 1):
            model.zero_gradients()
            part = np.float32(0)
            for i in (2 * rank, 2 * rank + 1):
                if n := int((y[i] >= 0).sum()):
                    model._call("gpt_model_place", i, 0)
                    part += np.float32(n / n_all) * np.float32(
                        model.backward(x[i], y[i], n / n_all)
                    )
            loss += part
            for name, values in model.gradients().items():
                sums[name] = sums[name] + values if rank else values
        for name, values in sums.items():
            model.write(name, "grad", values)
        norm = model.update(ranks.ADAMW)
        assert result[1] == norm
        assert result[0] == pytest.approx(float(loss), rel=1e-6)
        for rank in (0, 1):
            with np.load(folder / f"rank{rank}.npz") as saved:
                for name, values in model.parameters().items():
                    np.testing.assert_array_equal(saved[name], values, err_msg=name)


@needs_mpi
def test_ranks_that_differ_are_refused(arguments: list[str], tmp_path: Path) -> None:
    command = ["-m", "gptc", "train", *arguments, "--device", "cpu"]
    ran = subprocess.run(
        mpirun([1, *command], [1, *command, "--lr", "0.5"]),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 1
    assert len(ours(ran.stderr)) == 1, ran.stderr
    assert "differs from rank 0" in ours(ran.stderr)[0]
    assert "in --lr: 0.5 and 0.008" in ours(ran.stderr)[0]
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_an_option_that_ranks_cannot_share_is_refused_once(
    arguments: list[str], tmp_path: Path
) -> None:
    command = ["-m", "gptc", "train", *arguments, "--device", "cpu", "--batch-size", "1"]
    ran = subprocess.run(
        mpirun([2, *command, "--grad-accum", "1"]),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 1
    (line,) = ours(ran.stderr)
    assert "2 ranks" in line
    assert not (tmp_path / "run").exists()


def test_a_connected_rank_that_ends_is_named_once(options: dict[str, Any], tmp_path: Path) -> None:
    """By rank 0, at once: its connection ends."""
    options |= {"threads": 1, "device": "cpu", "save_every": 4}
    codes, (errors, _) = connected_job(tmp_path, options, "die")
    assert codes == [1, 9]
    (line,) = ours(errors)
    saved = tmp_path / "run" / "ckpt-000004"
    assert f"error: the connection to rank 1 has ended; continue from {saved} with" in line


@pytest.mark.parametrize("what", ["fail", "fail apart"])
def test_the_error_of_a_connected_rank_is_the_only_one_of_its_host(
    options: dict[str, Any], tmp_path: Path, what: str
) -> None:
    """A person may see the terminal of one host alone: another one has a line with the rank."""
    options |= {"threads": 1, "device": "cpu", "save_every": 4}
    codes, (others, errors) = connected_job(tmp_path, options, what)
    assert codes == [1, 1]
    (line,) = ours(errors)
    assert re.search(r"error: rank 1 \(.+\): the disk is full", line)
    heard = ["error: rank 1 has ended the job" in line for line in ours(others)]
    assert heard == ([True] if what == "fail apart" else [])


@needs_mpi
def test_srun_without_an_interface_to_mpi_is_one_line(tmp_path: Path) -> None:
    """Open MPI itself prints twelve lines, and ends the process."""
    env = environment() | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    env = {name: value for name, value in env.items() if not name.startswith(("OMPI_", "PMI"))}
    command = [sys.executable, "-m", "gptc", "train", "--data", "stories", "--out", tmp_path / "r"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == (
        "gptc: error: 2 ranks need MPI: srun has not told Open MPI of the other ranks; start them "
        "with srun --mpi=pmix or --mpi=pmi2, as your MPI library needs\n"
    )


@needs_mpi
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("begun", "not all ranks have come for 3 s; all or none may have called MPI_Init"),
        ("again", "MPI has ended in this process: it can join only once"),
    ],
)
def test_ranks_that_cannot_join_say_why(tmp_path: Path, what: str, message: str) -> None:
    ran = job(tmp_path, {}, what)
    assert ran.returncode == 1
    (line,) = ours(ran.stderr)
    assert message in line


@needs_mpi
def test_a_rank_that_hangs_ends_the_job(options: dict[str, Any], tmp_path: Path) -> None:
    ran = job(tmp_path, options | {"steps": 100, "save_every": 4, "device": "cpu"}, "hang")
    assert ran.returncode == 1
    (line,) = ours(ran.stderr)
    assert "no answer from rank 1 (" in line
    assert f"continue from {tmp_path / 'run' / 'ckpt-000004'} with gptc train --resume" in line
    assert sorted(path.name for path in (tmp_path / "run").glob("ckpt*")) == ["ckpt-000004"]
    resumed = train({"steps": 6}, resume=tmp_path / "run")
    assert (resumed.first_step, resumed.step) == (4, 6)


@pytest.mark.parametrize(("rank", "named"), [(0, " from run/ckpt-000004"), (1, "")])
def test_only_rank_0_names_the_checkpoint_to_continue_from(rank: int, named: str) -> None:
    state = State(step=5)

    def finish() -> None:  # the checkpoint was being written
        state.saved = Path("run/ckpt-000004")

    lost = EngineError("rank 0 is lost", library.GPT_ERR_COMM)
    with pytest.raises(EngineError) as caught, lost_ranks(state, Path("run"), finish, rank):
        raise lost
    assert str(caught.value).endswith(f"; continue{named} with gptc train --resume run")
