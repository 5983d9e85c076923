"""Tasks of multiple choice and of last words, by the likelihood of completions.

A file has a row of JSON a line, in the layout of HellaSwag, ARC, PIQA or LAMBADA, or with
`context`, `choices` and `answer`, the index of the right one. Prompts are those of
lm-evaluation-harness, so that its numbers are comparable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gptc.engine.model import Model
from gptc.errors import GptcError
from gptc.eval.likelihood import Likelihood, Scorer, split_pair
from gptc.files.limits import read_file
from gptc.tokenizer.base import Tokenizer

OWN = "stories"  # the set that ships with gptc
PROBLEM = ("prompt", "test", "entry_point")  # fields of a row of code.py, of a file of such rows
_BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of a row
_Row = TypeVar("_Row")
_OWN_FILE = Path(__file__).with_name("stories.jsonl")


@dataclass(frozen=True)
class Question:
    """A context, its continuations, and the index of the right one; one alone is a last word."""

    context: str
    choices: tuple[str, ...]
    answer: int
    lengths: tuple[int, ...]  # characters of the choices, without the space before them


@dataclass(frozen=True)
class TaskResult:
    """Results over `n` questions; `accuracy` is of the largest log-probability.

    `normalized` is of the largest log-probability per character. Of last words, `accuracy` is the
    share that greedy decoding writes, and `perplexity` that of the words; else it is None.
    """

    n: int
    accuracy: float
    normalized: float | None
    chance: float
    perplexity: float | None

    @property
    def centred(self) -> float:
        """Accuracy with 0 for chance and 1 for all, as CORE has it (Li et al. 2024)."""
        return (self.accuracy - self.chance) / (1 - self.chance)


def load_task(name: str) -> list[Question]:
    """The questions in a file, or of the set `stories`. GptcError names the first broken row."""
    return parsed(name, _question)


def parsed(name: str, read: Callable[[Any], _Row]) -> list[_Row]:
    """The rows of a task as `read` makes them of JSON values. GptcError names the first broken."""
    path = _OWN_FILE if name == OWN and not Path(name).exists() else Path(name)
    try:
        text = read_file(path, "prompt").decode("utf-8")
    except OSError as error:
        raise GptcError(
            f"cannot read the task {name}: {error.strerror}; give a file of JSON lines, or {OWN}"
        ) from None
    except UnicodeDecodeError:
        raise GptcError(f"{path} is not UTF-8: a task is a file of JSON lines") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(read(json.loads(line)))
            except _BROKEN as e:
                raise GptcError(f"{path}, line {number}, is not a question: {_words(e)}") from None
    if not found:
        raise GptcError(f"{path} has no questions")
    return found


def _words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return str(error)


def _question(row: Any) -> Question:
    """A row in any of the layouts."""
    if not isinstance(row, dict):
        raise ValueError("it must be an object")
    for names, read in _LAYOUTS:
        if all(name in row for name in names):
            return read(row)
    known = "; ".join(", ".join(names) for names in (*(names for names, _ in _LAYOUTS), PROBLEM))
    raise ValueError(f"its fields are {', '.join(map(str, row))[:80]}; known: {known}")


def _made(context: str, choices: Sequence[str], answer: int) -> Question:
    if not isinstance(choices, list):
        raise ValueError("its choices must be a list")
    if not isinstance(context, str) or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("context and choices must be text")
    if len(choices) < 2:
        raise ValueError(f"it has {len(choices)} choices; at least 2 are needed")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"its answer is {answer!r}; it must be from 0 to {len(choices) - 1}")
    return Question(
        context, tuple(f" {c}" for c in choices), answer, tuple(len(c) for c in choices)
    )


def _own(row: Mapping[str, Any]) -> Question:
    return _made(row["context"], row["choices"], row["answer"])


def _hellaswag(row: Mapping[str, Any]) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_cleaned(ending) for ending in row["endings"]]
    return _made(_cleaned(context), endings, int(row["label"]))


def _cleaned(text: str) -> str:
    """Without the marks of WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(row: Mapping[str, Any]) -> Question:
    """With choices as {text, label} of lists, or as a list of them within the question."""
    question = row["question"]
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    else:
        choices = row["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = ([choice[name] for choice in choices] for name in ("text", "label"))
    known = ", ".join(map(str, labels))
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is not one of {known}")
    return _made(f"Question: {question}\nAnswer:", texts, labels.index(row["answerKey"]))


def _piqa(row: Mapping[str, Any]) -> Question:
    choices = [row["sol1"], row["sol2"]]
    return _made(f"Question: {row['goal']}\nAnswer:", choices, row["label"])


def _lambada(row: Mapping[str, Any]) -> Question:
    context, space, word = row["text"].rpartition(" ")
    if not space or not context or not word:
        raise ValueError("its text has no last word")
    return Question(context, (f" {word}",), 0, (len(word),))


_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Question]], ...] = (
    (("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
    (("question", "answerKey"), _arc),
    (("goal", "sol1", "sol2", "label"), _piqa),
    (("context", "choices", "answer"), _own),
    (("text",), _lambada),
)


def evaluate_task(
    model: Model,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TaskResult:
    """The results of a model on questions. Calls progress(questions done, questions in all)."""
    right, normalized, chances, logprobs = 0, 0, 0.0, 0.0
    with closing(Scorer(model)) as scorer:
        for i, question in enumerate(questions):
            try:
                found = list(_likelihoods(scorer, tokenizer, question))
            except GptcError as error:
                raise GptcError(f"question {i + 1} of {len(questions)}: {error}") from None
            if len(found) == 1:
                right += found[0].greedy
                logprobs += found[0].logprob
            else:
                each = np.array([likelihood.logprob for likelihood in found])
                right += int(each.argmax()) == question.answer
                normalized += int((each / question.lengths).argmax()) == question.answer
                chances += 1 / len(found)
            progress(i + 1, len(questions))
    n = len(questions)
    words = all(len(question.choices) == 1 for question in questions)
    return TaskResult(
        n=n,
        accuracy=right / n,
        normalized=None if words else normalized / n,
        chance=chances / n,
        perplexity=math.exp(-logprobs / n) if words else None,
    )


def _likelihoods(scorer: Scorer, tokenizer: Tokenizer, question: Question) -> Iterator[Likelihood]:
    for choice in question.choices:
        yield scorer.score(*split_pair(tokenizer, question.context, choice))
