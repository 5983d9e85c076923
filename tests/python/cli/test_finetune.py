"""`gptc finetune` and `gptc info --show-mask`: their defaults, output and errors."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conversing import rows, write_base, write_rows
from gptc.cli.finetune import finetune_options
from gptc.engine import library
from gptc.training.options import LIMITS


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model and rows for it; the cache is empty."""
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    return write_base(tmp_path / "base"), write_rows(tmp_path / "chats.jsonl", rows(30))


@pytest.mark.parametrize(
    ("rank", "packing", "size"),
    [
        (0, (), "4 of 4 conversations of at most 128 tokens: 0.59 epochs\n"),
        (4, ("--packing", "fit", "--grad-accum", 2), "4 of 4 x 2 rows of at most 128 tokens: "),
    ],
)
def test_a_model_is_fine_tuned(
    files: tuple[Path, Path],
    gptc: Callable[..., Any],
    tmp_path: Path,
    rank: int,
    packing: tuple[Any, ...],
    size: str,
) -> None:
    base, chats = files
    out, steps = tmp_path / "run", ("--steps", 4, "--threads", 1, "--device", "cpu", *packing)
    ran = gptc("finetune", "-m", base, "--data", chats, "--out", out, "--lora-rank", rank, *steps)
    assert ran.code == 0, ran.err
    assert "27 conversations to train on, 3 held out" in ran.err
    assert f"  steps   {size}" in ran.err
    assert "FLOPs per token, at most " in ran.err
    assert ran.out.count("before: ") == ran.out.count("after: ") == 3
    assert f"next: gptc infer -m {out} --chat\n" in ran.err
    options = json.loads((out / "ckpt-000004" / "trainer.json").read_text())["options"]
    assert (options["lora_rank"], options["lr"]) == (rank, 2e-4 if rank else 2e-5)
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([{"role": "user", "content": "Hi"}]))
    assert f" tokens with padding of {chats}\n" in gptc("info", out).out
    answer = gptc("infer", "-m", out, "--messages", messages, "--max-tokens", 4)
    assert answer.code == 0, answer.err
    again = gptc("finetune", "-m", base, "--data", chats, "--out", out, "--steps", 4)
    assert (again.code, "--resume" in again.err) == (2, True)


def test_a_gpu_that_is_named_trains_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.gpu()._replace(problem=None)
    monkeypatch.setattr(library, "gpu", lambda: found)
    assert finetune_options({})["lora_rank"] == 0
    assert finetune_options({"device": "cuda"})["lora_rank"] == 16


def test_defaults_follow_the_options() -> None:
    cpu = {"device": "cpu"}
    assert finetune_options(cpu)["epochs"] == 3
    for name in LIMITS:
        options = finetune_options({**cpu, name: 7})
        assert [limit for limit in LIMITS if limit in options] == [name]
    assert finetune_options({**cpu, "lr": 1e-3, "lora_rank": 0})["lr"] == 1e-3


def test_faults_are_one_line(
    files: tuple[Path, Path], gptc: Callable[..., Any], tmp_path: Path
) -> None:
    base, _ = files
    bad = write_rows(tmp_path / "bad.jsonl", [*rows(2), {"instruction": "x", "output": ""}])
    ran = gptc("finetune", "-m", base, "--data", bad, "--out", tmp_path / "run")
    assert ran.code == 1
    assert f"{bad}: line 3: message 2 (assistant) is empty" in ran.err
    assert not (tmp_path / "run").exists()
    config = tmp_path / "c.toml"
    config.write_text('data = "stories"\n')
    ran = gptc("finetune", "-m", base, "--data", bad, "--config", config)
    assert (ran.code, "sets data" in ran.err) == (2, True)


def test_several_files_are_made_one_dataset_as_advised(
    files: tuple[Path, Path], gptc: Callable[..., Any], tmp_path: Path
) -> None:
    base, chats = files
    more = write_rows(tmp_path / "more rows.jsonl", rows(20, seed=2))
    ran = gptc("finetune", "-m", base, "--data", chats, "--data", more)
    assert ran.code == 2
    _, _, advice = ran.err.partition("give its folder: gptc ")
    out = tmp_path / "both"
    ran = gptc(*shlex.split(advice.replace("DIR", str(out))))
    assert ran.code == 0, ran.err
    ran = gptc("finetune", "-m", base, "--data", out, "--out", tmp_path / "run", "--steps", 1)
    assert "45 conversations to train on, 5 held out" in ran.err


def test_texts_are_noted(
    files: tuple[Path, Path], gptc: Callable[..., Any], tmp_path: Path
) -> None:
    base, chats = files
    text, data = tmp_path / "a.txt", tmp_path / "data"
    text.write_text("Amy is 30 years old and lives in Oslo.\n" * 200)
    assert gptc("prepare", text, "--tokenizer", base, "--out", data).code == 0
    for i, (given, noted) in enumerate(((text, True), (data, True), (chats, False))):
        out = tmp_path / f"run {i}"
        ran = gptc("finetune", "-m", base, "--data", given, "--out", out, "--steps", 1)
        assert ran.code == 0, ran.err
        note = f"note: {given} has texts and no conversations: every token is learned"
        assert (note in ran.err) == noted


def test_faults_of_rows_name_options_that_there_are(
    files: tuple[Path, Path],
    gptc: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, chats = files
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text() + "{\n")
    for command in (("finetune", "-m"), ("train", "--init-from")):
        ran = gptc(*command, base, "--data", bad)
        assert f"{bad}: line 31 is not JSON: repair it, or leave such rows out with" in ran.err
        assert "--raw" not in ran.err
    monkeypatch.setenv("GPTC_LIMITS", "row=50")
    ran = gptc("finetune", "-m", base, "--data", bad)
    assert "cut it into several rows, or raise it with GPTC_LIMITS=row=SIZE" in ran.err


def test_a_run_that_left_rows_out_is_evaluated_without_them(
    files: tuple[Path, Path], gptc: Callable[..., Any], tmp_path: Path
) -> None:
    base, chats = files
    bad, out, data = tmp_path / "bad rows.jsonl", tmp_path / "run", tmp_path / "data"
    bad.write_text(chats.read_text() + "{\n")
    skip = ("--on-bad-row", "skip")
    ran = gptc("finetune", "-m", base, "--data", bad, "--out", out, "--steps", 1, *skip)
    assert ran.code == 0, ran.err
    for given in ((), ("--data", bad)):
        ran = gptc("eval", "-m", out, *given)
        assert ran.code == 0, ran.err
    ran = gptc("eval", "-m", base, "--data", bad)
    assert (ran.code, "with --on-bad-row skip; that is an option of: gptc" in ran.err) == (1, True)
    advice = shlex.split(ran.err.partition("option of: gptc ")[2].replace("DIR", str(data)))
    assert gptc(*advice, *skip).code == 0
    assert gptc("eval", "-m", base, "--data", data).code == 0


def test_faults_name_the_file_that_was_given(
    files: tuple[Path, Path], gptc: Callable[..., Any], tmp_path: Path
) -> None:
    base, chats = files
    short = tmp_path / "short.txt"
    short.write_text("Amy")
    for _ in range(2):  # the second time, the cache has the dataset
        for command, named in (
            (("--data", chats, "--dpo"), f"; {chats} has others"),
            (("--data", chats, "--seq-len", 8), f"of the train split of {chats} has a target"),
            (("--data", short), f"the train split of {short} has "),
        ):
            ran = gptc("finetune", "-m", base, *command, "--out", tmp_path / "run")
            assert named in ran.err
            assert str(tmp_path / "cache") not in ran.err


def test_masks_are_shown_in_brackets(
    files: tuple[Path, Path], gptc: Callable[..., Any], tmp_path: Path
) -> None:
    base, chats = files
    out = tmp_path / "data"
    assert gptc("prepare", chats, "--tokenizer", base, "--out", out).code == 0
    shown = gptc("info", out, "--show-mask")
    assert shown.out.count("---- train") == 3
    assert '<|im_start|>assistant\n[{"name": ' in shown.out
    assert shown.out.count('"}<|endoftext|>]\n') == 3
    every = gptc("info", out, "--show-mask", "--train-on", "all")
    assert "[" in every.out.splitlines()[1]
    ran = gptc("info", base, "--show-mask")
    assert (ran.code, "for a dataset of conversations" in ran.err) == (2, True)
    assert "answers" in gptc("info", out).out
    evaluated = gptc("eval", "-m", base, "--data", chats, "--split", "val", "--seq-len", 120)
    assert evaluated.code == 0, evaluated.err
