"""`gptc eval --task`: accuracy on questions of multiple choice, and on last words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gptc.formats.model_file import ModelFile


def run_tasks(
    model: str | None,
    tasks: tuple[str, ...],
    options: Mapping[str, Any],
    as_json: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Prints the results of a model on each task. `options` are those of `load_model`."""
    from gptc.checkpoint.facade import load_model, on_newest
    from gptc.eval.tasks import TaskResult, evaluate_task, load_task

    questions = {name: load_task(name) for name in tasks}  # a broken row is an error before work

    def measure(file: ModelFile) -> tuple[Path, dict[str, TaskResult]]:
        tokenizer = file.tokenizer()
        with load_model(file, **options) as gpt:
            return file.path, {
                name: evaluate_task(gpt, tokenizer, found, progress)
                for name, found in questions.items()
            }

    path, results = on_newest(model, measure)
    if as_json:
        rows = [
            {"task": name, **asdict(result), "centred": result.centred}
            for name, result in results.items()
        ]
        answer: dict[str, Any] = {"model": str(path), "results": rows}
        if len(rows) > 1:
            answer["centred"] = sum(row["centred"] for row in rows) / len(rows)
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(f"{path}")
    for name, result in results.items():
        click.echo(f"  {_line(name, result)}")
    if len(results) > 1:
        mean = sum(result.centred for result in results.values()) / len(results)
        click.echo(f"  mean of the centred accuracies {mean:.4f}")


def _line(name: str, result: Any) -> str:
    head = f"{Path(name).stem}: accuracy {result.accuracy:.4f}"
    if result.perplexity is not None:
        return f"{head}, perplexity {result.perplexity:.3f} of {result.n:,} last words"
    return (
        f"{head}, by length {result.normalized:.4f}, chance {result.chance:.4f}, centred "
        f"{result.centred:.4f}, {result.n:,} questions"
    )
