"""Tasks for lm-evaluation-harness, and what it finds in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CHOICES = ("the fox", "and sat", "under it all", "so")

COMMON = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "writing": """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: " the"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


def write_tasks(folder: Path, names: Iterable[str], choices: Sequence[str] = CHOICES) -> Path:
    """A new folder with these tasks, and their questions; the last one is long."""
    texts = ["the fox ran under the tree", "a king sat, and", "the bear saw", "x " * 60]
    rows = [{"context": text, "choices": choices, "answer": i} for i, text in enumerate(texts)]
    folder.mkdir()
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names:
        head = COMMON.format(name=name, file=questions)
        (folder / f"{name}.yaml").write_text(head + TASKS[name])
    return folder


def results(kind: str, arguments: str, names: Iterable[str], tasks: Any) -> Any:
    """What a sort of model of the harness gives for these tasks."""
    import lm_eval

    return lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=list(names), task_manager=tasks, device="cpu",
        batch_size=1, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip


def scores(values: Any) -> list[float]:
    """The numbers of a sample's answers, in order; whether one is the likeliest is 0 or 1."""
    if isinstance(values, list | tuple):
        return [x for value in values for x in scores(value)]
    return [float(values == "True") if values in ("True", "False") else float(values)]
