"""A resumed run ends with the same bits, and names changes since it was interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.names import OPTIMIZER
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.formats.safetensors import TensorFile
from gptc.settings import read_toml
from gptc.training.options import TrainOptions
from gptc.training.run import train
from runs import content, metrics, reproducible

Options = dict[str, Any]


def test_a_damaged_checkpoint_is_skipped_and_said_once(
    options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(options["out"])
    train(options)
    (out / "ckpt-000008" / "model.safetensors").write_bytes(b"")
    assert train({}, resume=out).finished
    assert [record.getMessage().count("using") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2, "grad_accum": 3, "schedule": "linear", "eval_every": 3},
        {"preset": "gpt2", "n_ff": 64, "schedule": "wsd", "save_every": 1, "keep_last": 0},
        {"optimizer": "muon", "momentum_warmup": 6, "batch_size": 3},
        {"optimizer_dtype": "bf16", "save_every": 1},
        {"optimizer_dtype": "int8", "n_embd": 40, "n_ff": 56},
        {"n_expert": 3, "n_expert_used": 1, "router_loss": 0.1, "grad_accum": 2},
    ],
    ids=[
        "plain",
        "dropout and micro-batches",
        "gpt2",
        "muon",
        "moments of 16 bits",
        "moments of 8 bits",
        "experts",
    ],
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


def test_a_crash_loses_only_what_followed_the_checkpoint(options: Options, tmp_path: Path) -> None:
    """The process dies at step 7: resuming writes the same lines after step 4 again."""
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
        file.write('{"step": 8, "tok')  # an incomplete line
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
    assert (
        "has done its 8 steps; continue, at a constant learning rate, with"
        in capsys.readouterr().err
    )
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
        f"the run is at step 8 (256 tokens), past --{name} {value}; continue with "
        "--steps 16 --schedule constant --lr 0.0008"
    )
    assert (out / "config.toml").read_bytes() == before
    assert train({"steps": 16}, resume=out).step == 16


def test_what_cannot_change_on_resume(options: Options, tmp_path: Path) -> None:
    out = Path(options["out"])
    train({**options, "keep_last": 0})
    fixed = {"n_layer": 3, "seq_len": 8, "seed": 2, "preset": "gpt2", "optimizer": "muon"}
    for name, value in fixed.items():
        spelled = name.replace("_", "-")
        with pytest.raises(UsageError, match=f"--{spelled} cannot change on --resume"):
            train({name: value}, resume=out)
    train({"n_layer": 2, "out": str(out)}, resume=out)  # the same value changes nothing
    with pytest.raises(UsageError, match="--out cannot be given"):
        train({"out": str(tmp_path / "other")}, resume=out)
    with pytest.raises(UsageError, match=r"checkpoint of its run \(ckpt-000008 is\)"):
        train({}, resume=out / "ckpt-000004")
    with Model.create(GPTConfig.preset("tiny", n_layer=1), threads=1) as model:
        model.save(tmp_path / "model")
    with pytest.raises(GptcError, match=r"is a model, not a run; .*--init-from"):
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
    assert read_toml(TrainOptions, Path(first.out) / "config.toml")["steps"] == first.steps
    shutil.copytree(first.out, tmp_path / "copy")
    whole = train({}, resume=first.out)
    train({}, resume=tmp_path / "copy", on_step=lambda step, model: stop(step - 2, model))
    again = train({}, resume=tmp_path / "copy")
    assert whole.step == again.step == first.steps
    newest = [find_checkpoint(run) for run in (first.out, tmp_path / "copy")]
    assert content(newest[0]) == content(newest[1])


def test_a_run_with_muon_is_imported_without_its_optimizer(
    options: Options, tmp_path: Path
) -> None:
    """Other formats keep AdamW's two moments."""
    train({**options, "optimizer": "muon", "preset": "byte"})
    found = Checkpoint(find_checkpoint(options["out"]))
    assert found.optimizer_step is None
    assert any("moments, every number finite" in line for line in found.check())
    assert import_model(found.path, tmp_path / "imported").optimizer_step is None
    export_model(found, "heimerl", tmp_path / "model_gpt.bin")


def test_moments_are_converted_with_a_note(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    out, note = Path(options["out"]), "note: the moments were fp32 and are int8 now, so"
    train({**options, "steps": 4})
    train({"steps": 5, "optimizer_dtype": "int8"}, resume=out)
    assert note in capsys.readouterr().err
    train({"steps": 6}, resume=out)
    assert "note: the moments" not in capsys.readouterr().err
    moments = TensorFile(find_checkpoint(out) / OPTIMIZER).read("m.wte.weight")
    assert len(set(abs(moments.ravel()[:256]).tolist())) <= 128


def test_a_run_of_scaled_rows_resumes_bit_for_bit(options: dict[str, Any]) -> None:
    """NorMuon's averages are saved; cautious decay has no state."""
    own = {"optimizer": "muon", "muon_rows": True, "muon_cautious": True, "weight_decay": 0.5}
    own["schedule"] = "constant"
    whole, cut = options["out"] + "-whole", options["out"] + "-cut"
    train({**options, **own, "out": whole})
    train({**options, **own, "out": cut, "steps": 4})
    train({"steps": 8}, resume=cut)
    ends = [Path(run) / "ckpt-000008" for run in (whole, cut)]
    assert content(ends[0]) == content(ends[1])
    rows = TensorFile(ends[0] / OPTIMIZER).read("rows.h.0.attn.qkv.weight")
    assert rows.shape == (96,)
    assert (rows > 0).all()
    with pytest.raises(UsageError, match="--muon-rows cannot change on --resume"):
        train({"steps": 9, "muon_rows": False}, resume=cut)
