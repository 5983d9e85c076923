"""A run learns, reports, and ends at the first of its limits."""

from __future__ import annotations

import math
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.names import list_checkpoints
from gptc.checkpoint.reader import Checkpoint
from gptc.errors import GptcError
from gptc.settings import read_toml
from gptc.tokenizer.registry import make_tokenizer
from gptc.training import report
from gptc.training.options import TrainOptions
from gptc.training.resolve import new_options
from gptc.training.run import train
from runs import metrics

Options = dict[str, Any]


# ---- a run ----


def test_a_run_learns_and_reports(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train({**options, "steps": 60, "eval_every": 20, "lr": 1e-2})
    out = Path(options["out"])
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 61))
    numbers = ["train_loss", "lr", "grad_norm", "tokens_per_s", "mfu"]
    keys = ["step", "tokens", "elapsed_s", "time", *numbers]
    assert list(lines[0]) == keys
    kinds = ["wte", "attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"]
    ratios = [f"update_ratio/{kind}" for kind in kinds]
    assert list(lines[19]) == [*keys[:-2], *ratios, *keys[-2:], "val_loss", "val_bpb"]
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
        "tiny with a modified shape (llama)",
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
    monkeypatch.setattr("gptc.training.trainer.PEAK_EVERY_S", 0.0)
    assert train(options).peak_flops == 210e9
    shown = capsys.readouterr().err
    assert shown.count("note: peak remeasured") == 1
    assert "note: peak remeasured: 210 GFLOP/s; MFU now refers to it" in shown


def test_peak_memory_is_what_was_planned(options: Options) -> None:
    changes = {"n_embd": 128, "n_ff": 512, "n_layer": 4, "batch_size": 8, "seq_len": 64}
    summary = train({**options, **changes, "steps": 3})
    assert summary.engine_bytes > 20e6
    # If the process was larger before the run, its peak says nothing about the run.
    assert summary.peak_resident_bytes > summary.engine_bytes
    assert summary.planned_peak_bytes >= summary.resident_before_bytes + summary.engine_bytes


def test_epochs_are_counted() -> None:
    assert [report._epochs(n) for n in (1.0, 1.004, 0.5, 2.0)] == [
        "1 epoch", "1 epoch", "0.5 epochs", "2 epochs",
    ]  # fmt: skip


def test_a_run_that_is_too_long_is_noted(
    options: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: int, model: Model) -> None:
        signal.raise_signal(signal.SIGINT)

    train({**options, "steps": 10**11}, on_step=stop)
    shown = capsys.readouterr().err
    assert "177,777,778 epochs" in shown
    assert "note: 177,777,778 passes over the data" in shown
    assert re.search(r"note: at this pace the run takes [\d,]+ days; .*--minutes", shown)
    train({**options, "out": options["out"] + "2"})
    assert "note" not in capsys.readouterr().err


# ---- divergence ----


@pytest.mark.filterwarnings("ignore:overflow")
def test_divergence_stops_with_the_last_checkpoint_intact(options: Options) -> None:
    def poison(step: int, model: Model) -> None:
        if step == 6:
            model.set("wte.weight", np.full((256, 32), np.nan, np.float32))

    with pytest.raises(
        GptcError, match=r"at step 7 \(wte.weight itself is not finite; .*\); the last .* --lr"
    ):
        train(options, on_step=poison)
    newest = find_checkpoint(options["out"])
    assert newest.name == "ckpt-000004"
    Checkpoint(newest).verify()
    assert metrics(options["out"])[-1]["step"] == 6


def test_divergence_before_any_checkpoint(options: Options) -> None:
    def poison(step: int, model: Model) -> None:
        model.set("wte.weight", np.full((256, 32), np.inf, np.float32))

    with pytest.raises(GptcError, match=r"not finite at step 2 \(.*\); try a smaller --lr"):
        train(options, on_step=poison)


def test_a_bad_batch_is_skipped_named_and_kept(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One byte's embedding is not finite: batches with it are bad, others are not."""
    text = tmp_path / "text.txt"
    line = "the quick brown fox jumps over the lazy dog "
    text.write_text((line + "Q ") * 48 + line * 10)
    given = {**options, "data": str(text), "preset": "modern", "n_layer": 1, "n_embd": 32}
    given |= {"n_head": 2, "n_ff": 32, "steps": 12, "batch_size": 1, "eval_batches": 1}

    def poison(step: int, model: Model) -> None:
        if step == 2:
            table = model.get("wte.weight")
            table[ord("Q")] = np.nan
            model.set("wte.weight", table)

    with pytest.raises(
        GptcError, match=r"\(wte.weight itself is not finite; the batch is in .*npz"
    ):
        train(given, on_step=poison)
    (kept,) = Path(given["out"]).glob("bad-step-*.npz")
    batch = np.load(kept)
    assert ord("Q") in batch["inputs"][0, 0]
    assert batch["inputs"].shape == batch["targets"].shape == (1, 1, 16)
    skipped = {**given, "out": str(tmp_path / "skipped"), "on_nan": "skip"}
    assert train(skipped, on_step=poison).step == 12
    assert "its batches are skipped" in capsys.readouterr().err
    assert np.isfinite([line["train_loss"] for line in metrics(skipped["out"])]).all()


# ---- limits ----


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
    """Also on a machine far slower than estimated."""
    del options["steps"]
    monkeypatch.setattr("gptc.training.setup.time_step", lambda *_: 1e-5)

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
    assert read_toml(TrainOptions, Path(options["out"]) / "config.toml")["steps"] == summary.step
    assert train({}, resume=options["out"]).step == summary.step


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
