"""Training runs: exact resumption, schedules, options, fine-tuning, and every way to end early."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint import writer
from gptc.checkpoint.find import find_checkpoint, load_tokenizer
from gptc.checkpoint.names import list_checkpoints, step_of
from gptc.checkpoint.reader import Checkpoint
from gptc.data.dataset import Dataset
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.settings import read_toml, to_toml
from gptc.tokenizer.registry import make_tokenizer
from gptc.training.defaults import DEFAULTS
from gptc.training.options import TrainOptions
from gptc.training.resolve import new_options
from gptc.training.run import train
from gptc.training.schedule import learning_rate

Options = dict[str, Any]


def metrics(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def reproducible(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    clock = {"elapsed_s", "tokens_per_s", "mfu"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def content(ckpt: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in ckpt.iterdir() if f.suffix == ".safetensors"}


# ---- a run ----


def test_a_run_learns_and_reports(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train({**options, "steps": 60, "eval_every": 20, "lr": 1e-2})
    out = Path(options["out"])
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 61))
    keys = ["step", "tokens", "elapsed_s", "train_loss", "lr", "grad_norm", "tokens_per_s", "mfu"]
    assert list(lines[0]) == keys
    assert list(lines[19]) == [*keys, "val_loss", "val_bpb"]
    assert lines[-1]["tokens"] == 60 * 2 * 16
    assert lines[0]["train_loss"] == pytest.approx(math.log(256), abs=0.3)
    assert lines[-1]["val_loss"] < lines[19]["val_loss"] < 5
    # A token of the bytes tokenizer is a byte.
    assert lines[-1]["val_bpb"] == pytest.approx(lines[-1]["val_loss"] / math.log(2), rel=1e-6)
    assert lines[0]["elapsed_s"] < lines[-1]["elapsed_s"]
    assert 0 < lines[-1]["mfu"] < 1.5

    assert summary.finished
    assert (summary.step, summary.steps) == (60, 60)
    assert summary.val_loss == lines[-1]["val_loss"]
    assert summary.best_val_loss == pytest.approx(min(x.get("val_loss", 9) for x in lines))
    assert summary.sample
    assert summary.checkpoint == str(out / "ckpt-000060")
    assert [p.name for p in list_checkpoints(out)] == ["ckpt-000040", "ckpt-000060"]
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in (
        "tiny with another shape (llama)",
        "parameters",
        "training tokens",
        "peak",
        "resident before",
        "val bpb",
    ):
        assert part in shown.err

    stored = Checkpoint(out / "ckpt-000060").trainer()
    assert stored is not None
    assert stored["options"]["steps"] == 60
    assert stored["threads"] == 2
    assert stored["loader_position"] == 60 * 2


def test_a_higher_peak_is_said(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = iter([100e9, 105e9, 210e9, *[90e9] * 6])
    monkeypatch.setattr(Model, "peak_flops", lambda model: next(peaks))
    monkeypatch.setattr("gptc.training.run.PEAK_EVERY_S", 0.0)
    assert train(options).peak_flops == 210e9
    shown = capsys.readouterr().err
    assert shown.count("note: the peak is") == 1
    assert "note: the peak is 210 GFLOP/s now, of which mfu is a share from here on" in shown


def test_a_damaged_checkpoint_is_skipped_and_said_once(
    options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(options["out"])
    train(options)
    (out / "ckpt-000008" / "model.safetensors").write_bytes(b"")
    assert train({}, resume=out).finished
    assert [record.getMessage().count("using") for record in caplog.records] == [1]


def test_peak_memory_is_what_was_planned(options: Options) -> None:
    changes = {"n_embd": 128, "n_ff": 512, "n_layer": 4, "batch_size": 8, "seq_len": 64}
    summary = train({**options, **changes, "steps": 3})
    assert summary.engine_bytes > 20e6
    # The process may have been larger before the run; then its peak says nothing about the run.
    assert summary.peak_resident_bytes > summary.engine_bytes
    assert summary.planned_peak_bytes >= summary.resident_before_bytes + summary.engine_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2, "grad_accum": 3, "schedule": "linear", "eval_every": 3},
        {"preset": "gpt2", "n_ff": 64, "schedule": "wsd", "save_every": 1, "keep_last": 0},
    ],
    ids=["plain", "dropout and micro-batches", "gpt2"],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    options: Options, changes: Options, tmp_path: Path
) -> None:
    whole = {**options, **changes, "steps": 9, "out": str(tmp_path / "whole")}
    parts = {**whole, "out": str(tmp_path / "parts")}
    train(whole)

    def interrupt(at: int) -> Callable[[int, Model], None]:
        return lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == at else None

    first = train(parts, on_step=interrupt(2))
    assert (first.signal, first.step, first.finished) == (signal.SIGINT, 2, False)
    second = train({}, resume=tmp_path / "parts", on_step=interrupt(5))
    assert (second.signal, second.step) == (signal.SIGINT, 5)
    third = train({}, resume=tmp_path / "parts" / "ckpt-000005")
    assert (third.signal, third.step, third.finished) == (None, 9, True)

    last = "ckpt-000009"
    assert content(tmp_path / "whole" / last) == content(tmp_path / "parts" / last)
    expected, got = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert reproducible(got) == reproducible(expected)
    assert [x["elapsed_s"] for x in got] == sorted(x["elapsed_s"] for x in got)


def test_an_interrupted_step_is_dropped_and_done_again(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of many micro-batches takes minutes: its end is not waited for."""
    whole = {**options, "grad_accum": 3, "dropout": 0.2, "out": str(tmp_path / "whole")}
    parts = {**whole, "out": str(tmp_path / "parts")}
    train(whole)
    really, count = Model._backward, 0

    def interrupt_at(last: int) -> Callable[..., None]:
        def backward(model: Model, *args: Any) -> None:
            nonlocal count
            count += 1
            really(model, *args)
            if count == last:
                signal.raise_signal(signal.SIGINT)

        return backward

    monkeypatch.setattr(Model, "_backward", interrupt_at(2))
    summary = train(parts)
    assert (summary.signal, summary.step, summary.checkpoint, count) == (2, 0, None, 2)
    count = 0
    monkeypatch.setattr(Model, "_backward", interrupt_at(3 * 5 + 1))
    assert train(parts).step == 5
    assert count == 3 * 5 + 1
    monkeypatch.undo()
    assert train({}, resume=parts["out"]).finished
    last = "ckpt-000008"
    assert content(tmp_path / "whole" / last) == content(tmp_path / "parts" / last)
    assert reproducible(metrics(parts["out"])) == reproducible(metrics(whole["out"]))


def test_a_run_that_is_too_long_is_noted(
    options: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: int, model: Model) -> None:
        signal.raise_signal(signal.SIGINT)

    train({**options, "steps": 10**11}, on_step=stop)
    shown = capsys.readouterr().err
    assert "177,777,778 epochs" in shown
    assert "note: the run goes over its text 177,777,778 times" in shown
    assert re.search(r"note: at this pace the run takes [\d,]+ days; .*--minutes", shown)
    train({**options, "out": options["out"] + "2"})
    assert "note" not in capsys.readouterr().err


def test_a_crash_loses_only_what_followed_the_checkpoint(options: Options, tmp_path: Path) -> None:
    """The process dies at step 7: the lines after step 4 are written again, the same."""
    train(options)
    expected = reproducible(metrics(options["out"]))

    class Crash(BaseException):
        pass

    def crash(step: int, model: Model) -> None:
        if step == 7:
            raise Crash

    crashed = tmp_path / "crashed"
    with pytest.raises(Crash):
        train({**options, "out": str(crashed)}, on_step=crash)
    assert len(metrics(crashed)) == 7
    with (crashed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tok')  # a line that was being written
    train({}, resume=crashed)
    assert reproducible(metrics(crashed)) == expected
    last = "ckpt-000008"
    assert content(crashed / last) == content(Path(options["out"]) / last)


def test_a_longer_run_goes_on(options: Options) -> None:
    train({**options, "schedule": "constant"})
    summary = train({"steps": 12, "lr": 1e-4, "eval_every": 6}, resume=options["out"])
    lines = metrics(options["out"])
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["lr"] == pytest.approx(1e-4)
    assert "val_loss" in lines[11]
    assert "val_loss" not in lines[9]
    assert summary.tokens == 12 * 2 * 16


def test_resuming_a_finished_run_says_so(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options)
    before = (Path(options["out"]) / "metrics.jsonl").read_bytes()
    summary = train({}, resume=options["out"])
    assert summary.finished
    assert summary.step == 8
    assert "has done its 8 steps; train on with" in capsys.readouterr().err
    assert (Path(options["out"]) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("limit", [{"steps": 4}, {"tokens": 100}, {"epochs": 0.001}])
def test_a_limit_that_the_run_is_past_is_refused(options: Options, limit: Options) -> None:
    out = Path(options["out"])
    train(options)
    before = (out / "config.toml").read_bytes()
    with pytest.raises(UsageError) as caught:
        train(limit, resume=out)
    ((name, value),) = limit.items()
    assert str(caught.value) == (
        f"the run is at step 8 (256 tokens), which is past --{name} {value}; "
        "train on with --steps 16"
    )
    assert (out / "config.toml").read_bytes() == before
    assert train({"steps": 16}, resume=out).step == 16


def test_what_cannot_change_on_resume(options: Options, tmp_path: Path) -> None:
    out = Path(options["out"])
    train({**options, "keep_last": 0})
    for name, value in {"n_layer": 3, "seq_len": 8, "seed": 2, "preset": "gpt2"}.items():
        spelled = name.replace("_", "-")
        with pytest.raises(UsageError, match=f"--{spelled} cannot change on --resume"):
            train({name: value}, resume=out)
    train({"n_layer": 2, "out": str(out)}, resume=out)  # the same value is no change
    with pytest.raises(UsageError, match="--out cannot be given"):
        train({"out": str(tmp_path / "other")}, resume=out)
    with pytest.raises(UsageError, match="is not the newest checkpoint of its run, ckpt-000008 is"):
        train({}, resume=out / "ckpt-000004")
    with Model.create(GPTConfig.preset("tiny", n_layer=1), threads=1) as model:
        model.save(tmp_path / "model")
    with pytest.raises(GptcError, match=r"is a model, not a training run; .*--init-from"):
        train({}, resume=tmp_path / "model")


def test_other_threads_are_allowed_and_said(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options)
    train({"threads": 1, "steps": 10}, resume=options["out"])
    assert "note: threads was 2 and is 1 now" in capsys.readouterr().err


def test_other_data_is_allowed_and_said(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("one two three " * 400)
    train({**options, "data": str(tmp_path / "text")})
    (tmp_path / "text").write_text("two three four " * 400)
    assert train({"steps": 10}, resume=options["out"]).step == 10
    assert f"note: {tmp_path / 'text'} has changed, so the result" in capsys.readouterr().err


def test_resuming_from_elsewhere(
    options: Options, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(text_file, tmp_path / "fable.txt")
    monkeypatch.chdir(tmp_path)
    del options["out"]
    summary = train({**options, "data": "fable.txt", "tokenizer": "char"})
    assert summary.out == "runs/tiny-fable"
    assert train({**options, "data": "fable.txt"}).out == "runs/tiny-fable-2"
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    again = train({"steps": 10}, resume="../runs/tiny-fable")
    assert (again.step, again.out) == (10, "../runs/tiny-fable")


# ---- ending early ----


def test_sigterm_saves(options: Options) -> None:
    def stop(step: int, model: Model) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    summary = train(options, on_step=stop)
    assert (summary.signal, summary.step, summary.sample) == (signal.SIGTERM, 3, None)
    assert find_checkpoint(options["out"]).name == "ckpt-000003"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_aborts_at_once(options: Options) -> None:
    def stop(step: int, model: Model) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(options, on_step=stop)
    assert list_checkpoints(Path(options["out"])) == []


@pytest.mark.filterwarnings("ignore:overflow")
def test_divergence_stops_with_the_last_checkpoint_intact(options: Options) -> None:
    def poison(step: int, model: Model) -> None:
        if step == 6:
            model.set("wte.weight", np.full((256, 32), np.nan, np.float32))

    with pytest.raises(GptcError, match=r"the loss is not finite at step 7; the last .* --lr"):
        train(options, on_step=poison)
    newest = find_checkpoint(options["out"])
    assert newest.name == "ckpt-000004"
    Checkpoint(newest).verify()
    assert metrics(options["out"])[-1]["step"] == 6


def test_divergence_before_any_checkpoint(options: Options) -> None:
    def poison(step: int, model: Model) -> None:
        model.set("wte.weight", np.full((256, 32), np.inf, np.float32))

    with pytest.raises(GptcError, match="not finite at step 2; try a smaller --lr"):
        train(options, on_step=poison)


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
    assert f"{out / 'ckpt-000004'} is intact: make room, then gptc train --resume {out}" in message
    assert sorted(f.name for f in out.iterdir()) == ["ckpt-000004", "config.toml", "metrics.jsonl"]
    monkeypatch.undo()
    assert train({}, resume=out).finished


def test_a_disk_that_is_too_small_is_noticed_at_the_start(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each = 12 * 25_760  # bytes of a parameter and its moments
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * each - 1))
    train({**options, "save_every": 2})
    shown = capsys.readouterr().err
    assert "note: 927 kB are free at " in shown
    assert "and 3 checkpoints will take 927 kB: make room, or choose another --out" in shown
    train({"steps": 20, "save_every": 2}, resume=options["out"])  # two of three are there
    train({**options, "out": options["out"] + "2"})  # which saves twice
    assert "are free" not in capsys.readouterr().err

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write_chunks", full)
    with pytest.raises(GptcError, match="no checkpoint was saved yet: make room or choose another"):
        train({**options, "out": options["out"] + "3"})


def test_two_processes_cannot_train_into_one_folder(options: Options) -> None:
    train(options)
    with (Path(options["out"]) / "metrics.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(GptcError, match="another gptc train is writing to"):
            train({"steps": 10}, resume=options["out"])


# ---- limits and schedules ----


def test_the_first_limit_ends_the_run(options: Options) -> None:
    del options["steps"]
    n_tokens = 18_000
    per_step = 2 * 16
    cases = [
        ({"tokens": 100}, 4),
        ({"epochs": 0.01}, math.ceil(0.01 * n_tokens / per_step)),
        ({"tokens": 100, "steps": 3}, 3),
        ({"tokens": 100, "epochs": 1.0}, 4),
    ]
    for i, (limit, steps) in enumerate(cases):
        summary = train({**options, **limit, "out": f"{options['out']}{i}"})
        assert summary.steps == steps == summary.step, limit


def test_minutes_bound_the_time(options: Options) -> None:
    del options["steps"]
    summary = train({**options, "minutes": 0.02, "eval_every": 10_000})
    assert 0.1 < summary.elapsed_s < 3
    assert summary.steps > 5
    stored = Checkpoint(find_checkpoint(options["out"])).trainer()
    assert stored is not None
    assert stored["options"]["minutes"] is None
    assert stored["options"]["steps"] == summary.steps


def test_a_run_of_minutes_ends_as_any_other(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the machine turns out to be far slower than it was when the steps were estimated."""
    del options["steps"]
    monkeypatch.setattr("gptc.training.run.Run._time_step", lambda run: 1e-5)

    def sleep(step: int, model: Model) -> None:
        time.sleep(0.02)

    given = {"minutes": 0.02, "eval_every": 10_000, "warmup_steps": 2}
    summary = train({**options, **given}, on_step=sleep)
    assert summary.finished
    assert 5 < summary.step == summary.steps < 60
    assert summary.val_loss is not None
    assert "time is up after 0:01" in capsys.readouterr().err
    lines = metrics(options["out"])
    assert lines[-1]["val_loss"] == summary.val_loss
    assert lines[-1]["lr"] == pytest.approx(new_options({}).lr / 10, rel=0.1)
    assert read_toml(Path(options["out"]) / "config.toml")["steps"] == summary.step
    assert train({}, resume=options["out"]).step == summary.step


def test_a_run_of_minutes_that_is_interrupted_goes_on_by_the_step(
    options: Options, tmp_path: Path
) -> None:
    del options["steps"]

    def stop(step: int, model: Model) -> None:
        time.sleep(0.05)
        if step == 10:
            signal.raise_signal(signal.SIGINT)

    first = train({**options, "minutes": 0.02}, on_step=stop)
    assert (first.step, first.finished) == (10, False)
    assert 10 < first.steps < 30
    assert read_toml(Path(first.out) / "config.toml")["steps"] == first.steps
    shutil.copytree(first.out, tmp_path / "copy")
    whole = train({}, resume=first.out)
    train({}, resume=tmp_path / "copy", on_step=lambda step, model: stop(step - 2, model))
    again = train({}, resume=tmp_path / "copy")
    assert whole.step == again.step == first.steps
    newest = [find_checkpoint(run) for run in (first.out, tmp_path / "copy")]
    assert content(newest[0]) == content(newest[1])


def schedule(steps: int = 100, **changes: Any) -> list[float]:
    options = TrainOptions(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **changes})
    return [learning_rate(step, steps, options) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules(name: str) -> None:
    rates = schedule(schedule=name)
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    middle = {"cosine": 0.55, "linear": 0.55, "wsd": 1.0, "constant": 1.0}
    assert (rates[54] + rates[55]) / 2 == pytest.approx(middle[name], abs=1e-3)
    if name == "wsd":
        assert rates[79] == 1.0
        assert rates[80] < 1.0


def test_schedules_of_short_runs_stay_finite() -> None:
    for name in ("cosine", "linear", "wsd"):
        assert schedule(1, warmup_steps=0, schedule=name) == [1.0]
        assert schedule(2, warmup_steps=0, schedule=name)[1] == pytest.approx(0.1)
        assert all(math.isfinite(rate) for rate in schedule(3, warmup_steps=5, schedule=name))
    assert schedule(10, min_lr=None, warmup_steps=0)[-1] == pytest.approx(0.1)


def test_a_short_run_has_a_short_warm_up(options: Options) -> None:
    train({**options, "steps": 20})
    assert metrics(options["out"])[1]["lr"] == pytest.approx(new_options({}).lr)
    stored = Checkpoint(find_checkpoint(options["out"])).trainer()
    assert stored is not None
    assert stored["options"]["warmup_steps"] == 2


# ---- options ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 3}, "no option 'stepz'; did you mean steps"),
        ({"steps": 0}, "--steps is 0; it must be above 0"),
        ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
        ({"lr": -1.0}, "--lr is -1.0; it must be above 0"),
        ({"grad_accum": 10**12}, "tokens; the most is 268,435,456"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "--min-lr is 0.01, above --lr"),
        ({"dropout": 1.0}, "--dropout is 1.0; it must be at least 0 and below 1"),
        ({"schedule": "cos"}, "--schedule is 'cos', not one of cosine"),
        ({"preset": "tinny"}, "no preset 'tinny'; did you mean tiny"),
        ({"bias": "no"}, "bias is 'no'; it must be true or false"),
        ({"n_layer": True}, "n-layer is True; it must be a whole number"),
        ({"init_from": "x", "n_layer": 3}, "--n-layer cannot be given with --init-from"),
        ({"n_head": 3, "n_embd": 32}, "n_head 3 does not divide n_embd 32"),
        ({"seq_len": 30_000}, "--seq-len"),
    ],
)
def test_senseless_options(dataset_folder: Path, given: Options, message: str) -> None:
    with pytest.raises(GptcError, match=message):
        train({"data": str(dataset_folder), **given})


def test_nothing_is_left_behind_by_options_that_fail(options: Options) -> None:
    with pytest.raises(UsageError):
        train({**options, "n_head": 5})
    assert not Path(options["out"]).exists()


def test_a_run_is_not_overwritten(options: Options) -> None:
    train(options)
    with pytest.raises(UsageError, match="holds a run already; continue it with --resume"):
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


def test_options_survive_toml(tmp_path: Path) -> None:
    options = TrainOptions(data='a "b" \\ ü', lr=3e-5, eps=1e-8, bias=False, threads=2)
    (tmp_path / "c.toml").write_text(to_toml(options), "utf-8")
    given = read_toml(tmp_path / "c.toml")
    assert TrainOptions(**given) == options
    (tmp_path / "c.toml").write_text("batch_size = 3\nseq-len = 5\nlr = 1")
    assert read_toml(tmp_path / "c.toml") == {"batch_size": 3, "seq_len": 5, "lr": 1}
    (tmp_path / "c.toml").write_text('steps = "1K"\ntokens = "1.5M"\nout = "2K"')
    assert read_toml(tmp_path / "c.toml") == {"steps": 1000, "tokens": 1_500_000, "out": "2K"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is no valid TOML"),
        ("step = 3", "no option 'step'; did you mean steps"),
        ("steps = 1.5", "steps is 1.5; it must be a whole number"),
        ('steps = "few"', "steps: 'few' is no size such as 300, 64K"),
        ("[train]\nsteps = 3", "no option 'train'"),
        (None, "No such file"),
    ],
)
def test_wrong_toml_names_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)


def test_the_run_writes_a_config_that_repeats_it(options: Options, tmp_path: Path) -> None:
    train(options)
    again = tmp_path / "again"
    train({**read_toml(Path(options["out"]) / "config.toml"), "out": str(again)})
    assert reproducible(metrics(again)) == reproducible(metrics(options["out"]))


def test_preset_defaults_and_what_overrides_them() -> None:
    tiny = new_options({})
    assert {name: getattr(tiny, name) for name in DEFAULTS["tiny"]} == {
        **DEFAULTS["tiny"],
        "warmup_steps": None,  # chosen when the number of steps is known
    }
    assert new_options({"lr": 1e-4}).lr == 1e-4
    assert new_options({"preset": "gpt2-medium"}).lr == 6e-4
    assert new_options({"tokens": 1000}).steps is None
    assert new_options({"beta2": 0.9, "preset": "byte"}).beta2 == 0.9


def test_keeping_all_checkpoints_or_some(options: Options) -> None:
    out = Path(options["out"])
    train({**options, "save_every": 1, "keep_last": 0})
    assert len(list_checkpoints(out)) == 8
    train({"steps": 10, "save_every": 1, "keep_last": 3}, resume=out)
    assert [step_of(p) for p in list_checkpoints(out)] == [8, 9, 10]


# ---- fine-tuning ----


def test_fine_tuning_begins_with_the_weights(options: Options, tmp_path: Path) -> None:
    train({**options, "steps": 30, "lr": 1e-2})
    learned = metrics(options["out"])[-1]["val_loss"]
    base = {k: v for k, v in options.items() if k not in ("preset", "out") and k[:2] != "n_"}
    summary = train({**base, "init_from": options["out"], "out": str(tmp_path / "tuned")})
    first = metrics(summary.out)[0]
    assert first["train_loss"] < learned + 1
    stored = Checkpoint(find_checkpoint(summary.out)).trainer()
    assert stored is not None
    assert stored["step"] == 8  # a fresh optimizer and count
    assert train({"steps": 9}, resume=summary.out).step == 9
    shutil.rmtree(options["out"])  # a resumed run needs its own checkpoints only
    assert train({"steps": 10}, resume=summary.out).step == 10


def test_the_name_of_a_fine_tuned_run(
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    train({**options, "out": "runs/first"})
    summary = train({"init_from": "runs/first", "data": options["data"], "steps": 1})
    assert summary.out == "runs/first-fable"
    assert summary.options["seq_len"] == 16  # the model's context, though the default is longer
    assert "--seq-len" not in capsys.readouterr().err  # nobody asked for more
    train({"init_from": "runs/first", "data": options["data"], "steps": 1, "seq_len": 99})
    assert "--seq-len is lowered to the model's context of 16" in capsys.readouterr().err


def test_another_tokenizer_is_refused(options: Options, text_file: Path, tmp_path: Path) -> None:
    from gptc.data.preparation import prepare

    train(options)
    prepare([str(text_file)], tmp_path / "chars", tokenizer="char")
    with pytest.raises(GptcError) as caught:
        train({"init_from": options["out"], "data": str(tmp_path / "chars"), "steps": 1})
    message = str(caught.value)
    assert "ckpt-000008 was made with the bytes tokenizer (256 tokens)" in message
    assert "chars with char (" in message
    assert message.endswith("with: gptc prepare SOURCE --out DIR --tokenizer bytes")
    with pytest.raises(GptcError, match="was made with the bytes tokenizer"):
        train({"data": str(tmp_path / "chars")}, resume=options["out"])


@pytest.mark.parametrize("own", ["char", "bpe:300"])
def test_a_prepared_folder_has_its_tokenizer(
    options: Options, text_file: Path, tmp_path: Path, own: str
) -> None:
    from gptc.data.preparation import prepare

    folder = prepare([str(text_file)], tmp_path / "prepared", tokenizer=own).folder
    for given in ("gpt2", "bytes", "bpe:301"):
        with pytest.raises(UsageError, match=f"prepared was prepared with {own}: leave "):
            train({**options, "data": str(folder), "tokenizer": given})
    assert not Path(options["out"]).exists()
    # None, its name, and where it lies; what is recorded can be given again.
    recorded = {}
    for given in (None, own, str(folder)):
        out = tmp_path / str(len(recorded))
        tokenizer = {} if given is None else {"tokenizer": given}
        train({**options, "data": str(folder), "steps": 1, "out": str(out), **tokenizer})
        recorded[given] = read_toml(out / "config.toml")["tokenizer"]
        assert train({"steps": 2}, resume=out).step == 2
    assert set(recorded.values()) == {own}
    # One that was learned elsewhere is named by the folder that holds it.
    other = prepare([str(text_file)], tmp_path / "other", tokenizer=str(folder)).folder
    for n in range(2):
        given = {"tokenizer": str(other)} if n else {}
        summary = train({**options, "data": str(other), "out": str(tmp_path / f"o{n}"), **given})
        assert summary.options["tokenizer"] == str(other)
        assert train({"steps": 9}, resume=summary.out).step == 9


def test_text_is_cut_with_the_models_own_tokenizer(
    options: Options, text_file: Path, tmp_path: Path
) -> None:
    first = train({**options, "data": str(text_file), "tokenizer": "char"})
    tuned = train(
        {"init_from": first.out, "data": str(text_file), "steps": 1, "out": str(tmp_path / "t")}
    )
    tokenizers = [Checkpoint(find_checkpoint(s.out)).tokenizer() for s in (first, tuned)]
    assert tokenizers[0].kind == "char"
    assert tokenizers[0].fingerprint() == tokenizers[1].fingerprint()


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_a_learned_tokenizer_goes_with_the_run(
    options: Options, text_file: Path, tmp_path: Path, tokenizer: str
) -> None:
    text = tmp_path / "text"
    shutil.copy(text_file, text)
    first = train({**options, "data": str(text), "tokenizer": tokenizer})
    assert read_toml(Path(first.out) / "config.toml")["tokenizer"] == tokenizer
    caches = list((Path(os.environ["GPTC_CACHE"]) / "datasets").glob("text-*"))
    own = Checkpoint(find_checkpoint(first.out)).tokenizer().fingerprint()
    train({"steps": 9}, resume=first.out)
    # Nothing is prepared a second time.
    assert list((Path(os.environ["GPTC_CACHE"]) / "datasets").glob("text-*")) == caches
    with pytest.raises(UsageError, match=f"--tokenizer cannot change .* was {tokenizer}"):
        train({"tokenizer": "bytes"}, resume=first.out)
    text.write_text(text.read_text().replace("king", "bear"))
    train({"steps": 10}, resume=first.out)
    assert Checkpoint(find_checkpoint(first.out)).tokenizer().fingerprint() == own


def test_a_run_stands_for_its_newest_checkpoint(
    gptc: Callable[..., Any], options: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    run = train({**options, "data": str(text_file), "tokenizer": "bpe:300", "steps": 4}).out
    own = load_tokenizer(run).fingerprint()
    ran = gptc("prepare", text_file, "--tokenizer", run, "--out", tmp_path / "data")
    assert (ran.code, ran.err) == (0, "")
    assert Dataset.open(tmp_path / "data").tokenizer.fingerprint() == own
    again = train({**options, "data": str(text_file), "tokenizer": run, "out": str(tmp_path / "2")})
    assert load_tokenizer(again.out).fingerprint() == own
    (tmp_path / "empty").mkdir()
    ran = gptc("prepare", text_file, "--tokenizer", tmp_path / "empty", "--out", tmp_path / "no")
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert "give the folder of a dataset, checkpoint or run" in ran.err


def test_a_hugging_face_model_with_too_few_tokens(options: Options, tmp_path: Path) -> None:
    shape = GPTConfig.preset("gpt2", vocab_size=100, n_layer=1, n_head=1, n_embd=8, block_size=16)
    with Model.create(shape, threads=1) as model:
        model.save(tmp_path / "hf")
    with pytest.raises(GptcError, match=r"a vocabulary of 256 \(bytes tokenizer\), .* one of 100"):
        train({"init_from": str(tmp_path / "hf"), "data": options["data"]})


def test_a_validation_split_that_is_too_small(options: Options, tmp_path: Path) -> None:
    from gptc.data.preparation import prepare

    (tmp_path / "x.txt").write_text("abc " * 100)
    prepare([str(tmp_path / "x.txt")], tmp_path / "x", val_tokens=5)
    summary = train({**options, "data": str(tmp_path / "x")})
    assert summary.finished
    assert summary.val_loss is None
    assert make_tokenizer("bytes").fingerprint() == (
        Checkpoint(find_checkpoint(summary.out)).tokenizer().fingerprint()
    )
