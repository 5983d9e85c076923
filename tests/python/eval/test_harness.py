"""lm-evaluation-harness has the same numbers by gptc's model class as by `hf` on the same weights.

pip install torch transformers accelerate lm-eval
pytest -m clients
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.eval.tasks import evaluate_task, load_task
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config, varied

pytestmark = pytest.mark.clients

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of Hugging Face's GPT-2 and questions: some fit into its context, others do not."""
    texts = ["the fox ran under the tree", "a king sat, and", "the bear saw", "x " * 60]
    rows = [
        {"context": text, "choices": ["the fox", "and sat", "under it all", "so"], "answer": i}
        for i, text in enumerate(texts)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, text in TASKS.items():
        head = COMMON.format(name=name, file=questions)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(head + text)
    text = "the fox ran under the tree, and the king sat. a bear saw it. " * 20
    tokenizer = make_tokenizer("bpe:280", [text.encode()])
    config = make_config("gpt2", vocab_size=tokenizer.vocab_size, block_size=48)
    with varied(config) as model:
        model.save(tmp_path / "model", tokenizer)
    return tmp_path


def test_the_numbers_are_those_of_hf(folder: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import gptc.bench.harness  # noqa: F401  (registers the model)

    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = {}
    # The sum of hf for a repeated text of several windows is another with a batch size of 2.
    for kind, arguments in (
        ("gptc", f"model={folder / 'model'}"),
        ("hf", f"pretrained={folder / 'model'},dtype=float32"),
    ):
        found[kind] = lm_eval.simple_evaluate(
            model=kind, model_args=arguments, tasks=list(TASKS), task_manager=tasks,
            device="cpu", batch_size=1, log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    ours, theirs = found["gptc"], found["hf"]
    for name in TASKS:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), metric
        pairs = zip(ours["samples"][name], theirs["samples"][name], strict=True)
        for one, other in pairs:
            if name == "writing":
                assert one["resps"] == other["resps"]
                continue
            for a, b in zip(_flat(one["resps"]), _flat(other["resps"]), strict=True):
                assert a == pytest.approx(b, rel=1e-4)
    # And those of gptc eval, without the harness.
    path = str(folder / "questions.jsonl")
    tokenizer = open_checkpoint(folder / "model").tokenizer()
    with Model.load(str(folder / "model"), device="cpu") as model:
        result = evaluate_task(model, tokenizer, load_task(path))
    assert result.accuracy == theirs["results"]["choice"]["acc,none"]
    assert result.normalized == theirs["results"]["choice"]["acc_norm,none"]


def _flat(values: Any) -> list[float]:
    if isinstance(values, list | tuple):
        return [x for value in values for x in _flat(value)]
    return [float(values)]


def test_the_command_line(folder: Path) -> None:
    command = [
        sys.executable, "-m", "gptc.bench.harness", "--model", "gptc", "--model_args",
        f"model={folder / 'model'}", "--tasks", "choice", "--include_path", str(folder / "tasks"),
        "--device", "cpu",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "|choice|" in ran.stdout.replace(" ", "")
