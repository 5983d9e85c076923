"""Runs on several datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gptc.checkpoint.names import CHECKSUMS, TRAINER
from gptc.checkpoint.writer import _record
from gptc.data.preparation import prepare
from gptc.engine.world import World
from gptc.errors import GptcError, UsageError
from gptc.training.parallel import _circumstances, check_same
from gptc.training.plan import _eval_s, _evaluations
from gptc.training.progress import SilentProgress
from gptc.training.resolve import new_options
from gptc.training.run import train
from gptc.training.setup import set_up
from runs import content, metrics, reproducible

Options = dict[str, Any]


@pytest.fixture
def mixed(options: Options, tmp_path: Path) -> Options:
    """Options of a run on two datasets."""
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(map(str, range(3000))))
    prepare([str(text)], tmp_path / "numbers", tokenizer="bytes")
    data = (f"{options['data']}:0.7", f"{tmp_path / 'numbers'}:0.3")
    return {**options, "data": data, "dropout": 0.1, "save_every": 4}


def test_a_mixture_resumes_exactly_and_evaluates_each(
    mixed: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(mixed)
    shown = capsys.readouterr().err
    assert "0.7 of fable: 18,000 training tokens" in shown
    lines = metrics(mixed["out"])
    last = lines[-1]
    parts = last["val_loss/fable"], last["val_loss/numbers"]
    assert last["val_loss"] == pytest.approx(0.7 * parts[0] + 0.3 * parts[1])
    assert parts[0] != parts[1]
    assert f"fable {parts[0]:.4f}  numbers {parts[1]:.4f}" in shown
    assert whole.val_loss == last["val_loss"]
    other = {**mixed, "out": str(tmp_path / "two")}

    def crash(step: int, model: Any) -> None:
        if step == 6:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(other, on_step=crash)
    train({}, resume=other["out"])
    assert reproducible(metrics(other["out"])) == reproducible(lines)
    one, two = (Path(o["out"]) / "ckpt-000008" for o in (mixed, other))
    assert content(one) == content(two)
    stored = json.loads((one / "trainer.json").read_text())["options"]["data"]
    assert stored == list(mixed["data"])


@pytest.mark.parametrize(("eval_batches", "is_whole_at_end"), [(2, False), (6, True), (0, False)])
def test_the_plan_counts_the_evaluations_of_each(
    mixed: Options, eval_batches: int, is_whole_at_end: bool
) -> None:
    """Two evaluations, of B = 2 and T = 16; the last one covers all if that is cheap."""
    setup = set_up(new_options({**mixed, "eval_batches": eval_batches}), None, SilentProgress())
    try:
        sizes = [part.dataset.n_tokens("val") - 1 for part in setup.dataset.parts]
        windows, whole = sum(n // 16 for n in sizes), sum(-(-(n // 16) // 2) + 1 for n in sizes)
        assert all(n % 16 for n in sizes)  # a batch of the rest
        assert (windows <= 10 * 2 * 2 * eval_batches) == is_whole_at_end
        sampled = 2 * eval_batches if eval_batches else whole
        last = sampled + (whole if is_whole_at_end else 0)
        assert _evaluations(setup) == (sampled, last)
    finally:
        setup.close()


def test_the_plan_times_the_evaluations_of_each(
    mixed: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch takes a second for each row: two in one dataset, one in the other."""
    text = tmp_path / "short.txt"
    text.write_text("a king saw the fox " * 13)
    prepare([str(text)], tmp_path / "short", tokenizer="bytes")
    data = (mixed["data"][0], f"{tmp_path / 'short'}:0.3")
    setup = set_up(new_options({**mixed, "data": data, "eval_batches": 3}), None, SilentProgress())
    try:
        short = setup.dataset.parts[1].dataset
        assert 16 < short.n_tokens("val") - 1 < 2 * 16  # a window, and the rest
        monkeypatch.setattr(setup.model, "loss", lambda x, y, at: len(x))
        monkeypatch.setattr("gptc.training.plan._timed", lambda call: float(call()))
        monkeypatch.setattr("gptc.training.plan.CALIBRATION_S", 0.0)
        assert _eval_s(setup) == (3 * 2 + 2 * 1) / 5
    finally:
        setup.close()


def test_other_weights_are_noticed(mixed: Options, capsys: pytest.CaptureFixture[str]) -> None:
    first = train({**mixed, "eval_every": 4, "patience": 1})
    run, data = Path(mixed["out"]), [one.rpartition(":")[0] for one in mixed["data"]]
    assert (run / "best").exists() or first.best_step == first.step
    # A loss of other weights that the run would not reach again.
    trainer = run / f"ckpt-{first.step:06d}" / TRAINER
    stored = json.loads(trainer.read_text())
    stored |= {"best_val_loss": 0.5, "best_step": 4, "since_best": 1}
    trainer.write_text(json.dumps(stored))
    sums = json.loads((trainer.parent / CHECKSUMS).read_text())
    sums["files"][TRAINER] = _record(trainer)
    (trainer.parent / CHECKSUMS).write_text(json.dumps(sums))
    capsys.readouterr()
    other = (f"{data[0]}:0.4", f"{data[1]}:0.6")
    last = train({"data": other, "steps": first.step + 4}, resume=run)
    shown = capsys.readouterr().err
    assert "the weights of --data were [0.7, 0.3] and are [0.4, 0.6] now" in shown
    assert last.best_val_loss == pytest.approx(last.val_loss)
    assert last.best_step == last.step == first.step + 4
    train({"data": other}, resume=run)
    assert "weights of --data" not in capsys.readouterr().err


class Told(World):
    """Two ranks, the other of which has told its circumstances."""

    def __init__(self, other: dict[str, object]) -> None:
        super().__init__()
        self.size, self._other = 2, other

    def gather_json(self, value: Any) -> list[Any]:
        return [value, self._other]

    def named(self, rank: int) -> str:
        return f"rank {rank}"


def test_ranks_with_other_weights_are_refused(mixed: Options) -> None:
    data = [one.rpartition(":")[0] for one in mixed["data"]]
    given = {**mixed, "data": (f"{data[0]}:0.6", f"{data[1]}:0.4")}
    show = SilentProgress()
    with (
        closing(set_up(new_options(mixed), None, show)) as one,
        closing(set_up(new_options(given), None, show)) as two,
    ):
        check_same(one, Told(_circumstances(one)))
        with pytest.raises(
            GptcError, match=r"rank 1 .* in the weights of --data: \[0.6, 0.4\] and"
        ):
            check_same(one, Told(_circumstances(two)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": None, "epochs": 1.0}, "--epochs 1 is of one dataset, and --data names 2"),
        ({"data": ("a:0.5", "b:0.4")}, "sum to 0.9"),
        ({"data": []}, "--data names no dataset: name one"),
    ],
)
def test_options_that_contradict_a_mixture(mixed: Options, given: Options, message: str) -> None:
    options = {k: v for k, v in {**mixed, **given}.items() if v is not None}
    with pytest.raises(UsageError, match=message):
        train(options)
    assert not Path(mixed["out"]).exists()


def test_conversations_are_not_mixed(mixed: Options, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    with pytest.raises(UsageError, match=r"rows.jsonl has conversations, which are not mixed"):
        train({**mixed, "data": (mixed["data"][0], f"{rows}:0.3")})


def test_the_command_line_and_a_file_name_the_same(
    mixed: Options, gptc: Callable[..., Any], tmp_path: Path
) -> None:
    rest = {k: v for k, v in mixed.items() if k != "data"}
    arguments = [part for k, v in rest.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    data = [part for one in mixed["data"] for part in ("--data", one)]
    assert gptc("train", *arguments, *data).code == 0
    written = (Path(mixed["out"]) / "config.toml").read_text()
    assert f"data = {json.dumps(list(mixed['data']))}\n" in written
    again = ["--config", Path(mixed["out"]) / "config.toml", "--out", tmp_path / "again"]
    assert gptc("train", *again).code == 0
    one, two = (Path(out) / "ckpt-000008" for out in (mixed["out"], tmp_path / "again"))
    assert content(one) == content(two)
    ran = gptc("eval", "-m", one)
    assert ran.code == 2
    names = [text.rpartition(":")[0] for text in mixed["data"]]
    assert f"trained on {names[0]}, {names[1]}: name one of these with --data" in ran.err
    for name in names:
        ran = gptc("eval", "-m", one, "--data", name, "--split", "all")
        assert ran.code == 0
        assert "note: the model was trained on a part of this text" in ran.err
    assert f"{mixed['data'][0]}, {mixed['data'][1]}" in gptc("info", one).out
