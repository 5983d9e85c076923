"""A run that overfits shows it, and keeps its best checkpoint.

The class: work that is lost because only the newest result is kept.
"""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint.find import find_checkpoint, open_checkpoint
from gptc.checkpoint.names import list_checkpoints
from gptc.data.preparation import prepare
from gptc.errors import GptcError, UsageError
from gptc.eval.loss import Evaluation
from gptc.training.options import FIXED
from gptc.training.run import train
from runs import content, metrics, reproducible, sign

Options = dict[str, Any]
LOSSES = {1: 5.0, 2: 4.0, 3: 3.0, 4: 3.01, 5: 3.2, 6: 3.3, 7: 3.4, 8: 3.5, 9: 3.6}


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The validation loss by the step at which it is measured."""
    scripted, step = dict(LOSSES), {"now": 0}
    real = Model.train_step

    def train_step(model: Model, *args: Any, **given: Any) -> Any:
        result = real(model, *args, **given)
        step["now"] = model.step
        return result

    def evaluate(*args: Any, n_batches: int | None, **given: Any) -> Evaluation:
        loss = scripted[step["now"]]
        return Evaluation(loss, 1.0, 1)

    monkeypatch.setattr(Model, "train_step", train_step)
    monkeypatch.setattr("gptc.training.trainer.evaluate", evaluate)
    return scripted


def names(run: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


def test_the_best_checkpoint_is_kept(
    options: Options, losses: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(options["out"])
    summary = train({**options, "eval_every": 1})
    assert names(out) == ["ckpt-000003", "ckpt-000007", "ckpt-000008"]
    assert (out / "best").resolve() == (out / "ckpt-000003").resolve()
    assert (summary.best_step, summary.best_val_loss) == (3, 3.0)
    assert summary.best_checkpoint == str(out / "best")
    assert open_checkpoint(out / "best").step == 3
    assert find_checkpoint(out).name == "ckpt-000008"
    shown = capsys.readouterr().err
    assert shown.count("note: the validation loss has risen from 3.0000 at step 3") == 1
    assert "to 3.2000" in shown  # 3.01 is within the margin
    assert "--patience N" in shown


def test_the_best_is_saved_between_two_saves(options: Options, losses: dict[int, float]) -> None:
    out = Path(options["out"])
    train({**options, "eval_every": 1, "save_every": 8, "keep_last": 1})
    assert names(out) == ["ckpt-000003", "ckpt-000008"]


def test_a_run_that_improves_to_its_end(options: Options) -> None:
    summary = train({**options, "lr": 1e-2, "steps": 12})
    assert (summary.best_step, summary.best_checkpoint) == (12, None)
    assert (Path(options["out"]) / "best").resolve().name == "ckpt-000012"
    again = train({"steps": 13}, resume=Path(options["out"]) / "best")  # it is the newest
    assert again.step == 13


def test_patience_ends_the_run(
    options: Options, losses: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(options["out"])
    summary = train({**options, "eval_every": 1, "patience": 3})
    assert (summary.step, summary.finished, summary.out_of_patience) == (6, False, True)
    assert names(out)[-1] == "ckpt-000006"
    ended = (
        "the run has ended at step 6, after 3 evaluations without a better loss; "
        f"continue with gptc train --resume {out} --patience 0\n"
    )
    assert ended in capsys.readouterr().err
    again = train({}, resume=out)  # it has ended: resuming alone does no further step
    assert (again.step, again.out_of_patience) == (6, True)
    assert ended in capsys.readouterr().err
    assert train({"patience": 0}, resume=out).finished


def test_patience_counts_over_an_interruption(
    options: Options, losses: dict[int, float], tmp_path: Path
) -> None:
    given = {**options, "eval_every": 1, "patience": 3, "save_every": 2}
    whole = train(given)
    parts = str(tmp_path / "parts")

    def stop(step: int, model: Model) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    assert train({**given, "out": parts}, on_step=stop).step == 5
    resumed = train({}, resume=parts)
    assert resumed.step == whole.step == 6
    assert reproducible(metrics(parts)) == reproducible(metrics(whole.out))
    newest = [find_checkpoint(run) for run in (parts, whole.out)]
    assert content(newest[0]) == content(newest[1])
    assert (Path(parts) / "best").resolve().name == "ckpt-000003"


def test_keeping_the_best_does_not_change_the_result(options: Options, tmp_path: Path) -> None:
    summaries = [
        train({**options, **changes, "out": str(tmp_path / name)})
        for name, changes in (("a", {}), ("b", {"patience": 9, "log_every": 3, "save_every": 8}))
    ]
    a, b = (find_checkpoint(summary.out) for summary in summaries)
    assert content(a) == content(b)


def test_the_last_evaluation_is_compared_over_the_same_batches(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole split, which is measured at the end, may be easier than the batches."""
    n_seen = []

    def evaluate(*args: Any, n_batches: int | None, **given: Any) -> Evaluation:
        n_seen.append(n_batches)
        return Evaluation(1.0 if n_batches is None else 3.0 + len(n_seen), 1.0, 1)

    monkeypatch.setattr("gptc.training.trainer.evaluate", evaluate)
    summary = train({**options, "eval_batches": 9})
    assert n_seen == [9, 9, None]
    assert (summary.val_loss, summary.best_val_loss, summary.best_step) == (1.0, 4.0, 4)


def test_the_best_is_not_resumed_but_begun_from(options: Options, losses: dict[int, float]) -> None:
    best = Path(options["out"]) / "best"
    train({**options, "eval_every": 1})
    with pytest.raises(UsageError) as caught:
        train({}, resume=best)
    message = str(caught.value)
    assert "(ckpt-000008 is); resume the run with --resume" in message
    begin = shlex.split(message[message.index("--init-from") :])
    given = {"data": options["data"], "out": options["out"] + "2", "steps": 1}
    assert train({**given, "init_from": begin[1]}).step == 1


def test_a_run_without_evaluations_has_no_best(
    options: Options, tmp_path: Path, gptc: Callable[..., Any]
) -> None:
    (tmp_path / "x.txt").write_text("abc " * 100)
    prepare([str(tmp_path / "x.txt")], tmp_path / "x", val_tokens=5)
    summary = train({**options, "data": str(tmp_path / "x")})
    assert (summary.best_step, summary.best_checkpoint) == (None, None)
    with pytest.raises(GptcError, match="has no best checkpoint, since its run has had no eval"):
        find_checkpoint(Path(options["out"]) / "best")


def test_a_checkpoint_of_an_older_version_is_resumed(options: Options) -> None:
    """Its trainer.json names no best step."""
    train(options)
    newest = find_checkpoint(options["out"])
    path = newest / "trainer.json"
    trainer = json.loads(path.read_text())
    for name in ("best_step", "since_best"):
        del trainer[name]
    # Of options that cannot change, all but these are newer.
    first = {"preset", "init_from", "tokenizer", "seq_len", "seed", "optimizer", "bias"}
    first |= {"n_layer", "n_head", "n_kv_head", "n_embd", "n_ff"}
    for name in {"patience", "log_every", *FIXED} - first:
        del trainer["options"][name]
    path.write_text(json.dumps(trainer))
    sign(path)
    assert train({"steps": 12}, resume=options["out"]).step == 12


def test_info_names_the_best(
    options: Options, losses: dict[int, float], gptc: Callable[..., Any]
) -> None:
    train({**options, "eval_every": 1})
    assert ["best", "ckpt-000003"] in [
        line.split() for line in gptc("info", options["out"]).out.splitlines()
    ]
