"""Tasks by the likelihood of completions, against the losses of a forward pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.errors import GptcError
from gptc.eval.likelihood import Scorer, rolling_windows, split_pair
from gptc.eval.tasks import Question, TaskResult, evaluate_task, load_task
from gptc.tokenizer.base import Tokenizer
from vocabularies import small_tiktoken

Gptc = Callable[..., Any]
ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A man [step] sits.",
        "ctx_b": "he  runs [title] and",
        "endings": ["eats [substeps] it.", "sat.", "ran"],
        "label": "2",
    },
    "arc": {
        "question": "Why?",
        "choices": {"text": ["so", "not"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "arc of its file": {
        "question": {"stem": "Why?", "choices": [
            {"text": "so", "label": "1"}, {"text": "not", "label": "2"}
        ]},
        "answerKey": "2",
    },
    "piqa": {"goal": "Sit", "sol1": "on a chair", "sol2": "on air", "label": 0},
    "lambada": {"text": "the fox ran under the tree"},
    "own": {"context": "the fox", "choices": ["ran", "the"], "answer": 0},
}  # fmt: skip
WANT = {
    "hellaswag": Question(
        "Baking: A man  sits. He runs. and", (" eats  it.", " sat.", " ran"), 2, (8, 4, 3)
    ),
    "arc": Question("Question: Why?\nAnswer:", (" so", " not"), 1, (2, 3)),
    "arc of its file": Question("Question: Why?\nAnswer:", (" so", " not"), 1, (2, 3)),
    "piqa": Question("Question: Sit\nAnswer:", (" on a chair", " on air"), 0, (10, 6)),
    "lambada": Question("the fox ran under the", (" tree",), 0, (4,)),
    "own": Question("the fox", (" ran", " the"), 0, (3, 3)),
}


def _file(folder: Path, *rows: Any) -> str:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_layouts(tmp_path: Path, name: str) -> None:
    (found,) = load_task(_file(tmp_path, ROWS[name]))
    want = WANT[name]
    if name == "hellaswag":  # the cleaning is that of lm-evaluation-harness, spaces included
        assert found.context.split() == want.context.split()
        assert [c.split() for c in found.choices] == [c.split() for c in want.choices]
        assert found.answer == want.answer
        return
    assert found == want


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "a", "choices": ["b"], "answer": 0}, "it has 1 choices"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "its answer is 2; it must be from"),
        ({"context": "a", "choices": ["b", 3], "answer": 1}, "must be text"),
        ({**ROWS["arc"], "answerKey": "E"}, "answerKey 'E' is not one of A, B"),
        ({**ROWS["arc"], "choices": {"text": ["a", "b"]}}, "it has no label"),
        ({**ROWS["hellaswag"], "label": ""}, "invalid literal"),
        ({"text": "word"}, "its text has no last word"),
        ({"prompt": "a"}, "its fields are prompt; known: "),
        ([1], "it must be an object"),
        ({**ROWS["own"], "choices": "abcd"}, "its choices must be a list"),
        (
            {"question": "q", "choices": {"text": ["a", "b"], "label": [1, 2]}, "answerKey": "A"},
            "answerKey 'A' is not one of 1, 2",
        ),
    ],
)
def test_a_broken_row_is_named_before_any_work(
    tmp_path: Path, gptc: Gptc, row: Any, message: str
) -> None:
    ran = gptc("eval", "-m", "nothing", "--task", _file(tmp_path, ROWS["own"], row))
    assert ran.code == 1
    assert "task.jsonl, line 2, is not a question: " in ran.err
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1


def test_files_that_are_no_tasks(tmp_path: Path, gptc: Gptc) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (
        ("absent", "give a file of JSON lines, or stories"),
        ("empty", "has no questions"),
        ("binary", "is not UTF-8"),
    ):
        ran = gptc("eval", "-m", "nothing", "--task", tmp_path / name)
        assert (ran.code, message in ran.err) == (1, True)
    for name in ("--ngram", "--stride", "--batches", "--seq-len"):
        ran = gptc("eval", "--task", "stories", name, "3")
        assert (ran.code, f"{name} is for a loss" in ran.err) == (2, True)


def _logprobs(model: Model, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each token but the first by a forward pass, and the likeliest tokens."""
    logits = model.logits(np.array([tokens[:-1]], np.int32))[0].astype(float)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    at = np.array(tokens[1:])
    return logits[np.arange(len(at)), at], logits.argmax(axis=1)


def test_scores_are_those_of_a_forward_pass(writer: Model, tokenizer: Tokenizer) -> None:
    room = writer.config.block_size
    long = "the fox ran under the tree and sat. " * 40
    pairs = [
        ("the fox", " ran"), ("the fox", " rested"), ("the bear ", "x"), ("", "so"),
        (long[: room - 3], "abc"), (long[: 2 * room], " cut"), ("a", long[: room - 1]),
    ]  # fmt: skip
    with closing(Scorer(writer)) as scorer:
        for context, continuation in pairs:
            begin, end = split_pair(tokenizer, context, continuation)
            found = scorer.score(begin, end)
            tokens = [*begin, *end][-(room + 1) :]
            logprobs, likeliest = _logprobs(writer, tokens)
            n = len(end)
            assert found.tokens == n
            assert found.logprob == pytest.approx(logprobs[-n:].sum(), abs=1e-4 * n)
            assert found.greedy == (likeliest[-n:] == np.array(tokens[-n:])).all()
        greedy = int(_logprobs(writer, [*tokenizer.encode("the fox"), 0])[1][-1])
        assert scorer.score(tokenizer.encode("the fox").tolist(), [greedy]).greedy
        with pytest.raises(GptcError, match="the model's context"):
            scorer.score([1], [2] * (room + 1))


def test_a_pair_is_cut_as_one_text() -> None:
    words = small_tiktoken()
    for context, continuation in (("at", " the"), ("at ", "the"), ("the  ", "the")):
        begin, end = split_pair(words, context, continuation)
        assert words.decode([*begin, *end]) == context + continuation
        assert words.decode(begin) == context.rstrip()
    assert len(split_pair(words, "at ", "the")[1]) == 1  # " the" is one token
    assert split_pair(words, "", "at")[0] == [270]


def test_windows_of_a_text_count_each_token_once() -> None:
    tokens = list(range(100, 110))
    # The example of lm-evaluation-harness' documentation.
    assert list(rolling_windows(tokens, [7], 4)) == [
        ([7], [100, 101, 102, 103]),
        ([103], [104, 105, 106, 107]),
        ([105, 106, 107], [108, 109]),
    ]
    assert list(rolling_windows(tokens[:2], [7], 4)) == [([7], [100, 101])]
    assert list(rolling_windows([], [7], 4)) == []


def test_results(writer: Model, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    words = ["the fox", "ran", "sat under", "a", "tree and", "bear saw it"]
    questions = [
        Question(f"{words[a]} {words[b]}", (f" {words[c]}", f" {words[d]}", " so it is"), int(e),
                 (len(words[c]), len(words[d]), 8))
        for a, b, c, d, e in zip(*rng.integers(0, 6, (4, 12)), rng.integers(0, 3, 12), strict=True)
    ]  # fmt: skip
    right = normalized = 0
    for q in questions:
        each = []
        for choice in q.choices:
            tokens = tokenizer.encode(q.context + choice).tolist()
            n = len(choice.encode())
            each.append(_logprobs(writer, tokens)[0][-n:].sum())
        right += int(np.argmax(each)) == q.answer
        normalized += int(np.argmax([x / n for x, n in zip(each, q.lengths, strict=True)])) == (
            q.answer
        )
    found = evaluate_task(writer, tokenizer, questions)
    assert (found.n, found.accuracy, found.normalized) == (12, right / 12, normalized / 12)
    assert found.chance == pytest.approx(1 / 3)
    assert found.centred == pytest.approx((right / 12 - 1 / 3) / (2 / 3))
    assert found.accuracy != found.normalized


def test_last_words(writer: Model, tokenizer: Tokenizer, saved: Path, tmp_path: Path) -> None:
    texts = ["the fox ran under", "the bear sat"]
    (tmp_path / "x").mkdir()
    questions = load_task(_file(tmp_path, *({"text": text} for text in texts)))
    found = evaluate_task(writer, tokenizer, questions)
    total = 0.0
    for text in texts:
        n = len(text) - text.rindex(" ")
        total += _logprobs(writer, tokenizer.encode(text).tolist())[0][-n:].sum()
    assert found.perplexity == pytest.approx(math.exp(-total / 2), rel=1e-4)
    assert (found.normalized, found.accuracy) == (None, 0.0)


def test_a_choice_that_is_too_long_is_named(writer: Model, tokenizer: Tokenizer) -> None:
    short, long = (Question("a", (" b", f" {'c' * n}"), 0, (1, n)) for n in (1, 10_000))
    with pytest.raises(GptcError, match=r"question 2 of 2: a continuation has 10,?001 tokens"):
        evaluate_task(writer, tokenizer, [short, long])


def test_the_command_and_the_set_that_ships(gptc: Gptc, saved: Path, tmp_path: Path) -> None:
    own = load_task("stories")
    assert len(own) == 24
    assert all(len(q.choices) == len(set(q.choices)) == 4 for q in own)
    task, other = _file(tmp_path, ROWS["own"], ROWS["piqa"]), tmp_path / "other.jsonl"
    other.write_text(Path(task).read_text() * 2)
    answer = json.loads(gptc("eval", "-m", saved, "--task", task, "--task", other, "--json").out)
    row, twice = answer["results"]
    assert {**row, "task": str(other), "n": 4} == twice
    result = TaskResult(**{k: row[k] for k in TaskResult.__dataclass_fields__})
    assert answer["centred"] == pytest.approx(result.centred)
    shown = gptc("eval", "-m", saved, "--task", task).out
    assert f"task: accuracy {row['accuracy']:.4f}, by length {row['normalized']:.4f}" in shown
