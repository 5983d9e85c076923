"""A model that is trained on conversations follows them; a resumed run ends with the same bits.

The class of fault: a loss that is the mean of micro-batches and not of targets, a prompt that is
learned, a template that is lost on the way to the checkpoint, batches that depend on an interrupt.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversing import rows, write_base, write_rows
from gptc import Model
from gptc.checkpoint.find import open_folder
from gptc.checkpoint.reader import Checkpoint
from gptc.data.chat_cache import is_chat_file, resolve_chats
from gptc.data.options import PACKING
from gptc.data.preparation import prepare
from gptc.data.sequences import Windows
from gptc.errors import GptcError, UsageError
from gptc.eval.loss import Evaluation, evaluate
from gptc.eval.ngram import evaluate_ngrams
from gptc.generation.chat import chat
from gptc.training import trainer
from gptc.training.held_out import HeldOut
from gptc.training.run import train
from runs import content, metrics, reproducible


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A short run on 50 rows; the cache is empty."""
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    return {
        "init_from": str(write_base(tmp_path / "base")),
        "data": str(write_rows(tmp_path / "chats.jsonl", rows(50))),
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "dtype": "fp32",
        "threads": 1,
        "batch_size": 3,
        "grad_accum": 2,
        "seq_len": 128,
        "steps": 8,
        "lr": 1e-3,
        "eval_every": 4,
    }


def test_the_loss_of_a_step_is_the_mean_of_all_targets(tmp_path: Path) -> None:
    with Model.load(write_base(tmp_path / "base"), threads=1, training=True, max_batch=4) as model:
        rng = np.random.default_rng(0)
        x = rng.integers(0, 256, (4, 16)).astype(np.int32)
        y = rng.integers(0, 256, (4, 16)).astype(np.int32)
        y[0, :15] = y[1] = -1  # one target in the first half
        y[3, 4:] = -1
        whole = model.loss(x, y)
        model.backward(x, y)
        expected = model.gradients()
        model.zero_gradients()
        parts = ([x[:2], x[1:2], x[2:]], [y[:2], y[1:2], y[2:]])  # the second has no target
        result = model.train_step(*parts, lr=0.0, weight_decay=0.0, grad_clip=0.0)
        found = model.gradients()
        assert result.loss == pytest.approx(whole, rel=1e-5)
        for name, gradient in expected.items():
            assert np.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name
        with pytest.raises(UsageError, match="a step needs at least one"):
            model.train_step(x, np.full_like(y, -1), lr=1e-3)
        assert model.step == 1


def test_the_packing_does_not_change_the_gradient(options: dict[str, Any]) -> None:
    base = Path(options["init_from"])
    with Model.load(base, threads=1, training=True, max_batch=50) as model:
        dataset = resolve_chats(options["data"], Checkpoint(base).tokenizer())
        found = []
        for packing in PACKING:
            windows = Windows(dataset, "train", 128, packing)
            rows = windows.batch(range(len(windows)))
            loss = model.backward(rows.inputs, rows.targets, positions=rows.positions)
            found.append((len(windows), loss, model.gradients()))
            model.zero_gradients()
        (n_alone, alone, expected), (n_packed, packed, gradients) = found
        assert n_packed < n_alone
        assert packed == pytest.approx(alone, rel=1e-5)
        for name, gradient in expected.items():
            assert np.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("packing", PACKING)
def test_an_interrupted_run_ends_with_the_same_bits(
    options: dict[str, Any], tmp_path: Path, packing: str
) -> None:
    options["packing"] = packing
    whole, parts = ({**options, "out": str(tmp_path / name)} for name in ("whole", "parts"))
    train(whole)

    def interrupt(at: int) -> Callable[[int, Model], None]:
        return lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == at else None

    assert train(parts, on_step=interrupt(3)).step == 3
    with pytest.raises(UsageError, match="--train-on cannot change on --resume"):
        train({"train_on": "all"}, resume=tmp_path / "parts")
    assert train({}, resume=tmp_path / "parts").finished
    last = [Path(run["out"]) / "ckpt-000008" for run in (whole, parts)]
    assert content(last[0]) == content(last[1])
    lines = [reproducible(metrics(run["out"])) for run in (whole, parts)]
    assert lines[0] == lines[1]


def test_a_model_learns_the_format_of_50_rows(options: dict[str, Any], tmp_path: Path) -> None:
    changes = {"steps": 260, "lr": 4e-3, "grad_accum": 1, "batch_size": 6, "eval_every": 130}
    summary = train({**options, **changes})
    assert summary.sample is not None
    assert summary.sample.count("prompt: ") == summary.sample.count("before: ") == 3
    checkpoint = Checkpoint(Path(options["out"]) / "ckpt-000260")
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.marks.chat_template is not None
    held_out = [row for row in rows(200, 9) if row not in rows(50)][:10]
    with Model.load(checkpoint.path, threads=1) as model:
        answers = [
            chat(
                model,
                tokenizer,
                [{"role": "user", "content": row["instruction"]}],
                max_tokens=60,
                temperature=0,
            )
            for row in held_out
        ]
    assert sum(_obeys(answer) for answer in answers) >= 8, answers


def test_a_prepared_dataset_keeps_its_template(options: dict[str, Any], tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    base, folder = options["init_from"], tmp_path / "data"
    prepare([options["data"]], folder, tokenizer=base, chat_template=str(template))
    summary = train({**options, "data": str(folder), "steps": 1})
    assert summary.checkpoint is not None
    marks = Checkpoint(Path(summary.checkpoint)).tokenizer().marks
    assert marks.chat_template == template.read_text()


def test_a_run_resumes_without_the_file_of_its_template(
    options: dict[str, Any], tmp_path: Path
) -> None:
    template = tmp_path / "plain.jinja"
    text = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template.write_text(text)
    options["chat_template"] = str(template)
    train(options)
    template.unlink()
    summary = train({"steps": 9}, resume=options["out"])
    assert summary.checkpoint is not None
    assert Checkpoint(Path(summary.checkpoint)).tokenizer().marks.chat_template == text


def _obeys(answer: str) -> bool:
    try:
        found = json.loads(answer)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["name", "age", "city"]


def test_evaluation_is_over_targets_alone(options: dict[str, Any]) -> None:
    checkpoint = Checkpoint(Path(options["init_from"]))
    dataset = resolve_chats(options["data"], checkpoint.tokenizer())
    dataset.train_on = "all"
    with Model.load(checkpoint.path, threads=1, max_batch=4) as model:
        every = evaluate(model, dataset, batch_size=4, seq_len=127)
        dataset.train_on = "assistant"
        answers = evaluate(model, dataset, batch_size=4, seq_len=127)
        alone = evaluate(model, dataset, batch_size=1, seq_len=127)
    assert every.tokens > answers.tokens == alone.tokens
    assert alone.loss == pytest.approx(answers.loss, rel=1e-5)  # whatever the padding is


def test_ngrams_are_compared_on_the_targets(options: dict[str, Any]) -> None:
    tokenizer = Checkpoint(Path(options["init_from"])).tokenizer()
    dataset = resolve_chats(options["data"], tokenizer)
    with Model.load(options["init_from"], threads=1, max_batch=2) as model:
        expected = evaluate(model, dataset, batch_size=2)
    found = evaluate_ngrams(dataset, 2)
    assert [result.tokens for result in found] == [expected.tokens] * 3
    assert found[0].loss == pytest.approx(np.log(dataset.vocab_size))


@pytest.mark.parametrize(
    "found",
    [
        [{"prompt": f"Ask {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(40)],
        [{"instruction": f"Ask {i % 3}?", "output": f"Answer {i}."} for i in range(200)],
    ],
)
def test_each_prompt_is_shown_once(options: dict[str, Any], found: list[dict[str, Any]]) -> None:
    write_rows(Path(options["data"]), found)
    sample = train({**options, "steps": 1}).sample
    assert sample is not None
    asked = [line for line in sample.splitlines() if line.startswith("prompt: ")]
    assert len(asked) == len(set(asked)) == 3


def test_what_is_no_file_of_conversations(options: dict[str, Any], tmp_path: Path) -> None:
    assert is_chat_file(options["data"])
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    for name in ("text.jsonl", "base", "missing.jsonl"):
        assert not is_chat_file(str(tmp_path / name))
    bad = write_rows(tmp_path / "bad.jsonl", [*rows(3), {"instruction": "x", "output": ""}])
    with pytest.raises(GptcError, match=r"bad\.jsonl: line 4: message 2 \(assistant\) is empty"):
        train({**options, "data": str(bad)})
    assert not Path(options["out"]).exists()
    summary = train({**options, "data": str(bad), "on_bad_row": "skip", "steps": 2})
    assert summary.chats


@pytest.mark.parametrize("rank", [0, 2])
def test_the_answers_after_training_are_those_of_the_best_checkpoint(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The losses here say that the first evaluation was the best."""
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: Evaluation(next(losses), 1.0, 9))
    answering, seen = HeldOut.text, list[Any]()

    def text(held_out: HeldOut) -> str:
        model = held_out._setup.model
        seen.append({p.name: model.get(p.name).copy() for p in model.trained})
        return answering(held_out)

    monkeypatch.setattr(HeldOut, "text", text)
    summary = train({**options, "lora_rank": rank, "sample_every": 0})
    assert (summary.best_step, summary.step) == (4, 8)
    best = open_folder(Path(str(summary.best_checkpoint)))
    last = open_folder(Path(str(summary.checkpoint)))
    assert len(seen) == 1
    for name, values in seen[0].items():
        assert np.array_equal(values, best.read(name)), name
    assert any(not np.array_equal(values, last.read(name)) for name, values in seen[0].items())
