"""Runs on several datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc.data.preparation import prepare
from gptc.errors import UsageError
from gptc.training.plan import _evaluations
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


def test_the_plan_counts_the_evaluations_of_each(mixed: Options) -> None:
    show = SilentProgress()
    for n_batches, expected in ((2, 2 * 2 * 2), (0, None)):
        setup = set_up(new_options({**mixed, "eval_batches": n_batches}), None, show)
        try:
            found = _evaluations(setup)
            at_end = 0
            if expected is None:
                each = [(d.n_tokens("val") - 1) for d in (p.dataset for p in setup.dataset.parts)]
                expected = 2 * sum(-(-(n // 16) // 2) + (n % 16 > 0) for n in each)
            elif setup.n_val <= 10 * 2 * 2 * 2:
                at_end = found - expected
            assert found == expected + at_end
        finally:
            setup.close()


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
    assert "name one of these with --data" in ran.err
    assert f"{mixed['data'][0]}, {mixed['data'][1]}" in gptc("info", one).out
