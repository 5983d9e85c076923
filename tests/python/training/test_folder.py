"""A run locks its folder, and a full disk loses no checkpoint."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint import writer
from gptc.checkpoint.names import list_checkpoints, step_of
from gptc.errors import GptcError, UsageError
from gptc.training.run import train
from runs import metrics

Options = dict[str, Any]


# ---- full disks and locks ----


def test_a_full_disk_keeps_the_previous_checkpoint(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer.write_chunks

    def write(path: Path, chunks: Any) -> None:
        if "ckpt-000008" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, chunks)

    monkeypatch.setattr(writer, "write_chunks", write)
    out = Path(options["out"])
    with pytest.raises(GptcError) as caught:
        train(options)
    message = str(caught.value)
    assert message.startswith(f"cannot save {out / 'ckpt-000008'}: no space left on device")
    assert (
        f"{out / 'ckpt-000004'} is intact: free disk space, then gptc train --resume {out}"
        in message
    )
    names = ["best", "ckpt-000004", "config.toml", "metrics.jsonl"]
    assert sorted(f.name for f in out.iterdir()) == names
    monkeypatch.undo()
    assert train({}, resume=out).finished


def test_a_disk_that_is_too_small_is_noticed_at_the_start(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each = 12 * 25_760  # bytes of a parameter and its moments
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * each - 1))
    train({**options, "save_every": 2})
    shown = capsys.readouterr().err
    assert "note: 1.2 MB are free at " in shown
    assert "but 4 checkpoints will take 1.2 MB: free disk space, or choose another --out" in shown
    train({"steps": 20, "save_every": 2}, resume=options["out"])  # two of four are there
    train({**options, "out": options["out"] + "2"})  # this saves twice
    assert "are free" not in capsys.readouterr().err

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write_chunks", full)
    with pytest.raises(GptcError, match="no checkpoint is saved yet: free disk space or choose"):
        train({**options, "out": options["out"] + "3"})


def test_two_processes_cannot_train_into_one_folder(options: Options) -> None:
    train(options)
    with (Path(options["out"]) / "metrics.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(GptcError, match="another gptc train is writing to"):
            train({"steps": 10}, resume=options["out"])


# ---- contents of a folder ----


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_pipe_in_the_place_of_lines_is_not_waited_for(options: Options, name: str) -> None:
    out = Path(options["out"])
    out.mkdir(parents=True)
    os.mkfifo(out / name)
    with pytest.raises(GptcError, match=f"{name} is not a regular file: remove it"):
        train(options)


def test_nothing_is_left_behind_by_options_that_fail(options: Options) -> None:
    with pytest.raises(UsageError):
        train({**options, "n_head": 5})
    assert not Path(options["out"]).exists()


def test_a_run_is_not_overwritten(options: Options) -> None:
    train(options)
    with pytest.raises(UsageError, match="already holds a run; continue it with --resume"):
        train(options)


def test_a_run_that_saved_nothing_may_be_begun_anew(options: Options) -> None:
    def crash(step: int, model: Model) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        train(options, on_step=crash)
    assert len(metrics(options["out"])) == 1
    train(options)
    assert [line["step"] for line in metrics(options["out"])] == list(range(1, 9))


def test_a_folder_without_a_checkpoint_is_named(
    options: Options, tmp_path: Path, gptc: Callable[..., Any], arguments: list[str]
) -> None:
    def crash(step: int, model: Model) -> None:
        raise MemoryError

    run = Path(options["out"])
    with pytest.raises(MemoryError):
        train(options, on_step=crash)
    ran = gptc("train", "--resume", run)
    command = f"gptc train --config {run / 'config.toml'} --out {run}"
    assert ran.err == (
        f"gptc: error: {run} holds no checkpoint yet: its run ended before the first; "
        f"begin it again with {command}\n"
    )
    assert gptc(*command.split()[1:]).code == 0
    assert f"is a dataset; train on it with gptc train --data {options['data']}" in (
        gptc("infer", "-m", options["data"]).err
    )
    assert f"is a folder of runs; name one of them, such as {run}\n" in (
        gptc("infer", "-m", tmp_path).err
    )


def test_keeping_all_checkpoints_or_some(options: Options) -> None:
    out = Path(options["out"])
    train({**options, "save_every": 1, "keep_last": 0})
    assert len(list_checkpoints(out)) == 8
    train({"steps": 10, "save_every": 1, "keep_last": 3}, resume=out)
    assert [step_of(p) for p in list_checkpoints(out)] == [8, 9, 10]
