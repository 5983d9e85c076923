"""Tasks whose answers are programs, in the layout of HumanEval: a prompt, a test, an entry point.

The model completes the prompt, and the test's function `check` is called with the function that the
entry point names, in a sandbox (files/sandbox.py). The measure is pass@k, by the unbiased estimator
of Chen et al. 2021 (Evaluating large language models trained on code, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptc.engine.model import Model
from gptc.errors import GptcError
from gptc.eval.tasks import PROBLEM, parsed
from gptc.files.sandbox import Verdict, run_code
from gptc.generation.decoder import generate
from gptc.tokenizer.base import Tokenizer

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # those of Chen et al. 2021, section 3.2
SEVERAL = {"temperature": 0.8, "top_p": 0.95}  # of several samples, if not given
GREEDY = {"temperature": 0.0}  # of a single one
MOST_TOKENS = 512  # of a completion


@dataclass(frozen=True)
class Problem:
    """A row of a file."""

    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """The program that fails unless the completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class CodeResult:
    """Results over `n` problems, of `samples` completions each."""

    n: int
    samples: int
    pass_at: dict[int, float]  # by k: 1, 10, 100 as far as there are samples, and all
    timed_out: int  # completions


def has_problems(name: str) -> bool:
    """Whether the first row of a task has the fields of a problem."""
    return parsed(name, lambda row: isinstance(row, dict) and all(f in row for f in PROBLEM))[0]


def load_problems(name: str) -> list[Problem]:
    """The problems in a file. GptcError names the first broken row."""
    return parsed(name, _problem)


def _problem(row: Any) -> Problem:
    if not isinstance(row, dict):
        raise ValueError("it must be an object")
    found = Problem(*(row[name] for name in PROBLEM))
    if not all(isinstance(row[name], str) for name in PROBLEM):
        raise ValueError(f"{', '.join(PROBLEM)} must be text")
    if not found.entry_point.isidentifier():
        raise ValueError(f"its entry_point is {found.entry_point!r}; it must be a name")
    return found


def pass_at(k: int, n: int, right: int) -> float:
    """The chance that one of k samples is right, from `right` of n: 1 - C(n-right, k) / C(n, k)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def evaluate_problems(
    model: Model,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    samples: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    sampling: Mapping[str, Any] | None = None,
) -> CodeResult:
    """Runs what the model writes. Calls progress(problems done, problems in all).

    `sampling` are fields of `Sampling`; without a temperature, a single sample is greedy.
    GptcError if no sandbox can be made here, before the model writes anything.
    """
    run_code("")
    ks = sorted({k for k in (1, 10, 100) if k <= samples} | {samples})
    sums, late = dict.fromkeys(ks, 0.0), 0
    drawing: dict[str, Any] = {**(SEVERAL if samples > 1 else GREEDY), **(sampling or {})}
    for i, problem in enumerate(problems):
        try:
            texts = generate(
                model, tokenizer, problem.prompt,
                num_samples=samples, max_tokens=MOST_TOKENS, stop=STOP, **drawing,
            )  # fmt: skip
        except GptcError as error:
            raise GptcError(f"problem {i + 1} of {len(problems)}: {error}") from None
        verdicts: dict[str, Verdict] = {
            text: run_code(problem.program(text)) for text in set(texts)
        }
        right = sum(verdicts[text] == "passed" for text in texts)
        late += sum(verdicts[text] == "timed out" for text in texts)
        for k in ks:
            sums[k] += pass_at(k, samples, right)
        progress(i + 1, len(problems))
    n = len(problems)
    return CodeResult(n, samples, {k: sums[k] / n for k in ks}, late)
