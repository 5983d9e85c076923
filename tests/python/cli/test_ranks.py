"""Commands that several ranks run together: what they print is that of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc.engine.world import World
from mpi_jobs import job, needs_mpi


@needs_mpi
def test_two_ranks_print_what_one_process_prints(
    gptc: Callable[..., Any], saved: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines: list[Any] = ["Once", {"prompt": "two", "num_samples": 2}, {"no": "prompt"}, "", "four"]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = ["-m", str(saved), "--device", "cpu", "--dtype", "fp32", "--threads", "1"]
    answering = ["infer", *shared, "--seed", "4", "--max-tokens", "6", "--prompts"]
    commands = {
        "eval": ["eval", *shared, "--data", str(dataset_folder), "--batch-size", "3", "--json"],
        "infer": [*answering, str(prompts)],
        "stdin": [*answering, "-"],
        "lost": ["eval", *shared, "--data", str(tmp_path / "none")],
        "ngram": ["eval", *shared, "--ngram", "5", "--split", "all"],
        "chat": [*answering, str(prompts), "--chat"],
    }
    ran = job(tmp_path, commands, "commands")
    assert ran.returncode == 0, ran.stderr
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert all(found[1:] == ["", ""] for found in second.values())
    for name, code in {"eval": 0, "infer": 1, "stdin": 1, "lost": 1, "ngram": 1, "chat": 1}.items():
        assert first[name][0] == second[name][0] == code
        assert len(first[name][2].splitlines()) == code
        if name in ("ngram", "chat"):  # as by one process, but for its code
            assert first[name][1:] == ["", gptc(*commands[name]).err]
        elif name != "stdin":  # which one process reads
            alone = gptc(*commands[name])
            assert first[name] == [alone.code, alone.out, alone.err]
    assert "2 ranks share the lines of a file" in first["stdin"][2]


def test_ranks_wait_for_each_other_without_limit(
    gptc: Callable[..., Any], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines may take one rank longer than another by any time."""
    limits: list[float] = []
    monkeypatch.setattr(World, "set_timeout", lambda self, seconds: limits.append(seconds))
    for command in (["infer", "--prompts", tmp_path / "none"], ["eval", "--data", tmp_path / "no"]):
        assert gptc(command[0], "-m", saved, "--device", "cpu", *command[1:]).code == 1
    assert limits == [0, 0]


@needs_mpi
def test_two_ranks_prepare_the_dataset_of_one_process(
    gptc: Callable[..., Any], tmp_path: Path
) -> None:
    shared = ["prepare", "stories", "--stories-bytes", "900K", "--tokenizer", "bpe:300"]
    shared += ["--shard-tokens", "100K", "--out"]
    out = str(tmp_path / "two")
    commands = {
        "new": [*shared, out],
        "again": [*shared, out],
        "other": [*shared, out, "--val-fraction", "0.2"],
        "lost": ["prepare", str(tmp_path / "none"), "--out", str(tmp_path / "empty")],
    }
    ran = job(tmp_path, commands, "commands")
    assert ran.returncode == 0, ran.stderr
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert second == {name: [0, "", ""] for name in commands}  # it has encoded, or waited
    alone = gptc(*shared, tmp_path / "one")
    for name, code in {"new": 0, "again": 0, "other": 1, "lost": 1}.items():
        assert first[name][0] == code
        assert len(first[name][2].splitlines()) == code
    assert first["new"][1] == alone.out.replace(str(tmp_path / "one"), out)
    assert "is already there" in first["again"][1]
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert len(one) > 3
