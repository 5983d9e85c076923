"""`gptc eval --task`: accuracy on multiple choice and on last words, and programs that are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.errors import UsageError
from gptc.files.words import plural
from gptc.generation.options import Sampling
from gptc.settings import declared

if TYPE_CHECKING:
    from gptc.eval.code import CodeResult, Problem
    from gptc.eval.tasks import Question, TaskResult
    from gptc.formats.model_file import ModelFile


def run_tasks(
    model: str | None,
    tasks: tuple[str, ...],
    options: Mapping[str, Any],
    as_json: bool,
    progress: Callable[[int, int], None],
    run_code: bool = False,
    samples: int | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Prints the results of a model on each task. `options` are those of `load_model`.

    With `run_code`, `samples` programs that the model writes for each problem are run, drawn by
    `sampling`.
    """
    from gptc.checkpoint.facade import load_model, on_newest
    from gptc.eval.code import evaluate_problems
    from gptc.eval.tasks import evaluate_task

    # A broken row, or an option out of range, is an error before work.
    Sampling(**(sampling or {})).check()
    loaded = _loaded(tasks, run_code, samples, sampling or {})

    def measure(file: ModelFile) -> tuple[Path, dict[str, TaskResult | CodeResult]]:
        tokenizer = file.tokenizer()
        with load_model(file, **options) as gpt:
            results: dict[str, TaskResult | CodeResult] = {}
            for name, (questions, problems) in loaded.items():
                if problems:
                    results[name] = evaluate_problems(
                        gpt, tokenizer, problems, samples or 1, progress, sampling
                    )
                else:
                    results[name] = evaluate_task(gpt, tokenizer, questions, progress)
            return file.path, results

    path, results = on_newest(model, measure)
    centred = [result.centred for result in results.values() if hasattr(result, "centred")]
    mean = sum(centred) / len(centred) if len(centred) > 1 else None
    if as_json:
        rows = [{"task": name, **_fields(result)} for name, result in results.items()]
        answer: dict[str, Any] = {"model": str(path), "results": rows}
        click.echo(json.dumps(answer | ({} if mean is None else {"centred": mean}), indent=2))
        return
    click.echo(f"{path}")
    for name, result in results.items():
        click.echo(f"  {_line(name, result)}")
    if mean is not None:
        click.echo(f"  mean of the centred accuracies {mean:.4f}")


def _loaded(
    tasks: tuple[str, ...], run_code: bool, samples: int | None, sampling: Mapping[str, Any]
) -> dict[str, tuple[list[Question], list[Problem]]]:
    """The questions, or the problems, of each task. UsageError for code that must not be run."""
    from gptc.eval.code import has_problems, load_problems
    from gptc.eval.tasks import load_task

    found: dict[str, tuple[list[Question], list[Problem]]] = {}
    for name in tasks:
        if not has_problems(name):
            found[name] = load_task(name), []
        elif run_code:
            found[name] = [], load_problems(name)
        else:
            raise UsageError(
                f"{name} has tests in Python, and the model's answers are programs: gptc would run "
                "code of strangers; to allow that, in a sandbox, add --run-code"
            )
    given = given_for_code(run_code, samples, sampling)
    if given and not any(problems for _, problems in found.values()):
        raise UsageError(f"{given} is for a --task with problems to program: leave it out")
    return found


def given_for_code(run_code: bool, samples: int | None, sampling: Mapping[str, Any]) -> str:
    """The first option that was given and is for programs alone; "" if none was."""
    if run_code:
        return "--run-code"
    if samples:
        return f"--samples {samples}"
    given = (
        f"--{declaration.flag}"
        for name, declaration in declared(Sampling).items()
        if name in sampling
    )
    return next(given, "")


def _fields(result: TaskResult | CodeResult) -> dict[str, Any]:
    centred = {"centred": result.centred} if hasattr(result, "centred") else {}
    return {**asdict(result), **centred}


def _line(name: str, result: Any) -> str:
    if hasattr(result, "pass_at"):
        shares = ", ".join(f"pass@{k} {share:.4f}" for k, share in result.pass_at.items())
        late = f", {result.timed_out:,} timed out" if result.timed_out else ""
        return (
            f"{Path(name).stem}: {shares}, {plural(result.n, 'problem')} x {result.samples:,}{late}"
        )
    head = f"{Path(name).stem}: accuracy {result.accuracy:.4f}"
    if result.perplexity is not None:
        return f"{head}, perplexity {result.perplexity:.3f} of {result.n:,} last words"
    return (
        f"{head}, by length {result.normalized:.4f}, chance {result.chance:.4f}, centred "
        f"{result.centred:.4f}, {result.n:,} questions"
    )
