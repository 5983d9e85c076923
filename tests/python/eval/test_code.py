"""Problems whose answers are programs: their estimator, rows, command and verdicts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.errors import GptcError
from gptc.eval import code
from gptc.eval.code import Problem, evaluate_problems, has_problems, load_problems, pass_at
from gptc.tokenizer.base import Tokenizer
from sandboxed import needs_sandbox

Gptc = Callable[..., Any]
ROWS = [
    {
        "task_id": "own/0",
        "prompt": "def double(x):\n",
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(f):\n    assert f(2) == 4\n    assert f(-1) == -2\n",
    },
    {
        "task_id": "own/1",
        "prompt": "def longest(words):\n",
        "entry_point": "longest",
        "canonical_solution": "    return max(words, key=len)\n",
        "test": "def check(f):\n    assert f(['a', 'bcd', 'ef']) == 'bcd'\n",
    },
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A file of two problems."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at(k, n, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_a_program_is_the_prompt_the_completion_and_the_test(task: Path) -> None:
    assert has_problems(str(task))
    first, _ = load_problems(str(task))
    namespace: dict[str, Any] = {}
    exec(first.program(ROWS[0]["canonical_solution"]), namespace)
    with pytest.raises(AssertionError):
        exec(first.program("    return x\n"), namespace)


@needs_sandbox
def test_results(
    task: Path, writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ROWS[0]["canonical_solution"]
    answers = {
        ROWS[0]["prompt"]: [right, "    return x\n", right, "    retur"],
        ROWS[1]["prompt"]: ["    return 1\n", "    while True: pass\n", "", "    return words\n"],
    }
    asked: dict[str, Any] = {}

    def written(model: Model, tokenizer: Tokenizer, prompt: str, **options: Any) -> list[str]:
        asked.update(options)
        return answers[prompt][: options["num_samples"]]

    monkeypatch.setattr(code, "generate", written)
    ran: list[str] = []

    def verdict(program: str) -> str:
        ran.append(program)
        return "timed out" if "while True" in program else code_run(program)

    code_run = code.run_code
    monkeypatch.setattr(code, "run_code", verdict)
    done: list[tuple[int, int]] = []
    problems = load_problems(str(task))
    found = evaluate_problems(writer, tokenizer, problems, 4, lambda *counts: done.append(counts))
    assert (found.n, found.samples, found.timed_out) == (2, 4, 1)
    assert found.pass_at == {1: 0.25, 4: 0.5}
    assert done == [(1, 2), (2, 2)]
    assert asked["temperature"] > 0
    assert len(ran) == 1 + 3 + 4  # a program that was written twice is run once
    found = evaluate_problems(writer, tokenizer, problems)
    assert found.pass_at == {1: 0.5}
    assert asked["temperature"] == 0
    evaluate_problems(writer, tokenizer, problems, 4, sampling={"temperature": 0.2, "top_k": 5})
    assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (0.2, 5, 0.95)


@needs_sandbox
def test_the_command(
    task: Path, gptc: Gptc, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of bytes writes nothing that works."""
    ran = gptc("eval", "-m", saved, "--task", task, "--run-code", "--samples", 2, "--json")
    (row,) = json.loads(ran.out)["results"]
    assert (row["n"], row["samples"], row["pass_at"]) == (2, 2, {"1": 0.0, "2": 0.0})
    asked: dict[str, Any] = {}

    def written(*_: object, **options: Any) -> list[str]:
        asked.update(options)
        return [""]

    monkeypatch.setattr(code, "generate", written)
    gptc("eval", "-m", saved, "--task", task, "--run-code", "--temperature", 0.3, "--seed", 4)
    assert (asked["temperature"], asked["seed"], asked["num_samples"]) == (0.3, 4, 1)
    monkeypatch.undo()
    other = tmp_path / "words.jsonl"
    other.write_text(json.dumps({"context": "the fox", "choices": ["ran", "the"], "answer": 0}))
    shown = gptc("eval", "-m", saved, "--task", task, "--task", other, "--run-code").out
    assert "own: pass@1 0.0000, 2 problems x 1" in shown
    assert "words: accuracy" in shown


def test_code_is_not_run_unless_that_is_asked_for(
    task: Path, gptc: Gptc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "run_code", None)
    ran = gptc("eval", "-m", "nothing", "--task", task)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert (
        "gptc would run code of strangers; to allow that, in a sandbox, add --run-code" in ran.err
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--task", "stories", "--run-code"), "--run-code is for a --task with problems"),
        (("--task", "stories", "--samples", 3), "--samples 3 is for a --task with problems"),
        (("--run-code",), "--run-code is for --task FILE"),
        (("--samples", 3), "--samples 3 is for --task FILE"),
        (("--top-k", 3), "--top-k is for --task FILE"),
        (("--logit-bias", "5=1"), "--logit-bias is for --task FILE"),
        (("--task", "stories", "--temperature", 1), "--temperature is for a --task with"),
        (("--task", "stories", "--top-p", 2), "--top-p is 2.0; it must be above 0 and at most 1"),
    ],
)
def test_options_without_problems(gptc: Gptc, given: tuple[Any, ...], message: str) -> None:
    ran = gptc("eval", "-m", "nothing", *given)
    assert (ran.code, message in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": 3}, "prompt, test, entry_point must be text"),
        ({"entry_point": "f(); g"}, "its entry_point is 'f(); g'; it must be a name"),
        ({"entry_point": None}, "must be text"),
    ],
)
def test_a_broken_problem_is_named(
    task: Path, gptc: Gptc, change: dict[str, Any], message: str
) -> None:
    with task.open("a") as file:
        file.write(json.dumps({**ROWS[0], **change}) + "\n")
    ran = gptc("eval", "-m", "nothing", "--task", task, "--run-code")
    assert "own.jsonl, line 3, is not a question: " in ran.err
    assert message in ran.err


def test_a_row_that_lacks_a_field_of_a_problem_names_them(tmp_path: Path, gptc: Gptc) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "def f():", "test": ""}))
    ran = gptc("eval", "-m", "nothing", "--task", path, "--run-code")
    assert ran.err.endswith("; prompt, test, entry_point\n")


@needs_sandbox
def test_a_prompt_that_is_too_long_is_named(writer: Model, tokenizer: Tokenizer) -> None:
    long = Problem("x" * 10_000, "", "f")
    with pytest.raises(GptcError, match=r"problem 1 of 1: the prompt has 10,\d+ tokens"):
        evaluate_problems(writer, tokenizer, [long])
