"""lm-evaluation-harness has the same numbers by gptc's model class as by `hf` on the same weights.

pip install torch transformers accelerate lm-eval
pytest -m clients
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.eval.tasks import evaluate_task, load_task
from gptc.tokenizer.registry import make_tokenizer
from harness_tasks import TASKS, results, scores, write_tasks
from small_models import make_config, varied

pytestmark = pytest.mark.clients


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of Hugging Face's GPT-2 and questions: some fit into its context, others do not."""
    write_tasks(tmp_path / "tasks", TASKS)
    text = "the fox ran under the tree, and the king sat. a bear saw it. " * 20
    tokenizer = make_tokenizer("bpe:280", [text.encode()])
    config = make_config("gpt2", vocab_size=tokenizer.vocab_size, block_size=48)
    with varied(config) as model:
        model.save(tmp_path / "model", tokenizer)
    return tmp_path


def test_the_numbers_are_those_of_hf(folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    import gptc.bench.harness  # noqa: F401  (registers the model)

    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = {}
    # The sum of hf for a repeated text of several windows is another with a batch size of 2.
    for kind, arguments in (
        ("gptc", f"model={folder / 'model'}"),
        ("hf", f"pretrained={folder / 'model'},dtype=float32"),
    ):
        found[kind] = results(kind, arguments, TASKS, tasks)
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
            for a, b in zip(scores(one["resps"]), scores(other["resps"]), strict=True):
                assert a == pytest.approx(b, rel=1e-4)
    # And those of gptc eval, without the harness.
    path = str(folder / "tasks" / "questions.jsonl")
    tokenizer = open_checkpoint(folder / "model").tokenizer()
    with Model.load(str(folder / "model"), device="cpu") as model:
        result = evaluate_task(model, tokenizer, load_task(path))
    assert result.accuracy == theirs["results"]["choice"]["acc,none"]
    assert result.normalized == theirs["results"]["choice"]["acc_norm,none"]


def test_the_command_line(folder: Path) -> None:
    command = [
        sys.executable, "-m", "gptc.bench.harness", "--model", "gptc", "--model_args",
        f"model={folder / 'model'}", "--tasks", "choice", "--include_path", str(folder / "tasks"),
        "--device", "cpu",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "|choice|" in ran.stdout.replace(" ", "")
