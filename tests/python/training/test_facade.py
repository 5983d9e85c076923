"""`gptc.train`: a run from Python, with options as arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

import gptc
from gptc.errors import UsageError


def test_a_run_from_python(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat. " * 100)
    seen: list[int] = []
    small = {"seq_len": 16, "batch_size": 1, "eval_batches": 1}
    summary = gptc.train(
        data=str(text), out=str(tmp_path / "run"), steps=3, **small,
        on_step=lambda step, model: seen.append(step),
    )  # fmt: skip
    assert (summary.step, seen) == (3, [1, 2, 3])
    with gptc.Model.load(tmp_path / "run") as model:
        assert model.config.vocab_size == gptc.load_tokenizer(tmp_path / "run").vocab_size
    more = gptc.train(resume=tmp_path / "run", steps=5)
    assert (more.first_step, more.step) == (3, 5)
    with pytest.raises(UsageError, match=r"^n_layer cannot change on resume"):
        gptc.train(resume=tmp_path / "run", n_layer=9)


def test_errors_name_python_parameters() -> None:
    with pytest.raises(UsageError, match=r"^batch_size is 0; it must be 1 or more"):
        gptc.train(batch_size=0)
    with pytest.raises(UsageError, match=r"unknown option 'stepz'; did you mean steps"):
        gptc.train(stepz=3)
